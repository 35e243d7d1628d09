"""Conversations: turns of a chat, with what was read kept in the caches of target and drafters.

A turn renders the whole conversation in the chat template, compares its tokens with those that the caches hold,
cuts the caches back to what both begin with, and reads the rest. Texts are those of no caches kept: token for
token in float32, but for near ties, since an answer's keys were computed a few tokens at a time.
"""

import dataclasses
import functools
import time
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_specdec import progress
from jax_specdec._types import Params
from jax_specdec.answers import answer_of, names_of
from jax_specdec.core.context import TargetView
from jax_specdec.core.drafter import States
from jax_specdec.core.loop import DecodeLoop, LoopState
from jax_specdec.core.model import rewinds
from jax_specdec.core.sharding import put_rows, to_host
from jax_specdec.core.stats import RUNNING
from jax_specdec.encoding import Encoded
from jax_specdec.errors import RunError, UserError, a_kind, shown
from jax_specdec.generation import Chunk, Generation, Request, make_requests
from jax_specdec.options import Options
from jax_specdec.streaming import Pieces, Stream
from jax_specdec.text.chat import Message, chat_text, check_messages
from jax_specdec.text.detokenize import TextStream
from jax_specdec.text.transcript import Transcript

if TYPE_CHECKING:
    from jax_specdec.pipeline import SpeculativeDecoder

Caches = tuple[TargetView, States]
Events = Generator[Chunk | Generation, None, None]


class Conversation:
    """A chat of several turns; `SpeculativeDecoder.chat` makes one.

    A turn that fails, is interrupted, or whose stream is not read to its end leaves the conversation as it was.

    Attributes:
      messages: `{"role": ..., "content": ...}` of all turns so far. They may be changed between turns: what
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
        **options: Unpack[Options],
    ):
        tokenizer = decoder.target.tokenizer
        if tokenizer is None or decoder.token_bytes is None:
            raise UserError("A chat needs a tokenizer: load the target with one.")
        self._decoder, self._options = decoder, options
        self._form = {"template": template, "template_args": template_args}
        self._nothing = self._script = Transcript(tokenizer, decoder.token_bytes)
        self._state: LoopState | None = None
        self._turn: Events | None = None
        self.messages = check_messages(messages)
        if system is not None:
            self.system = system
        # What is wrong with the options, and with the template, is said before the first message.
        decoder.prepare([self._request(0, [0], {})], 1, 1)
        self._rendered([{"role": "user", "content": "Hello"}])

    @property
    def system(self) -> str | None:
        """The system message, which may be set; None without one."""
        begun = bool(self.messages) and self.messages[0]["role"] == "system"
        return self.messages[0]["content"] if begun else None

    @system.setter
    def system(self, text: str | None) -> None:
        if not (text is None or isinstance(text, str)):
            raise UserError(f"A system message is text, not {a_kind(text)}.")
        given = [] if text is None else [{"role": "system", "content": text}]
        self.messages[: self.system is not None] = given

    def __call__(self, message: str, **options: Unpack[Options]) -> Generation:
        """The answer to a message.

        Args:
          options: fields of `Request` for this turn alone.

        Raises:
          UserError: options out of range, a template that fails, or a conversation that is longer than the
            model's context; it can go on after `undo` or `reset`.
          RunError: as `SpeculativeDecoder.generate`.
        """
        stream = self.stream(message, rounds_per_chunk=8, **options)
        for _ in stream:
            pass
        return stream.generation

    def stream(
        self, message: str, *, rounds_per_chunk: int = 2, **options: Unpack[Options]
    ) -> Stream:
        """The answer to a message piece by piece, as it is decoded, as `SpeculativeDecoder.stream`.

        An answer that is still being streamed when the next turn begins is given up.
        """
        if not isinstance(message, str):
            raise UserError(f"A message is text, not {a_kind(message)}.")
        if not message:
            raise UserError("The message is empty.")
        said = {"role": "user", "content": message}
        script = self._script.encode(self._rendered([said]))
        context = self._decoder.target.config.context
        if len(script.ids) >= context:
            raise UserError(
                f"With this message the conversation has {len(script.ids)} tokens, and the context of {context} "
                "must hold the answer, too: say less, take turns back (undo) or begin anew (reset)."
            )
        number = sum(message["role"] == "user" for message in self.messages)
        request = self._request(number, script.ids, options)
        (row,) = self._decoder.prepare([request], 1, rounds_per_chunk)
        self._give_up()
        self._turn = self._events(said, script, row, rounds_per_chunk)
        text = TextStream(self._decoder.token_bytes, request.stop, row.ids)
        return Stream(self._turn, Pieces(text))

    def undo(self) -> None:
        """Takes back the last turn: the user's last message and what follows it.

        Raises:
          UserError: there is none.
        """
        self._give_up()
        for place in reversed(range(len(self.messages))):
            if self.messages[place]["role"] == "user":
                del self.messages[place:]
                return
        raise UserError("There is no turn to undo.")

    def reset(self) -> None:
        """Begins anew, with the same system message and empty caches."""
        self._give_up()
        del self.messages[self.system is not None :]
        self._state, self._script = None, self._nothing

    def __repr__(self) -> str:
        said = [m["content"] for m in self.messages if m["role"] == "user"]
        last = f", the last {shown(said[-1], 40)} and its answer" if said else ""
        return f"Conversation({len(self.messages)} messages{last})"

    def _give_up(self) -> None:
        """Ends a turn that has not come to its end."""
        if self._turn is not None:
            try:
                self._turn.close()
            except ValueError:  # it is running
                raise UserError(
                    "Another thread is in a turn of this conversation: have one at a time."
                ) from None

    def _rendered(self, more: Sequence[Message], answer_follows: bool = True) -> str:
        messages = [*self.messages, *more]
        tokenizer = self._decoder.target.tokenizer
        form = {**self._form, "answer_follows": answer_follows, "instead": "use generate"}
        return chat_text(tokenizer, messages, **form)

    def _request(self, number: int, ids: list[int], options: Mapping[str, Any]) -> Request:
        options = {**self._options, **options}
        beside = ("system", "messages", "template", "template_args", "rounds_per_chunk")
        return make_requests([ids], [number], options, alone=True, beside=beside)[0]

    def _events(self, said: Message, script: Transcript, row: Encoded, per_chunk: int) -> Events:
        """The turn's chunks and answer; what was said counts once that is there."""
        for event in self._rounds(row, per_chunk):
            if isinstance(event, Generation):
                script = script.answered(event.token_ids)
                self.messages += [dict(said), self._answered(said, script, event.text)]
                self._script = script
            yield event

    def _answered(self, said: Message, script: Transcript, text: str) -> dict[str, Any]:
        """An answer as a message: without the spaces around it where the template has its own."""
        whole = {"role": "assistant", "content": text}
        try:
            if script.begins(self._rendered([said, whole], answer_follows=False)):
                return whole
        except UserError:  # the next turn will say so
            return whole
        return {"role": "assistant", "content": text.strip()}

    def _rounds(self, row: Encoded, per_chunk: int) -> Events:
        """Reads what is new of a prompt, then decodes.

        `self._state` is the newest state all the time, so that an interrupted turn leaves what it has read.
        """
        decoder, loop = self._decoder, self._decoder.loop
        with decoder.lock:
            spent = decoder.compile_time_s
            caches, common, cached, least = self._caches(row)
            arrays, capacity = decoder.encoder.arrays([row], least)
            (kept,) = put_rows((np.asarray([common], np.int32),), decoder.target.sharding)
            told = progress.told() and jax.process_index() == 0
            resumed = (caches, kept)
            resume, run = programs = decoder.programs.get(arrays, capacity, told, resumed=resumed)
            fresh = functools.partial(_fresh, loop, decoder.params, capacity)
            costs = decoder.programs.costs(arrays, programs, told, fresh)
            if decoder.target.sharding is not None:  # rounds may have left them elsewhere
                resumed = jax.device_put(resumed, resume.input_shardings[0][5:])
            compiling = decoder.compile_time_s - spent
            began, self._state = time.perf_counter(), None  # its caches are given away
            self._state = resume(decoder.params, *arrays, *resumed, costs=costs)
            del caches, resumed
            jax.block_until_ready(self._state)
        prefill, seen = time.perf_counter() - began, len(row.ids)
        while True:
            with decoder.lock:
                self._state = at = run(decoder.params, self._state, jnp.int32(per_chunk))
                host = to_host((at.text.tokens, at.text.length, at.prompt_length, at.stats))
            new, stats = slice(seen, int(host[1][0])), host[3]
            seen = new.stop
            if new.stop > new.start:
                yield Chunk(
                    0, host[0][0, new].tolist(), names_of(stats.source[0, new], loop.sources)
                )
            if stats.finish[0] != RUNNING:
                break
        times = (time.perf_counter() - began, prefill, compiling)
        about = (loop, decoder.token_bytes, decoder.target.decoder.dtype)
        try:
            answer = answer_of(row.request, host, 0, times, *about)
        except RunError:  # where scores were not finite, keys may not be either
            self._state = None
            raise
        stats = dataclasses.replace(answer.stats, num_cached_tokens=cached)
        yield dataclasses.replace(answer, stats=stats)

    def _caches(self, row: Encoded) -> tuple[Caches, int, int, int]:
        """Caches, and what they are worth.

        Returns:
          The caches; how many tokens their text and the prompt begin with alike; how many of these the target
          has read; and the capacity.
        """
        decoder, state, ids = self._decoder, self._state, row.ids
        loop, params = decoder.loop, decoder.params
        capacity = decoder.capacity(len(ids), row.request.max_new_tokens)
        if state is not None and not any(leaf.is_deleted() for leaf in jax.tree.leaves(state)):
            tokens, length = to_host((state.text.tokens, state.text.length))
            old, had = tokens[0, : length[0]].tolist(), tokens.shape[1] - loop.window
            common = _common(old, ids)
            if rewinds(loop.target) or (common >= len(old) - 1 and capacity <= had):
                caches = (state.view, state.drafts)
                if capacity > had:
                    caches = _enlarged(loop, params, caches, capacity)
                return caches, common, min(common, len(old) - 1, len(ids) - 1), max(capacity, had)
        self._state = None
        return _empty(loop, params, capacity), 0, 0, capacity


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with.

    >>> _common([1, 2, 3], [1, 2, 4, 5])
    2
    """
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


@functools.partial(jax.jit, static_argnums=(0, 2))
def _empty(loop: DecodeLoop, params: Params, capacity: int) -> Caches:
    return loop.empty(params, 1, capacity)


def _fresh(loop: DecodeLoop, params: Params, capacity: int) -> tuple[Caches, Any]:
    """What `resume` takes of a conversation that has not begun."""
    return _empty(loop, params, capacity), jnp.zeros((1,), jnp.int32)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _enlarged(loop: DecodeLoop, params: Params, caches: Caches, capacity: int) -> Caches:
    """The same in larger buffers; drafters that cannot be copied so begin anew."""
    view, drafts = loop.empty(params, 1, capacity)

    def copy(new: Any, old: Any) -> Any:
        return lax.dynamic_update_slice(new, old, (0,) * new.ndim)

    view = jax.tree.map(copy, view, caches[0])
    return view, jax.tree.map(copy, drafts, caches[1]) if loop.drafter.info.rewinds else drafts
