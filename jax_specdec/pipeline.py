"""Text in, text out: batching, bucketing and statistics around the compiled loop."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import NoneType
from typing import TYPE_CHECKING, Any, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np

from jax_specdec import display, progress
from jax_specdec.answers import answer_of, names_of
from jax_specdec.checkpoints.targets import Target
from jax_specdec.core.acceptance import MATCH, Acceptance
from jax_specdec.core.loop import DecodeLoop, LoopState
from jax_specdec.core.plain import NoDrafter
from jax_specdec.core.processors import Processor
from jax_specdec.core.sharding import check_agreement, to_host
from jax_specdec.core.stats import RUNNING
from jax_specdec.encoding import Encoded, Encoder
from jax_specdec.errors import UserError, a_kind
from jax_specdec.generation import Chunk, Generation, Request, make_requests, samples_of
from jax_specdec.options import Options
from jax_specdec.programs import Programs
from jax_specdec.progress import check_progress
from jax_specdec.specs.build import LoadedDrafter
from jax_specdec.streaming import Pieces, Stream
from jax_specdec.text.chat import Message
from jax_specdec.text.detokenize import TextStream
from jax_specdec.text.inputs import check_count, split
from jax_specdec.text.token_bytes import TokenBytes
from jax_specdec.tuning.round_costs import Given

if TYPE_CHECKING:
    from jax_specdec.conversation import Conversation

_ROUNDS_FOREVER = np.iinfo(np.int32).max
# Where nobody listens the device still comes back about so often (seconds), for Ctrl-C and the bar.
_SLICE = 0.6

One = str | Request | Sequence[int] | Sequence[Message]
Several = Sequence[str] | Sequence[Request] | Sequence[Sequence[int] | Sequence[Message]]


class Settings(Options, total=False):
    """What a call of a decoder takes."""

    batch_size: int
    progress: bool | None


class SpeculativeDecoder:
    """Decodes prompts with one target and one drafter.

    Programs are compiled ahead of time, one pair (prefill, rounds) per text capacity, batch size and
    number of stop-string states, each in powers of two; `compilations` counts them.

    Several threads may use one decoder: they take turns. After Ctrl-C, or an error in a callback, it
    decodes the next prompt as if nothing had been.

    Args:
      drafter: as loaded for this target; default: plain decoding.
      rule, processors, logprobs, margins: see `DecodeLoop`.
      budget: whether rounds draft as deep and verify as wide as pays (`core.budget`), or all that they can.
      costs: of rounds, see `tuning.round_costs`.

    Raises:
      UserError: a drafter that was loaded for another target, or costs that are not of these rounds.
    """

    def __init__(
        self,
        target: Target,
        drafter: LoadedDrafter | None = None,
        *,
        rule: Acceptance = MATCH,
        processors: Sequence[Processor] = (),
        logprobs: bool = False,
        margins: bool = False,
        budget: bool = True,
        costs: Given = None,
    ):
        if not isinstance(target, Target):
            raise UserError(f"A decoder takes a target of `load_target`, not {a_kind(target)}.")
        if not isinstance(drafter, (LoadedDrafter, NoneType)):
            raise UserError(f"A decoder takes a drafter of `load_drafter`, not {a_kind(drafter)}.")
        if not isinstance(rule, Acceptance):
            raise UserError(f"rule is an acceptance rule, as in Match(), not {a_kind(rule)}.")
        if not isinstance(budget, bool):
            raise UserError(f"budget is True or False, not {a_kind(budget)}.")
        self.target = target
        self._loaded = drafter or LoadedDrafter(NoDrafter(), {}, "none")
        self._loaded.check_target(target)
        parts = (target.decoder, self._loaded.drafter, rule, tuple(processors))
        loop = DecodeLoop(*parts, logprobs=logprobs, margins=margins)
        self.loop = loop.budgeted() if budget else loop
        self.params = {"target": target.params, "drafters": self._loaded.params}
        self.programs = Programs(target, self.loop, self._loaded, self.params, costs)
        self.encoder = Encoder(target)
        # Held while the device works, never while a caller's code runs.
        self.lock = threading.Lock()

    @property
    def loaded(self) -> LoadedDrafter:
        """The drafter; another one needs another decoder."""
        return self._loaded

    @property
    def token_bytes(self) -> TokenBytes | None:
        """How the target's tokenizer spells, None without one."""
        return self.encoder.token_bytes

    def encode(self, prompt: Any) -> list[int]:
        """See `Encoder.encode`."""
        return self.encoder.encode(prompt)

    def capacity(self, longest: int, max_new_tokens: int) -> int:
        """See `Encoder.capacity`."""
        return self.encoder.capacity(longest, max_new_tokens)

    @property
    def compilations(self) -> int:
        return self.programs.compilations

    @property
    def compile_time_s(self) -> float:
        return self.programs.seconds

    def __repr__(self) -> str:
        rule = self.loop.rule.name
        exact = "" if self.loop.rule.exact else ", NOT exact"
        return f"SpeculativeDecoder({self.target!r}, {self._loaded!r}, rule {rule}{exact})"

    def _repr_html_(self) -> str:
        found = self._loaded
        facts = {
            "target": repr(self.target),
            "drafter": found.spec + (f", {found.reason}" if found.reason else ""),
            "acceptance": self.loop.rule.name + ("" if self.loop.rule.exact else " (NOT exact)"),
            "widths of rounds": ", ".join(map(str, self.loop.widths or (self.loop.nodes,))),
            "programs": f"{self.compilations}, compiled in {self.compile_time_s:.1f} s",
        }
        return display.facts_html("SpeculativeDecoder", facts)

    @overload
    def __call__(
        self, prompt: One, *, n: None = None, **options: Unpack[Settings]
    ) -> Generation: ...
    @overload
    def __call__(self, prompt: One, *, n: int, **options: Unpack[Settings]) -> list[Generation]: ...
    @overload
    def __call__(
        self, prompt: Several, *, n: None = None, **options: Unpack[Settings]
    ) -> list[Generation]: ...
    @overload
    def __call__(
        self, prompt: Several, *, n: int, **options: Unpack[Settings]
    ) -> list[list[Generation]]: ...
    @overload
    def __call__(
        self, prompt: Any, *, n: int | None = None, **options: Unpack[Settings]
    ) -> Any: ...
    def __call__(
        self,
        prompt: Any,
        *,
        n: int | None = None,
        batch_size: int = 1,
        progress: bool | None = None,
        **options: Any,
    ) -> Any:
        """The answer to a prompt, or the answers to a list of them.

        Args:
          prompt: a text, a chat (messages with `role` and `content`), token ids, what a tokenizer returns,
            or a `Request`; or a list of these, or an iterator, or an array of two dimensions.
          n: so many samples of each prompt, as a list; the first is the one without `n`, and sample i has
            the key `generation.sample_key(key, i)`.
          batch_size, progress, options: as in `generate`.

        Raises:
          UserError, RunError: as `generate`.
        """
        prompts, alone = split(prompt)
        beside = ("n", "batch_size", "progress")
        requests = make_requests(prompts, None, options, alone=alone, beside=beside)
        if n is not None:
            requests = samples_of(requests, n)
        answers = list(self.generate(requests, batch_size=batch_size, progress=progress))
        if n is not None:
            grouped = [answers[i : i + n] for i in range(0, len(answers), n)]
            return grouped[0] if alone else grouped
        return answers[0] if alone else answers

    def stream(
        self,
        prompt: Any,
        *,
        rounds_per_chunk: int = 2,
        progress: bool | None = None,
        **options: Unpack[Options],
    ) -> Stream:
        """The answer to one prompt piece by piece, as it is decoded; also for `async for`.

        Args:
          prompt: one, as in a call of the decoder.
          rounds_per_chunk: passes of the target before pieces come.

        Raises:
          UserError, RunError: as `generate`.
        """
        prompts, alone = split(prompt)
        if not alone:
            raise UserError(f"A stream is of one prompt: got {a_kind(prompt)} of several.")
        check_progress(progress)
        beside = ("rounds_per_chunk", "progress")
        requests = make_requests(prompts, None, options, alone=True, beside=beside)
        (row,) = encoded = self.prepare(requests, 1, rounds_per_chunk)
        text = None
        if self.token_bytes is not None:
            text = TextStream(self.token_bytes, row.request.stop, row.ids)
        return Stream(self._events(encoded, 1, rounds_per_chunk, progress), Pieces(text))

    def chat(
        self,
        system: str | None = None,
        *,
        messages: Sequence[Message] = (),
        template: str | None = None,
        template_args: Mapping[str, Any] | None = None,
        **options: Unpack[Options],
    ) -> "Conversation":
        """A conversation, each turn of which reads only what is new of it; see `Conversation`.

        Args:
          system: the system message. messages: a conversation so far, to go on with.
          template: Jinja, in place of the tokenizer's chat template.
          template_args: what else the template is given, such as `{"enable_thinking": False}`.
          options: fields of `Request`, for all turns.

        Raises:
          UserError: no tokenizer or template, a template that fails, or options out of range.
        """
        from jax_specdec.conversation import Conversation

        form = {"template": template, "template_args": template_args}
        return Conversation(self, system, messages=messages, **form, **options)

    def generate(
        self,
        prompts: Iterable[Any],
        *,
        batch_size: int = 1,
        ids: Sequence[Any] | None = None,
        on_chunk: Callable[[Chunk], None] | None = None,
        rounds_per_chunk: int = 8,
        progress: bool | None = None,
        **options: Unpack[Options],
    ) -> Iterator[Generation]:
        """Answers prompts in order, `batch_size` at a time, while the answers are asked for.

        Args:
          prompts: several, each as in a call of the decoder.
          ids: names for the answers; default: the prompt's number.
          on_chunk: called with new tokens every `rounds_per_chunk` rounds.
          progress: whether to say what is compiled, and to show a bar; default: on a terminal and in a
            notebook, of what takes more than a second. Commands say what is compiled wherever they run.
          options: fields of `Request`, each one value, or a list with one per prompt.

        Raises:
          UserError: any value out of range, before anything runs.
          RunError: the target's scores for a prompt were not finite, or every token was forbidden.
        """
        items, alone = split(prompts)
        if alone:
            raise UserError(f"Prompts come in a list, one prompt too: got {a_kind(prompts)} alone.")
        check_progress(progress)
        if not (on_chunk is None or callable(on_chunk)):
            raise UserError(f"on_chunk must be a function of a Chunk, not {a_kind(on_chunk)}.")
        beside = ("batch_size", "ids", "on_chunk", "rounds_per_chunk", "progress")
        requests = make_requests(items, ids, options, beside=beside)
        encoded = self.prepare(requests, batch_size, rounds_per_chunk)
        if self.target.sharding is None and batch_size not in self.programs.batches:
            # Fewer prompts than rows need no copies of themselves.
            batch_size = min(batch_size, len(encoded))

        def answers() -> Iterator[Generation]:
            per_chunk = None if on_chunk is None else rounds_per_chunk
            for event in self._events(encoded, batch_size, per_chunk, progress):
                if isinstance(event, Generation):
                    yield event
                elif on_chunk is not None:
                    on_chunk(event)

        return answers()

    def prepare(
        self, requests: Sequence[Request], batch_size: int, per_chunk: int
    ) -> list[Encoded]:
        """The requests on token ids, all that they ask for checked."""
        check_count("batch_size", batch_size)
        check_count("rounds_per_chunk", per_chunk)
        encoded = self.encoder.requests(requests)
        check_agreement((encoded, batch_size))
        sharding = self.target.sharding
        rows = 1 if sharding is None else sharding.size("batch")
        if batch_size % rows:
            raise UserError(
                f"batch_size is {batch_size} and does not divide over {rows} devices: make it a multiple."
            )
        return encoded

    def _events(
        self, encoded: Sequence[Encoded], batch_size: int, per_chunk: int | None, shown: bool | None
    ) -> Iterator[Chunk | Generation]:
        """Chunks every `per_chunk` rounds, unless that is None, and answers as batches end.

        Nothing outlives an exception but compiled programs: the state is of one batch, and its buffers,
        which each run of rounds takes over, are never used again.
        """
        speaks = jax.process_index() == 0
        told, shown = progress.told(shown) and speaks, progress.watched(shown) and speaks
        context, bar = self.target.config.context, None
        room = [min(row.request.max_new_tokens, context - len(row.ids)) for row in encoded]
        about = (self.loop, self.token_bytes, self.target.decoder.dtype)
        with contextlib.ExitStack() as stack:
            for first in range(0, len(encoded), batch_size):
                batch = encoded[first : first + batch_size]
                count = len(batch)
                # A short last batch repeats its last row, so that it needs no program of its own.
                batch = [*batch, *[batch[-1]] * (batch_size - count)]
                with self.lock:
                    spent = self.compile_time_s
                    arrays, capacity = self.encoder.arrays(batch)
                    start, run = programs = self.programs.get(arrays, capacity, told)
                    costs = self.programs.costs(arrays, programs, told)
                    compiling = self.compile_time_s - spent
                if bar is None:  # its clock starts behind the first compilation
                    watched = progress.bar(sum(room), shown and per_chunk is None, unit="token")
                    bar = stack.enter_context(watched)
                began = time.perf_counter()
                with self.lock:
                    state = jax.block_until_ready(start(self.params, *arrays, costs=costs))
                prefill = time.perf_counter() - began
                state = yield from self._rounds(run, state, first, count, per_chunk, prefill, bar)
                wall = time.perf_counter() - began
                text, lengths = state.text, state.prompt_length
                host = to_host((text.tokens, text.length, lengths, state.stats))
                for place in range(count):
                    times = (wall, prefill, compiling)
                    answer = answer_of(batch[place].request, host, place, times, *about)
                    bar.total -= room[first + place] - len(answer.token_ids)
                    yield answer

    def _rounds(
        self,
        run: Callable,
        state: LoopState,
        first: int,
        rows: int,
        per_chunk: int | None,
        prefill: float,
        bar: Any,
    ) -> Any:
        """Rounds until all rows have ended, in slices; yields chunks where somebody listens."""
        seen = to_host(state.text.length).copy()
        rounds = per_chunk or max(1, int(_SLICE / max(prefill, 1e-3)))
        if per_chunk is None and jax.process_count() > 1:  # processes must run the same programs
            rounds = _ROUNDS_FOREVER
        while True:
            began = time.perf_counter()
            with self.lock:
                state = run(self.params, state, jnp.int32(rounds))
                length, finish = to_host((state.text.length, state.stats.finish))
            bar.update(int((length - seen)[:rows].sum()))
            if per_chunk is not None:
                tokens, source = to_host((state.text.tokens, state.stats.source))
                for row in range(rows):
                    if length[row] > seen[row]:
                        new = (row, slice(int(seen[row]), int(length[row])))
                        names = names_of(source[new], self.loop.sources)
                        yield Chunk(first + row, tokens[new].tolist(), names)
            elif rounds < _ROUNDS_FOREVER:
                rounds = max(1, int(rounds * _SLICE / max(time.perf_counter() - began, 1e-3)))
            seen = length
            if (finish != RUNNING).all():
                return state

    def peak_memory(self) -> int:
        """The most bytes that one of its compiled programs takes so far, parameters included."""
        return self.programs.peak_memory()
