"""Text in, text out: batching, bucketing, compilation and statistics around the compiled loop."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_specdec.checkpoints.memory import available_memory, check_fits, memory_plan
from jax_specdec.checkpoints.targets import Target
from jax_specdec.core.acceptance import MATCH, Acceptance
from jax_specdec.core.loop import DecodeLoop, LoopState
from jax_specdec.core.plain import NoDrafter
from jax_specdec.core.processors import Processor
from jax_specdec.core.sampling import Sampling, make_sampling
from jax_specdec.core.sharding import check_agreement, put_rows, shapes_at, to_host
from jax_specdec.core.stats import FAILED, FINISH_REASONS, RUNNING
from jax_specdec.errors import RunError, UserError
from jax_specdec.generation import (
    SAMPLED,
    Chunk,
    Generation,
    Request,
    Stats,
    each,
    make_requests,
    near_tie,
)
from jax_specdec.specs.build import LoadedDrafter
from jax_specdec.text.detokenize import answer_text
from jax_specdec.text.stop_strings import special_stops, stop_rows
from jax_specdec.text.token_bytes import TokenBytes

# Text buffers come in powers of two from here up to the context: so many programs at most.
SMALLEST_CAPACITY = 128
_ROUNDS_FOREVER = np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True)
class _Encoded:
    """A request with its prompt, stop tokens and bad words as token ids."""

    request: Request
    ids: list[int]
    stop_ids: tuple[int, ...]
    bad_words: tuple[tuple[int, ...], ...]


class SpeculativeDecoder:
    """Decodes prompts with one target and one drafter.

    Programs are compiled ahead of time, one pair (prefill, rounds) per text capacity, batch size and
    number of stop-string states, each in powers of two; `compilations` counts them.

    Args:
      rule, processors, logprobs, margins: see `DecodeLoop`.
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
    ):
        self.target = target
        self._loaded = drafter or LoadedDrafter(NoDrafter(), {}, "none")
        self.loop = DecodeLoop(
            target.decoder,
            self._loaded.drafter,
            rule,
            tuple(processors),
            logprobs=logprobs,
            margins=margins,
        )
        self.params = {"target": target.params, "drafters": self._loaded.params}
        self.compilations = 0
        self.compile_time_s = 0.0
        self._programs: dict[Any, tuple[Callable, Callable]] = {}
        self._batches: set[int] = set()
        self.token_bytes = None if target.tokenizer is None else TokenBytes(target.tokenizer)

    @property
    def loaded(self) -> LoadedDrafter:
        """The drafter; another one needs another decoder."""
        return self._loaded

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt, checked.

        Raises:
          UserError: an empty prompt, one longer than the context, or ids outside the vocabulary.
        """
        if isinstance(prompt, str):
            if not prompt:
                raise UserError("The prompt is empty.")
            if self.target.tokenizer is None:
                raise UserError("A text prompt needs a tokenizer: load the target with one.")
            ids = self.target.tokenizer(prompt, verbose=False)["input_ids"]
        else:
            try:
                array = np.asarray(prompt)
            except ValueError:  # lists of different lengths
                array = np.asarray(None)
            if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
                kind = type(prompt).__name__
                raise UserError(f"A prompt must be text or a list of token ids, got a {kind}.")
            ids = array.tolist()
        if not ids:
            raise UserError("The prompt is empty.")
        context, vocab = self.target.config.context, self.target.vocab_size
        if len(ids) >= context:
            raise UserError(
                f"The prompt has {len(ids)} tokens, but the context of {context} must also hold at least "
                "one new token."
            )
        if min(ids) < 0 or max(ids) >= vocab:
            raise UserError(f"The prompt has token ids outside the vocabulary of {vocab}.")
        return ids

    def capacity(self, longest: int, max_new_tokens: int) -> int:
        """The text buffer for a prompt of `longest` tokens: a power of two, at most the context."""
        context = self.target.config.context
        wanted = min(longest + max_new_tokens, context)
        size = SMALLEST_CAPACITY
        while size < wanted:
            size *= 2
        return min(size, context)

    def _compiled(
        self, tokens: Any, lengths: Any, sampling: Sampling, ids: Any, capacity: int
    ) -> tuple[Callable, Callable]:
        shapes = jax.tree.map(lambda x: (x.shape, str(x.dtype)), (tokens, sampling))
        key = (capacity, str(jax.tree.leaves(shapes)))
        if key not in self._programs:
            config, dtype = self.target.config, self.target.decoder.dtype
            # Without slots: the whole state is counted as it is, the drafter's caches with it.
            plan = memory_plan(config, dtype, tokens.shape[0], 0, width=self.loop.nodes)
            args = (self.params, tokens, lengths, sampling, ids)
            start = jax.jit(self.loop.start, static_argnames=("capacity",))
            state = start.eval_shape(*args, capacity=capacity)
            held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
            check_fits(dataclasses.replace(plan, parameters=0, cache=held), available_memory())
            began, places = time.perf_counter(), {}
            start = start.lower(*args, capacity=capacity).compile()
            if self.target.sharding is not None:
                # Rounds leave everything where the prefill puts it.
                state = shapes_at(state, start.output_shardings)
                places = {"out_shardings": start.output_shardings}
            run = (
                jax.jit(self.loop.run, donate_argnums=1, **places)
                .lower(self.params, state, jnp.int32(0))
                .compile()
            )
            self._programs[key] = (start, run)
            self._batches.add(tokens.shape[0])
            self.compilations += 2
            self.compile_time_s += time.perf_counter() - began
        return self._programs[key]

    def generate(
        self,
        prompts: Sequence[str | Sequence[int] | Request],
        *,
        batch_size: int = 1,
        ids: Sequence[Any] | None = None,
        on_chunk: Callable[[Chunk], None] | None = None,
        rounds_per_chunk: int = 8,
        **options: Any,
    ) -> Iterator[Generation]:
        """Answers prompts in order, `batch_size` at a time.

        Args:
          ids: names for the answers; default: the prompt's number.
          on_chunk: called with new tokens every `rounds_per_chunk` rounds.
          options: fields of `Request`, each one value, or a list with one per prompt.

        Raises:
          UserError: any value out of range, before anything runs.
          RunError: the target's scores for a prompt were not finite, or every token was forbidden.
        """
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}.")
        if rounds_per_chunk < 1:
            raise UserError(f"rounds_per_chunk must be at least 1, got {rounds_per_chunk}.")
        requests = make_requests(prompts, ids, options)
        encoded = each(requests, self._encode)
        check_agreement((encoded, batch_size))
        try:
            make_sampling(len(requests), **_settings(requests))
        except UserError:  # whose it is
            each(requests, lambda request: make_sampling(1, **_settings([request])))
            raise
        sharding = self.target.sharding
        if sharding is not None and batch_size % sharding.size("batch"):
            raise UserError(
                f"batch_size is {batch_size} and does not divide over {sharding.size('batch')} devices: make it "
                "a multiple."
            )
        if sharding is None and batch_size not in self._batches:
            # Fewer prompts than rows need no copies of themselves.
            batch_size = min(batch_size, len(encoded))
        return self._generate(encoded, batch_size, on_chunk, rounds_per_chunk)

    def _encode(self, request: Request) -> _Encoded:
        """The request on token ids, those of its values checked that `make_sampling` does not see."""
        ids, own = self.encode(request.prompt), self.token_bytes
        stop = request.stop
        if isinstance(stop, str) or not all(isinstance(item, str) for item in stop):
            raise UserError("Give stop strings as a tuple, or as a list with one tuple per prompt.")
        if "" in stop:
            raise UserError("A stop string must not be empty.")
        if stop and own is None:
            raise UserError("Stop strings need a tokenizer: load the target with one.")
        if stop:
            special_stops(own, stop)
        vocab = self.target.vocab_size
        given = {"stop token": request.stop_token_ids, "logit bias": request.logit_bias}
        for what, tokens in given.items():
            if any(not 0 <= token < vocab for token in tokens):
                raise UserError(f"A {what} has an id outside the vocabulary of {vocab}.")
        eos = () if request.ignore_eos else self.target.config.eos_ids
        words = tuple(word for item in request.bad_words for word in self._words(item))
        return _Encoded(request, ids, (*eos, *request.stop_token_ids), words)

    def _words(self, word: str | Sequence[int]) -> list[tuple[int, ...]]:
        """The token sequences of a bad word: as it begins a text, and as it follows a space."""
        vocab = self.target.vocab_size
        if not isinstance(word, str):
            if not word or any(not 0 <= token < vocab for token in word):
                raise UserError(f"A bad word must be tokens of the vocabulary of {vocab}.")
            return [tuple(word)]
        if self.target.tokenizer is None:
            raise UserError("Bad words as text need a tokenizer: load the target with one.")
        if not word:
            raise UserError("A bad word must not be empty.")
        spelled = self.target.tokenizer([word, f" {word}"], add_special_tokens=False)["input_ids"]
        return list(dict.fromkeys(map(tuple, spelled)))

    def _generate(
        self, encoded: Sequence[_Encoded], batch_size: int, on_chunk: Any, per_chunk: int
    ) -> Iterator[Generation]:
        for first in range(0, len(encoded), batch_size):
            batch = encoded[first : first + batch_size]
            count = len(batch)
            # A short last batch repeats its last row, so that it needs no program of its own.
            batch = [*batch, *[batch[-1]] * (batch_size - count)]
            sampling = put_rows(self._sampling(batch), self.target.sharding)
            longest = max(len(row.ids) for row in batch)
            capacity = self.capacity(longest, max(row.request.max_new_tokens for row in batch))
            tokens = np.zeros((batch_size, capacity), np.int32)
            for place, row in enumerate(batch):
                tokens[place, : len(row.ids)] = row.ids
            lengths = np.asarray([len(row.ids) for row in batch], np.int32)
            numbers = np.asarray([row.request.key for row in batch], np.int32)
            tokens, lengths, numbers = put_rows((tokens, lengths, numbers), self.target.sharding)
            spent = self.compile_time_s
            start, run = self._compiled(tokens, lengths, sampling, numbers, capacity)
            compiling = self.compile_time_s - spent

            began = time.perf_counter()
            state = start(self.params, tokens, lengths, sampling, numbers)
            jax.block_until_ready(state)
            prefill = time.perf_counter() - began
            state = self._run(run, state, first, count, on_chunk, per_chunk)
            wall = time.perf_counter() - began
            host = to_host((state.text.tokens, state.text.length, state.prompt_length, state.stats))
            for place in range(count):
                times = (wall, prefill, compiling)
                yield self._answer(batch[place].request, host, place, times)

    def _run(
        self, run: Callable, state: LoopState, first: int, rows: int, on_chunk: Any, per_chunk: int
    ) -> LoopState:
        """All rounds at once, or in chunks where somebody listens."""
        if on_chunk is None:
            state = run(self.params, state, jnp.int32(_ROUNDS_FOREVER))
            return jax.block_until_ready(state)
        seen = to_host(state.text.length).copy()
        while True:
            state = run(self.params, state, jnp.int32(per_chunk))
            length, tokens, source, finish = to_host(
                (state.text.length, state.text.tokens, state.stats.source, state.stats.finish)
            )
            for row in range(rows):
                if length[row] > seen[row]:
                    new = slice(int(seen[row]), int(length[row]))
                    names = self._names(source[row, new])
                    on_chunk(Chunk(first + row, tokens[row, new].tolist(), names))
            seen = length
            if (finish != RUNNING).all():
                return state

    def _sampling(self, batch: Sequence[_Encoded]) -> Sampling:
        table, start = None, -1
        strings = [row.request.stop for row in batch]
        if any(strings):
            prompts = [row.ids for row in batch]
            table, start = stop_rows(self.token_bytes, self.target.vocab_size, strings, prompts)
            states = 1 << max(3, (len(table) - 1).bit_length())
            table = np.pad(table, ((0, states - len(table)), (0, 0)))
        most = max(1, *(len(row.stop_ids) for row in batch))
        stops = [(*row.stop_ids, *(-1,) * (most - len(row.stop_ids))) for row in batch]
        return make_sampling(
            len(batch),
            **_settings([row.request for row in batch]),
            own_seed=[row.request.own_seed for row in batch],
            bad_words=[list(row.bad_words) for row in batch],
            stop_ids=np.asarray(stops, np.int32),
            stop_state=start,
            stop_table=table,
        )

    def peak_memory(self) -> int:
        """The most bytes that one of its compiled programs takes so far, parameters included."""

        def size(program: Any) -> int:
            found = program.memory_analysis()
            held = found.argument_size_in_bytes + found.output_size_in_bytes
            return held - found.alias_size_in_bytes + found.temp_size_in_bytes

        return max((size(p) for pair in self._programs.values() for p in pair), default=0)

    def _names(self, source: np.ndarray) -> list[str | None]:
        names = (None, *self._loaded.drafter.info.sources)
        return [names[i] for i in source.tolist()]

    def _answer(self, request: Request, host: Any, row: int, times: Any) -> Generation:
        tokens, length, prompt_length, stats = host
        wall, prefill, compiling = times
        if stats.finish[row] == FAILED:
            raise RunError(
                f"Prompt {request.id}: after {length[row] - prompt_length[row]} tokens the target's scores were "
                "not finite, or every token was forbidden. A checkpoint in float16 may overflow: try bfloat16 or "
                "float32."
            )
        span = slice(int(prompt_length[row]), int(length[row]))
        ids = tokens[row, span].tolist()
        text = ""
        if self.token_bytes is not None:
            before = tokens[row, : span.start].tolist()
            text = answer_text(self.token_bytes, before, ids, request.stop)
        rounds = int(stats.rounds[row])
        drafted, accepted = int(stats.drafted[row].sum()), int(stats.accepted[row].sum())
        per_drafter = {
            source: {
                "calls": int(stats.calls[row, i]),
                "drafted": int(stats.drafted[row, i]),
                "accepted": int(stats.accepted[row, i]),
            }
            for i, source in enumerate(self._loaded.drafter.info.sources, 1)
        }
        prompt = request.prompt if isinstance(request.prompt, str) else list(request.prompt)
        logprobs = None if stats.logprobs is None else stats.logprobs[row, span].tolist()
        margins, near_ties = None, None
        if stats.margins is not None:
            margins = stats.margins[row, span].tolist()
            near_ties = sum(m < near_tie(self.target.decoder.dtype) for m in margins)
        return Generation(
            id=request.id,
            prompt=prompt,
            text=text,
            token_ids=ids,
            finish_reason=FINISH_REASONS[int(stats.finish[row])],  # type: ignore[arg-type]
            stats=Stats(
                num_tokens=len(ids),
                num_spec_steps=rounds,
                num_draft_tokens=drafted,
                num_accepted_tokens=accepted,
                draft_acceptance_rate=accepted / drafted if drafted else 0.0,
                mean_acceptance_length=len(ids) / rounds if rounds else 0.0,
                accepted_per_pos=stats.accepted_per_pos[row].tolist(),
                per_drafter=per_drafter,
                wall_time_s=wall,
                prefill_time_s=prefill,
                compile_time_s=compiling,
                tokens_per_second=len(ids) / wall if wall else 0.0,
                near_ties=near_ties,
            ),
            logprobs=logprobs,
            margins=margins,
            sources=self._names(stats.source[row, span]),
        )


def _settings(requests: Sequence[Request]) -> dict[str, Any]:
    """What `make_sampling` takes of requests, a list for each setting."""
    return {name: [getattr(request, name) for request in requests] for name in SAMPLED}
