"""What is asked of a decoder and what it gives: requests, answers with statistics, and news while it runs."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from jax_specdec import display
from jax_specdec._types import Int
from jax_specdec.errors import UserError, a_kind, did_you_mean, shown, shown_value
from jax_specdec.options import TUPLES, are_items, no_tuple
from jax_specdec.text.inputs import Prompt, is_whole

# Two best scores closer than this may change places between a one-row and a T-row forward.
_NEAR_TIES = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.03}


def near_tie(dtype: Any) -> float:
    """The margin between two best scores below which rounding in a dtype decides which of them is first.

    >>> near_tie("float32"), near_tie("bfloat16")
    (0.001, 0.25)
    """
    return _NEAR_TIES[jnp.dtype(dtype).name]


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt, and how it is to be answered.

    >>> Request("Once upon a time", max_new_tokens=32, temperature=0.7).top_p
    1.0

    Attributes:
      prompt: a text, a chat, token ids, or what a tokenizer returns (`text.inputs`).
      id: name of the answer; default: the prompt's number in its list.
      key: what the seed is folded with, in [0, 2^31), so that a text depends on seed and key and not on the
        place of its prompt; default: the prompt's number. `id_key` makes one from an id.
      max_new_tokens, min_new_tokens: the most tokens, and before how many no stop token may come.
      temperature: 0 is greedy. top_k, top_p, min_p: as in `Sampling`.
      seed: of the run, folded with the id; or of this row alone where `own_seed` is true.
      stop: strings before which the text ends. stop_token_ids: tokens with which it ends, besides the target's
        own end-of-text tokens, which `ignore_eos` leaves out.
      repetition_penalty, presence_penalty, frequency_penalty, logit_bias: as in `processors.Processing`.
      bad_words: texts, with and without a space before them, or token sequences, that must not occur.

    None for a filter, a penalty, `logit_bias`, a stop or `bad_words` is off.
    """

    prompt: Any
    id: Any = None
    key: int | None = None
    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    own_seed: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    bad_words: tuple[str | tuple[int, ...], ...] = ()


def id_key(name: Any) -> int:
    """A `Request.key` from an id: a number below 2^31 itself, a hash of anything else.

    >>> id_key(7), id_key("question 7") == id_key("question 7")
    (7, True)
    """
    if isinstance(name, int) and 0 <= name < 2**31:
        return int(name)
    digest = hashlib.blake2b(str(name).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % 2**31


# Fields whose value is itself a sequence or mapping.
_WHOLE = (*TUPLES, "logit_bias")
OPTIONS = tuple(f.name for f in dataclasses.fields(Request) if f.name not in ("prompt", "id"))


# Those that are settings of `make_sampling` as they are.
SAMPLED = (
    "max_new_tokens",
    "min_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "seed",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
)

# Those that are off where nothing is given, and None says so.
_OFF = {
    f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
    for f in dataclasses.fields(Request)
    if f.name in (*_WHOLE, "top_k", "top_p", "min_p") or f.name.endswith("_penalty")
}


def make_requests(
    prompts: Sequence[Any],
    ids: Sequence[Any] | None,
    options: Mapping[str, Any],
    *,
    alone: bool = False,
    beside: Sequence[str] = (),
) -> list[Request]:
    """One request for each prompt.

    Args:
      prompts: texts, token id lists, or requests, which keep their own options.
      ids: names for the answers; default: the prompt's number.
      options: fields of `Request`, one value for all prompts or a list with one per prompt.
      alone: the one prompt was given by itself, so that a list of stops or bad words can only be its own.
      beside: other arguments of the caller's, which an unknown option may be misspelt from.

    >>> first, second = make_requests(["a", "b"], None, {"temperature": [0.0, 0.7], "seed": 3})
    >>> second.id, second.temperature, second.seed
    (1, 0.7, 3)

    Raises:
      UserError: prompts that are no list, no prompts, an unknown option, or a list of another length.
    """
    if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Sequence):
        raise UserError(f"Prompts come in a list, one prompt too: got {a_kind(prompts)} alone.")
    count = len(prompts)
    if count == 0:
        raise UserError("There are no prompts.")
    if not (ids is None or (isinstance(ids, Iterable) and not isinstance(ids, (str, bytes)))):
        raise UserError(f"ids are a list with a name for each prompt, not {a_kind(ids)}.")
    names = list(range(count)) if ids is None else list(ids)
    if len(names) != count:
        raise UserError(f"Got {len(names)} ids for {count} prompts.")
    rows: dict[str, list[Any]] = {}
    for name, value in options.items():
        if name == "n":
            raise UserError(
                "n is for a call, decoder(prompt, n=2): a stream is of one sample, as is each answer of "
                "generate and of a chat."
            )
        if name not in OPTIONS:
            near = did_you_mean(name, (*OPTIONS, *beside))
            near = near or f"; there are {', '.join(OPTIONS)}."
            raise UserError(f"There is no option {shown(name)}{near}")
        if isinstance(value, np.ndarray):
            value = value.tolist() if value.ndim else value.item()
        if isinstance(value, tuple) and name not in _WHOLE:
            value = list(value)
        if name in TUPLES and isinstance(value, list):
            if alone and are_items(name, value):
                value = tuple(value)
            elif any(isinstance(item, (str, int)) for item in value):
                raise no_tuple(name, value)  # for all prompts, or one for each? Neither is guessed
        rows[name] = value if isinstance(value, list) else [value] * count
        if len(rows[name]) != count:
            if name == "stop":
                raise UserError(f"Got stop strings for {len(rows[name])} of {count} prompts.")
            raise UserError(f"Got {len(rows[name])} values for {count} prompts: {name}.")
    requests = []
    for row, (prompt, name) in enumerate(zip(prompts, names, strict=True)):
        if isinstance(prompt, Request):
            if rows:
                raise UserError("A request has options of its own: give none beside it.")
            request = prompt if ids is None else dataclasses.replace(prompt, id=name)
        else:
            request = Request(prompt, name, **{field: of[row] for field, of in rows.items()})
        filled = {key: off for key, off in _OFF.items() if getattr(request, key) is None}
        if isinstance(request.stop, str):
            filled["stop"] = (request.stop,)
        filled["id"] = row if request.id is None else request.id
        filled["key"] = row if request.key is None else request.key
        if not is_whole(filled["key"]) or not 0 <= filled["key"] < 2**31:
            raise UserError(f"A key must be in [0, 2^31), got {shown_value(filled['key'])}.")
        requests.append(dataclasses.replace(request, **filled))
    return requests


def samples_of(requests: Sequence[Request], n: int) -> list[Request]:
    """Each request `n` times, with keys of their own: the first as it is, the others by `sample_key`.

    >>> [r.key for r in samples_of(make_requests(["a"], None, {"temperature": 1.0}), 2)] == [
    ...     0,
    ...     sample_key(0, 1),
    ... ]
    True

    Raises:
      UserError: `n` below 1, or samples that would all be the same text.
    """
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1:
        raise UserError(f"n must be a whole number of at least 1, got {n!r:.40}.")
    if n > 1 and any(
        isinstance(r.temperature, (int, float)) and r.temperature == 0 for r in requests
    ):
        raise UserError(
            f"At temperature 0 all {n} samples would be the same text: give a temperature."
        )
    if n > 1 and any(r.own_seed for r in requests):
        raise UserError(
            "With own_seed the seed alone decides a text, and n samples would be the same."
        )
    return [
        dataclasses.replace(r, key=sample_key(0 if r.key is None else r.key, i))
        for r in requests
        for i in range(n)
    ]


def sample_key(key: int, number: int) -> int:
    """The key of a prompt's sample: the prompt's own for the first, and so whatever `n` is."""
    return key if number == 0 else id_key(f"{key}/{number}")


@dataclasses.dataclass(frozen=True)
class Stats:
    """What one prompt took. Names as in vLLM where it has them.

    Attributes:
      num_tokens: emitted. num_spec_steps: target forwards (rounds) while the row was running.
      num_draft_tokens, num_accepted_tokens: tokens that were drafted and verified, and accepted ones, without the
        target's own. What a budget had drafted and did not verify is in `steps_per_depth` alone.
      draft_acceptance_rate: accepted / drafted, 0 where nothing was drafted.
      mean_acceptance_length: tokens per round, the target's own token included (tau).
      accepted_per_pos: how often the draft's token at each position was accepted.
      per_drafter: by source, `calls` (rounds in which tokens of it were verified), `drafted` and `accepted`.
      wall_time_s: prefill to the last token of the row's batch, compilation apart.
      steps_per_width: rounds by how many nodes were verified, root included. steps_per_depth: rounds by how many
        tokens were asked for, or drafted by a model before it ended itself, the first of them without a draft; see `core.budget`.
      num_cached_tokens: of the prompt, those that were not read because caches held them (`Conversation`).
      near_ties: emitted tokens whose score beat the second best by less than rounding may change
        (`near_tie`); None where margins are not recorded.
    """

    num_tokens: int
    num_spec_steps: int
    num_draft_tokens: int
    num_accepted_tokens: int
    draft_acceptance_rate: float
    mean_acceptance_length: float
    accepted_per_pos: list[int]
    per_drafter: dict[str, dict[str, int]]
    wall_time_s: float
    prefill_time_s: float
    compile_time_s: float
    tokens_per_second: float
    near_ties: int | None
    num_cached_tokens: int = 0
    steps_per_width: dict[int, int] = dataclasses.field(default_factory=dict)
    steps_per_depth: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, repr=False)
class Generation:
    """One prompt's answer; `str` of it is the text, and notebooks show it coloured by source.

    Attributes:
      prompt: its text, messages or token ids.
      token_ids: emitted tokens, the one that stopped the row included.
      text: what the tokens add to the prompt's text, without special tokens, cut before a stop string.
      logprobs: the target's log-probability of each emitted token (nats, before temperature and
        filters), None where they are not recorded. margins: by how much each token's score beat the second
        best, or None.
      sources: which drafter each token is from, None for the target's own.
      token_texts: what each token made certain of the text, so that they add up to it; empty without a
        tokenizer.
    """

    id: Any
    prompt: Prompt
    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"] | None
    stats: Stats
    logprobs: list[float] | None
    margins: list[float] | None
    sources: list[str | None]
    token_texts: list[str] = dataclasses.field(default_factory=list)

    @property
    def tokens(self) -> Int[np.ndarray, " N"]:
        """`token_ids` as an array, int32."""
        return np.asarray(self.token_ids, np.int32)

    def table(self) -> "display.Table":
        """A row per token: `position` in the answer, `token_id`, `text`, `source`, `logprob` and `margin`.

        The last two are there where they are recorded. `pandas.DataFrame(generation.table())` takes it.
        """
        texts = self.token_texts or [""] * len(self.token_ids)
        columns: dict[str, Any] = {
            "position": range(len(self.token_ids)),
            "token_id": self.token_ids,
            "text": texts,
            "source": [source or "target" for source in self.sources],
            "logprob": self.logprobs,
            "margin": self.margins,
        }
        kept = {name: values for name, values in columns.items() if values is not None}
        rows = zip(*kept.values(), strict=True)
        return display.Table([dict(zip(kept, row, strict=True)) for row in rows], tuple(kept))

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        shown = repr(self.text if len(self.text) <= 60 else f"{self.text[:57]}...")
        return (
            f"Generation({shown}, {self.stats.num_tokens} tokens, {self.finish_reason}, "
            f"tau {self.stats.mean_acceptance_length:.2f}, {self.stats.tokens_per_second:.0f} tokens/s)"
        )

    def _repr_html_(self) -> str:
        spans = zip(self.token_texts, self.sources, strict=True) if self.token_texts else ()
        stats = self.stats
        figures = {
            "tokens": f"{stats.num_tokens}",
            "passes of the target": f"{stats.num_spec_steps}",
            "tokens a pass (tau)": f"{stats.mean_acceptance_length:.2f}",
            "drafts accepted": f"{stats.draft_acceptance_rate:.0%}",
            "tokens/s": f"{stats.tokens_per_second:.0f}",
            "ended by": f"{self.finish_reason}",
        }
        if len(stats.steps_per_depth) > 1 and stats.steps_per_depth[0]:
            figures["passes without a draft"] = f"{stats.steps_per_depth[0]}"
        before = self.prompt if isinstance(self.prompt, str) else ""
        return display.answer_html(list(spans), list(stats.per_drafter), figures, before)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """News of a running request: the tokens since the last chunk and their sources.

    Attributes:
      index: of the prompt in the list.
    """

    index: int
    token_ids: list[int]
    sources: list[str | None]


def each(requests: Sequence[Request], function: Callable[[Request], Any]) -> list[Any]:
    """`function` of each request; an error names the prompt where there are several."""
    done = []
    for request in requests:
        try:
            done.append(function(request))
        except UserError as error:
            if len(requests) == 1:
                raise
            raise UserError(f"Prompt {request.id}: {error}") from None
    return done
