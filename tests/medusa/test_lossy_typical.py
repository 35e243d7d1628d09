"""The lossy rule of Medusa's paper, against its definition in float64."""

import itertools

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from medusa_drafts import TREE, drafter, params, plain_answers

from jax_specdec import DecodeLoop, UserError
from jax_specdec.core import acceptance
from jax_specdec.core.draft import Draft, Text, chain
from jax_specdec.expansions.expand import Expand


def random_tree(rng, vocab, parents):
    """A draft of these parents, siblings distinct, some nodes invalid; and laws, some of them certain."""
    nodes = len(parents)
    tokens, valid = np.zeros(nodes, np.int32), rng.random(nodes) > 0.15
    for node in range(1, nodes):
        taken = [tokens[i] for i in range(1, node) if parents[i] == parents[node]]
        tokens[node] = rng.choice([t for t in range(vocab) if t not in taken])
    valid[0] = True
    for node in range(1, nodes):
        valid[node] &= valid[parents[node]]
    p = rng.dirichlet(np.full(vocab, 0.5), nodes)
    p[rng.random(nodes) < 0.2] = np.eye(vocab)[1]
    return tokens, valid, p


def wanted(tokens, valid, parents, p, own, epsilon, delta):
    """Typical acceptance, path by path: the longest, then the likeliest one."""
    best = (0, 0.0, [0])
    for leaf in range(len(parents)):
        path = [leaf]
        while path[0]:
            path.insert(0, parents[path[0]])
        fine, likelihood = True, 0.0
        for above, node in itertools.pairwise(path):
            law = p[above]
            entropy = -sum(x * np.log(x) for x in law if x > 0)
            chance = law[tokens[node]]
            fine &= bool(valid[node] and chance > min(epsilon, delta * np.exp(-entropy)))
            likelihood += np.log(chance) if chance > 0 else 0.0
        if fine and (len(path) - 1, likelihood) > best[:2]:
            best = (len(path) - 1, likelihood, path)
    path = best[2]
    return path, [*tokens[path[1:]], own[path[-1]]]


@pytest.mark.parametrize(
    "parents", [(0, 0, 1, 2), (0, 0, 1, 2, 0, 0, 4, 4, 1, 6)], ids=["chain", "tree"]
)
def test_lossy_typical_in_float64(parents):
    rng, vocab = np.random.default_rng(0), 5
    batch, lossy = 300, acceptance.LossyTypical(0.3, 0.5)
    rows = [random_tree(rng, vocab, parents) for _ in range(batch)]
    tokens, valid, p = (np.stack(x) for x in zip(*rows, strict=True))
    own = rng.integers(0, vocab, tokens.shape).astype(np.int32)
    depths = [0]
    for above in parents[1:]:
        depths.append(depths[above] + 1)
    with jax.enable_x64(True):
        parent = jnp.broadcast_to(jnp.asarray(parents, jnp.int32)[None], tokens.shape)
        depth = jnp.broadcast_to(jnp.asarray(depths, jnp.int32)[None], tokens.shape)
        shape = {
            "parent": parent,
            "depth": depth,
            "ancestors": h.ancestor_bits(parent, max(depths)),
        }
        draft = Draft(
            tokens=jnp.asarray(tokens),
            valid=jnp.asarray(valid),
            source=jnp.ones(tokens.shape, jnp.int32),
            probability=jnp.ones(tokens.shape, jnp.float32),
            depth_limit=max(depths),
            **({} if len(parents) == 4 else shape),
        )
        got = jax.device_get(
            jax.jit(acceptance.lossy_typical, static_argnums=3)(
                draft, jnp.asarray(p), jnp.asarray(own), lossy
            )
        )
    seen = set()
    for row in range(batch):
        path, emitted = wanted(*rows[row][:2], parents, p[row], own[row], 0.3, 0.5)
        count = len(path) - 1
        seen.add(count)
        assert got.accepted[row] == count
        assert got.path[row, : count + 1].tolist() == path
        assert got.tokens[row, : count + 1].tolist() == [int(t) for t in emitted]
    assert seen == set(range(max(depths) + 1)), "every depth occurred"


def test_lossy_typical_is_not_exact():
    """The control: greedy rows are plain decoding's, sampled ones are longer in fewer rounds and differ."""
    sampling, plain = plain_answers()
    prompts = h.prompts_of([1, 3, 8, 13])
    loop = DecodeLoop(h.SMALL, Expand(drafter(3), TREE), acceptance.LossyTypical())
    got = h.decode(loop, params(), prompts, sampling)
    assert got.tokens[0] == plain.tokens[0]
    assert got.tokens[2] != plain.tokens[2] or got.tokens[3] != plain.tokens[3]
    # The law: of (.5, .3, .2) a draft of the second token is always taken.
    p = jnp.asarray([[[0.5, 0.3, 0.2]] * 2], jnp.float32)
    text = Text(jnp.zeros((1, 3), jnp.int32), jnp.ones((1,), jnp.int32))
    draft = chain(text, jnp.ones((1, 1), jnp.int32))
    for own in range(3):
        target = jnp.full((1, 2), own, jnp.int32)
        verdict = acceptance.lossy_typical(draft, p, target, acceptance.LossyTypical())
        assert verdict.tokens[0, 0] == 1


def test_lossy_settings_that_are_refused():
    for fields, message in (
        ({"epsilon": 0.0}, "epsilon of lossy-typical"),
        ({"epsilon": 1.5}, "epsilon of lossy-typical"),
        ({"delta": float("nan")}, "delta of lossy-typical"),
    ):
        with pytest.raises(UserError, match=message):
            acceptance.LossyTypical(**fields)
    assert DecodeLoop(h.SMALL, drafter(2)).rule == acceptance.Match()
