"""Text of a row while it grows."""

from collections.abc import Sequence
from typing import Any

from jax_specdec.text.stop_strings import truncate


class TextStream:
    """Turns tokens into text piece by piece; the pieces add up to the text of the finished answer.

    Held back until it is certain: the bytes of an unfinished character, and what may become a stop
    string.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._ids: list[int] = []
        self._shown = 0

    def push(self, ids: Sequence[int]) -> str:
        """The text that these tokens make certain."""
        self._ids.extend(ids)
        text = self._text()
        certain = text.rstrip("\ufffd")
        begun = (
            size
            for stop in self._stops
            for size in range(1, len(stop))
            if certain.endswith(stop[:size])
        )
        return self._take(text, len(certain) - max(begun, default=0))

    def finish(self) -> str:
        """What was held back, now that the row has ended."""
        text = self._text()
        return self._take(text, len(text))

    def _text(self) -> str:
        # All of it each time: what a token adds may depend on the ones before, and this costs little
        # beside a forward pass.
        return truncate(self._tokenizer.decode(self._ids, skip_special_tokens=True), self._stops)

    def _take(self, text: str, end: int) -> str:
        piece = text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece
