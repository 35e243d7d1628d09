"""Which keys of the target a drafter sees in training.

In decoding, the i-th token of a draft is predicted from position p and sees the target's keys before the
root, p - i + 1 of them. The delay of a query is its distance to the last key that it sees, here i. Training
reads whole texts, whose keys are all known, and hides the newest keys from each query.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from jax_specdec._types import Array, Int, UInt

Visibility = Literal["shift", "block", "none"]


def visible_keys(
    kind: Visibility, shape: tuple[int, ...], delay: int, key: UInt[Array, ""]
) -> Int[Array, "B T"]:
    """How many of the target's keys each query of a text sees, `int32[B, T]`; 0 is none.

    Args:
      kind: `block`, the mask of GliDe (arXiv 2402.02082, section 4.2): blocks of `delay` tokens, each of
        which sees the blocks before it, as the tokens of one draft do; delays follow from positions.
        `shift`, after LongSpec (arXiv 2502.17421, section 3.2): every text has one delay, uniform in 1
        to `delay`. `none`: the delay is 1 everywhere.
      shape: (B, T). delay: the largest one.

    A query of the first block sees nothing. (GliDe's code lets it see all up to itself, which no draft can.)
    """
    batch, length = shape
    position = jnp.arange(length, dtype=jnp.int32)[None]
    if kind == "block":
        return jnp.broadcast_to(position // delay * delay, (batch, length))
    shift = jnp.ones((batch, 1), jnp.int32)
    if kind == "shift":
        shift = jax.random.randint(key, (batch, 1), 1, delay + 1, jnp.int32)
    return jnp.maximum(position + 1 - shift, 0)
