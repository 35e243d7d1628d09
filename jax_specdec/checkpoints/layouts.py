"""How weights lie in a device's memory, where JAX's default costs a copy.

XLA keeps arguments as they come. For TPU7x it multiplies bfloat16 weights in tiles of 16 rows, JAX puts
them down in tiles of 8, and every program would begin by rewriting all of them, beside the first copy.
Weights that are put down in the wider tiles are read where they lie: `jax.jit` compiles for the layout
of the arrays that it is given.
"""

from typing import Any

import jax
import numpy as np
from jax.experimental.layout import Format, Layout

# Parameters that only ever stand right of a product, by a key of their path.
_MULTIPLIED = frozenset(("qkv", "out", "gate_up", "up", "down", "head", "heads", "q"))


def weight_layout(
    path: tuple[str | int, ...], shape: tuple[int, ...], dtype: Any, device_kind: str
) -> Layout | None:
    """The layout of one array of a parameter tree.

    Args:
      path: its keys, such as `("layers", 3, "qkv")`. device_kind: of the device that it goes to, as
        `jax.Device.device_kind`.

    Returns:
      None where the default serves.
    """
    if device_kind != "TPU7x" or dtype != jax.numpy.bfloat16 or len(shape) < 2:
        return None
    if _MULTIPLIED.isdisjoint(path):
        return None
    return Layout(tuple(range(len(shape))), ((16, 128), (2, 1)))


def put(path: tuple[str | int, ...], value: np.ndarray, device: Any = None) -> jax.Array:
    """An array of a parameter tree on a device (None: the default one), in the layout that is best there."""
    usual = jax.device_put(value, device)
    (device,) = usual.devices()
    layout = weight_layout(path, value.shape, value.dtype, device.device_kind)
    if layout is None:
        return usual
    return jax.device_put(usual, Format(layout, usual.sharding), donate=True)


def put_tree(params: Any) -> Any:
    """`put` for every array of a parameter tree."""
    return jax.tree_util.tree_map_with_path(lambda path, value: put(keys(path), value), params)


def shapes_of(params: Any, places: Any, device_kind: str) -> Any:
    """A parameter tree as shapes that lie at `places`, in the layouts in which `put` lays it down."""

    def one(path: Any, x: Any, place: Any) -> jax.ShapeDtypeStruct:
        layout = weight_layout(keys(path), x.shape, x.dtype, device_kind)
        where = place if layout is None else Format(layout, place)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    return jax.tree_util.tree_map_with_path(one, params, places)


def keys(path: tuple[Any, ...]) -> tuple[str | int, ...]:
    """A path of JAX as plain keys and indices."""
    return tuple(getattr(key, "key", getattr(key, "idx", key)) for key in path)
