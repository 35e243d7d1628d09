"""The compiled loop: draft, verify, commit, until rows have finished.

`DecodeLoop` is static (a frozen dataclass); everything that holds arrays is in `LoopState`. There is no
host synchronisation inside a round. Rows are slots: no row depends on another, and `insert` puts a new
request where an old one has finished.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_specdec._types import Array, Int, Params
from jax_specdec.core import acceptance, prng
from jax_specdec.core.budget import Budget, RoundCosts, Told, check_widths, usual_widths
from jax_specdec.core.context import Context, Tapped, TargetView
from jax_specdec.core.draft import Text
from jax_specdec.core.drafter import Drafter, States, accepted_prefix, ways_of
from jax_specdec.core.law import Law
from jax_specdec.core.model import Model
from jax_specdec.core.prefill import read_text
from jax_specdec.core.processors import Processor
from jax_specdec.core.round import decode_round
from jax_specdec.core.sampling import Sampling
from jax_specdec.core.sharding import on_its_mesh, sharding_of
from jax_specdec.core.state import LoopState
from jax_specdec.core.stats import LENGTH, RUNNING, Stats
from jax_specdec.errors import UserError


@dataclasses.dataclass(frozen=True)
class DecodeLoop:
    """The speculative decoding loop of one target and one drafter.

    Attributes:
      rule: which drafted path becomes text.
      processors: a user's own logits processors, applied at every node of the tree.
      logprobs, margins: whether `Stats` records them. Each costs a pass over the logits of every round.
      widths: nodes of a verification, root included, rising from 1 to the whole draft's: each round takes one
        of them, see `budget`. Empty: every round drafts and verifies all that the drafter can.

    Raises:
      UserError: widths that do not rise from 1 to the draft's.
    """

    target: Model
    drafter: Drafter
    rule: acceptance.Acceptance = acceptance.MATCH
    processors: tuple[Processor, ...] = ()
    logprobs: bool = False
    margins: bool = False
    widths: tuple[int, ...] = ()

    def __post_init__(self):
        if self.widths:
            check_widths(self.widths, self.nodes)
            if self.rule.needs_q and not self.drafter.info.is_chain and len(self.widths) > 2:
                raise UserError(
                    "The rejection rule verifies a tree whole or not at all: its widths are 1 and "
                    f"{self.nodes}."
                )

    @property
    def nodes(self) -> int:
        """T, the width of a verification."""
        return self.drafter.info.nodes + 1

    @property
    def window(self) -> int:
        """The most tokens a round can emit: P + 1."""
        return self.drafter.info.depth + 1

    def budgeted(self) -> "DecodeLoop":
        """The same with the usual widths; as it is where nothing is drafted."""
        info = self.drafter.info
        if not info.depth:
            return self
        whole = self.rule.needs_q and not info.is_chain
        widths = (1, self.nodes) if whole else usual_widths(self.nodes)
        return dataclasses.replace(self, widths=widths)

    def unknown_costs(self) -> RoundCosts | None:
        """`RoundCosts.unknown` of this loop; None where all rounds are alike."""
        if len(self.widths) < 2:
            return None
        alike = [way.info.depth for way in getattr(self.drafter, "alternatives", ())]
        return RoundCosts.unknown(*self._costs, alike)

    def check_costs(self, costs: RoundCosts) -> RoundCosts:
        """The costs as arrays; raises `UserError` for those that are not this loop's."""
        if len(self.widths) < 2:
            raise UserError(
                "All rounds of this decoder are alike, and there is nothing to choose by costs."
            )
        costs = costs.as_arrays()
        costs.check(*self._costs)
        return costs

    @property
    def _costs(self) -> tuple[int, int, int]:
        return len(self.widths), len(ways_of(self.drafter)), self.drafter.info.depth

    @property
    def told(self) -> tuple[Told, ...]:
        """When each way of drafting says how likely its tokens are, to the budget: behind a draft only where what it says may
        decide how much of it is verified, and where the drafter's scores lie on one device."""
        late = self.rule.coupled and sharding_of(self.target) is None
        told: list[Told] = [way.info.chances for way in ways_of(self.drafter)]
        return tuple(told if late else (None if kind == "after" else kind for kind in told))

    @property
    def sources(self) -> tuple[str, ...]:
        """Names for `Stats.source`, which counts from 1: the drafter's, and those of its other ways."""
        ways = ways_of(self.drafter) if self.widths else (self.drafter,)
        return tuple(dict.fromkeys(name for way in ways for name in way.info.sources))

    @property
    def tapped(self) -> Tapped:
        return Tapped(self.target, self.drafter.info.taps)

    @on_its_mesh
    def start(
        self,
        params: Params,
        tokens: Int[Array, "B Lp"],
        lengths: Int[Array, " B"],
        sampling: Sampling,
        request_ids: Int[Array, " B"],
        *,
        capacity: int,
        chunk: int | None = None,
        costs: RoundCosts | None = None,
    ) -> LoopState:
        """Reads the prompts into all caches.

        Args:
          params: `{"target": ..., "drafters": {name: ...}}`.
          tokens: prompts, left-aligned; what lies behind `lengths[b] >= 1` is ignored.
          capacity: static, the most tokens of a row, prompt included.
          costs: of a round, for a loop with widths; default: `RoundCosts.unknown`.

        Raises:
          UserError: the costs of another loop.
        """
        view, drafts = self.empty(params, tokens.shape[0], capacity)
        args = (tokens, lengths, sampling, request_ids, capacity, chunk)
        return self._start(params, *args, view, drafts, costs)

    @on_its_mesh
    def empty(self, params: Params, batch: int, capacity: int) -> tuple[TargetView, States]:
        """The target's cache and the drafter's states that have read nothing."""
        view = self.tapped.init_view(params["target"], batch, capacity + self.nodes)
        return view, self.drafter.init(batch, capacity + self.window)

    @on_its_mesh
    def resume(
        self,
        params: Params,
        tokens: Int[Array, "B Lp"],
        lengths: Int[Array, " B"],
        sampling: Sampling,
        request_ids: Int[Array, " B"],
        caches: tuple[TargetView, States],
        kept: Int[Array, " B"],
        *,
        capacity: int,
        chunk: int | None = None,
        costs: RoundCosts | None = None,
    ) -> LoopState:
        """`start` beside caches that have read a part of the texts: the rest alone is read. Donate `caches`.

        Args:
          caches: `view` and `drafts` of a state of this capacity, or `empty`.
          kept: how many tokens at the start of each text are those of the state's text. Below what the target
            has read, its cache is rolled back, which it must allow (`model.rewinds`).
        """
        view, drafts = caches
        behind = kept <= view.length  # not all of the old text is in the new one
        cut = jnp.minimum(view.length, jnp.minimum(kept, lengths - 1))
        view, info = self.tapped.rollback(view, cut), self.drafter.info
        if info.rewinds:
            none = jnp.zeros_like(kept)
            drafts = self.drafter.commit(drafts, accepted_prefix(kept, none, info.depth))
        else:
            drafts = self.drafter.reset(drafts, behind)
        args = (tokens, lengths, sampling, request_ids, capacity, chunk)
        return self._start(params, *args, view, drafts, costs)

    def _start(
        self, params, tokens, lengths, sampling, request_ids, capacity, chunk, view, drafts, costs
    ) -> LoopState:
        """`start` with caches that may have read something."""
        batch, width = tokens.shape
        if width > capacity:
            raise ValueError(f"prompts of width {width} do not fit a capacity of {capacity}")
        columns = capacity + self.window
        buffer = jnp.zeros((batch, columns), jnp.int32)
        text = Text(lax.dynamic_update_slice(buffer, tokens, (0, 0)), lengths)
        view = read_text(self.tapped, params["target"], view, text.tokens, lengths - 1, chunk)
        limit = jnp.minimum(lengths + sampling.max_new_tokens, capacity)
        info, budget = self.drafter.info, None
        costs = self.unknown_costs() if costs is None else costs
        if costs is not None:
            costs = self.check_costs(costs)
            budget = Budget.empty(costs, batch)
        state = LoopState(
            text=text,
            prompt_length=lengths,
            limit=limit,
            view=view,
            drafts=drafts,
            keys=prng.row_keys(sampling, request_ids),
            sampling=sampling,
            stop_state=sampling.stop_state,
            stats=Stats.empty(
                jnp.where(limit > lengths, RUNNING, LENGTH).astype(jnp.int32),
                columns,
                len(self.sources),
                info.depth,
                max(1, len(self.widths)),
                logprobs=self.logprobs,
                margins=self.margins,
            ),
            budget=budget,
        )
        sharding = sharding_of(self.target)
        if sharding is not None:  # what begins as zeros would lie on every device
            names = ("text", "prompt_length", "limit", "keys", "stop_state", "stats")
            state = state.replace(**{name: sharding.rows(getattr(state, name)) for name in names})
            if budget is not None:
                state = state.replace(budget=budget.placed(sharding))
        ctx = self.context(state)
        return state.replace(drafts=self.drafter.extend(params["drafters"], drafts, ctx))

    @on_its_mesh
    def insert(
        self,
        params: Params,
        state: LoopState,
        row: Int[Array, ""] | int,
        tokens: Int[Array, "1 Lp"],
        length: Int[Array, "1"],
        sampling: Sampling,
        request_id: Int[Array, "1"],
        *,
        chunk: int | None = None,
    ) -> LoopState:
        """Puts a new request into a row of a running batch, whatever the row held. Donate `state`.

        The request's text does not depend on its row, its batch or the time.

        Args:
          row: may be traced. tokens, length, sampling, request_id: as in `start`, of one row. Its sampling must
            have the shapes of the batch's; stop strings are looked up in the batch's table.
        """
        capacity = state.text.tokens.shape[1] - self.window
        # Arrays without a row axis are shared, and pass through whole.
        axes = self._row_axes(params, state, capacity)
        sampling = sampling.replace(stop_table=state.sampling.stop_table)

        def take(leaf: Array, axis: int) -> Array:
            return leaf if axis < 0 else lax.dynamic_slice_in_dim(leaf, row, 1, axis)

        def put(leaf: Array, new: Array, axis: int) -> Array:
            if axis < 0:
                return new
            return lax.dynamic_update_slice_in_dim(leaf, new.astype(leaf.dtype), row, axis)

        drafts = jax.tree.map(take, state.drafts, axes.drafts)
        drafts = self.drafter.reset(drafts, jnp.ones((1,), bool))
        view, _ = self.empty(params, 1, capacity)
        costs = None if state.budget is None else state.budget.costs
        args = (tokens, length, sampling, request_id, capacity, chunk)
        fresh = self._start(params, *args, view, drafts, costs)
        return jax.tree.map(put, state, fresh, axes)

    def _row_axes(self, params: Params, state: LoopState, capacity: int) -> Any:
        """The axis of each leaf of the state that counts rows, -1 where there is none."""

        def shapes(batch: int) -> LoopState:
            def of_rows(leaf: Array) -> Any:  # of what the caller hands over: rows come first
                return jax.ShapeDtypeStruct((batch, *leaf.shape[1:]), leaf.dtype)

            table = state.sampling.stop_table
            sampling = jax.tree.map(of_rows, state.sampling).replace(
                stop_table=jax.ShapeDtypeStruct(table.shape, table.dtype)
            )
            rows = of_rows(state.prompt_length)
            tokens = jax.ShapeDtypeStruct((batch, 1), "int32")
            costs = None if state.budget is None else state.budget.costs
            return jax.eval_shape(
                lambda p, *args: self.start(p, *args, capacity=capacity, costs=costs),
                params,
                tokens,
                rows,
                sampling,
                rows,
            )

        def axis(one: Any, two: Any) -> int:
            apart = [i for i, (a, b) in enumerate(zip(one.shape, two.shape, strict=True)) if a != b]
            return apart[0] if apart else -1

        return jax.tree.map(axis, shapes(1), shapes(2))

    def context(self, state: LoopState, *, return_q: bool = False) -> Context:
        """What the drafter sees of a state.

        Args:
          return_q: static, see `Context`.
        """
        return Context(
            text=state.text,
            view=state.view,
            law=Law(state.sampling, state.prompt_length, self.processors),
            keys=state.keys,
            active=state.stats.finish == RUNNING,
            budget=state.limit - state.text.length,
            sharding=sharding_of(self.target),
            return_q=return_q,
            vocab_size=self.target.vocab_size,
            role=prng.ROLE_DRAFT if self.rule.needs_q else prng.ROLE_MATCH,
        )

    def round(self, params: Params, state: LoopState, *, replaced: bool = False) -> LoopState:
        """Draft, verify, commit: every running row emits at least one token.

        Args:
          replaced: whether ended rows are, so that no row waits for another (`core.budget.worth`); static.
        """
        return decode_round(self, params, state, replaced)

    @on_its_mesh
    def run(
        self,
        params: Params,
        state: LoopState,
        rounds: Int[Array, ""] | int,
        until: Int[Array, ""] | int | None = None,
    ) -> LoopState:
        """Rounds until `until` rows are not running, by default all, at most `rounds` of them.

        Where rows that have ended are replaced (`insert`), name `until`: a budget then counts every row's tokens
        alike; else the batch waits for its last row, and it counts rows by how far they are behind.

        Donate `state`.
        """
        rows = state.text.length.shape[0] if until is None else until

        def going(carry):
            done, state = carry
            running = state.stats.finish == RUNNING
            ended = jnp.sum(~running, dtype=jnp.int32)
            return jnp.any(running) & (ended < rows) & (done < rounds)

        def step(carry):
            done, state = carry
            return done + 1, decode_round(self, params, state, until is not None)

        return lax.while_loop(going, step, (jnp.int32(0), state))[1]
