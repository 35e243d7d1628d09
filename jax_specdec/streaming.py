"""An answer while it grows: pieces of text with the tokens that they are from."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Iterator, Sequence

from jax_specdec.errors import UserError
from jax_specdec.generation import Chunk, Generation
from jax_specdec.text.detokenize import TextStream


@dataclasses.dataclass(frozen=True)
class Piece:
    """Text that is certain now, and the tokens since the last piece; `str` of it is the text.

    >>> piece = Piece(" the end", [5, 9], ["lm", "lm"])
    >>> str(piece), piece.source
    (' the end', 'lm')

    Attributes:
      text: whole characters, and nothing that a stop string takes away later. Empty for tokens without
        text at the end of an answer.
      sources: the drafter that each token is from, None for the target's own.
    """

    text: str
    token_ids: list[int]
    sources: list[str | None]

    @property
    def source(self) -> str | None:
        """Whose token made the text certain."""
        return self.sources[-1] if self.sources else None

    def __str__(self) -> str:
        return self.text


class Pieces:
    """Turns chunks of tokens into pieces, each of one source as far as its characters are whole.

    Args:
      text: spells the tokens; None where there is no tokenizer, and pieces then have no text.
    """

    def __init__(self, text: TextStream | None):
        self._text = text
        self._ids: list[int] = []
        self._sources: list[str | None] = []

    def push(self, token_ids: Sequence[int], sources: Sequence[str | None]) -> Iterator[Piece]:
        """The pieces that these tokens make certain."""
        text, ids, by = "", [], []
        for token, source in zip(token_ids, sources, strict=True):
            said = self._text.push([token]) if self._text else ""
            if ids and said and by[-1] != source:
                yield Piece(text, ids, by)
                text, ids, by = "", [], []
            self._ids.append(token)
            self._sources.append(source)
            if said or self._text is None:
                text, ids, by = text + said, ids + self._ids, by + self._sources
                self._ids, self._sources = [], []
        if ids:
            yield Piece(text, ids, by)

    def finish(self) -> Iterator[Piece]:
        """What was held back, now that the answer has ended."""
        text = self._text.finish() if self._text else ""
        if text or self._ids:
            yield Piece(text, self._ids, self._sources)
        self._ids, self._sources = [], []


class Stream(Iterator[Piece], AsyncIterator[Piece]):
    """The pieces of one answer, computed while they are asked for; also for `async for`.

    Args:
      events: chunks, and the whole answer at the end.
    """

    def __init__(self, events: Iterator[Chunk | Generation], pieces: Pieces):
        self._events = events
        self._pieces = pieces
        self._waiting: list[Piece] = []
        self._generation: Generation | None = None

    @property
    def generation(self) -> Generation:
        """The whole answer.

        Raises:
          UserError: the stream has not come to its end.
        """
        if self._generation is None:
            raise UserError("The answer has not ended: take all pieces of the stream first.")
        return self._generation

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Piece:
        while not self._waiting:
            event = next(self._events)
            if isinstance(event, Generation):
                self._generation = event
                self._waiting += self._pieces.finish()
            else:
                self._waiting += self._pieces.push(event.token_ids, event.sources)
        return self._waiting.pop(0)

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Piece:
        # In a thread, so that the event loop goes on while the device works.
        piece = await asyncio.to_thread(next, self, None)
        if piece is None:
            raise StopAsyncIteration
        return piece

    def close(self) -> None:
        """Gives up what has not been decoded yet."""
        self._waiting.clear()
        close = getattr(self._events, "close", None)
        if close is not None:
            close()

    def __repr__(self) -> str:
        return f"Stream({'running' if self._generation is None else repr(self._generation)})"
