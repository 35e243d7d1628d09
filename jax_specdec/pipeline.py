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
from jax_specdec.core.stats import FINISH_REASONS, RUNNING
from jax_specdec.errors import UserError
from jax_specdec.generation import Chunk, Generation, Stats
from jax_specdec.specs.build import LoadedDrafter
from jax_specdec.text.detokenize import answer_text
from jax_specdec.text.stop_strings import special_stops, stop_rows
from jax_specdec.text.token_bytes import TokenBytes

# Two best scores closer than this may change places between a one-row and a T-row forward in float32.
NEAR_TIE = 1e-3
# Text buffers come in powers of two from here up to the context: so many programs at most.
SMALLEST_CAPACITY = 128
_ROUNDS_FOREVER = np.iinfo(np.int32).max


def _per_row(value: Any, count: int) -> list[Any]:
    """One value per prompt: a list is taken as such, anything else repeated."""
    if isinstance(value, (list, np.ndarray)):
        if len(value) != count:
            raise UserError(f"Got {len(value)} values for {count} prompts.")
        return list(value)
    return [value] * count


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
        logprobs: bool = True,
        margins: bool = True,
    ):
        self.target = target
        self.loaded = drafter or LoadedDrafter(NoDrafter(), {}, "none")
        self.loop = DecodeLoop(
            target.decoder,
            self.loaded.drafter,
            rule,
            tuple(processors),
            logprobs=logprobs,
            margins=margins,
        )
        self.params = {"target": target.params, "drafters": self.loaded.params}
        self.compilations = 0
        self.compile_time_s = 0.0
        self._programs: dict[Any, tuple[Callable, Callable]] = {}
        self.token_bytes = None if target.tokenizer is None else TokenBytes(target.tokenizer)

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt, checked.

        Raises:
          UserError: an empty prompt, one longer than the context, or ids outside the vocabulary.
        """
        if isinstance(prompt, str):
            if not prompt.strip():
                raise UserError("The prompt is empty.")
            if self.target.tokenizer is None:
                raise UserError("A text prompt needs a tokenizer: load the target with one.")
            ids = self.target.tokenizer(prompt, verbose=False)["input_ids"]
        else:
            ids = [int(i) for i in prompt]
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
            state = jax.eval_shape(lambda *a: self.loop.start(*a, capacity=capacity), *args)
            held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
            check_fits(dataclasses.replace(plan, parameters=0, cache=held), available_memory())
            began = time.perf_counter()
            start = (
                jax.jit(self.loop.start, static_argnames=("capacity",))
                .lower(*args, capacity=capacity)
                .compile()
            )
            run = (
                jax.jit(self.loop.run, donate_argnums=1)
                .lower(self.params, state, jnp.int32(0))
                .compile()
            )
            self._programs[key] = (start, run)
            self.compilations += 2
            self.compile_time_s += time.perf_counter() - began
        return self._programs[key]

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_new_tokens: int | list[int] = 128,
        temperature: float | list[float] = 0.0,
        top_k: int | list[int] = 0,
        top_p: float | list[float] = 1.0,
        min_p: float | list[float] = 0.0,
        seed: int | list[int] = 0,
        own_seed: bool | list[bool] = False,
        stop: Sequence[str] | list[Sequence[str]] = (),
        ignore_eos: bool = False,
        batch_size: int = 1,
        ids: Sequence[Any] | None = None,
        on_chunk: Callable[[Chunk], None] | None = None,
        rounds_per_chunk: int = 8,
    ) -> Iterator[Generation]:
        """Answers prompts in order, `batch_size` at a time.

        Every sampling parameter is one value, or a list with one per prompt. Row i draws from the run's
        seed folded with i, whatever batch it is in; where `own_seed` is true, from its seed alone.

        Args:
          stop: stop strings (a tuple for all prompts, or a list with a tuple per prompt).
          ids: names for the answers; default: the prompt's number.
          on_chunk: called with new tokens every `rounds_per_chunk` rounds.

        Raises:
          UserError: any value out of range, before anything runs.
        """
        count = len(prompts)
        if count == 0:
            raise UserError("There are no prompts.")
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}.")
        names = list(range(count)) if ids is None else list(ids)
        encoded = []
        for name, prompt in zip(names, prompts, strict=True):
            try:
                encoded.append(self.encode(prompt))
            except UserError as error:
                if count == 1:
                    raise
                raise UserError(f"Prompt {name}: {error}") from None
        rows = {
            "max_new_tokens": _per_row(max_new_tokens, count),
            "temperature": _per_row(temperature, count),
            "top_k": _per_row(top_k, count),
            "top_p": _per_row(top_p, count),
            "min_p": _per_row(min_p, count),
            "seed": _per_row(seed, count),
            "own_seed": _per_row(own_seed, count),
        }
        make_sampling(count, **{name: np.asarray(value) for name, value in rows.items()})
        if isinstance(stop, str):
            stop = (stop,)
        strings = list(stop) if isinstance(stop, list) else [tuple(stop)] * count
        if len(strings) != count:
            raise UserError(f"Got stop strings for {len(strings)} of {count} prompts.")
        if any(isinstance(item, str) for item in strings):
            raise UserError("Give stop strings as a tuple, or as a list with one tuple per prompt.")
        if any("" in item for item in strings):
            raise UserError("A stop string must not be empty.")
        if any(strings) and self.token_bytes is None:
            raise UserError("Stop strings need a tokenizer: load the target with one.")
        for item in {tuple(item) for item in strings if item}:
            special_stops(self.token_bytes, item)
        return self._generate(
            prompts,
            encoded,
            names,
            rows,
            strings,
            ignore_eos,
            batch_size,
            on_chunk,
            rounds_per_chunk,
        )

    def _generate(
        self, prompts, encoded, names, rows, strings, ignore_eos, batch_size, on_chunk, per_chunk
    ) -> Iterator[Generation]:
        for first in range(0, len(prompts), batch_size):
            taken = list(range(first, min(first + batch_size, len(prompts))))
            # A short last batch repeats its last row, so that it needs no program of its own.
            padded = taken + [taken[-1]] * (batch_size - len(taken))
            sampling = self._sampling(padded, rows, strings, encoded, ignore_eos)
            longest = max(len(encoded[i]) for i in padded)
            capacity = self.capacity(longest, max(rows["max_new_tokens"][i] for i in padded))
            tokens = np.zeros((batch_size, capacity), np.int32)
            for row, index in enumerate(padded):
                tokens[row, : len(encoded[index])] = encoded[index]
            lengths = jnp.asarray([len(encoded[i]) for i in padded], jnp.int32)
            request = jnp.asarray(padded, jnp.int32)
            spent = self.compile_time_s
            start, run = self._compiled(jnp.asarray(tokens), lengths, sampling, request, capacity)
            compiling = self.compile_time_s - spent

            began = time.perf_counter()
            state = start(self.params, jnp.asarray(tokens), lengths, sampling, request)
            jax.block_until_ready(state)
            prefill = time.perf_counter() - began
            state = self._run(run, state, len(taken), on_chunk, per_chunk)
            wall = time.perf_counter() - began
            host = jax.device_get(
                (state.text.tokens, state.text.length, state.prompt_length, state.stats)
            )
            for row, index in enumerate(taken):
                yield self._answer(
                    names[index],
                    prompts[index],
                    strings[index],
                    host,
                    row,
                    (wall, prefill, compiling),
                )

    def _run(
        self, run: Callable, state: LoopState, rows: int, on_chunk: Any, per_chunk: int
    ) -> LoopState:
        """All rounds at once, or in chunks where somebody listens."""
        if on_chunk is None:
            state = run(self.params, state, jnp.int32(_ROUNDS_FOREVER))
            return jax.block_until_ready(state)
        seen = np.asarray(state.text.length).copy()
        while True:
            state = run(self.params, state, jnp.int32(per_chunk))
            length, tokens, origin, finish = jax.device_get(
                (state.text.length, state.text.tokens, state.stats.source, state.stats.finish)
            )
            for row in range(rows):
                if length[row] > seen[row]:
                    new = slice(int(seen[row]), int(length[row]))
                    on_chunk(Chunk(row, tokens[row, new].tolist(), self._names(origin[row, new])))
            seen = length
            if (finish != RUNNING).all():
                return state

    def _sampling(self, padded, rows, strings, encoded, ignore_eos: bool) -> Sampling:
        config = self.target.config
        table, start = None, -1
        if any(strings[i] for i in padded):
            table, start = stop_rows(
                self.token_bytes,
                self.target.vocab_size,
                [strings[i] for i in padded],
                [encoded[i] for i in padded],
            )
            states = 1 << max(3, (len(table) - 1).bit_length())
            table = np.pad(table, ((0, states - len(table)), (0, 0)))
        return make_sampling(
            len(padded),
            **{name: np.asarray([value[i] for i in padded]) for name, value in rows.items()},
            stop_ids=(-1,) if ignore_eos or not config.eos_ids else config.eos_ids,
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

    def _names(self, origin: np.ndarray) -> list[str | None]:
        names = (None, *self.loaded.drafter.info.sources)
        return [names[i] for i in origin.tolist()]

    def _answer(self, name, prompt, strings, host, row: int, times) -> Generation:
        tokens, length, prompt_length, stats = host
        wall, prefill, compiling = times
        span = slice(int(prompt_length[row]), int(length[row]))
        ids = tokens[row, span].tolist()
        text = ""
        if self.token_bytes is not None:
            before = tokens[row, : span.start].tolist()
            text = answer_text(self.token_bytes, before, ids, strings)
        rounds = int(stats.rounds[row])
        drafted, accepted = int(stats.drafted[row].sum()), int(stats.accepted[row].sum())
        per_drafter = {
            proposer: {
                "calls": int(stats.calls[row, i]),
                "drafted": int(stats.drafted[row, i]),
                "accepted": int(stats.accepted[row, i]),
            }
            for i, proposer in enumerate(self.loaded.drafter.info.sources, 1)
        }
        margins = stats.margins[row, span]
        return Generation(
            id=name,
            prompt=prompt if isinstance(prompt, str) else list(prompt),
            text=text,
            token_ids=ids,
            finish_reason=FINISH_REASONS[int(stats.finish[row])],
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
                near_ties=int((margins < NEAR_TIE).sum()),
            ),
            logprobs=stats.logprobs[row, span].tolist(),
            margins=margins.tolist(),
            origins=self._names(stats.source[row, span]),
        )
