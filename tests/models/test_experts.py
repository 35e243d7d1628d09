"""Mixtures of experts: the sum that they are, and no pass over all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_specdec.models import experts
from jax_specdec.models.experts import mixture, route
from jax_specdec.models.quantized import quantize
from pallas_kernels.tuning import Device

EMBED, SIZE = 16, 24


def weights(count, seed=0):
    rng = np.random.default_rng(seed)
    up = rng.normal(size=(count, EMBED, 2 * SIZE)).astype(np.float32)
    down = rng.normal(size=(count, SIZE, EMBED)).astype(np.float32)
    return jnp.asarray(up), jnp.asarray(down)


def activate(y):
    gate, up = jnp.split(y, 2, axis=-1)
    return jax.nn.silu(gate) * up


def inputs(rows, count, chosen=2, seed=1):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(rows, EMBED)).astype(np.float32))
    return x, *route(jnp.asarray(rng.normal(size=(rows, count)), jnp.float32), chosen, True)


def dense(x, chosen, weight, up, down):
    """Every row through every expert."""
    out = np.zeros(x.shape, np.float64)
    for row in range(len(x)):
        for e, w in zip(np.asarray(chosen)[row], np.asarray(weight)[row], strict=True):
            gate, linear = np.split(np.asarray(x[row], np.float64) @ np.asarray(up[e]), 2)
            out[row] += w * ((gate / (1 + np.exp(-gate)) * linear) @ np.asarray(down[e]))
    return out


# One row; fewer rows than experts; several blocks of an expert, and experts of no rows.
@pytest.mark.parametrize(("rows", "count"), [(1, 8), (5, 16), (70, 3)])
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_the_sum_of_chosen_experts(rows, count, platform, monkeypatch):
    monkeypatch.setattr(experts.tuning, "device", lambda: Device(platform, platform, None))
    (up, down), (x, chosen, weight) = weights(count), inputs(rows, count)
    if rows == 70:
        chosen = jnp.where(chosen == 1, 2, chosen)
    got = mixture(x, chosen, weight, up, down, activate)
    want = dense(x, chosen, weight, up, down)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    coarse = quantize({"experts_up": up, "experts_down": down})
    got = mixture(x, chosen, weight, coarse["experts_up"], coarse["experts_down"], activate)
    np.testing.assert_allclose(got, want, rtol=0, atol=0.03 * np.abs(want).max())


def test_weights_of_a_row():
    logits = jnp.log(jnp.asarray([[0.1, 0.4, 0.2, 0.3]]))
    chosen, weight = route(logits, 2, True)
    assert chosen.tolist() == [[1, 3]]
    np.testing.assert_allclose(weight, [[4 / 7, 3 / 7]], rtol=1e-6)
    np.testing.assert_allclose(route(logits, 2, False)[1], [[0.4, 0.3]], rtol=1e-6)


def test_operations():
    """A round of 16 nodes through 2 of 64 experts computes what is chosen, and not 64 times 16 rows."""
    rows, count, chosen = 16, 64, 2
    (up, down), (x, experts_of, weight) = weights(count), inputs(rows, count, chosen)
    program = jax.jit(mixture, static_argnums=5)
    compiled = program.lower(x, experts_of, weight, up, down, activate).compile()
    found = compiled.cost_analysis()["flops"]
    one = 2 * EMBED * 2 * SIZE + 2 * SIZE * EMBED  # a row through an expert
    # The analysis counts a loop's body once. There is a block for each row of an expert here, each of one row.
    assert found < 3 * one + 20 * rows * chosen * count  # sorting and counting
    text = compiled.as_text()
    assert "while" in text and f"f32[{rows * chosen},{count}" not in text.replace(" ", "")
    dense_flops = rows * count * one
    assert found + (rows * chosen - 1) * 3 * one < dense_flops / 8
