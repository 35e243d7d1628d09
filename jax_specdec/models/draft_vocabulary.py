"""A draft vocabulary: a drafter's head over the target's most frequent tokens only.

The head is the largest matrix of a small drafter. Of its columns those of a few thousand tokens are kept, as in
FR-Spec (arXiv 2502.14856, section 3.2) and EAGLE-3's `d2t`; the other tokens are never drafted, their logits being
-inf. That changes no text: any distribution may draft, under match and under rejection. What is drafted is read
as before, since the embedding stays whole.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_specdec._types import Array, Float, Int, Params
from jax_specdec.core.draft import TOP
from jax_specdec.core.numerics import NEG_INF
from jax_specdec.models.quantized import Quantized

IDS = "draft_ids"
PLACE = "draft_place"


def narrow(params: Params, ids: np.ndarray) -> Params:
    """Parameters that end in a head over some tokens only.

    Args:
      params: with `head [E, V]`, or `embed [V, E]` where the head is tied, or with `out`, matrices `[E, V]`.
      ids: `int32[R]`, the draft vocabulary, increasing.

    Returns:
      The same with `head [E, R]` or `out`, each `[E, R]`, `draft_ids`, `int32[R]`, and `draft_place`, `int32[V]`: each
      token's column, R for a token that is never drafted.
    """
    columns = jnp.asarray(ids, jnp.int32)

    def cut(matrix: Any) -> Any:
        if isinstance(matrix, Quantized):
            return Quantized(matrix.values[..., columns], matrix.scale[..., columns])
        return jnp.take(matrix, columns, axis=-1)

    if "out" in params:
        some, rows = {"out": tuple(map(cut, params["out"]))}, params["out"][0].shape[-1]
    elif "head" in params:
        some, rows = {"head": cut(params["head"])}, params["head"].shape[-1]
    else:
        embed = params["embed"]
        some, rows = {"head": jnp.take(embed, columns, axis=0).T}, embed.shape[0]
    place = np.full(rows, len(ids), np.int32)
    place[ids] = np.arange(len(ids), dtype=np.int32)
    return {**params, **some, IDS: columns, PLACE: jnp.asarray(place)}


def in_draft_vocabulary(params: Params) -> tuple[Params, Int[Array, " R"] | None]:
    """Parameters whose logits are `[B, T, R]`, of the draft vocabulary alone, and the token of each column.

    All the work behind the head is then over R tokens. None where the parameters have no draft vocabulary, or one of
    fewer tokens than a draft reports children of each node.
    """
    if PLACE not in params or params[IDS].shape[0] < TOP:
        return params, None
    return {name: params[name] for name in params if name != PLACE}, params[IDS]


def is_in_draft_vocabulary(params: Params) -> bool:
    """Whether parameters are those of `in_draft_vocabulary`."""
    return IDS in params and PLACE not in params


def widen(params: Params, logits: Float[Array, "B T R"]) -> Float[Array, "B T V"]:
    """Logits of the whole vocabulary, of those of the draft vocabulary where the parameters have one."""
    if PLACE not in params:
        return logits
    padded = jnp.pad(logits, ((0, 0), (0, 0), (0, 1)), constant_values=NEG_INF)
    return jnp.take(padded, params[PLACE], axis=-1)
