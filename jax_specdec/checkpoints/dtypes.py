"""What models are computed and kept in; without jax, for flags."""

from typing import Any

from jax_specdec.errors import UserError, shown

DTYPES = ("float32", "bfloat16", "float16")


def check_dtype(dtype: Any, name: str = "dtype", *, of_files: bool = False) -> str:
    """A dtype's name, of anything that jax takes for one.

    >>> import jax.numpy as jnp
    >>> check_dtype(jnp.bfloat16), check_dtype("f4")
    ('bfloat16', 'float32')

    Args:
      of_files: nothing is computed in it, so that `int8` is no way out.

    Raises:
      UserError: none of `DTYPES`.
    """
    import jax.numpy as jnp  # which makes bfloat16 known to numpy

    try:
        found = "None" if dtype is None else jnp.dtype(dtype).name
    except (AttributeError, TypeError, ValueError):
        found = str(dtype)
    if found in DTYPES:
        return found
    narrow = found.startswith(("int", "uint", "float8", "float4")) and not of_files
    hint = ': for weights in 8 bits give int8=("weights",)' if narrow else ""
    *some, last = DTYPES
    raise UserError(f"{name} must be {', '.join(some)} or {last}, not {shown(found, 40)}{hint}.")
