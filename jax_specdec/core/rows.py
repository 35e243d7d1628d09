"""From a user's values, one for all rows or one per row, to checked arrays."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jax_specdec._types import Array
from jax_specdec.errors import UserError, shown_value

PerRow = float | Sequence[float] | np.ndarray  # one value for all rows, or one for each


def per_row(
    name: str, value: Any, batch: int, dtype: Any, legal: Callable[[Any], bool], expected: str
) -> Array:
    """`value` as an array `dtype[B]`.

    Args:
      legal: what a value must satisfy. expected: the same in words, as in "at least 1".

    Raises:
      UserError: not a number, not `batch` values, a fraction where a count is wanted, or a value that is not
        legal, NaN included.
    """

    def refuse(item: Any) -> UserError:
        return UserError(f"{name} must be {expected}, got {shown_value(item)}.")

    dtype = np.dtype(dtype)
    array = _numbers(value)
    listed = isinstance(value, (list, tuple))
    if array is None or (array.ndim > 1 and listed):
        wrong = (item for item in value if _numbers(item, 0) is None) if listed else ()
        raise refuse(next(iter(wrong), value))
    if array.ndim > 1 or array.shape not in ((), (1,), (batch,)):
        raise UserError(f"Got {array.size} values of {name} for {batch} rows.")
    for item in array.ravel().tolist():
        whole = dtype.kind == "f" or float(item).is_integer()
        # In the array's dtype, too: 1e39 is infinite in float32, and 1e-50 is 0.
        with np.errstate(over="ignore"):
            if not (whole and legal(item) and legal(dtype.type(item))):
                raise refuse(item)
    # jnp.asarray compiles a copy for each shape.
    return jax.device_put(np.broadcast_to(array, (batch,)).astype(dtype))


def _numbers(value: Any, most: int | None = None) -> np.ndarray | None:
    """An array of numbers, of `most` dimensions at most; None where the value is no such thing."""
    try:
        array = np.asarray(value)
    except ValueError:  # lists of different lengths
        return None
    return array if array.dtype.kind in "iuf" and (most is None or array.ndim <= most) else None
