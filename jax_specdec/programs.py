"""The compiled programs of a decoder: one pair (prefill, rounds) for each shape of a batch."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_specdec._types import Params
from jax_specdec.checkpoints.memory import available_memory, check_fits, memory_plan
from jax_specdec.checkpoints.targets import Target
from jax_specdec.core.budget import RoundCosts
from jax_specdec.core.loop import DecodeLoop, LoopState
from jax_specdec.core.sharding import put_whole, shapes_at
from jax_specdec.errors import UserError
from jax_specdec.progress import Compilation, machine
from jax_specdec.specs.build import LoadedDrafter
from jax_specdec.tuning.round_costs import CostTables, Given


class Programs:
    """Compiles ahead of time what a batch needs, and keeps it, with what its rounds cost.

    Args:
      params: of target and drafter. costs: of rounds, see `tuning.round_costs`.

    Attributes:
      batches: batch sizes that there are programs for.
      compilations, seconds: how many programs were compiled, and how long that took.
    """

    def __init__(
        self, target: Target, loop: DecodeLoop, loaded: LoadedDrafter, params: Params, costs: Given
    ):
        self._costs = None
        if len(loop.widths) > 1:
            self._costs = CostTables(target, loop, loaded, costs)
        elif costs is not None:
            raise UserError(
                "Costs are for a drafter whose budget is on: leave them out (--costs) without a drafter or a budget."
            )
        self._target, self._loop, self._params = target, loop, params
        self._pairs: dict[Any, tuple[Callable, Callable]] = {}
        self._rounds: dict[Any, Callable] = {}
        self._seen: dict[str, set[int]] = {"batch": set(), "texts of up to": set(), "stops": {0}}
        self.compilations = 0
        self.seconds = 0.0

    @property
    def batches(self) -> set[int]:
        return self._seen["batch"]

    def get(
        self,
        arrays: Any,
        capacity: int,
        progress: bool | None = None,
        *,
        resumed: tuple[Any, ...] = (),
    ) -> tuple[Callable, Callable]:
        """The prefill and the rounds for arrays of these shapes.

        Args:
          arrays: tokens, lengths, sampling and request ids, as `DecodeLoop.start` takes them.
          capacity: see there. progress: whether to say what is compiled, see `progress.told`.
          resumed: `caches` and `kept`, where the prefill is to be `DecodeLoop.resume`.

        Raises:
          UserError: they do not fit the memory.
        """
        tokens, _, sampling, _ = arrays
        shapes = jax.tree.map(lambda x: (x.shape, str(x.dtype)), (tokens, sampling))
        rounds = (capacity, str(jax.tree.leaves(shapes)))
        # On one device rounds do not ask how they were begun.
        shared = rounds if self._target.sharding is None else (*rounds, bool(resumed))
        key = (*rounds, bool(resumed))
        if key not in self._pairs:
            began = time.perf_counter()
            sizes = (tokens.shape[0], capacity, sampling.stop_table.shape[0])
            what = "next turns of a chat" if rounds in self._rounds else self._what(sizes)
            args, known = (*arrays, *resumed), self._rounds.get(shared)
            self._pairs[key] = self._compile(args, capacity, what, progress, known)
            self._rounds[shared] = self._pairs[key][1]
            for seen, size in zip(self._seen.values(), sizes, strict=True):
                seen.add(size)
            self.compilations += 2 if known is None else 1
            self.seconds += time.perf_counter() - began
        return self._pairs[key]

    def costs(
        self,
        arrays: Any,
        programs: tuple[Callable, Callable],
        progress: bool | None = None,
        caches: Callable[[], tuple[Any, ...]] = tuple,
    ) -> RoundCosts | None:
        """What the rounds of a batch cost, measured where that is to be; None where all are alike.

        Args:
          arrays, programs: of the batch, see `get`. caches: what the first program takes behind the arrays.
        """
        start, run = programs

        def begin(arrays: Any, costs: RoundCosts) -> LoopState:
            return start(self._params, *arrays, *caches(), costs=costs)

        if self._costs is None:
            return None
        costs = self._costs.get(arrays, begin, functools.partial(run, self._params), progress)
        return put_whole(costs, self._target.sharding)

    def _compile(
        self,
        rows: tuple[Any, ...],
        capacity: int,
        what: str,
        progress: bool | None,
        known: Callable | None,
    ) -> tuple[Callable, Callable]:
        """The programs, `known` being that of the rounds."""
        target, loop, args = self._target, self._loop, (self._params, *rows)
        # Without slots: the whole state is counted as it is, the drafter's caches with it.
        batch = rows[0].shape[0]
        plan = memory_plan(target.config, target.decoder.dtype, batch, 0, width=loop.nodes)
        begin, given_away = (loop.resume, (5,)) if len(rows) > 4 else (loop.start, ())
        start = jax.jit(begin, static_argnames=("capacity",), donate_argnums=given_away)
        costs = put_whole(loop.unknown_costs(), target.sharding)  # any of these shapes
        state = start.eval_shape(*args, capacity=capacity, costs=costs)
        held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        check_fits(dataclasses.replace(plan, parameters=0, cache=held), available_memory())

        platform = jax.devices()[0].platform
        compilation = Compilation(platform, machine(), what, progress)
        prefill = compilation.add(start.lower(*args, capacity=capacity, costs=costs))
        if known is not None:
            return compilation.compile(prefill), known
        if target.sharding is None:
            rounds = compilation.add(self._lower(state, {}))
            return compilation.compile(prefill), compilation.compile(rounds)
        begun = compilation.compile(prefill)
        # Rounds leave everything where the prefill puts it.
        state = shapes_at(state, begun.output_shardings)
        rounds = compilation.add(self._lower(state, {"out_shardings": begun.output_shardings}))
        return begun, compilation.compile(rounds)

    def _lower(self, state: Any, places: dict[str, Any]) -> Any:
        run = jax.jit(self._loop.run, donate_argnums=1, **places)
        return run.lower(self._params, state, jnp.int32(0))

    def _what(self, sizes: tuple[int, int, int]) -> str:
        """What is new about these shapes."""
        if not self.batches:
            return f"first use of batch {sizes[0]}"
        names = dict(zip(self._seen, sizes, strict=True))
        new = [name for name, size in names.items() if size not in self._seen[name]]
        if "batch" in new:
            return f"first use of batch {sizes[0]}"
        if "texts of up to" in new:
            return f"first use of texts of up to {sizes[1]} tokens"
        if "stops" in new:
            longer = "longer " if len(self._seen["stops"]) > 1 else ""
            return f"first use of {longer}stop strings"
        return "first use of these sizes together"

    def peak_memory(self) -> int:
        """The most bytes that one of them takes, parameters included."""

        def size(program: Any) -> int:
            found = program.memory_analysis()
            held = found.argument_size_in_bytes + found.output_size_in_bytes
            return held - found.alias_size_in_bytes + found.temp_size_in_bytes

        return max((size(p) for pair in self._pairs.values() for p in pair), default=0)
