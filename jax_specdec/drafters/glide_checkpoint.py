"""Checkpoint folders of GliDe drafters: config.json, and safetensors named by the path in our tree.

What is shared with the target is not stored. The folder names the target that it was trained for by a
fingerprint, and loads beside no other: the drafter's queries mean nothing to other keys.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_specdec.checkpoints import Target, load_config
from jax_specdec.errors import UserError
from jax_specdec.models.config import ModelConfig
from jax_specdec.models.decoder import Params, unstack_layers
from jax_specdec.models.glide import GliDe
from jax_specdec.models.glide_config import GliDeConfig
from jax_specdec.models.hf import Weight, weight_names
from jax_specdec.tensor_files import (
    aligned,
    check_tensors,
    new_folder,
    open_tensors,
    read_into,
    read_json,
    write_json,
    write_tensors,
)

MODEL_TYPE = "glide"
SHARD_BYTES = 14 * 10**6
# Rows and columns of each of the target's tensors that its fingerprint reads.
_SAMPLED_ROWS, _SAMPLED_COLUMNS = 4, 256
# What does not change the target's keys: special ids, and the longest text.
_NOT_IDENTITY = ("family", "context", "bos_id", "eos_ids", "pad_id")


def target_fingerprint(folder: str | os.PathLike[str]) -> str:
    """SHA-256 over a target's geometry and a fixed sample of every tensor, rounded to bfloat16.

    It is taken from the files, and so is the same whatever dtype the target is loaded in.

    Raises:
      UserError: the folder is no checkpoint, or a tensor is missing.
    """
    folder = Path(folder)
    config, tensors = load_config(folder), open_tensors(folder)
    geometry = dataclasses.asdict(config)
    for name in _NOT_IDENTITY:
        del geometry[name]
    digest = hashlib.sha256(json.dumps(geometry, sort_keys=True).encode())
    for name in sorted(weight_names(config)):
        if name not in tensors:
            raise UserError(f"{folder} lacks {name}, which its config.json describes.")
        view = tensors[name].get_slice(name)
        rows = view.get_shape()[0]
        for row in np.linspace(0, rows - 1, min(rows, _SAMPLED_ROWS)).astype(int).tolist():
            part = view[row : row + 1][..., :_SAMPLED_COLUMNS]
            digest.update(part.astype(jnp.bfloat16).tobytes())
    return digest.hexdigest()


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
    dtype = jnp.dtype(dtype)
    config = {
        "model_type": MODEL_TYPE,
        "dtype": dtype.name,
        **dataclasses.asdict(model.config),
        "target": fingerprint,
    }
    with new_folder(Path(folder)) as new:
        write_json(new / "config.json", config)
        write_tensors(new, _weights(model), params, dtype, max_shard_bytes)


def load_glide(
    folder: str | os.PathLike[str], target: Target, dtype: Any = None
) -> tuple[GliDe, Params]:
    """A drafter and its parameters, joined with the target's (see `GliDe.join`).

    Args:
      dtype: of parameters and computation; None is the target's.

    Raises:
      UserError: no such checkpoint, one that is damaged, or one for another target.
    """
    folder = Path(folder)
    config, fingerprint = read_glide_config(folder)
    if fingerprint != target_fingerprint(target.path):
        raise UserError(
            f"The GliDe drafter in {folder} was trained for another target than the model in "
            f"{target.path}: train one for it with `jax-specdec train glide`."
        )
    model = make_glide(config, target.config, dtype or target.decoder.dtype)
    own = load_own_params(folder, model)
    return model, model.join(own, target.params)


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
    from jax_specdec.drafters.loading import check_vocabulary

    check_vocabulary(target, small)
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
    model = make_glide(
        make_glide_config({**fixed, **fields}, "What was given"), target.config, "float32"
    )
    alike = model.config.decoder(target.config)
    for field in dataclasses.fields(ModelConfig):
        if field.name in (*_NOT_IDENTITY, "tied_head"):
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


def make_glide(config: GliDeConfig, target: ModelConfig, dtype: Any) -> GliDe:
    """`GliDe`, its errors as a UserError."""
    try:
        return GliDe(config, target, dtype)
    except (TypeError, ValueError) as error:
        raise UserError(f"This GliDe drafter does not fit the target: {error}.") from None


def read_glide_config(folder: Path) -> tuple[GliDeConfig, str]:
    """The configuration and the target's fingerprint in a folder's config.json.

    Raises:
      UserError: it is missing, broken, or not a GliDe drafter's.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} is no GliDe checkpoint: it has no config.json.")
    found = read_json(path)
    if found.pop("model_type", None) != MODEL_TYPE:
        raise UserError(
            f"{folder} holds no GliDe drafter: the model_type of its config.json differs."
        )
    found.pop("dtype", None)
    fingerprint = found.pop("target", None)
    if not isinstance(fingerprint, str):
        raise UserError(f"{path} does not say which target the drafter was trained for.")
    return make_glide_config(found, str(path)), fingerprint


def make_glide_config(fields: dict[str, Any], where: str) -> GliDeConfig:
    """`GliDeConfig` from JSON values, checked.

    Raises:
      UserError: unknown or missing fields, or wrong values, with `where` they are.
    """
    fields = dict(fields)
    try:
        if "target_layers" in fields:
            fields["target_layers"] = tuple(fields["target_layers"])
        return GliDeConfig(**fields)
    except (TypeError, ValueError) as error:
        reason = str(error).replace("GliDeConfig.__init__() ", "")
        raise UserError(f"{where} does not describe a GliDe drafter: {reason}.") from None


def load_own_params(folder: Path, model: GliDe) -> Params:
    """The parameters that are not shared, in the model's dtype.

    Raises:
      UserError: keys or shapes differ from the configuration; all of them are listed.
    """
    tensors, weights = open_tensors(folder), _weights(model)
    return read_weights(folder, tensors, weights, model)


def read_weights(
    folder: Path, tensors: dict[str, Any], weights: dict[str, Weight], model: GliDe
) -> Params:
    """A drafter's own parameters from open files.

    Args:
      tensors: as `open_tensors` returns them. weights: every tensor that there should be, by its name.

    Raises:
      UserError: missing, unexpected or misshapen tensors; all of them are listed.
    """
    check_tensors(folder, tensors, weights)
    hosts = jax.tree.map(lambda leaf: aligned(leaf.shape, model.dtype), _abstract(model))
    for name, weight in weights.items():
        host: Any = hosts
        for key in weight.path:
            host = host[key]
        part = host[..., weight.start : weight.start + weight.part[-1]]
        read_into(part, tensors[name].get_slice(name), weight.transposed)
    return jax.tree.map(jax.device_put, hosts)


def _abstract(model: GliDe) -> Params:
    return jax.eval_shape(model.init, jax.random.key(0))


def _weights(model: GliDe) -> dict[str, Weight]:
    """Our own layout: every array as it is, by its path, such as `layers.0.cross.q`."""

    def keys(path: tuple[Any, ...]) -> tuple[str | int, ...]:
        return tuple(getattr(key, "key", getattr(key, "idx", key)) for key in path)

    leaves = jax.tree_util.tree_leaves_with_path(_abstract(model))
    weights = [Weight(keys(path), leaf.shape) for path, leaf in leaves]
    return {".".join(map(str, weight.path)): weight for weight in weights}
