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

from jax_specdec._types import Array, Bool, Float, Int, Params
from jax_specdec.core import acceptance, numerics, prng
from jax_specdec.core.context import Context, Tapped, TargetView
from jax_specdec.core.draft import Draft, Text
from jax_specdec.core.drafter import Drafter, Outcome, States, accepted_prefix
from jax_specdec.core.law import Law
from jax_specdec.core.model import Model
from jax_specdec.core.prefill import read_text
from jax_specdec.core.processors import Processor
from jax_specdec.core.sampling import STRING_COMPLETE, Sampling
from jax_specdec.core.sharding import Sharding, on_its_mesh, sharding_of
from jax_specdec.core.state import LoopState
from jax_specdec.core.stats import FAILED, LENGTH, RUNNING, STOP, Stats, write_window


def _lead(scores: Float[Array, "B T V"], sharding: Sharding | None) -> Float[Array, "B T"]:
    """How far the best score is ahead of the second best."""
    value, token = numerics.best(scores, sharding)
    index = jnp.arange(scores.shape[-1], dtype=jnp.int32)[None, None]
    second = jnp.max(jnp.where(index == token[..., None], numerics.NEG_INF, scores), axis=-1)
    return value - second


@dataclasses.dataclass(frozen=True)
class DecodeLoop:
    """The speculative decoding loop of one target and one drafter.

    Attributes:
      rule: which drafted path becomes text.
      processors: a user's own logits processors, applied at every node of the tree.
      logprobs, margins: whether `Stats` records them. Each costs a pass over the logits of every round.
    """

    target: Model
    drafter: Drafter
    rule: acceptance.Acceptance = acceptance.MATCH
    processors: tuple[Processor, ...] = ()
    logprobs: bool = False
    margins: bool = False

    @property
    def nodes(self) -> int:
        """T, the width of a verification."""
        return self.drafter.info.nodes + 1

    @property
    def window(self) -> int:
        """The most tokens a round can emit: P + 1."""
        return self.drafter.info.depth + 1

    @property
    def _tapped(self) -> Tapped:
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
    ) -> LoopState:
        """Reads the prompts into all caches.

        Args:
          params: `{"target": ..., "drafters": {name: ...}}`.
          tokens: prompts, left-aligned; what lies behind `lengths[b] >= 1` is ignored.
          capacity: static, the most tokens of a row, prompt included.
        """
        caches = self.empty(params, tokens.shape[0], capacity)
        return self._start(params, tokens, lengths, sampling, request_ids, capacity, chunk, *caches)

    @on_its_mesh
    def empty(self, params: Params, batch: int, capacity: int) -> tuple[TargetView, States]:
        """The target's cache and the drafter's states that have read nothing."""
        view = self._tapped.init_view(params["target"], batch, capacity + self.nodes)
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
        view, info = self._tapped.rollback(view, cut), self.drafter.info
        if info.rewinds:
            none = jnp.zeros_like(kept)
            drafts = self.drafter.commit(drafts, accepted_prefix(kept, none, info.depth))
        else:
            drafts = self.drafter.reset(drafts, behind)
        return self._start(
            params, tokens, lengths, sampling, request_ids, capacity, chunk, view, drafts
        )

    def _start(
        self, params, tokens, lengths, sampling, request_ids, capacity, chunk, view, drafts
    ) -> LoopState:
        """`start` with caches that may have read something."""
        batch, width = tokens.shape
        if width > capacity:
            raise ValueError(f"prompts of width {width} do not fit a capacity of {capacity}")
        columns = capacity + self.window
        buffer = jnp.zeros((batch, columns), jnp.int32)
        text = Text(lax.dynamic_update_slice(buffer, tokens, (0, 0)), lengths)
        view = read_text(self._tapped, params["target"], view, text.tokens, lengths - 1, chunk)
        limit = jnp.minimum(lengths + sampling.max_new_tokens, capacity)
        info = self.drafter.info
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
                len(info.sources),
                info.depth,
                logprobs=self.logprobs,
                margins=self.margins,
            ),
        )
        sharding = sharding_of(self.target)
        if sharding is not None:  # what begins as zeros would lie on every device
            names = ("text", "prompt_length", "limit", "keys", "stop_state", "stats")
            state = state.replace(**{name: sharding.rows(getattr(state, name)) for name in names})
        ctx = self.context(state, None)
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
        args = (tokens, length, sampling, request_id, capacity, chunk)
        fresh = self._start(params, *args, view, drafts)
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
            return jax.eval_shape(
                lambda p, *args: self.start(p, *args, capacity=capacity),
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

    def context(
        self, state: LoopState, noise: Float[Array, "B Q V"] | None, **static: bool
    ) -> Context:
        """What the drafter sees of a state.

        Args:
          static: `return_q`, `return_top`.
        """
        return Context(
            text=state.text,
            view=state.view,
            law=Law(state.sampling, state.prompt_length, self.processors),
            noise=noise,
            keys=state.keys,
            active=state.stats.finish == RUNNING,
            budget=state.limit - state.text.length,
            sharding=sharding_of(self.target),
            **static,
        )

    def noise(self, state: LoopState) -> Float[Array, "B Q V"]:
        """The noise that drafting and verification share in one round."""
        role = prng.ROLE_DRAFT if self.rule.needs_q else prng.ROLE_MATCH
        return prng.shared_noise(
            state.keys,
            state.sampling,
            state.text.length,
            self.window,
            self.target.vocab_size,
            role,
        )

    def _cut(
        self,
        state: LoopState,
        emitted: Int[Array, "B Q"],
        count: Int[Array, " B"],
        active: Bool[Array, " B"],
    ) -> tuple[Int[Array, " B"], Int[Array, " B"], Int[Array, " B"]]:
        """Ends rows at the first stop token, stop string or length limit inside the block.

        Returns `(count, finish, stop_state)`, the tokens that become text (the one that ends a row
        included).
        """
        sampling, finish = state.sampling, state.stats.finish
        place = jnp.arange(self.window, dtype=jnp.int32)[None]
        stops = jnp.any(emitted[..., None] == sampling.stop_ids[:, None], axis=-1)
        automaton, trail = state.stop_state, emitted
        if sampling.stop_table.shape[0]:
            table = sampling.stop_table

            def advance(current, token):
                following = table[jnp.maximum(current, 0), token]
                following = jnp.where(current >= 0, following, current)
                # -1: the row has no stop strings; -2: one is complete
                return following, following

            _, trail = lax.scan(advance, automaton, jnp.swapaxes(emitted, 0, 1))
            trail = jnp.swapaxes(trail, 0, 1)  # [B, P+1], state after each token
            stops = stops | (trail == STRING_COMPLETE)
        stops = stops & (place < count[:, None])
        stopped = jnp.any(stops, axis=1)
        count = jnp.where(stopped, jnp.argmax(stops, axis=1).astype(jnp.int32) + 1, count)
        budget = state.limit - state.text.length
        stopped = stopped & (count <= budget)
        count = jnp.where(active, jnp.minimum(count, budget), 0)
        if sampling.stop_table.shape[0]:
            last = jnp.maximum(count - 1, 0)[:, None]
            reached = jnp.take_along_axis(trail, last, axis=1)[:, 0]
            automaton = jnp.where(active & (count > 0), reached, automaton)
        ended = jnp.where(stopped, STOP, jnp.where(count >= budget, LENGTH, RUNNING))
        return count, jnp.where(active, ended, finish).astype(jnp.int32), automaton

    def round(self, params: Params, state: LoopState) -> LoopState:
        """Draft, verify, commit: every running row emits at least one token."""
        text = state.text
        ctx = self.context(state, self.noise(state), return_q=self.rule.needs_q)
        active = ctx.active
        with jax.named_scope("draft"):
            draft, drafts = self.drafter.draft(params["drafters"], state.drafts, ctx)
        depths = draft.depths()
        draft = draft.replace(valid=draft.valid & (depths <= ctx.budget[:, None]))
        with jax.named_scope("verify"):
            positions = jnp.broadcast_to(text.length[:, None] - 1 + depths, draft.tokens.shape)
            out = self._tapped.apply(
                params["target"], draft.tokens, positions, state.view, draft.ancestors
            )
            assert out.logits is not None
            scores = ctx.scores(out.logits, draft.tokens[:, 1:], draft.on_path())
            verified = self.rule(ctx, draft, scores)
        margin, sound = self._examine(ctx, draft, scores)

        place = jnp.arange(self.window, dtype=jnp.int32)[None]
        # Tokens before the first node without a law are right; unless they end the row, it fails behind them.
        sound = jnp.take_along_axis(sound, verified.path, axis=1)
        sound = jnp.sum(jnp.cumprod(sound.astype(jnp.int32), axis=1), axis=1, dtype=jnp.int32)
        whole = jnp.minimum(verified.accepted + 1, sound)
        count, finish, stop_state = self._cut(state, verified.tokens, whole, active)
        failed = (sound <= verified.accepted) & (finish == RUNNING)
        finish = jnp.where(failed, FAILED, finish)
        accepted = jnp.minimum(verified.accepted, count)  # counted up to where the text was cut
        on_chain = (verified.path == place) & (place >= 1) & (place <= accepted[:, None])
        matched = text.length + jnp.sum(on_chain, axis=1, dtype=jnp.int32)
        with jax.named_scope("commit"):
            path = None if draft.is_chain else verified.path
            view = self._tapped.commit(state.view, out, count, path)
            drafts = self.drafter.commit(drafts, Outcome(matched, verified.path, accepted))
        return state.replace(
            text=Text(write_window(text.tokens, verified.tokens, text.length), text.length + count),
            view=view,
            drafts=drafts,
            stop_state=stop_state,
            stats=state.stats.record(
                draft, verified, accepted, finish, text.length, active, out.logits, margin
            ),
        )

    def _examine(
        self, ctx: Context, draft: Draft, scores: Float[Array, "B T V"]
    ) -> tuple[Float[Array, "B T"] | None, Bool[Array, "B T"]]:
        """The margin of each node's own token where it is recorded, and which nodes have one.

        A node has no token of its own where a score is NaN or infinite, or all tokens are forbidden.
        """
        if self.rule.coupled:  # the rule took the maximum of this sum, too
            scores = scores + acceptance.node_noise(ctx, draft)
        sound = jnp.isfinite(numerics.best(scores, ctx.sharding)[0])
        if not self.margins:
            return None, sound
        margin = _lead(scores, ctx.sharding)
        if not self.rule.coupled:  # a drawn token is no argmax
            greedy = ctx.law.sampling.temperature == 0
            margin = jnp.where(greedy[:, None], margin, jnp.inf)
        return margin, sound

    @on_its_mesh
    def run(
        self,
        params: Params,
        state: LoopState,
        rounds: Int[Array, ""] | int,
        until: Int[Array, ""] | int | None = None,
    ) -> LoopState:
        """Rounds until `until` rows are not running, by default all, at most `rounds` of them.

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
            return done + 1, self.round(params, state)

        return lax.while_loop(going, step, (jnp.int32(0), state))[1]
