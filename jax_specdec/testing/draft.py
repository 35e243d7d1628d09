"""Checks of a draft alone, and of what a drafter says of itself."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_specdec.core.draft import MAX_NODES, TOP, Draft, Text
from jax_specdec.core.drafter import Info
from pallas_kernels import masks


def check_draft(draft: Draft, info: Info, text: Text, vocab: int, wants_q: bool) -> None:
    """Checks one draft alone: shapes, dtypes, order and the tree's consistency.

    Raises:
      AssertionError: what is wrong with it.
    """
    batch, nodes = text.length.shape[0], info.nodes + 1

    def array(name: str, shape: tuple[int, ...], dtype: str, optional: bool = False) -> Any:
        value = getattr(draft, name)
        if value is None:
            require(optional, f"Draft.{name} must be an array, not None")
            return None
        require(
            value.shape == shape and value.dtype == jnp.dtype(dtype),
            f"Draft.{name} must be {dtype}{shape}, got {value.dtype}{value.shape}",
        )
        return np.asarray(value)

    words = masks.num_words(nodes)
    tokens, valid = array("tokens", (batch, nodes), "int32"), array("valid", (batch, nodes), "bool")
    source = array("source", (batch, nodes), "int32")
    chance = array("probability", (batch, nodes), "float32")
    parent = array("parent", (batch, nodes), "int32", optional=True)
    depth = array("depth", (batch, nodes), "int32", optional=True)
    bits = array("ancestors", (batch, nodes, words), "int32", optional=True)
    top = (batch, nodes, min(TOP, vocab))
    ids = array("top_ids", top, "int32", optional=True)
    top_probs = array("top_probs", top, "float32", optional=True)
    q = array("q", (batch, info.depth, vocab), "float32", optional=True)

    require(
        draft.depth_limit == info.depth,
        f"Draft.depth_limit must be the drafter's depth {info.depth}, got {draft.depth_limit}",
    )
    given = [x is not None for x in (parent, depth, bits)]
    require(
        all(given) or not any(given),
        "parent, depth and ancestors must all be given (a tree) or all be None (a chain)",
    )
    require(
        (tokens[:, 0] == np.asarray(text.root())).all() and valid[:, 0].all(),
        "node 0 must be the root: the last committed token, valid",
    )
    inside = (tokens >= 0) & (tokens < vocab)
    require(inside.all(), f"drafted tokens must be in the vocabulary of {vocab}, valid or not")
    require((source[:, 0] == 0).all(), "the root's source must be 0")
    known = (source[:, 1:] >= 1) & (source[:, 1:] <= len(info.sources))
    require(
        (known | ~valid[:, 1:]).all(),
        f"the source of a drafted node must be in 1..{len(info.sources)}",
    )
    in_range = (chance >= 0) & (chance <= 1 + 1e-5)
    require((in_range | ~valid).all(), "the probability of a node must be in [0, 1]")

    if bits is None:
        require(nodes == info.depth + 1, "a chain must have as many nodes as its depth")
        parent = np.broadcast_to(np.maximum(np.arange(nodes) - 1, 0), tokens.shape)
    else:
        _check_tree(parent, depth, bits, info.depth)
    above = np.take_along_axis(valid, parent, axis=1)
    require((above | ~valid).all(), "a node below an invalid one must be invalid")

    require((ids is None) == (top_probs is None), "top_ids and top_probs must be given together")
    if ids is not None:
        require(((ids >= 0) & (ids < vocab)).all(), f"top_ids must be in the vocabulary of {vocab}")
        known = top_probs.max(axis=-1) > 0
        # A token drawn from q comes first whatever its chance, and so does one that lenience let pass.
        start = 1 if wants_q or not info.ranked else 0
        require(
            (np.diff(top_probs[..., start:], axis=-1) <= 0).all(),
            "top_probs must be in falling order, except that a token drawn from q comes first",
        )
        drafted = known[:, : info.depth] & valid[:, 1 : info.depth + 1]
        require(
            (ids[:, : info.depth, 0] == tokens[:, 1 : info.depth + 1])[drafted].all(),
            "the first of a main-chain node's top_ids must be the next token of the chain",
        )
    if not wants_q:
        require(q is None, "q must be None where ctx.return_q is false")
    elif q is not None:
        live = valid[:, 1 : info.depth + 1]
        require(
            (abs(q.sum(-1) - 1)[live] < 1e-4).all() and (q >= 0).all(), "q must be probabilities"
        )
        drawn = np.take_along_axis(q, tokens[:, 1 : info.depth + 1, None], axis=-1)[..., 0]
        require((drawn[live] > 0).all(), "a drawn token must be possible under q")


def _check_tree(parent: np.ndarray, depth: np.ndarray, bits: np.ndarray, limit: int) -> None:
    nodes = parent.shape[1]
    place = np.arange(nodes)[None]
    require((parent[:, 0] == 0).all(), "the root must be its own parent")
    require(
        ((parent[:, 1:] >= 0) & (parent[:, 1:] < place[:, 1:])).all(),
        "a node must come after its parent",
    )
    chain = slice(1, limit + 1)
    require(
        (parent[:, chain] == place[:, chain] - 1).all(),
        "the main chain must come first: the parent of node d is d - 1 for d up to the depth",
    )
    want = np.zeros_like(parent)
    seen = np.zeros((*parent.shape, nodes), bool)
    seen[:, 0, 0] = True
    rows = np.arange(parent.shape[0])
    for i in range(1, nodes):
        want[:, i] = want[rows, parent[:, i]] + 1
        seen[:, i] = seen[rows, parent[:, i]]
        seen[:, i, i] = True
    require((depth == want).all(), "a node's depth must be its parent's plus 1, the root's 0")
    require((want <= limit).all(), f"no node may be deeper than the drafter's depth {limit}")
    given = np.asarray(masks.unpack(jnp.asarray(bits), nodes))
    require(
        (given == seen).all(),
        "bit j of a node's ancestors must be set if and only if j is the node or above it",
    )


def check_chances(draft: Draft, drafter: Any, text: Text, rows: np.ndarray) -> None:
    """Checks what a drafter that has `Info.chances` says of its tokens, in some rows `bool[B]`.

    Raises:
      AssertionError: what is wrong with it.
    """
    info, batch = drafter.info, text.length.shape[0]
    valid = np.asarray(draft.valid)[:, 1 : info.depth + 1]
    require(
        info.chances in ("before", "after"),
        f"info.chances must be 'before', 'after' or None, got {info.chances!r}",
    )
    if info.chances == "after":
        said = np.asarray(draft.probability)[:, 1 : info.depth + 1]
        there = valid & rows[:, None]
        require(
            not there.any() or bool(((said > 0) & (said < 1))[there].any()),
            "the probability of tokens must say how likely they are where info.chances is 'after'",
        )
        return
    chances = np.asarray(drafter.chances(text))
    depth = chances.shape[-1]
    require(
        chances.dtype == np.float32 and chances.ndim == 2 and chances.shape[0] == batch,
        f"chances(text) must be float32[{batch}, P], got {chances.dtype}{chances.shape}",
    )
    require(0 < depth <= info.depth, f"chances(text) must be of 1 to {info.depth} depths")
    require(((chances >= 0) & (chances <= 1)).all(), "chances(text) must be in [0, 1]")
    require(
        ((chances > 0) | ~valid[:, :depth])[rows].all(),
        "chances(text) must be above 0 where the drafter proposes something",
    )


def check_static(drafter: Any) -> None:
    wanted = ("info", "init", "reset", "extend", "draft", "commit")
    missing = [name for name in wanted if not hasattr(drafter, name)]
    require(not missing, f"a drafter must have {', '.join(missing)}")
    try:
        hash(drafter)
    except TypeError as error:
        raise AssertionError(
            f"a drafter must be hashable, as a frozen dataclass is: {error}"
        ) from None
    info = drafter.info
    require(isinstance(info, Info), f"info must be an Info, got {info!r}")
    counts = (info.nodes, info.depth)
    require(
        all(isinstance(n, int) for n in counts) and 0 <= counts[1] <= counts[0] < MAX_NODES,
        f"0 <= depth <= nodes < {MAX_NODES} must hold, got depth {counts[1]}, nodes {counts[0]}",
    )
    names = info.sources
    require(
        isinstance(names, tuple) and all(isinstance(n, str) for n in names),
        f"sources must be a tuple of names, got {names!r}",
    )
    require(bool(names) == bool(info.nodes), "a drafter has sources if it drafts nodes")
    sizes = info.sizes
    require(
        sizes == tuple(sorted(set(sizes))) and max(sizes) == info.depth and sizes[0] >= 0,
        f"sizes must rise to the depth {info.depth}, got {sizes!r}",
    )


def require(holds: Any, sentence: str) -> None:
    if not holds:
        raise AssertionError(sentence + ".")
