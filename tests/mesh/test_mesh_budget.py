"""Budgets on a mesh: costs are everywhere, and all devices take the same depth and width."""

import jax
import jax.numpy as jnp
import meshes as m
import numpy as np
import pytest

from jax_specdec import DecodeLoop
from jax_specdec.core.sharding import Sharding, put_rows, put_whole


@pytest.mark.parametrize(
    ("name", "data", "tensor"),
    [
        ("lm", 2, 2),
        ("first", 2, 1),
        pytest.param("cascade", 2, 1, marks=pytest.mark.slow),
        pytest.param("glide+cape", 1, 2, marks=pytest.mark.slow),
    ],
)
def test_rounds_of_several_widths(name, data, tensor):
    sharding = Sharding(m.mesh_of(data, tensor))
    target, drafter, params = m.case(name, sharding)
    loop = DecodeLoop(target, drafter).budgeted()
    wide = jnp.asarray(1 + 0.2 * np.log2(loop.widths), jnp.float32)
    costs = loop.unknown_costs().replace(verify=wide)
    costs = put_whole(costs, sharding)
    rows = (*m.h.pad(m.PROMPTS), m.sampling(), jnp.arange(m.BATCH, dtype=jnp.int32))

    def decode(params, costs, *rows):
        state = loop.start(params, *rows, capacity=16 + m.NEW, costs=costs)
        return loop.run(params, state, 16 + m.NEW)

    state = jax.jit(decode)(params, costs, *put_rows(rows, sharding))
    assert state.budget.costs.verify.sharding.is_fully_replicated
    if data > 1:
        assert not state.budget.hits.sharding.is_fully_replicated
    state = jax.device_get(state)
    for row, want in enumerate(m.plain()):
        start = len(m.PROMPTS[row])
        assert state.text.tokens[row, start : state.text.length[row]].tolist() == want
    assert (state.stats.widths.sum(axis=1) == state.stats.rounds).all()
    assert state.stats.widths[:, :-1].any(), "all rounds were as wide as can be"
