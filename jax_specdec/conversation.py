"""Conversations: turns of a chat, with what was read kept in the caches of target and drafters.

A turn renders the whole conversation in the chat template, compares its tokens with those that the caches hold,
cuts the caches back to what both begin with, and reads the rest. Texts are those of no caches kept: token for
token in float32, but for near ties, since an answer's keys were computed a few tokens at a time.
"""

import dataclasses
import functools
import time
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_specdec._types import Params
from jax_specdec.core.context import TargetView
from jax_specdec.core.drafter import States
from jax_specdec.core.loop import DecodeLoop, LoopState
from jax_specdec.core.model import rewinds
from jax_specdec.core.sharding import put_rows, to_host
from jax_specdec.core.stats import RUNNING
from jax_specdec.errors import RunError, UserError
from jax_specdec.generation import Chunk, Generation, make_requests
from jax_specdec.text.chat import Message, chat_text, check_messages
from jax_specdec.text.transcript import Transcript

if TYPE_CHECKING:
    from jax_specdec.pipeline import SpeculativeDecoder

_ROUNDS_FOREVER = np.iinfo(np.int32).max
Caches = tuple[TargetView, States]


class Conversation:
    """A chat of several turns; `SpeculativeDecoder.chat` makes one.

    A turn that fails, is interrupted, or whose stream is not read to its end leaves the conversation as it was.

    Attributes:
      messages: `{"role": ..., "content": ...}` of all turns so far. It may be changed between turns; what
        is no longer as it was is read anew.
    """

    messages: list[dict[str, Any]]

    def __init__(
        self,
        decoder: "SpeculativeDecoder",
        system: str | None = None,
        *,
        messages: Sequence[Message] = (),
        template: str | None = None,
        template_args: Mapping[str, Any] | None = None,
        **options: Any,
    ):
        tokenizer = decoder.target.tokenizer
        if tokenizer is None or decoder.token_bytes is None:
            raise UserError("A chat needs a tokenizer: load the target with one.")
        self.messages = check_messages(messages)
        if system is not None:
            if self.messages and self.messages[0]["role"] == "system":
                raise UserError("The messages begin with a system message: give it once.")
            self.messages.insert(0, {"role": "system", "content": system})
        self._decoder, self._options = decoder, options
        self._form = {"template": template, "template_args": template_args}
        self._nothing = self._script = Transcript(tokenizer, decoder.token_bytes)
        self._state: LoopState | None = None
        self._open: Generator[Chunk, None, Generation] | None = None
        decoder._encode(self._request("", [0], {}))  # what is wrong with the options
        self._rendered([{"role": "user", "content": "Hello"}])  # and with the template

    def __call__(self, message: str, **options: Any) -> Generation:
        """The answer to a message.

        Args:
          options: fields of `Request` for this turn alone.

        Raises:
          UserError: options out of range, a template that fails, or a conversation that is longer than the
            model's context; it can go on after `undo` or `reset`.
          RunError: as `SpeculativeDecoder.generate`.
        """
        turn = self._turn(message, options)
        while True:
            try:
                next(turn)
            except StopIteration as end:
                return end.value

    def undo(self) -> None:
        """Takes back the last turn: the user's last message and what follows it.

        Raises:
          UserError: there is none.
        """
        for place in reversed(range(len(self.messages))):
            if self.messages[place]["role"] == "user":
                del self.messages[place:]
                return
        raise UserError("There is no turn to undo.")

    def reset(self) -> None:
        """Begins anew, with the same system message and empty caches."""
        begun = bool(self.messages) and self.messages[0]["role"] == "system"
        del self.messages[begun:]
        self._state, self._script = None, self._nothing

    def _rendered(self, more: Sequence[Message], answer_follows: bool = True) -> str:
        tokenizer = self._decoder.target.tokenizer
        messages = [*self.messages, *more]
        return chat_text(tokenizer, messages, answer_follows=answer_follows, **self._form)

    def _request(self, number: Any, ids: list[int], options: Mapping[str, Any]) -> Any:
        return make_requests([ids], [number], {**self._options, **options})[0]

    def _turn(
        self, message: str, options: Mapping[str, Any], per_chunk: int | None = None
    ) -> Generator[Chunk, None, Generation]:
        """The rounds of a turn: what is new after each `per_chunk` of them, and at last the answer."""
        if not isinstance(message, str):
            raise UserError(f"A message is text, not of type {type(message).__name__}.")
        said = {"role": "user", "content": message}
        script = self._script.encode(self._rendered([said]))
        context = self._decoder.target.config.context
        if len(script.ids) >= context:
            raise UserError(
                f"The conversation has {len(script.ids)} tokens with this message, and the context of {context} "
                "must hold the answer, too: take turns back (undo), begin anew (reset) or say less."
            )
        number = sum(message["role"] == "user" for message in self.messages)
        row = self._decoder._encode(self._request(number, script.ids, options))
        if self._open is not None:
            try:
                self._open.close()
            except ValueError:  # it is running
                raise UserError(
                    "A conversation has one turn at a time: another thread is in one."
                ) from None
        self._open = self._rounds(row, per_chunk)

        def rounds(turn: Generator[Chunk, None, Generation]) -> Generator[Chunk, None, Generation]:
            answer = yield from turn
            after = script.answered(answer.token_ids)
            self.messages += [said, self._answered(said, after, answer.text)]
            self._script = after
            return answer

        return rounds(self._open)

    def _answered(self, said: Message, script: Transcript, text: str) -> dict[str, Any]:
        """An answer as a message: without the spaces around it where the template has its own."""
        for content in (text, text.strip()):
            message = {"role": "assistant", "content": content}
            try:
                if script.begins(self._rendered([said, message], answer_follows=False)):
                    return message
            except UserError:  # the next turn says so
                break
        return {"role": "assistant", "content": text.strip()}

    def _rounds(self, row: Any, per_chunk: int | None) -> Generator[Chunk, None, Generation]:
        """Reads what is new of a prompt, then decodes."""
        decoder, ids, request = self._decoder, row.ids, row.request
        spent = decoder.compile_time_s
        caches, kept, cached, capacity = self._caches(ids, request.max_new_tokens)
        tokens = np.zeros((1, capacity), np.int32)
        tokens[0, : len(ids)] = ids
        numbers = (len(ids), kept, request.key)
        length, keep, key = (np.asarray([number], np.int32) for number in numbers)
        rows = (tokens, length, keep, decoder._sampling([row]), key)
        args = (decoder.params, caches, *put_rows(rows, decoder.target.sharding))
        resume, run = decoder._compiled(decoder.loop.resume, args, capacity)
        compiling = decoder.compile_time_s - spent

        self._state, began = None, time.perf_counter()  # its caches are given away
        self._state = resume(*args)
        del args, caches
        jax.block_until_ready(self._state)
        prefill = time.perf_counter() - began
        seen, going, host = len(ids), True, None
        while going:
            self._state = run(decoder.params, self._state, jnp.int32(per_chunk or _ROUNDS_FOREVER))
            at = self._state
            host = to_host((at.text.tokens, at.text.length, at.prompt_length, at.stats))
            new = slice(seen, int(host[1][0]))
            seen, stats = new.stop, host[3]
            if per_chunk is not None and new.stop > new.start:
                yield Chunk(0, host[0][0, new].tolist(), decoder._names(stats.source[0, new]))
            going = stats.finish[0] == RUNNING
        times = (time.perf_counter() - began, prefill, compiling)
        try:
            answer = decoder._answer(request, host, 0, times)
        except RunError:  # of scores that were not finite, keys may be neither
            self._state = None
            raise
        stats = dataclasses.replace(answer.stats, num_cached_tokens=cached)
        return dataclasses.replace(answer, stats=stats)

    def _caches(self, ids: Sequence[int], max_new_tokens: int) -> tuple[Caches, int, int, int]:
        """Caches; how many tokens their text and the prompt begin with alike, and how many of them the target
        has read; the capacity.
        """
        decoder, state = self._decoder, self._state
        loop, params = decoder.loop, decoder.params
        capacity, kept = decoder.capacity(len(ids), max_new_tokens), 0
        if state is not None and not any(x.is_deleted() for x in jax.tree.leaves(state)):
            tokens, length = to_host((state.text.tokens, state.text.length))
            old = tokens[0, : length[0]].tolist()
            kept = _common(old, ids)
            # What has been read but is not kept must be cut off.
            had = tokens.shape[1] - loop.window
            if rewinds(loop.target) or (kept >= len(old) - 1 and capacity <= had):
                caches = (state.view, state.drafts)
                if capacity > had:
                    caches = _enlarge(loop, params, caches, capacity)
                return caches, kept, min(kept, len(old) - 1, len(ids) - 1), max(capacity, had)
        self._state = None
        return _empty(loop, params, capacity), 0, 0, capacity


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


@functools.partial(jax.jit, static_argnums=(0, 2))
def _empty(loop: DecodeLoop, params: Params, capacity: int) -> Caches:
    return loop.empty(params, 1, capacity)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _enlarge(loop: DecodeLoop, params: Params, caches: Caches, capacity: int) -> Caches:
    """The same in larger buffers."""
    view, drafts = loop.empty(params, 1, capacity)

    def copy(new: Any, old: Any) -> Any:
        return lax.dynamic_update_slice(new, old, (0,) * new.ndim)

    view = jax.tree.map(copy, view, caches[0])
    if loop.drafter.info.rewinds:
        drafts = jax.tree.map(copy, drafts, caches[1])
    return view, drafts
