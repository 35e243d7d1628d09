"""The bytes that each token adds to a text, as the tokenizer's own decoder has it.

A decoder is a sequence of steps over token names (`tokenizers.decoders`). Those that stand here work name by
name; what a token adds then depends on nothing but whether text stands before it. Names alone decide nothing:
an added token of a byte-level vocabulary may contain U+2581, and one of a sentencepiece vocabulary may not.
"""

import json
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from tokenizers import Regex, Tokenizer, decoders

from jax_specdec.errors import UserError

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# What a token is so far, between two steps, and whether it is the first of its text.
_Step = Callable[[Any, bool], Any]


class Lead(NamedTuple):
    """What the decoder still does to the start of a text; `Lead()` once the text has begun.

    Attributes:
      first: the next token is the first one, which Metaspace and WordPiece spell without a space.
      strip: so many characters may still be taken off.
    """

    first: bool = False
    strip: int = 0


class Place(NamedTuple):
    """Where an answer begins.

    Attributes:
      lead: what the prompt leaves to be done; `Lead()` unless the prompt has no text.
      head: bytes of a character that the prompt begins and does not end, usually none.
    """

    lead: Lead = Lead()
    head: bytes = b""


class TokenBytes:
    """What every token id of a tokenizer adds to a text.

    Special tokens (the decoder skips them) and ids without a token add nothing. The bytes are read as
    UTF-8 with U+FFFD for what is none. Two things differ from `tokenizer.decode`, because text that has
    been shown must stay: a run of byte-fallback tokens with a wrong byte keeps its whole characters, and
    `clean_up_tokenization_spaces` is not applied.

    Args:
      tokenizer: a transformers tokenizer with a `backend_tokenizer`, or that back-end.

    Raises:
      UserError: its decoder does not work token by token, or is not known here.
    """

    def __init__(self, tokenizer: Any):
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not isinstance(backend, Tokenizer):
            raise UserError(
                f"{type(tokenizer).__name__} is no tokenizer with a tokenizer.json, so the bytes of its "
                "tokens are not known: load the target without a tokenizer and give token ids."
            )
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self.special = {token.content: i for i, token in added.items() if token.special}
        self._steps, positional, self._strip, count = _read_decoder(backend.decoder)
        self.start = Lead(positional, count)
        self._behind: dict[int, bytes | None] = {}  # of tokens behind others
        self._pieces: list[bytes] = []

    def pieces(self, vocab_size: int) -> list[bytes]:
        """What each id below `vocab_size` adds behind other text."""
        if len(self._pieces) != vocab_size:
            self._pieces = [self._piece(i, False) or b"" for i in range(vocab_size)]
        return self._pieces

    def step(self, index: int, lead: Lead) -> tuple[bytes, Lead]:
        """What the token adds where `lead` is still to be done, and what is left to be done then."""
        piece = self._piece(index, lead.first)
        if piece is None:
            return b"", lead
        strip = lead.strip
        while strip and piece.startswith(self._strip):
            piece, strip = piece[len(self._strip) :], strip - 1
        return piece, Lead(False, 0 if piece else strip)

    def read(self, ids: Iterable[int], lead: Lead) -> tuple[bytes, Lead]:
        """What several tokens add; see `step`."""
        out = []
        for index in ids:
            piece, lead = self.step(index, lead)
            out.append(piece)
        return b"".join(out), lead

    def after(self, prompt: Iterable[int]) -> Place:
        """Where an answer to a prompt begins."""
        data, lead = self.read(prompt, self.start)
        return Place(lead, _unfinished(data))

    def _piece(self, index: int, first: bool) -> bytes | None:
        """None for what the decoder leaves out: special tokens and ids without a token."""
        if not first and index in self._behind:
            return self._behind[index]
        value: Any = self._backend.id_to_token(index)
        if value is not None and value in self.special:
            value = None
        if value is not None:
            for step in self._steps:
                value = step(value, first)
            value = value.encode() if isinstance(value, str) else value
        if not first:
            self._behind[index] = value
        return value


def as_token_bytes(tokenizer: Any) -> TokenBytes:
    """The tokenizer's bytes; what is such already is taken as it is."""
    return tokenizer if isinstance(tokenizer, TokenBytes) else TokenBytes(tokenizer)


def token_bytes(tokenizer: Any, vocab_size: int) -> list[bytes]:
    """The bytes that each token adds behind other text; special and unused ids add none."""
    return as_token_bytes(tokenizer).pieces(vocab_size)


def id_bound(tokenizer: Any) -> int:
    """The highest token id and one. `len(tokenizer)` counts tokens, which is less where ids have holes."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def _unfinished(data: bytes) -> bytes:
    """The bytes at the end that begin a character and do not end it."""
    for size in range(1, min(3, len(data)) + 1):
        tail = data[-size:]
        if tail[0] >= 0xC0:
            try:
                tail.decode()
            except UnicodeDecodeError as error:
                return tail if error.reason == "unexpected end of data" else b""
            return b""
    return b""


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-ins that byte-level BPE uses for bytes (GPT-2's table)."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in kept}
    rest = [byte for byte in range(256) if byte not in kept]
    table.update({chr(256 + i): byte for i, byte in enumerate(rest)})
    return table


_ALPHABET = _byte_alphabet()


def _byte_level(name: str, first: bool) -> bytes:
    del first
    try:
        return bytes([_ALPHABET[char] for char in name])
    except KeyError:  # an added token; it is spelled as it is
        return name.encode()


def _byte_fallback(name: str, first: bool) -> str | bytes:
    del first
    found = _BYTE.fullmatch(name)
    return bytes([int(found[1], 16)]) if found else name


def _replace(old: str, new: str, at_start: str | None = None) -> _Step:
    """Replaces in text and in bytes; `at_start` is what stands for `old` in the first token."""
    begin = new if at_start is None else at_start

    def step(value: str | bytes, first: bool) -> str | bytes:
        if isinstance(value, str):
            return value.replace(old, begin if first else new)
        return value.replace(old.encode(), (begin if first else new).encode())

    return step


def _alone(decoder: Any) -> _Step:
    """A step of the library that treats each token by itself."""
    return lambda name, first: decoder.decode([name])


def _behind(decoder: Any) -> _Step:
    """A step of the library that treats the first token in another way."""
    return lambda name, first: decoder.decode([name]) if first else decoder.decode(["x", name])[1:]


def _read_decoder(decoder: Any) -> tuple[list[_Step], bool, bytes, int]:
    """The steps; whether the first token differs; what is stripped off the text's start, and how often."""
    steps: list[_Step] = []
    if decoder is None:  # the library puts a space between tokens
        return [lambda name, first: name if first else f" {name}"], True, b"", 0
    positional = spelled = fused = False
    strip, count = b"", 0
    for step in _flat(json.loads(decoder.__getstate__())):
        kind = step["type"]
        whole = spelled or fused  # tokens may be parts of characters, or one text
        if count:
            raise _refusal(kind, "behind Strip")
        if kind == "Fuse":
            fused = True
        elif kind in ("ByteLevel", "ByteFallback") and not whole:
            steps.append(_byte_level if kind == "ByteLevel" else _byte_fallback)
            spelled, fused = True, kind == "ByteLevel"
        elif kind == "Replace":
            ((form, old),) = step["pattern"].items()
            new = step["content"]
            if form == "String" and old and (len(old) == 1 or not whole):
                steps.append(_replace(old, new))
            elif not whole:
                pattern = Regex(old) if form == "Regex" else old
                steps.append(_alone(decoders.Replace(pattern, new)))
            else:
                raise _refusal(kind, "of more than a character in the whole text")
        elif kind == "Metaspace" and (not fused or step["prepend_scheme"] == "never"):
            drops = step["prepend_scheme"] != "never"
            positional = positional or drops
            steps.append(_replace(step["replacement"], " ", "" if drops else None))
        elif kind == "WordPiece" and not whole:
            positional = True
            steps.append(_behind(decoders.WordPiece(step["prefix"], step["cleanup"])))
        elif kind == "Strip" and not whole and not (step["start"] and step["stop"]):
            # Both at once make the library panic at a token of one space.
            made = decoders.Strip(step["content"], step["start"], step["stop"])
            steps.append(_alone(made))
        elif kind == "Strip" and fused and not step["stop"]:
            strip, count = step["content"].encode(), step["start"]
        else:
            raise _refusal(kind, "in this place" if kind in _KNOWN else "")
    return steps, positional, strip, count


_KNOWN = ("ByteLevel", "ByteFallback", "Replace", "Metaspace", "WordPiece", "Strip", "Fuse")


def _flat(spec: dict[str, Any]) -> Iterable[dict[str, Any]]:
    if spec["type"] != "Sequence":
        yield spec
        return
    for part in spec["decoders"]:
        yield from _flat(part)


def _refusal(kind: str, where: str) -> UserError:
    step = f"{kind} {where}".strip()
    return UserError(
        f"The tokenizer's decoder has the step {step}, so what a token adds to the text is not known when it "
        "comes: load the target without a tokenizer and give token ids."
    )
