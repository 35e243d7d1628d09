"""Text of an answer, whole or while it grows.

An answer's text is what it adds to its prompt's: `decode(prompt + answer)` less `decode(prompt)`. So a
leading space stays, and prompt and answer can be put together.
"""

import codecs
from collections.abc import Sequence
from typing import Any

from jax_specdec.text.stop_strings import truncate
from jax_specdec.text.token_bytes import as_token_bytes


class TextStream:
    """Turns tokens into text piece by piece; the pieces add up to `answer_text`, and none is taken back.

    Held back until it is certain: the bytes of an unfinished character, and what may become a stop
    string. Behind a stop string nothing more is shown.

    Args:
      tokenizer: of transformers, or its `TokenBytes`.
      stops: stop strings. prompt: token ids of what the text follows.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), prompt: Sequence[int] = ()):
        self._bytes = as_token_bytes(tokenizer)
        self._stops = tuple(stops)
        self._lead, self._head = self._bytes.after(prompt)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoder.decode(self._head)
        self._held = ""
        self._stopped = False

    def push(self, ids: Sequence[int]) -> str:
        """The text that these tokens make certain."""
        data, self._lead = self._bytes.read(ids, self._lead)
        self._hold(self._decoder.decode(data))
        begun = (
            size
            for stop in self._stops
            for size in range(1, len(stop))
            if self._held.endswith(stop[:size])
        )
        return self._take(len(self._held) - max(begun, default=0))

    def finish(self) -> str:
        """What was held back, now that the row has ended."""
        self._hold(self._decoder.decode(b"", final=True))
        return self._take(len(self._held))

    def _hold(self, text: str) -> None:
        if text and self._head:
            # What the prompt left open and the answer did not end is U+FFFD in the prompt already.
            text, self._head = text.removeprefix("\ufffd"), b""
        if not self._stopped:
            self._held += text

    def _take(self, end: int) -> str:
        cut = truncate(self._held, self._stops)
        if len(cut) < len(self._held):
            self._stopped, self._held = True, ""
            return cut
        piece, self._held = self._held[:end], self._held[end:]
        return piece


def answer_text(
    tokenizer: Any, prompt: Sequence[int], ids: Sequence[int], stops: Sequence[str] = ()
) -> str:
    """What the tokens `ids` add to the text of `prompt`, up to the first stop string.

    Args:
      tokenizer: of transformers, or its `TokenBytes`.
    """
    stream = TextStream(tokenizer, (), prompt)
    return truncate(stream.push(ids) + stream.finish(), stops)
