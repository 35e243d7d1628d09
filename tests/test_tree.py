"""Trees: bitmasks, paths, chains."""

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_specdec.core.draft import MAX_NODES, Draft, Text, chain, paths, root_only
from pallas_kernels import masks

pytestmark = pytest.mark.smoke

TEXT = Text(jnp.asarray([[5, 6, 7, 0], [8, 9, 1, 2]], jnp.int32), jnp.asarray([3, 1], jnp.int32))


def ancestors_of(tree, node):
    out = [node]
    while node:
        node = tree[node]
        out.append(node)
    return out[::-1]


@pytest.mark.parametrize("size", [1, 2, 7, 31, 32, 33, 64])
def test_bits_and_paths(size):
    """Against walking up the parents, for as many words as 64 nodes take."""
    rng = np.random.default_rng(size)
    trees = []
    depth = min(5, size - 1)
    for _ in range(4):
        trees.append(h.random_parents(rng, depth, size - 1 - depth))
    parent = jnp.asarray(trees, jnp.int32)
    bits = h.ancestor_bits(parent, depth)
    assert bits.dtype == jnp.int32 and bits.shape == (4, size, -(-size // 32))
    seen = np.asarray(masks.unpack(bits, size))
    levels = [[len(ancestors_of(t, i)) - 1 for i in range(size)] for t in trees]
    draft = Draft(
        tokens=parent,
        valid=parent >= 0,
        source=parent,
        probability=parent.astype(jnp.float32),
        parent=parent,
        depth=jnp.asarray(levels, jnp.int32),
        ancestors=bits,
        depth_limit=depth,
    )
    all_paths = jax.jit(paths)
    for leaf in range(size):
        got = all_paths(draft, jnp.full((4,), leaf, jnp.int32))
        assert got.shape == (4, depth + 1)
        for b, tree in enumerate(trees):
            want = ancestors_of(tree, leaf)
            assert np.flatnonzero(seen[b, leaf]).tolist() == sorted(want)
            assert got[b, : len(want)].tolist() == want
            assert (np.asarray(got)[b, len(want) :] == 0).all()


def test_root():
    assert TEXT.root().tolist() == [7, 8]
    draft = root_only(TEXT)
    assert draft.tokens.tolist() == [[7], [8]] and draft.valid.all()
    assert draft.is_chain and draft.depth_limit == 0 and draft.source.tolist() == [[0], [0]]


def test_chain():
    tokens = jnp.asarray([[1, 2, 3], [4, 5, 6]], jnp.int32)
    valid = jnp.asarray([[True, False, True], [True, True, True]])
    draft = chain(TEXT, tokens, valid)
    assert draft.tokens.tolist() == [[7, 1, 2, 3], [8, 4, 5, 6]]
    assert draft.valid.tolist() == [[True, True, False, False], [True] * 4]
    assert draft.source.tolist() == [[0, 1, 1, 1]] * 2
    assert (draft.probability == 1).all() and draft.depth_limit == 3
    assert draft.depths().tolist() == [[0, 1, 2, 3]] and draft.parents().tolist() == [[0, 0, 1, 2]]
    with pytest.raises(ValueError, match="path of a chain"):
        paths(draft, jnp.zeros((2,), jnp.int32))


def test_a_draft_has_a_limit():
    chain(TEXT, jnp.zeros((2, MAX_NODES - 1), jnp.int32))
    with pytest.raises(ValueError, match="at most 64 nodes"):
        chain(TEXT, jnp.zeros((2, MAX_NODES), jnp.int32))
