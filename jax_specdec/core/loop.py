"""The compiled loop: draft, verify, commit, until every row has finished.

`DecodeLoop` is static (a frozen dataclass); everything that holds arrays is in `LoopState`. There is no
host synchronisation inside a round.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import export, lax

from jax_specdec._types import Array, Float, Int, UInt
from jax_specdec.core import acceptance, numerics, prng
from jax_specdec.core import cache as kv
from jax_specdec.core import sampling as laws
from jax_specdec.core.draft import Draft, Text
from jax_specdec.core.drafter import Drafter, Outcome, States, TargetView
from jax_specdec.core.prefill import read_text
from jax_specdec.core.prng import Noise
from jax_specdec.core.processors import History, Processor
from jax_specdec.core.sampling import Sampling
from jax_specdec.core.stats import LENGTH, RUNNING, STOP, Stats
from jax_specdec.errors import UserError
from jax_specdec.models.decoder import Decoder
from pallas_kernels import masks

STRING_COMPLETE = -2  # state of the stop-string automaton


class LoopState(flax.struct.PyTreeNode):
    """Everything a round reads and writes.

    Attributes:
      text: committed tokens. `text.tokens[:, length - 1]` is the root, whose key is not cached yet.
      prompt_length, limit: `int32[B]`; a row ends when its length reaches `limit`.
      cache: the target's, of length `text.length - 1`.
      drafts: drafter states by name.
      keys: `uint32[B, 2]`, key data per row. stop_state: `int32[B]`, stop-string automaton.
    """

    text: Text
    prompt_length: Int[Array, " B"]
    limit: Int[Array, " B"]
    cache: kv.KVCache
    drafts: States
    keys: UInt[Array, "B 2"]
    sampling: Sampling
    stop_state: Int[Array, " B"]
    stats: Stats


def write_window(buffer: Array, values: Array, start: Int[Array, " B"]) -> Array:
    """Writes `values [B, Q]` at `start[b]` of each row of `buffer [B, C]`, which must have room."""
    return kv.write_rows(buffer[:, None, :, None], values[:, None, :, None], start)[:, 0, :, 0]


def _best_two(scores: Float[Array, "B T V"]) -> tuple[Int[Array, "B T"], Float[Array, "B T"]]:
    """The argmax, and how far it is ahead of the second best."""
    token = numerics.argmax(scores)
    index = jnp.arange(scores.shape[-1], dtype=jnp.int32)[None, None]
    second = jnp.max(jnp.where(index == token[..., None], numerics.NEG_INF, scores), axis=-1)
    return token, jnp.max(scores, axis=-1) - second


@dataclasses.dataclass(frozen=True)
class DecodeLoop:
    """The speculative decoding loop of one target and one drafter.

    Attributes:
      rule: `match` (any draft, exact, identical to plain decoding with the same seed), `reject`
        (speculative sampling of a chain, exact in law) or `lossy-typical` (not exact).
      lossy: what `lossy-typical` accepts.
      processors: history-dependent logits processors, applied at every node of the tree.
    """

    target: Decoder
    drafter: Drafter
    rule: acceptance.Rule = "match"
    processors: tuple[Processor, ...] = ()
    lossy: acceptance.LossyTypical = acceptance.PUBLISHED

    def __post_init__(self):
        if self.rule not in acceptance.RULES:
            raise UserError(
                f"Unknown acceptance rule {self.rule!r}; there are {', '.join(acceptance.RULES)}."
            )

    @property
    def nodes(self) -> int:
        """T, the width of a verification."""
        return self.drafter.num_nodes + 1

    @property
    def window(self) -> int:
        """The most tokens a round can emit: P + 1."""
        return self.drafter.depth + 1

    def start(
        self,
        params: dict[str, Any],
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
          tokens: prompts, left-aligned; what lies behind `lengths[b] >= 1` is ignored.
          capacity: static, the most tokens of a row, prompt included.
        """
        batch, width = tokens.shape
        if width > capacity:
            raise ValueError(f"prompts of width {width} do not fit a capacity of {capacity}")
        columns = capacity + self.window
        buffer = jnp.zeros((batch, columns), jnp.int32)
        text = Text(lax.dynamic_update_slice(buffer, tokens, (0, 0)), lengths)
        cache = self.target.init_cache(
            batch, capacity + self.nodes, hidden=self.drafter.reads_hidden
        )
        cache = read_text(self.target, params["target"], cache, text.tokens, lengths - 1, chunk)
        drafts = self.drafter.init(batch, columns)
        drafts = self.drafter.extend(params["drafters"], drafts, text, TargetView(cache))
        origins = len(self.drafter.proposers) + 1
        counts = jnp.zeros((batch, origins), jnp.int32)
        record = jnp.zeros((batch, columns), jnp.float32)
        limit = jnp.minimum(lengths + sampling.max_new_tokens, capacity)
        stats = Stats(
            rounds=jnp.zeros((batch,), jnp.int32),
            drafted=counts,
            accepted=counts,
            calls=counts,
            accepted_per_pos=jnp.zeros((batch, self.drafter.depth), jnp.int32),
            finish=jnp.where(limit > lengths, RUNNING, LENGTH).astype(jnp.int32),
            logprobs=record,
            margins=record,
            origin=jnp.zeros((batch, columns), jnp.int32),
        )
        return LoopState(
            text=text,
            prompt_length=lengths,
            limit=limit,
            cache=cache,
            drafts=drafts,
            keys=prng.row_keys(sampling, request_ids),
            sampling=sampling,
            stop_state=sampling.stop_state,
            stats=stats,
        )

    def _verify(
        self, state: LoopState, draft: Draft, logits: Array, noise: Array
    ) -> tuple[acceptance.Verdict, Array]:
        """The verdict, and the margin of each node's own token, `float32[B, T]`."""
        scores = laws.warp(logits, state.sampling)
        if self.rule != "reject":
            if draft.is_chain:
                added = noise[:, : scores.shape[1]]
            else:
                depth = jnp.broadcast_to(draft.depths(), draft.tokens.shape)
                added = jnp.take_along_axis(noise, depth[..., None], axis=1)
            token, margin = _best_two(scores + added)
            if self.rule == "match":
                return acceptance.match(draft, token), margin
            p = laws.law_of(scores, state.sampling)
            verdict = acceptance.lossy_typical(draft, p, token, self.lossy)
            return verdict, jnp.full(margin.shape, jnp.inf, jnp.float32)
        batch, vocab = scores.shape[0], scores.shape[-1]
        start, depth = state.text.length, self.drafter.depth
        p = laws.law_of(scores, state.sampling)
        q = draft.q
        if q is None:  # a proposer without a distribution is certain of its token
            q = jax.nn.one_hot(draft.tokens[:, 1 : depth + 1], vocab, dtype=jnp.float32)
        verdict = acceptance.reject(
            draft,
            p,
            q,
            prng.position_uniform(state.keys, start, depth, prng.ROLE_ACCEPT),
            prng.position_noise(state.keys, start, depth + 1, vocab, prng.ROLE_RESIDUAL),
            prng.position_noise(state.keys, start, depth + 1, vocab, prng.ROLE_BONUS),
        )
        return verdict, jnp.full((batch, scores.shape[1]), jnp.inf, jnp.float32)

    def _process(self, state: LoopState, draft: Draft, logits: Array) -> Array:
        """Runs the processors, each node with the history that leads to it."""
        if not self.processors:
            return logits
        nodes = draft.tokens.shape[1]
        bits = masks.chain(nodes)[None] if draft.ancestors is None else draft.ancestors
        on_path = jnp.broadcast_to(masks.unpack(bits, nodes), (draft.tokens.shape[0], nodes, nodes))
        history = History(
            state.text.tokens, state.text.length, state.prompt_length, draft.tokens, on_path
        )
        for processor in self.processors:
            logits = processor(logits, history)
        return logits

    def _cut(
        self, state: LoopState, emitted: Array, count: Array, active: Array
    ) -> tuple[Array, Array, Array]:
        """Ends rows at the first stop token, stop string or length limit inside the block.

        Returns `(count, finish, stop_state)`, the tokens that become text (the one that ends a row
        included).
        """
        sampling, finish = state.sampling, state.stats.finish
        place = jnp.arange(self.window, dtype=jnp.int32)[None]
        stops = jnp.any(emitted[..., None] == sampling.stop_ids[:, None], axis=-1)
        automaton = state.stop_state
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
        room = state.limit - state.text.length
        stopped = stopped & (count <= room)
        count = jnp.where(active, jnp.minimum(count, room), 0)
        if sampling.stop_table.shape[0]:
            last = jnp.maximum(count - 1, 0)[:, None]
            reached = jnp.take_along_axis(trail, last, axis=1)[:, 0]
            automaton = jnp.where(active, reached, automaton)
        ended = jnp.where(stopped, STOP, jnp.where(count >= room, LENGTH, RUNNING))
        return count, jnp.where(active, ended, finish).astype(jnp.int32), automaton

    def round(self, params: dict[str, Any], state: LoopState) -> LoopState:
        """Draft, verify, commit: every running row emits at least one token."""
        text, sampling, stats = state.text, state.sampling, state.stats
        active = stats.finish == RUNNING
        room = state.limit - text.length
        view = TargetView(state.cache)
        role = prng.ROLE_DRAFT if self.rule == "reject" else prng.ROLE_MATCH
        noise = prng.shared_noise(
            state.keys, sampling, text.length, self.window, self.target.config.vocab_size, role
        )
        draft, drafts = self.drafter.draft(
            params["drafters"],
            state.drafts,
            text,
            view,
            sampling,
            Noise(noise, return_q=self.rule == "reject"),
            active,
            room,
        )
        depths = draft.depths()
        draft = draft.replace(valid=draft.valid & (depths <= room[:, None]))
        out = self.target.apply(
            params["target"],
            draft.tokens,
            text.length[:, None] - 1 + depths,
            state.cache,
            draft.ancestors,
        )
        assert out.logits is not None
        logits = self._process(state, draft, out.logits)
        verdict, margin = self._verify(state, draft, logits, noise)

        emitted, path = verdict.tokens, verdict.path
        count, finish, stop_state = self._cut(state, emitted, verdict.accepted + 1, active)
        place = jnp.arange(self.window, dtype=jnp.int32)[None]
        own = place == verdict.accepted[:, None]  # the target's own token
        drafted_at = jnp.minimum(place + 1, self.window - 1)
        origin = jnp.take_along_axis(
            draft.origin, jnp.take_along_axis(path, jnp.broadcast_to(drafted_at, path.shape), 1), 1
        )
        origin = jnp.where(own, 0, origin)
        accepted = jnp.minimum(verdict.accepted, count)  # counted up to where the text was cut
        landed = (place < accepted[:, None]) & active[:, None]
        proposed = draft.valid & active[:, None] & (draft.origin > 0)
        log_z = jax.nn.logsumexp(out.logits, axis=-1)  # [B, T]
        vocab = out.logits.shape[-1]
        logit = jnp.take_along_axis(
            out.logits.reshape(out.logits.shape[0], -1), path * vocab + emitted, axis=1
        )
        logprob = logit - jnp.take_along_axis(log_z, path, axis=1)

        def by_origin(origins: Array, mask: Array) -> Array:
            label = jnp.arange(stats.drafted.shape[1], dtype=jnp.int32)[None, None]
            hit = (origins[..., None] == label) & mask[..., None]
            return jnp.sum(hit, axis=1, dtype=jnp.int32)

        drafted = by_origin(draft.origin, proposed)
        new_length = text.length + count
        new_stats = stats.replace(
            rounds=stats.rounds + active.astype(jnp.int32),
            drafted=stats.drafted + drafted,
            calls=stats.calls + (drafted > 0).astype(jnp.int32),
            accepted=stats.accepted + by_origin(origin, landed),
            accepted_per_pos=stats.accepted_per_pos
            + landed[:, : self.drafter.depth].astype(jnp.int32),
            finish=finish,
            logprobs=write_window(stats.logprobs, logprob, text.length),
            margins=write_window(
                stats.margins, jnp.take_along_axis(margin, path, axis=1), text.length
            ),
            origin=write_window(stats.origin, origin, text.length),
        )
        on_chain = (path == place) & (place >= 1) & (place <= accepted[:, None])
        outcome = Outcome(
            length=new_length,
            agreed=text.length + jnp.sum(on_chain, axis=1, dtype=jnp.int32),
            path=path,
            accepted=accepted,
        )
        taken = None if draft.is_chain else path
        cache = kv.commit(state.cache, out.new_kv, count, taken, after=out.hidden)
        return state.replace(
            text=Text(write_window(text.tokens, emitted, text.length), new_length),
            cache=cache,
            drafts=self.drafter.commit(drafts, outcome, TargetView(cache)),
            stop_state=stop_state,
            stats=new_stats,
        )

    def run(self, params: dict[str, Any], state: LoopState, rounds: Array | int) -> LoopState:
        """Rounds until every row has finished, at most `rounds` of them. Donate `state`."""

        def going(carry):
            done, state = carry
            return jnp.any(state.stats.finish == RUNNING) & (done < rounds)

        def step(carry):
            done, state = carry
            return done + 1, self.round(params, state)

        return lax.while_loop(going, step, (jnp.int32(0), state))[1]


# An exported `generate` is serialised with the types of its arguments and results.
for _type in (Sampling, Text, Stats):
    export.register_pytree_node_serialization(
        _type,
        serialized_name=f"jax_specdec.{_type.__name__}",
        serialize_auxdata=lambda aux: b"",
        deserialize_auxdata=lambda data: (),
    )
