"""What a checkpoint asks of decoding: `generation_config.json`."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_specdec.checkpoints.tensor_files import read_json
from jax_specdec.errors import UserError
from jax_specdec.models.config import ModelConfig
from jax_specdec.models.hf import Json, token_ids

_KINDS: dict[str, tuple[type, ...]] = {
    "do_sample": (bool,),
    "temperature": (int, float),
    "top_k": (int,),
    "top_p": (int, float),
    "min_p": (int, float),
    "repetition_penalty": (int, float),
    "no_repeat_ngram_size": (int,),
    "min_new_tokens": (int,),
    "max_new_tokens": (int,),
    "min_length": (int,),
    "max_length": (int,),
}
_TOKEN_LISTS = ("suppress_tokens", "begin_suppress_tokens")
# Further settings that change a text, and the value at which they do not.
_OTHERS: dict[str, Any] = {
    "dola_layers": None,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "exponential_decay_length_penalty": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1.0,
    "num_beams": 1,
    "penalty_alpha": None,
    "remove_invalid_values": False,
    "sequence_bias": None,
    "top_h": None,
    "typical_p": 1.0,
    "watermarking_config": None,
}
_WORDS = ("bad_words_ids", "stop_strings")
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclasses.dataclass(frozen=True)
class GenerationDefaults:
    """Sampling parameters that a checkpoint names, as transformers spells them; None: not named.

    transformers samples only where `do_sample` is true, and applies the penalty, the n-gram rule, the
    suppressed tokens and the minimum to greedy decoding, too.

    Attributes:
      repetition_penalty: of prompt and answer, 1 is off. no_repeat_ngram_size: 0 is off.
      min_length, max_length: of prompt and answer together, in tokens.
      suppress_tokens: ids that are never emitted. begin_suppress_tokens: never as the first token.
      bad_words_ids: token sequences that are never emitted. stop_strings: texts with which an answer ends.
      others: names of settings that change a text and are not among these fields, such as `num_beams`.
      file: all of `generation_config.json`; where there is none, what `config.json` has of it.
    """

    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    min_new_tokens: int | None = None
    max_new_tokens: int | None = None
    min_length: int | None = None
    max_length: int | None = None
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    stop_strings: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    file: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def options(self) -> dict[str, Any]:
        """What of these settings a `generation.Request` has, as its fields.

        As in transformers, temperature and filters count where `do_sample` is true, and top-k is 50 there unless
        it is named. An answer ends before a stop string, and in transformers behind it.

        >>> GenerationDefaults(do_sample=True, temperature=0.7, suppress_tokens=(5,)).options()
        {'temperature': 0.7, 'top_k': 50, 'bad_words': ((5,),)}
        """
        same = ("max_new_tokens", "min_new_tokens", "repetition_penalty")
        named: dict[str, Any] = {name: getattr(self, name) for name in same}
        if self.do_sample:
            named["temperature"] = 1.0 if self.temperature is None else self.temperature
            named["top_k"] = 50 if self.top_k is None else self.top_k
            named |= {"top_p": self.top_p, "min_p": self.min_p}
        named["bad_words"] = (
            *((token,) for token in self.suppress_tokens),
            *self.bad_words_ids,
        ) or None
        named["stop"] = self.stop_strings or None
        return {name: value for name, value in named.items() if value is not None}

    def unheeded(self, context: int) -> tuple[str, ...]:
        """Names of settings that change a text and that `options` leaves out."""
        changing = {
            "no_repeat_ngram_size": bool(self.no_repeat_ngram_size),
            "min_length": bool(self.min_length),
            "max_length": self.max_length is not None and self.max_length < context,
            "begin_suppress_tokens": bool(self.begin_suppress_tokens),
        }
        return (*(name for name, on in changing.items() if on), *self.others)


def read_generation(folder: Path) -> GenerationDefaults:
    """The defaults of a checkpoint's folder.

    As in transformers, `config.json` counts only where there is no `generation_config.json`.

    Raises:
      UserError: a file that is broken, or a value of the wrong type.
    """
    path = folder / "generation_config.json"
    if path.is_file():  # of a GGUF file there is neither
        return _read(read_json(path), path.name)
    path = folder / "config.json"
    if not path.is_file():
        return GenerationDefaults()
    names = {*_KINDS, *_TOKEN_LISTS, *_WORDS, *_OTHERS, *_IDS}
    found = {k: v for k, v in read_json(path).items() if k in names and v is not None}
    return _read(found, path.name)


def write_generation(config: ModelConfig, defaults: GenerationDefaults | None) -> Json:
    """A `generation_config.json`: all that was read, and the end-of-text ids of `config`."""
    ids = {key: value for key, value in token_ids(config).items() if value is not None}
    if defaults is None or not defaults.file:
        return {"_from_model_config": True, **ids}
    out = dict(defaults.file)
    # Where the file names no end of text, config.json does: so it stays for transformers, too.
    if out.get("eos_token_id") is not None:
        out["eos_token_id"] = token_ids(config)["eos_token_id"]
    return out


def _read(found: Json, file: str) -> GenerationDefaults:
    fields: dict[str, Any] = {}
    for name, kinds in _KINDS.items():
        value = found.get(name)
        if value is None:
            continue
        good = isinstance(value, kinds) and (kinds == (bool,) or not isinstance(value, bool))
        if not good or not math.isfinite(value):
            expected = "true or false" if kinds == (bool,) else "a number"
            expected = "a whole number" if kinds == (int,) else expected
            raise UserError(f"{file} must give {name} as {expected}, not {value!r:.80}.")
        fields[name] = float(value) if float in kinds else value
    for name in _TOKEN_LISTS:
        value = found.get(name)
        if value is None:
            continue
        if not isinstance(value, list) or not all(type(i) is int for i in value):
            raise UserError(f"{file} must give {name} as a list of token ids, not {value!r:.80}.")
        fields[name] = tuple(value)
    words, stops = found.get("bad_words_ids"), found.get("stop_strings")
    if words is not None:
        if not isinstance(words, list) or not all(map(_is_word, words)):
            raise UserError(
                f"{file} must give bad_words_ids as lists of token ids, not {words!r:.80}."
            )
        fields["bad_words_ids"] = tuple(map(tuple, words))
    if stops is not None:
        stops = [stops] if isinstance(stops, str) else stops
        if not isinstance(stops, list) or not all(isinstance(x, str) and x for x in stops):
            raise UserError(f"{file} must give stop_strings as a list of texts, not {stops!r:.80}.")
        fields["stop_strings"] = tuple(stops)
    others = [n for n, off in _OTHERS.items() if found.get(n) is not None and found[n] != off]
    return GenerationDefaults(**fields, others=tuple(others), file=found)


def _is_word(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(i) is int for i in value)
