"""Growing trees: expansion rules that have the drafter read branches, level by level.

At each depth the drafter reads the most probable nodes of that depth in one forward pass, and their
children are the candidates of the next. The drafter's cache is not touched: keys and values of the
nodes lie beside it until they are verified, and `commit` moves those on the accepted path into it, so that
the next round begins as after a chain.

* `DynamicTree`: of all candidates the most probable are verified (EAGLE-2, arXiv 2406.16858, section 4).
* `BeamSearch`: what was read is verified (the comparison of arXiv 2402.02082, section 5.4). Beams that
  fall behind stay in the tree but are not extended, so that no cache is reordered
  (arXiv 2502.17421, section 3.3).

In both the drafter's main chain is kept whatever its probability, so that node d is chain node d and an
expansion never accepts less than its chain.
"""

from typing import Any, ClassVar, NamedTuple, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax

from jax_specdec._types import Array, Float, Int, Params
from jax_specdec.core.confidence import best_children
from jax_specdec.core.context import Context, Proposal, TargetView
from jax_specdec.core.draft import Draft, Text, from_parents
from jax_specdec.core.drafter import Drafter, States, rollback
from jax_specdec.core.model import Model, Output
from jax_specdec.errors import UserError
from jax_specdec.expansions.expand import Rule
from jax_specdec.expansions.select import select
from pallas_kernels import masks


@runtime_checkable
class TreeModel(Model, Protocol):
    """A model that reads tree nodes beside others that are in no cache yet, as `models.Decoder` does."""

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Per layer, the sliding window, or None; a tree can be grown where none has one."""
        ...

    def blank(self, batch: int, nodes: int) -> Any:
        """`Output.new` of `nodes` nodes, all 0."""
        ...


@runtime_checkable
class Grower(Drafter, Protocol):
    """A drafter that can read branches, as `drafters.neural.NeuralDrafter` does."""

    @property
    def proposal(self) -> Proposal: ...

    @property
    def body(self) -> Any: ...

    def reader(self, view: TargetView) -> Any: ...

    def read(
        self, params: Params, states: States, ctx: Context
    ) -> tuple[Any, Float[Array, "B 1 V"]]: ...


class Grown(NamedTuple):
    """Candidates of every depth, C = width * children of each; candidate 0 of each is the main chain.

    Attributes:
      tokens: `int32[B, P, C]`. value: `float32[B, P, C]`, log-probability of the path, -inf for none.
      read: `int32[B, P, width]`, which candidates of each depth the drafter read; the last depth's
        would be read next. Candidate j is the child of `read[j // children]` of the depth before.
      new_kv: keys and values of what was read, node `width * (depth - 1) + place in read`.
    """

    tokens: Int[Array, "B P C"]
    value: Float[Array, "B P C"]
    read: Int[Array, "B P width"]
    new_kv: Any


class GrownTree(Rule):
    """A rule that grows a tree over a neural drafter.

    Made for the match rule. It is exact under the rejection rule too, where its tokens count as certain,
    but there only the chain and its siblings can be accepted.
    """

    needs: ClassVar[str] = "grows"

    def shape(self, depth: int) -> tuple[int, int]:
        """(width, children): nodes read at each depth, and candidates below each of them."""
        raise NotImplementedError

    def chosen(self, grown: Grown) -> tuple[Array, Array]:
        """The nodes off the main chain: candidates `int32[B, S]`, counted over all depths, and valid.

        Valid ones must be in rising order, distinct and not in the chain; the parent of each must be among
        them or in the chain. Invalid ones may be anything.
        """
        raise NotImplementedError

    def check(self, drafter):
        name = drafter.info.name
        if not isinstance(drafter, Grower) or not isinstance(drafter.body, TreeModel):
            raise UserError(f"The drafter {name!r} cannot grow trees: it is not a neural one.")
        if any(drafter.body.windows):
            raise UserError(
                f"The drafter {name!r} has layers with a sliding window, which cannot grow trees: "
                "expand it by cape, fixed or path."
            )
        if drafter.info.ends_early:
            raise UserError(
                f"The drafter {name!r} ends drafts early, and a tree grows to its full depth: expand it by "
                "cape, fixed or path, or leave out its threshold."
            )

    def init(self, drafter, batch, capacity):
        depth = drafter.info.depth
        width, _ = self.shape(depth)
        new_kv = drafter.body.blank(batch, width * max(depth - 1, 1))
        slot = jnp.zeros((batch, self.size(depth)), jnp.int32)
        return {**drafter.init(batch, capacity), _key(drafter): (new_kv, slot)}

    def draft(self, drafter, params, states, ctx):
        cache, logits = drafter.read(params, states, ctx)
        grown = self.grow(drafter, params, cache, states[_key(drafter)][0], logits, ctx)
        draft, slot = self.assemble(drafter, grown, ctx.text)
        new = {drafter.info.name: cache, _key(drafter): (grown.new_kv, slot)}
        return draft, {**states, **new}

    def grow(
        self,
        drafter: Grower,
        params: Params,
        cache: Any,
        new_kv: Any,
        logits: Float[Array, "B 1 V"],
        ctx: Context,
    ) -> Grown:
        """Reads and expands depth after depth, from the logits after the root."""
        limit = drafter.info.depth
        width, children = self.shape(limit)
        batch, steps = logits.shape[0], limit - 1
        slots = width * max(steps, 1)
        candidates = width * children
        reader, weights = drafter.reader(ctx.view), params[drafter.info.name]
        sampling, start = ctx.law.sampling, ctx.text.length[:, None] - 1

        def expand(logits, value, depth, drafted=None, on_path=None):
            scores = ctx.scores(logits, drafted, on_path)
            if not ctx.return_q:  # nothing need be drawn from a distribution that is handed over
                scores = ctx.perturbed(scores, depth, drafter.proposal)
            ids, probs = best_children(scores, ctx.argmax(scores), sampling, children)
            value = value[..., None] + jnp.log(probs)
            return ids.reshape(batch, -1), value.reshape(batch, -1)

        def step(carry, depth):
            tokens, value, seen, drafted, new_kv = carry
            read = widest(value, width)
            parent = read // children
            # A node sees its parent and what the parent saw. Nodes of depth 1 see none.
            before = jnp.take_along_axis(seen, parent[..., None], axis=1)
            slot = (depth - 2) * width + parent
            line = jnp.arange(slots, dtype=jnp.int32)[None, None]
            seen = before | ((line == slot[..., None]) & (depth > 1))
            itself = jnp.broadcast_to(jnp.eye(width, dtype=bool)[None], (batch, width, width))
            token = jnp.take_along_axis(tokens, read, axis=1)
            out = reader.apply(
                weights,
                token,
                jnp.broadcast_to(start + depth, read.shape),
                cache,
                masks.pack(jnp.concatenate([seen, itself], axis=-1)),
                drafted=new_kv,
            )
            first = (depth - 1) * width
            new_kv = jax.tree.map(
                lambda old, new: lax.dynamic_update_slice_in_dim(
                    old, new.astype(old.dtype), first, axis=old.ndim - 3
                ),
                new_kv,
                out.new,
            )
            drafted = lax.dynamic_update_slice_in_dim(drafted, token, first, axis=1)
            own = line == first + jnp.arange(width, dtype=jnp.int32)[None, :, None]
            path = jnp.take_along_axis(value, read, axis=1)
            following = expand(out.logits, path, depth, drafted, seen | own)
            return (*following, seen, drafted, new_kv), (*following, read)

        tokens, value = expand(logits, jnp.zeros((batch, 1), jnp.float32), 0)
        pad = ((0, 0), (0, candidates - children))
        tokens, value = jnp.pad(tokens, pad), jnp.pad(value, pad, constant_values=-jnp.inf)
        seen = jnp.zeros((batch, width, slots), bool)
        drafted = jnp.zeros((batch, slots), jnp.int32)
        depth = jnp.arange(1, limit, dtype=jnp.int32)
        carry = (tokens, value, seen, drafted, new_kv)
        (_, last, _, _, new_kv), rest = lax.scan(step, carry, depth)
        rest_tokens, rest_value, rest_read = (jnp.swapaxes(x, 0, 1) for x in rest)
        return Grown(
            tokens=jnp.concatenate([tokens[:, None], rest_tokens], axis=1),
            value=jnp.concatenate([value[:, None], rest_value], axis=1),
            read=jnp.concatenate([rest_read, widest(last, width)[:, None]], axis=1),
            new_kv=new_kv,
        )

    def assemble(
        self, drafter: Drafter, grown: Grown, text: Text
    ) -> tuple[Draft, Int[Array, "B T"]]:
        """The draft, and where each node's keys and values lie in `grown.new_kv`, -1 for nowhere."""
        width, children = self.shape(drafter.info.depth)
        batch, depth, candidates = grown.tokens.shape
        others, some = self.chosen(grown)
        chain = jnp.arange(depth, dtype=jnp.int32)[None] * candidates
        node = jnp.concatenate([jnp.broadcast_to(chain, (batch, depth)), others], axis=1)
        valid = jnp.concatenate([jnp.ones((batch, depth), bool), some], axis=1)
        level, place = node // candidates, node % candidates

        def of(per_candidate: Array) -> Array:
            return jnp.take_along_axis(per_candidate.reshape(batch, -1), node, axis=1)

        # The candidate above each node; -1 at depth 1, where it is the root, which is no candidate.
        above = jnp.maximum(level - 1, 0) * width + place // children
        above = jnp.take_along_axis(grown.read.reshape(batch, -1), above, axis=1)
        above = jnp.where(level > 0, (level - 1) * candidates + above, -1)
        # The parent is the first node that is this candidate: a rule that finds too few may name the chain
        # again. Invalid nodes get the root as their parent.
        hit = above[:, :, None] == node[:, None]
        below = valid & jnp.any(hit, axis=2)
        parent = jnp.where(below, jnp.argmax(hit, axis=2).astype(jnp.int32) + 1, 0)
        value = jnp.concatenate([jnp.zeros((batch, 1), jnp.float32), of(grown.value)], axis=1)
        before = jnp.take_along_axis(value, parent, axis=1)
        probability = jnp.where(valid, jnp.exp(value[:, 1:] - before), 0.0)

        read = jnp.take_along_axis(grown.read, level[..., None], axis=1)  # [B, T-1, width]
        hit = (read == place[..., None]) & (valid & (level < depth - 1))[..., None]
        slot = level[..., None] * width + jnp.arange(width, dtype=jnp.int32)[None, None]
        slot = jnp.max(jnp.where(hit, slot, -1), axis=2)

        is_chain = jnp.arange(node.shape[1], dtype=jnp.int32)[None] < depth
        draft = from_parents(
            text,
            tokens=of(grown.tokens),
            parent=parent,
            valid=valid,
            depth_limit=depth,
            source=jnp.where(is_chain, 1, 2),
            probability=probability,
        )
        return draft, jnp.pad(slot, ((0, 0), (1, 0)), constant_values=-1)

    def commit(self, drafter, states, outcome):
        name = drafter.info.name
        cache, (new_kv, slot) = states[name], states[_key(drafter)]
        cache = drafter.body.rollback(cache, rollback(cache.length, outcome))
        slot = jnp.take_along_axis(slot, outcome.path[:, 1:], axis=1)  # [B, P]
        level = jnp.arange(1, drafter.info.depth + 1, dtype=jnp.int32)[None]
        # Only the last accepted node may not have been read; the next round reads it, as after a chain.
        held = (slot >= 0) & (level <= outcome.accepted[:, None])
        count = jnp.sum(jnp.cumprod(held.astype(jnp.int32), axis=1), axis=1, dtype=jnp.int32)
        read = Output(None, cast(Any, None), new_kv, {})
        return {**states, name: drafter.body.commit(cache, read, count, jnp.maximum(slot, 0))}


def widest(value: Float[Array, "B C"], width: int) -> Int[Array, "B width"]:
    """The main chain's candidate and the most probable others, in rising order."""
    return select(value.at[:, 0].set(jnp.inf), width)[0]


def _key(drafter: Drafter) -> str:
    return f"{drafter.info.name}+"
