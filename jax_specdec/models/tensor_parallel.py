"""A model over a mesh: whether it can be divided, and its parameters in the order that this takes.

The columns of `qkv` and `gate_up` are several matrices beside each other. Divided over t devices they are t
groups, each with the heads, or the part of the MLP, of one device. Where there are fewer KV heads than devices,
each is there several times, for the query heads of as many devices; that changes no result.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from jax_specdec._types import Params
from jax_specdec.core.sharding import Sharding
from jax_specdec.errors import UserError
from jax_specdec.models.config import ModelConfig


def divided_config(config: ModelConfig, sharding: Sharding) -> ModelConfig:
    """The configuration as the mesh has it, with KV heads repeated where there are fewer than devices.

    Raises:
      UserError: heads, MLP or vocabulary do not divide; it offers the divisions that do.
    """
    parts = sharding.size("kv_heads")
    if not _heads_divide(config, parts):
        fit = [n for n in range(1, config.num_heads + 1) if _heads_divide(config, n)]
        raise UserError(
            f"{config.num_heads} query heads and {config.num_kv_heads} KV heads do not divide over "
            f"{parts} devices; they do over {', '.join(map(str, fit))}."
        )
    sizes = [("vocab", config.vocab_size), ("embed", config.hidden_size)]
    sizes = [("mlp", size) for size in config.mlp_sizes] + sizes
    for name, size in sizes:
        among = sharding.size(name)
        if size % among:
            fit = [n for n in range(1, min(size, 256) + 1) if size % n == 0]
            raise UserError(
                f"The axis {name} of {size} does not divide over {among} devices; it does over "
                f"{', '.join(map(str, fit))}, and rules with {name}=None keep it whole."
            )
    return dataclasses.replace(config, num_kv_heads=max(config.num_kv_heads, parts))


def _heads_divide(config: ModelConfig, parts: int) -> bool:
    heads, kv_heads = config.num_heads, config.num_kv_heads
    return heads % parts == 0 and (kv_heads % parts == 0 or parts % kv_heads == 0)


def fused_order(name: str, config: ModelConfig, sharding: Sharding) -> np.ndarray | None:
    """Of each column of a parameter on the mesh, the column that it is on one device; None for the same.

    Args:
      name: of the parameter in its layer. config: as the checkpoint has it.
    """
    if name in ("qkv", "qkv_bias"):
        parts, dim = sharding.size("heads"), config.head_dim
        n, k = config.num_heads, config.num_kv_heads
        kept = _kept_heads(k, parts)
        pieces = [np.arange(n), n + kept, n + k + kept]
    elif name == "k_norm" and config.wide_qk_norm:
        parts, dim = sharding.size("heads"), config.head_dim
        pieces = [_kept_heads(config.num_kv_heads, parts)]
    elif name in ("gate_up", "gate_up_bias", "experts_up") and config.gated:
        parts, dim = sharding.size("mlp"), 1
        size = config.expert_size if name == "experts_up" else config.mlp_size
        pieces = [np.arange(size), size + np.arange(size)]
    else:
        return None
    if parts == 1:
        return None
    heads = np.concatenate([piece.reshape(parts, -1) for piece in pieces], axis=1).reshape(-1)
    return (heads[:, None] * dim + np.arange(dim)).reshape(-1)


def _kept_heads(count: int, parts: int) -> np.ndarray:
    """The KV head that each is, where there are fewer than devices."""
    return np.arange(max(count, parts)) * count // max(count, parts)


def divide(params: Params, config: ModelConfig, decoder: Any) -> Params:
    """Parameters of one device, on the mesh of `decoder`.

    Args:
      params: in the decoder's layer layout. config: of these parameters.

    Returns:
      What `decoder.apply` reads. `load_target` gets there without holding the whole.
    """
    sharding = decoder.sharding

    def moved(path: Any, value: Any, names: tuple[str | None, ...]) -> Any:
        order = fused_order(path[-1].key, config, sharding)
        value = value if order is None else np.asarray(value)[..., order]
        return jax.device_put(value, sharding.of(*names))

    axes = decoder.axes()[0]
    if "head" in params and "head" not in axes:  # the transposed copy of a tied embedding
        axes = {**axes, "head": ("embed", "vocab")}
    return jax.tree_util.tree_map_with_path(moved, params, axes)
