"""Drafts: token trees with static shapes.

A draft has T nodes, node 0 is the root (the last emitted token). The order is chain-first: root, main
chain, then siblings, so that main-chain node d has index d and an accepted chain is contiguous.
"""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax.numpy as jnp

from jax_specdec._types import Array, Bool, Float, Int
from pallas_kernels import masks

MAX_NODES = 64
TOP = 8  # ids and probabilities that a drafter with a distribution reports per node


class Text(flax.struct.PyTreeNode):
    """Committed tokens of every row; what lies behind `length` is garbage.

    Attributes:
      tokens: `int32[B, C]`, with room for one draft behind the last committed token.
      length: `int32[B]`. Row b's root is `tokens[b, length[b] - 1]`.
    """

    tokens: Int[Array, "B C"]
    length: Int[Array, " B"]

    def root(self) -> Int[Array, " B"]:
        """The last committed token of each row."""
        return jnp.take_along_axis(self.tokens, self.length[:, None] - 1, axis=1)[:, 0]


class Draft(flax.struct.PyTreeNode):
    """A batch of token trees.

    Attributes:
      tokens: `int32[B, T]`, the root first.
      valid: `bool[B, T]`; a node below an invalid one is invalid. The root is always valid.
      source: `int32[B, T]`, which drafter the node is from: 0 the root, i the i-th of `Info.sources`.
      probability: `float32[B, T]`, the drafter's probability of the node, 1 where it has none or neither
        `Context.return_top` nor `return_chance` was set.
      parent, depth: `int32[B, T]`, or None for a chain. The root is its own parent.
      ancestors: `int32[B, T, W]`, or None for a chain: bit j of row i is set iff node j is node i or
        above it.
      top_ids, top_probs: `[B, T, TOP]`, the best children of each node by its drafter's distribution
        and their probabilities, or None where no drafter has one, `Context.return_top` was not set, or
        the draft is an expansion, which has used them up.
        The chain's own token comes first, the others follow from the most to the least probable. A
        node without a distribution, or whose children are not known, has a row of probability 0.
        `confidence.chain_fields` says how they rank and which probabilities these are.
      q: `float32[B, P, V]`, the distribution that each chain token was drawn from, or None. Row d is that of node
        d + 1. Present under the rejection rule only.
      depth_limit: static, P.
    """

    tokens: Int[Array, "B T"]
    valid: Bool[Array, "B T"]
    source: Int[Array, "B T"]
    probability: Float[Array, "B T"]
    parent: Int[Array, "B T"] | None = None
    depth: Int[Array, "B T"] | None = None
    ancestors: Int[Array, "B T W"] | None = None
    top_ids: Int[Array, "B T 8"] | None = None
    top_probs: Float[Array, "B T 8"] | None = None
    q: Float[Array, "B P V"] | None = None
    depth_limit: int = flax.struct.field(pytree_node=False, default=0)

    @property
    def is_chain(self) -> bool:
        return self.ancestors is None

    def depths(self) -> Int[Array, "#B T"]:
        """Depth of each node, root 0."""
        if self.depth is not None:
            return jnp.asarray(self.depth)
        return jnp.arange(self.tokens.shape[1], dtype=jnp.int32)[None]

    def parents(self) -> Int[Array, "#B T"]:
        """Parent of each node, the root's being the root."""
        if self.parent is not None:
            return jnp.asarray(self.parent)
        return jnp.maximum(jnp.arange(self.tokens.shape[1], dtype=jnp.int32) - 1, 0)[None]

    def on_path(self) -> Bool[Array, "#B T M"]:
        """Which drafted nodes (without the root) are each node or lead to it; see `Context.scores`."""
        nodes = self.tokens.shape[1]
        if self.ancestors is None:
            return on_chain(nodes)
        return masks.unpack(self.ancestors, nodes)[..., 1:]


def on_chain(nodes: int) -> Bool[Array, "1 T M"]:
    """`Draft.on_path` of a chain of `nodes`, its root included: token j + 1 leads to node i iff j < i."""
    line = jnp.arange(nodes, dtype=jnp.int32)
    return (line[None, 1:] <= line[:, None])[None]


def root_only(text: Text) -> Draft:
    """The draft of plain decoding: nothing but the root."""
    root = text.root()[:, None]
    return Draft(
        tokens=root,
        valid=jnp.ones_like(root, dtype=bool),
        source=jnp.zeros_like(root),
        probability=jnp.ones(root.shape, jnp.float32),
    )


def chain(
    text: Text,
    tokens: Int[Array, "B P"],
    valid: Bool[Array, "B P"] | None = None,
    probability: Float[Array, "B P"] | None = None,
    **fields,
) -> Draft:
    """A chain below the root. `valid` is made a prefix: nothing valid follows an invalid node."""
    batch, depth = tokens.shape
    if depth + 1 > MAX_NODES:
        raise ValueError(f"a draft has at most {MAX_NODES} nodes, got a chain of {depth + 1}")
    if valid is None:
        valid = jnp.ones((batch, depth), bool)
    if probability is None:
        probability = jnp.ones((batch, depth), jnp.float32)
    valid = jnp.cumprod(valid.astype(jnp.int32), axis=1).astype(bool)
    root = root_only(text)
    return Draft(
        tokens=jnp.concatenate([root.tokens, tokens], axis=1),
        valid=jnp.concatenate([root.valid, valid], axis=1),
        source=jnp.concatenate([root.source, jnp.ones((batch, depth), jnp.int32)], axis=1),
        probability=jnp.concatenate([root.probability, probability], axis=1),
        depth_limit=depth,
        **fields,
    )


def from_parents(
    text: Text,
    tokens: Int[Array, "B N"],
    parent: Int[Array, "#B N"],
    valid: Bool[Array, "B N"],
    depth_limit: int,
    source: Int[Array, "#B N"],
    probability: Float[Array, "B N"] | None = None,
    **fields,
) -> Draft:
    """A tree below the root, from the parent of each of its N nodes.

    >>> text = Text(jnp.asarray([[5, 7, 0]]), jnp.asarray([2]))
    >>> draft = from_parents(
    ...     text, jnp.asarray([[8, 9, 3]]), jnp.asarray([[0, 1, 0]]), jnp.ones((1, 3), bool), 2, jnp.asarray([[1, 1, 2]])
    ... )
    >>> draft.tokens.tolist(), draft.depth.tolist()
    ([[7, 8, 9, 3]], [[0, 1, 2, 1]])

    Args:
      parent: node indices, the root's being 0 and the first of `tokens` 1; smaller than the node's own. The
        main chain comes first: the parent of node d is d - 1 for d up to the depth limit.
      valid: nodes below an invalid one become invalid.
    """
    batch, count = tokens.shape
    root = root_only(text)
    parent = jnp.pad(jnp.broadcast_to(parent, tokens.shape), ((0, 0), (1, 0)))
    line = jnp.arange(count + 1, dtype=jnp.int32)
    seen = jnp.broadcast_to(line[:, None] == line[None], (batch, count + 1, count + 1))
    current = parent
    for _ in range(depth_limit):
        seen = seen | (current[..., None] == line[None, None])
        current = jnp.take_along_axis(parent, current, axis=1)
    valid = jnp.concatenate([root.valid, valid], axis=1)
    if probability is None:
        probability = jnp.ones(tokens.shape, jnp.float32)
    return Draft(
        tokens=jnp.concatenate([root.tokens, tokens], axis=1),
        valid=jnp.all(valid[:, None] | ~seen, axis=-1),
        source=jnp.pad(jnp.broadcast_to(source, tokens.shape), ((0, 0), (1, 0))),
        probability=jnp.concatenate([root.probability, probability], axis=1),
        parent=parent,
        depth=jnp.sum(seen, axis=-1, dtype=jnp.int32) - 1,
        ancestors=masks.pack(seen),
        depth_limit=depth_limit,
        **fields,
    )


def narrow(draft: Draft, width: int) -> tuple[Draft, Int[Array, "B T"] | None]:
    """A draft's first `width` valid nodes, and the index in the whole draft of each, None for the same one.

    A chain keeps its order, and so does a tree, whose parents come before their children; but a tree's main
    chain does not keep its places.
    """
    nodes = draft.tokens.shape[1]
    if width == nodes:
        return draft, None
    fields: dict[str, Any] = {"top_ids": None, "top_probs": None}
    if draft.is_chain or width == 1:
        for name in ("tokens", "valid", "source", "probability"):
            fields[name] = getattr(draft, name)[:, :width]
        fields |= {"parent": None, "depth": None, "ancestors": None}
        q = None if draft.q is None or width == 1 else draft.q[:, : width - 1]
        return draft.replace(**fields, q=q, depth_limit=width - 1), None
    assert draft.ancestors is not None and draft.q is None, "a tree under a coupled rule"
    # Stable: valid nodes in their order.
    order = jnp.argsort(~draft.valid, axis=1, stable=True).astype(jnp.int32)
    place = jnp.argsort(order, axis=1).astype(jnp.int32)
    order = order[:, :width]
    for name in ("tokens", "valid", "source", "probability"):
        fields[name] = jnp.take_along_axis(getattr(draft, name), order, axis=1)
    for name, of in (("parent", draft.parents()), ("depth", draft.depths())):
        of = jnp.broadcast_to(of, draft.tokens.shape)
        fields[name] = jnp.take_along_axis(of, order, axis=1)
    fields["parent"] = jnp.take_along_axis(place, fields["parent"], axis=1)
    above = jnp.take_along_axis(masks.unpack(draft.ancestors, nodes), order[..., None], axis=1)
    above = jnp.take_along_axis(above, order[:, None], axis=2)
    return draft.replace(**fields, ancestors=masks.pack(above)), order


def widened(draft: Draft, nodes: int, sources: Sequence[int]) -> Draft:
    """A chain with invalid nodes behind it, `nodes` in all without the root.

    Args:
      sources: what the draft's sources are to be, the first its source 1.
    """
    more = ((0, 0), (0, nodes + 1 - draft.tokens.shape[1]))
    return Draft(
        tokens=jnp.pad(draft.tokens, more),
        valid=jnp.pad(draft.valid, more),
        source=jnp.pad(jnp.take(jnp.asarray([0, *sources], jnp.int32), draft.source), more),
        probability=jnp.pad(draft.probability, more),
        depth_limit=nodes,
    )


def paths(draft: Draft, leaf: Int[Array, " B"]) -> Int[Array, "B Q"]:
    """Node index at each depth 0..P on the way to `leaf`; 0 behind the leaf's own depth."""
    if draft.ancestors is None:
        raise ValueError("the path of a chain is 0, 1, 2, ...")
    words = jnp.take_along_axis(draft.ancestors, leaf[:, None, None], axis=1)  # [B, 1, W]
    above = masks.unpack(words, draft.tokens.shape[1])[:, 0]  # [B, T]
    level = jnp.arange(draft.depth_limit + 1, dtype=jnp.int32)
    hit = above[:, None] & (draft.depths()[:, None] == level[None, :, None])  # [B, P+1, T]
    node = jnp.arange(draft.tokens.shape[1], dtype=jnp.int32)
    return jnp.sum(jnp.where(hit, node[None, None], 0), axis=-1, dtype=jnp.int32)
