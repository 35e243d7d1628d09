"""The tokenizer in a GGUF file's metadata, as the one of transformers that its tokenizer.json would give.

transformers reads GGUF tokenizers, too. It leaves out how SmolLM's splits digits, Qwen's normal form and that Llama 3
takes whole words first, and adds GPT-2's end of text where there is none: ids would differ from those that the
model was trained on.
"""

from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from jax_specdec.checkpoints.gguf_file import open_gguf
from jax_specdec.errors import UserError, shown

KEY = "tokenizer.ggml."
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # of tokenizer.ggml.token_type
_SPACE = "\u2581"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_CASED = (
    r"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]*[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]+{endings}"
    r"|[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]+[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*{endings}"
    r"|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _Split(NamedTuple):
    """How byte-level text is cut before merging.

    Attributes:
      pattern: of a word; None for GPT-2's. digits: each is a word. nfc: Unicode's composed form comes first.
      whole: a word that is a token is not merged. bos: a text begins with one unless the file says otherwise.
    """

    pattern: str | None = None
    digits: bool = False
    nfc: bool = False
    whole: bool = False
    bos: bool = False


_GPT2, _DIGITS = _Split(), _Split(digits=True)
_LLAMA3 = _Split(_WORDS.format(digits="{1,3}"), whole=True, bos=True)
_QWEN2 = _Split(_WORDS.format(digits=""), nfc=True)
# By tokenizer.ggml.pre.
SPLITS = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _LLAMA3._replace(whole=False, bos=False)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2),
    "tekken": _Split(_CASED.format(endings="", digits=""), whole=True, bos=True),
    "gpt-4o": _Split(_CASED.format(endings=_ENDINGS, digits="{1,3}")),
}


def has_tokenizer(path: Path) -> bool:
    return f"{KEY}model" in open_gguf(path).metadata


def load_tokenizer(path: Path) -> Any:
    """A transformers tokenizer, its chat template included.

    Raises:
      UserError: there is none, or one of a type or way to split words that is not known.
    """
    metadata = open_gguf(path).metadata
    model = metadata.get(f"{KEY}model")
    if model is None:
        raise UserError(f"{path} has no tokenizer (tokenizer.ggml.model).")
    if model not in ("gpt2", "llama"):
        raise UserError(f"{path} has a tokenizer of type {shown(model)}; gpt2 and llama are read.")
    tokens = _strings(path, metadata, "tokens")
    kinds = metadata.get(f"{KEY}token_type", [1] * len(tokens))
    if not isinstance(kinds, list) or len(kinds) != len(tokens) or len(set(tokens)) != len(tokens):
        raise UserError(
            f"{path} does not give each of its {len(tokens)} tokens one name and one type."
        )
    make = _byte_level if model == "gpt2" else _sentencepiece
    try:
        backend, bos = make(path, metadata, tokens, kinds)
    except UserError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"The tokenizer in {path} cannot be read: {error!s:.300}") from error
    special = [t for t, kind in zip(tokens, kinds, strict=True) if kind in (_UNKNOWN, _CONTROL)]
    own = [t for t, kind in zip(tokens, kinds, strict=True) if kind == _USER_DEFINED]
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    backend.add_tokens([AddedToken(t, normalized=False) for t in own])
    from transformers import PreTrainedTokenizerFast

    template = metadata.get("tokenizer.chat_template")
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    found = {key: _token(path, metadata, tokens, name) for key, name in names.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{key: token for key, token in found.items() if token is not None},
        add_bos_token=bool(metadata.get(f"{KEY}add_bos_token", bos)),
        add_eos_token=bool(metadata.get(f"{KEY}add_eos_token", False)),
        chat_template=template if isinstance(template, str) else None,
        clean_up_tokenization_spaces=False,
    )


def _strings(path: Path, metadata: dict[str, Any], name: str) -> list[str]:
    found = metadata.get(f"{KEY}{name}")
    if not isinstance(found, list) or not all(isinstance(x, str) for x in found):
        raise UserError(f"{path} must give {KEY}{name} as a list of texts.")
    return found


def _token(path: Path, metadata: dict[str, Any], tokens: list[str], name: str) -> str | None:
    index = metadata.get(f"{KEY}{name}_token_id")
    if index is None:
        return None
    if type(index) is not int or not 0 <= index < len(tokens):
        raise UserError(
            f"{path} gives {KEY}{name}_token_id as {shown(index)} of {len(tokens)} tokens."
        )
    return tokens[index]


def _byte_level(
    path: Path, metadata: dict[str, Any], tokens: list[str], kinds: list[int]
) -> tuple[Tokenizer, bool]:
    del kinds
    name = metadata.get(f"{KEY}pre")
    if not isinstance(name, str) or name not in SPLITS:
        how = "does not say how it splits words (tokenizer.ggml.pre), as older files"
        if name is not None:
            how = f"splits words in a way that is not known, {shown(name)} (tokenizer.ggml.pre)"
        raise UserError(
            f"{path} {how}: take a newer file, or the original; known are {', '.join(SPLITS)}."
        )
    split = SPLITS[name]
    pairs = [tuple(merge.split(" ")) for merge in _strings(path, metadata, "merges")]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab, pairs, ignore_merges=split.whole))  # type: ignore[arg-type]
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if split.digits else []
    if split.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(split.pattern), behavior="isolated"))
    usual = split.pattern is None
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=usual))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)  # type: ignore[assignment]
    if split.nfc:
        backend.normalizer = normalizers.NFC()  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return backend, split.bos


def _sentencepiece(
    path: Path, metadata: dict[str, Any], tokens: list[str], kinds: list[int]
) -> tuple[Tokenizer, bool]:
    """Llama's: the best-scored pair of neighbours that is a piece is merged first, bytes stand for the rest."""
    scores = metadata.get(f"{KEY}scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise UserError(f"{path} must give a score to each of its {len(tokens)} tokens.")
    vocab = {token: i for i, token in enumerate(tokens)}
    pairs = []
    for token, score, kind in zip(tokens, scores, kinds, strict=True):
        if kind == 1:
            parts = [(token[:i], token[i:]) for i in range(1, len(token))]
            pairs += [(-score, *pair) for pair in parts if pair[0] in vocab and pair[1] in vocab]
    pairs.sort(key=lambda pair: (pair[0], vocab[pair[1] + pair[2]], vocab[pair[1]], vocab[pair[2]]))
    unknown = _token(path, metadata, tokens, "unknown")
    backend = Tokenizer(
        models.BPE(
            vocab,
            [(left, right) for _, left, right in pairs],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    begins = metadata.get(f"{KEY}add_space_prefix", True)
    replace: list[Any] = [normalizers.Prepend(_SPACE)] if begins else []
    backend.normalizer = normalizers.Sequence([*replace, normalizers.Replace(" ", _SPACE)])  # type: ignore[assignment]
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if begins:
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)  # type: ignore[assignment]
    return backend, True
