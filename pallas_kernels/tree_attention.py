"""Attention of new tokens over a ragged KV cache and over each other, along a tree."""

import functools
import logging
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import _mosaic_tpu, _reference, _triton, _xla, masks, tuning
from pallas_kernels.partition import Partition

logger = logging.getLogger(__name__)


@runtime_checkable
class Backend(Protocol):
    """What a back-end implements: `tree_attention` after validation, every default filled in."""

    def __call__(
        self,
        q: jax.Array,
        k_new: jax.Array | None,
        v_new: jax.Array | None,
        k_cache: jax.Array,
        v_cache: jax.Array,
        length: jax.Array,
        ancestors: jax.Array | None,
        *,
        layer: int | jax.Array | None,
        scale: float,
        soft_cap: float | None,
        window: int | None,
        visible: jax.Array | None,
        k_scale: jax.Array | None,
        v_scale: jax.Array | None,
        return_lse: bool,
    ) -> tuple[jax.Array, jax.Array | None]: ...


BACKENDS: dict[str, Backend] = {
    "reference": _reference.attend,
    "xla": _xla.attend,
    "mosaic_tpu": _mosaic_tpu.attend,
    "triton": _triton.attend,
}
_PALLAS = {"mosaic_tpu": _mosaic_tpu, "triton": _triton}


def tree_attention(
    q: jax.Array,
    k_new: jax.Array | None,
    v_new: jax.Array | None,
    k_cache: jax.Array,
    v_cache: jax.Array,
    length: jax.Array,
    ancestors: jax.Array | None = None,
    *,
    layer: int | jax.Array | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    window: int | None = None,
    visible: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    interpret: Any = False,
    partition: Partition | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attends from T new tokens to the live prefix of a KV cache and to the new tokens themselves.

    The new keys and values are arguments and are not written to the cache, so that rejecting a
    draft costs nothing. Cache slots at or past a row's `length` may hold anything, NaN included:
    they never reach the output. Letters: B batch, T new tokens or tree nodes, N query heads, K KV
    heads with N = K * G, D head width, S cache slots, L layers, W = ceil(T / 32).

    Scores, softmax statistics and sums are float32 whatever the input dtype (float64 for float64
    inputs); float32 inputs are multiplied at precision HIGHEST; with narrower inputs the attention
    weights are rounded to the dtype of the values before they multiply them.

    Args:
        q: floating [B, T, N, D]. Query head n reads KV head n // G. All of q, keys, values and
            caches have one dtype, unless the caches are int8.
        k_new: [B, T, K, D], keys of the new tokens, or None (with `v_new`) to attend to the cache
            only.
        v_new: [B, T, K, D], or None with `k_new`.
        k_cache: [B, K, S, D], or [L, B, K, S, D] together with `layer`.
        v_cache: same shape as `k_cache`.
        length: int32[B], how many slots of each row are valid; 0 <= length <= S.
        ancestors: int32[B, T, W] bitmask (see `pallas_kernels.masks`): node i sees new key j iff
            bit j % 32 of word j // 32 of row i is set. None is a chain: node i sees keys 0..i.
        layer: index into the stacked caches, a Python int or an int32 scalar array.
        scale: factor on q @ k; default D ** -0.5.
        soft_cap: if given, scaled scores become soft_cap * tanh(score / soft_cap).
        window: if given, a query at position p sees keys at positions > p - window only. Cache
            slot s is at position s, new token i at length + depth(i), where depth is the number
            of its proper ancestors (i in a chain).
        visible: int32[B, T], only without new keys: query t sees cache slots < visible[b, t] (and
            < length[b]). A window then counts back from there: query t sees slots >= visible[b, t] -
            window.
        k_scale: float32[K], or float32[L, K] with `layer`, for int8 caches only: a slot's key is
            k_cache * k_scale of its head. All greater than 0. The new tokens' keys are not scaled.
        v_scale: the same for the values.
        return_lse: also return the log-sum-exp of the scores.
        backend: "reference" (dense, slow, readable), "xla" (every platform), "mosaic_tpu" or
            "triton" (NVIDIA GPUs of compute capability 8.0 and up); None picks by platform and
            shape, and logs which, once, at level DEBUG. The platform is that of the abstract mesh that
            is set, if it names a device, and of the default device otherwise.
        interpret: run a Pallas back-end in an interpreter, on any device: True, or
            `pallas.tpu.InterpretParams(...)` for mosaic_tpu. For tests; needs an explicit `backend`.
        partition: how a mesh divides rows and heads; shapes are those of the whole arrays.

    Returns:
        [B, T, N, D] in q's dtype; zeros for a query that sees nothing. With `return_lse`, also
        float32[B, T, N]: the log-sum-exp of the scores (scaled and capped); -inf where nothing is
        seen.

    Raises:
        ValueError: at trace time, for shapes, dtypes or options that do not fit together, or a
            back-end that does not exist.
    """
    _validate(
        q,
        k_new,
        v_new,
        k_cache,
        v_cache,
        length,
        ancestors,
        layer,
        soft_cap,
        window,
        visible,
        k_scale,
        v_scale,
    )
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    if partition is not None:
        return _divided(
            partition,
            {
                "q": q,
                "k_new": k_new,
                "v_new": v_new,
                "k_cache": k_cache,
                "v_cache": v_cache,
                "length": length,
                "ancestors": ancestors,
                "layer": None if layer is None else jnp.asarray(layer, jnp.int32),
                "visible": visible,
                "k_scale": k_scale,
                "v_scale": v_scale,
            },
            scale=scale,
            soft_cap=soft_cap,
            window=window,
            return_lse=return_lse,
            backend=backend,
            interpret=interpret,
        )
    if layer is not None and k_scale is not None and v_scale is not None:
        k_scale, v_scale = (
            lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (k_scale, v_scale)
        )
    attend = _choose(
        backend, q, k_cache, ancestors, new_tokens=k_new is not None, interpret=interpret
    )
    out, lse = attend(
        q,
        k_new,
        v_new,
        k_cache,
        v_cache,
        length,
        ancestors,
        layer=layer,
        scale=scale,
        soft_cap=soft_cap,
        window=window,
        visible=visible,
        k_scale=k_scale,
        v_scale=v_scale,
        return_lse=return_lse,
    )
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


# The axes of each argument, for `Partition`; a stacked cache has its layers in front.
_AXES = {
    **{"q": "BTKD", "k_new": "BTKD", "v_new": "BTKD", "k_cache": "BKSD", "v_cache": "BKSD"},
    **{"length": "B", "ancestors": "BTW", "layer": "", "visible": "BT"},
    **{"k_scale": "K", "v_scale": "K"},
}


def _divided(
    partition: Partition, args: dict[str, Any], *, return_lse: bool, **options: Any
) -> Any:
    """The attention, each device with its own rows and heads."""
    axes = _AXES
    if args["layer"] is not None:
        stacked = ("k_cache", "v_cache", "k_scale", "v_scale")
        axes = axes | {name: f"L{axes[name]}" for name in stacked}
    local = functools.partial(tree_attention, return_lse=return_lse, **options)
    out = ("BTKD", "BTK") if return_lse else "BTKD"
    return partition.call(local, args, axes, out, len(args["length"]))


def automatic(q: Any, ancestors: Any = None, *, new_tokens: bool = True) -> tuple[str, str | None]:
    """The back-end that is taken where none is named, and why it is not the platform's own Pallas kernel.

    Args:
        q, ancestors: arrays, or their shapes, as in `tree_attention`. new_tokens: whether there are new keys.
    """
    native = tuning.NATIVE.get(tuning.device().platform)
    if native is None:
        return "xla", None
    why = _PALLAS[native].reason_against(q, ancestors, new_tokens=new_tokens)
    return (native, None) if why is None else ("xla", f"{native} {why}")


def _choose(
    backend: str | None, q, k_cache, ancestors, *, new_tokens: bool, interpret: Any
) -> Backend:
    if backend is None:
        if interpret:
            raise ValueError("interpret needs a backend: 'mosaic_tpu' or 'triton'")
        backend, why = automatic(q, ancestors, new_tokens=new_tokens)
        _say(backend, tuning.device(), why, q.shape, k_cache.shape)
        return BACKENDS[backend]
    tuning.check_exists(backend, BACKENDS)
    if backend not in _PALLAS:
        if interpret:
            raise ValueError(f"backend {backend!r} has no interpreter: it is not a Pallas kernel")
        return BACKENDS[backend]
    why = _PALLAS[backend].reason_against(
        q, ancestors, new_tokens=new_tokens, anywhere=bool(interpret)
    )
    if why is not None:
        raise ValueError(f"backend {backend!r} {why}")
    # Only the Pallas back-ends have an interpreter.
    return functools.partial(_PALLAS[backend].attend, interpret=interpret)


@functools.cache
def _say(backend: str, device: tuning.Device, why: str | None, q_shape, cache_shape) -> None:
    # Cached, so that each device and shape is logged once.
    because = f" ({why})" if why else ""
    logger.debug(
        "%s for q %s, cache %s on %s%s", backend, q_shape, cache_shape, device.kind, because
    )


def _validate(
    q,
    k_new,
    v_new,
    k_cache,
    v_cache,
    length,
    ancestors,
    layer,
    soft_cap,
    window,
    visible,
    k_scale,
    v_scale,
):
    if q.ndim != 4:
        raise ValueError(f"q must be [B, T, N, D], got {q.shape}")
    b, t, n, d = q.shape
    if k_cache.shape != v_cache.shape:
        raise ValueError(f"k_cache {k_cache.shape} and v_cache {v_cache.shape} differ in shape")
    rank = 4 if layer is None else 5
    if k_cache.ndim != rank:
        wanted = "[B, K, S, D]" if layer is None else "[L, B, K, S, D]"
        given = "without" if layer is None else "with"
        raise ValueError(f"{given} layer the caches must be {wanted}, got {k_cache.shape}")
    if layer is not None:
        if isinstance(layer, (int, np.integer)):
            if not 0 <= layer < k_cache.shape[0]:
                raise ValueError(
                    f"layer {layer} is not one of the cache's {k_cache.shape[0]} layers"
                )
        elif jnp.shape(layer) != () or not jnp.issubdtype(layer.dtype, jnp.integer):
            raise ValueError(
                f"layer must be an int or an integer scalar array, got {layer.dtype}{layer.shape}"
            )
    k = k_cache.shape[-3]
    if (k_cache.shape[-4], k_cache.shape[-1]) != (b, d):
        raise ValueError(f"q {q.shape} and cache {k_cache.shape} differ in batch or head width")
    if n % k:
        raise ValueError(
            f"q {q.shape} has {n} heads, not a multiple of the cache's {k}, {k_cache.shape}"
        )
    if (k_new is None) != (v_new is None):
        raise ValueError("k_new and v_new go together: give both or neither")
    if k_new is not None:
        for name, x in (("k_new", k_new), ("v_new", v_new)):
            if x.shape != (b, t, k, d):
                raise ValueError(
                    f"{name} must be {(b, t, k, d)} for q {q.shape} and cache {k_cache.shape}, "
                    f"got {x.shape}"
                )
        if visible is not None:
            raise ValueError("visible is for attending to the cache alone, without k_new and v_new")
    else:
        if ancestors is not None:
            raise ValueError("ancestors says which new keys are seen, and there is no k_new")
        if window is not None and visible is None:
            raise ValueError(
                "a window without k_new counts back from `visible`, which is not given"
            )
    if (k_scale is None) != (v_scale is None):
        raise ValueError("k_scale and v_scale go together: give both or neither")
    arrays = {"q": q, "k_new": k_new, "v_new": v_new}
    if k_scale is None:
        arrays |= {"k_cache": k_cache, "v_cache": v_cache}
    else:
        if {k_cache.dtype, v_cache.dtype} != {jnp.dtype("int8")}:
            raise ValueError(
                f"k_scale and v_scale are of int8 caches, not of {k_cache.dtype} and {v_cache.dtype}"
            )
        shape = (k,) if layer is None else (k_cache.shape[0], k)
        for name, x in (("k_scale", k_scale), ("v_scale", v_scale)):
            if x.shape != shape or x.dtype != jnp.float32:
                raise ValueError(
                    f"{name} must be float32{shape} for cache {k_cache.shape}, got {x.dtype}{x.shape}"
                )
    dtypes = {name: x.dtype for name, x in arrays.items() if x is not None}
    if len(set(dtypes.values())) > 1 or not jnp.issubdtype(q.dtype, jnp.floating):
        listed = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise ValueError(
            f"q, keys, values and caches must have one floating dtype (int8 caches go with k_scale and v_scale), got {listed}"
        )
    integers = {
        "length": (length, (b,)),
        "ancestors": (ancestors, (b, t, masks.num_words(t))),
        "visible": (visible, (b, t)),
    }
    for name, (x, shape) in integers.items():
        if x is not None and (x.shape != shape or x.dtype != jnp.int32):
            raise ValueError(f"{name} must be int32{shape} for q {q.shape}, got {x.dtype}{x.shape}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"soft_cap must be positive, got {soft_cap}")
