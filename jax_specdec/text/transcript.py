"""The token ids of a conversation, in which what a model wrote stays as it wrote it.

A template renders the whole conversation anew for each turn. Spelled again, an answer may come out as other
tokens than those that were decoded, and then caches would hold a text that nobody asks for. So ids are kept up
to the last place where the new rendering still begins with the old text, and only what follows is spelled.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jax_specdec.text.token_bytes import Lead, TokenBytes


class _Mark(NamedTuple):
    """An end of a rendering or an answer: so many characters are so many tokens."""

    chars: int
    tokens: int


class Transcript:
    """The ids of one conversation.

    Args:
      tokenizer: of transformers. token_bytes: its bytes.
    """

    def __init__(self, tokenizer: Any, token_bytes: TokenBytes):
        self._tokenizer, self._bytes = tokenizer, token_bytes
        self._names = {index: name.encode() for name, index in token_bytes.special.items()}
        self._text, self._ids, self._marks = "", [], []

    def encode(self, rendering: str) -> "Transcript":
        """The transcript of a rendering, its ids those of this one as far as they spell its beginning."""
        for mark in reversed(self._marks):
            if not rendering.startswith(self._text[: mark.chars]):
                continue
            rest = rendering[mark.chars :]
            more = self._spell(rest)
            if self._read(more) == rest.encode():  # some tokenizers begin each text with a space
                marks = [known for known in self._marks if known <= mark]
                return self._with(rendering, [*self._ids[: mark.tokens], *more], marks)
        return self._with(rendering, self._spell(rendering), [])

    def answered(self, ids: Sequence[int]) -> "Transcript":
        """The transcript with an answer behind it."""
        said = self._read(ids[:-1]).decode(errors="replace")
        whole = self._read(ids).decode(errors="replace")
        # The token that ends an answer may be a template's own, or none of it.
        inner = self._with(self._text + said, [*self._ids, *ids[:-1]], self._marks)
        return self._with(self._text + whole, [*self._ids, *ids], inner._marks)

    @property
    def ids(self) -> list[int]:
        return self._ids

    def begins(self, rendering: str) -> bool:
        """Whether a rendering goes on where the last answer ends, but for the token that ended it."""
        return any(rendering.startswith(self._text[: m.chars]) for m in self._marks[-2:])

    def _with(self, text: str, ids: list[int], marks: list[_Mark]) -> "Transcript":
        made = Transcript(self._tokenizer, self._bytes)
        made._text, made._ids = text, ids
        made._marks = [*marks, _Mark(len(text), len(ids))]
        return made

    def _spell(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _read(self, ids: Sequence[int]) -> bytes:
        """What ids spell behind other text, special tokens by name."""
        return b"".join(
            self._names[index] if index in self._names else self._bytes.step(index, Lead())[0]
            for index in ids
        )
