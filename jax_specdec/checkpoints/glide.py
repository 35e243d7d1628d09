"""Checkpoint folders of GliDe drafters, see `drafters.own_files`."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jax_specdec._types import Params
from jax_specdec.checkpoints.draft_vocabulary import narrowed
from jax_specdec.checkpoints.target_bound import (
    NOT_IDENTITY,
    SHARD_BYTES,
    Kind,
    check_target,
    make_config,
    read_fields,
    read_own,
    save_own,
    target_fingerprint,
)
from jax_specdec.checkpoints.targets import Target
from jax_specdec.checkpoints.vocabulary import check_vocabulary
from jax_specdec.core.sharding import Sharding
from jax_specdec.errors import UserError
from jax_specdec.models.config import ModelConfig
from jax_specdec.models.decoder import unstack_layers
from jax_specdec.models.glide import GliDe
from jax_specdec.models.glide_config import GliDeConfig

__all__ = [
    "KIND",
    "fitted_glide",
    "from_decoder",
    "load_glide",
    "load_own_params",
    "make_glide",
    "make_glide_config",
    "read_glide_config",
    "save_glide",
    "target_fingerprint",
]

KIND = Kind("glide", "GliDe")


def save_glide(
    folder: str | os.PathLike[str],
    model: GliDe,
    params: Params,
    fingerprint: str,
    *,
    dtype: Any = "bfloat16",
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a drafter; a folder that exists keeps its other files.

    Args:
      params: its own, as `GliDe.init` returns them. fingerprint: of its target.

    Raises:
      RunError: the disk is full or read-only.
    """
    fields = dataclasses.asdict(model.config)
    save_own(KIND, folder, fields, model.shapes(), params, fingerprint, dtype, max_shard_bytes)


def load_glide(
    folder: str | os.PathLike[str],
    target: Target,
    dtype: Any = None,
    read: tuple[GliDeConfig, str] | None = None,
) -> tuple[GliDe, Params]:
    """A drafter and its parameters, joined with the target's (see `GliDe.join`), in its draft vocabulary if it has one.

    Args:
      dtype: of parameters and computation; None is the target's.
      read: `read_glide_config` of the folder, where it was called before.

    Raises:
      UserError: no such checkpoint, one that is damaged, or one for another target.
    """
    model = fitted_glide(folder, target, dtype, read)
    joined = model.join(load_own_params(Path(folder), model), target.params)
    return model, narrowed(Path(folder), target, joined, model.sharding)


def fitted_glide(
    folder: str | os.PathLike[str],
    target: Target,
    dtype: Any = None,
    read: tuple[GliDeConfig, str] | None = None,
) -> GliDe:
    """`load_glide` without parameters, the target's among them."""
    folder = Path(folder)
    config, fingerprint = read or read_glide_config(folder)
    check_target(KIND, folder, fingerprint, target)
    dtype = dtype or target.decoder.dtype
    return make_glide(config, target.config, dtype, target.sharding)


def from_decoder(
    small: Target, target: Target, key: jax.Array, **fields: Any
) -> tuple[GliDe, Params]:
    """A drafter that begins as a decoder: its layers, embedding and head, and cross-attention that adds 0.

    What the decoder learned need not be learned again, and cross-attention has only to improve on it.

    Args:
      small: with the target's vocabulary, in float32. fields: of `GliDeConfig`, what the decoder leaves open.

    Raises:
      UserError: another vocabulary, a field that the decoder says otherwise, or a decoder of another kind
        than a GliDe drafter for this target is.
    """
    check_vocabulary(target.tokenizer, target.vocab_size, small.tokenizer, small.vocab_size)
    c = small.config
    names = (
        "hidden_size",
        "mlp_size",
        "num_layers",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "qkv_bias",
    )
    fixed = {name: getattr(c, name) for name in names} | {"share": False, "final_norm": True}
    for name, value in fixed.items():
        if fields.get(name, value) != value:
            raise UserError(
                f"{small.path} has {name} {value}, and what begins as it cannot have {fields[name]}."
            )
    config = make_glide_config({**fixed, **fields}, "What was given")
    model = make_glide(config, target.config, "float32", target.sharding)
    alike = model.config.decoder(target.config)
    for field in dataclasses.fields(ModelConfig):
        if field.name in (*NOT_IDENTITY, "tied_head"):
            continue
        theirs, ours = getattr(c, field.name), getattr(alike, field.name)
        if theirs != ours:
            raise UserError(
                f"{small.path} has {field.name} {theirs}, and a GliDe drafter for this target {ours}."
            )
    params = model.init(key)
    theirs = unstack_layers(small.params)
    params["layers"] = tuple(
        {**own, **layer} for own, layer in zip(params["layers"], theirs["layers"], strict=True)
    )
    for layer in params["layers"]:
        if "cross" in layer:
            layer["cross"]["out"] = jnp.zeros_like(layer["cross"]["out"])
    params |= {"norm": theirs["norm"], "embed": theirs["embed"]}
    params["head"] = theirs["head"] if "head" in theirs else theirs["embed"].T
    return model, params


def make_glide(
    config: GliDeConfig, target: ModelConfig, dtype: Any, sharding: Sharding | None = None
) -> GliDe:
    """`GliDe`, its errors as a UserError."""
    try:
        return GliDe(config, target, dtype, sharding)
    except (TypeError, ValueError) as error:
        raise UserError(f"This GliDe drafter does not fit the target: {error}.") from None


def read_glide_config(folder: Path) -> tuple[GliDeConfig, str]:
    """The configuration and the target's fingerprint in a folder's config.json.

    Raises:
      UserError: it is missing, broken, or not a GliDe drafter's.
    """
    found, fingerprint = read_fields(KIND, folder)
    return make_glide_config(found, str(folder / "config.json")), fingerprint


def make_glide_config(fields: dict[str, Any], where: str) -> GliDeConfig:
    """`GliDeConfig` from JSON values, checked.

    Raises:
      UserError: unknown or missing fields, or wrong values, with `where` they are.
    """
    fields = dict(fields)
    layers = fields.get("target_layers")
    if isinstance(layers, list):
        fields["target_layers"] = tuple(layers)
    return make_config(KIND, GliDeConfig, fields, where)


def load_own_params(folder: Path, model: GliDe) -> Params:
    """The parameters that are not shared, in the model's dtype.

    Raises:
      UserError: keys or shapes differ from the configuration; all of them are listed.
    """
    places = None if model.sharding is None else model.places()
    return read_own(folder, model.shapes(), places)
