"""Which keys of the target a drafter sees in training.

In decoding, the i-th token of a draft is predicted from position p and sees the target's keys before the
root, p - i + 1 of them. The delay of a query is its distance to the last key that it sees, here i. Training
reads whole texts, whose keys are all known, and hides the newest keys from each query.

Committed tokens are read at delay 1. So a token has one delay as a query of its draft and another as a key of later
ones, where its own keys depend on the delay: in a second layer, or with the target's hidden state as an input. `drafts`
reads every token in both roles; the other masks give each token one delay, which is the same for one layer without.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jax_specdec._types import Array, Int, UInt
from pallas_kernels import masks


class Drafts(NamedTuple):
    """A text `[B, T]` twice in a row, `[B, 2T]`: each token committed, and each token drafted.

    Attributes:
      visible: `int32[B, 2T]`, how many of the target's keys each query sees.
      ancestors: `int32[B, 2T, ceil(2T/32)]`, which of the 2T tokens its self-attention sees, see `pallas_kernels.masks`.
      delay: `int32[B, 2T]`, 1 in the first half; 0 for a token without a root in its text.
    """

    visible: Int[Array, "B N"]
    ancestors: Int[Array, "B N W"]
    delay: Int[Array, "B N"]


def drafts(
    shape: tuple[int, ...], longest: int, first: Int[Array, "B 1"], window: int | None = None
) -> Drafts:
    """The drafter's reading of a text as in decoding: drafts of `longest` tokens, one behind the other.

    A drafted token sees the committed ones up to the root of its draft, and its draft up to itself, as in the
    training-time test of EAGLE-3 (arXiv 2503.01840, section 3.2), here with one delay of 2 to `longest` a token.

    Args:
      shape: (B, T). longest: at least 2; the first token of a draft is predicted at its root, which is committed.
      first: `int32[B, 1]`, where a draft begins, 0 to `longest` - 2.
      window: sliding window of the self-attention in tokens, or None.
    """
    batch, length = shape
    at = jnp.arange(length, dtype=jnp.int32)[None]
    begin = at - (at - first) % (longest - 1)  # of the draft that each token is in
    root = begin - 1
    delay = jnp.where(root >= 0, at - root + 1, 0)
    visible = jnp.concatenate([jnp.broadcast_to(at, (batch, length)), jnp.maximum(root, 0)], axis=1)
    key, query = at[:, None], at[..., None]
    near = jnp.ones((), bool) if window is None else query - key < window
    committed = jnp.broadcast_to((key <= query) & near, (batch, length, length))
    rooted = (key < begin[..., None]) & near
    own = (key >= begin[..., None]) & (key <= query) & near
    none = jnp.zeros_like(committed)
    seen = jnp.concatenate(
        [jnp.concatenate([committed, none], -1), jnp.concatenate([rooted, own], -1)], axis=1
    )
    return Drafts(visible, masks.pack(seen), jnp.concatenate([jnp.ones_like(delay), delay], axis=1))


def random_drafts(
    shape: tuple[int, ...], longest: int, key: UInt[Array, ""], window: int | None = None
) -> Drafts:
    """`drafts` that begin anywhere."""
    first = jax.random.randint(key, (shape[0], 1), 0, longest - 1, jnp.int32)
    return drafts(shape, longest, first, window)


def visible_keys(
    kind: Literal["shift", "block", "none"],
    shape: tuple[int, ...],
    delay: int,
    key: UInt[Array, ""],
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
