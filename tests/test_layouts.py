"""Weights put down in a layout of our choice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.layout import Layout

from jax_specdec.checkpoints import layouts


@pytest.mark.parametrize(
    ("path", "shape", "dtype", "kind", "chosen"),
    [
        (("layers", 3, "qkv"), (64, 128), jnp.bfloat16, "TPU7x", True),
        (("layers", "down"), (4, 64, 128), jnp.bfloat16, "TPU7x", True),
        (("layers", 0, "cross", "q"), (64, 128), jnp.bfloat16, "TPU7x", True),
        (("heads", 1, 0, "weight"), (64, 64), jnp.bfloat16, "TPU7x", True),
        (("heads", 1, 0, "bias"), (64,), jnp.bfloat16, "TPU7x", False),
        (("embed",), (128, 64), jnp.bfloat16, "TPU7x", False),  # rows of it are looked up
        (("layers", "mlp_norm"), (4, 64), jnp.bfloat16, "TPU7x", False),
        (("layers", 3, "qkv"), (64, 128), jnp.float32, "TPU7x", False),
        (("layers", 3, "qkv"), (64, 128), jnp.bfloat16, "TPU v6 lite", False),
        (("layers", 3, "qkv"), (64, 128), jnp.bfloat16, "cpu", False),
    ],
)
def test_weight_layout(path, shape, dtype, kind, chosen):
    layout = layouts.weight_layout(path, shape, dtype, kind)
    assert (layout is not None) == chosen
    if layout is not None:
        assert layout.major_to_minor == tuple(range(len(shape)))


def test_put_tree_keeps_values_and_programs_follow_the_layout(monkeypatch):
    def by_columns(path, shape, dtype, kind):
        return Layout((1, 0)) if path[-1] == "qkv" else None

    monkeypatch.setattr(layouts, "weight_layout", by_columns)
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    params = {"embed": values, "layers": ({"qkv": values + 1},)}
    placed = layouts.put_tree(params)
    jax.tree.map(np.testing.assert_array_equal, placed, params)
    assert placed["layers"][0]["qkv"].format.layout.major_to_minor == (1, 0)
    assert placed["embed"].format.layout.major_to_minor == (0, 1)

    compiled = jax.jit(lambda p: p["embed"] @ p["layers"][0]["qkv"].T).lower(placed).compile()
    (taken,), _ = compiled.input_formats
    assert taken["layers"][0]["qkv"].layout.major_to_minor == (1, 0)
    np.testing.assert_array_equal(compiled(placed), values @ (values + 1).T)
