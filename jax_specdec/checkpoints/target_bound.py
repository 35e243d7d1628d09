"""Checkpoint folders of drafters that read the target: config.json, and safetensors named by the path in
our tree.

What is shared with the target is not stored. A folder names the target that it was trained for by a
fingerprint, and loads beside no other: what such a drafter has learnt to read means nothing elsewhere.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jax_specdec._types import Params
from jax_specdec.checkpoints import layouts, sharded
from jax_specdec.checkpoints.target_tensors import open_target
from jax_specdec.checkpoints.targets import Target, load_config
from jax_specdec.checkpoints.tensor_files import (
    Stored,
    aligned,
    check_tensors,
    new_folder,
    open_tensors,
    read_json,
    read_weight,
    write_json,
    write_tensors,
)
from jax_specdec.errors import UserError
from jax_specdec.models.hf_tensors import Weight, weight_names

C = TypeVar("C")

SHARD_BYTES = 14 * 10**6
# Rows and columns of each of the target's tensors that its fingerprint reads.
_SAMPLED_ROWS, _SAMPLED_COLUMNS = 4, 256
# What does not change the target's keys: special ids, and the longest text.
NOT_IDENTITY = ("family", "context", "bos_id", "eos_ids", "pad_id")

# Fields that version 0.1.0 began without.
_LATER = frozenset(
    [
        "local_rope",
        "unrotated",
        "learned_positions",
        "norm",
        "norms",
        "parallel",
        "wide_qk_norm",
        "mlp_bias",
        "gated",
        "activation",
        "embed_scale",
        "residual_scale",
        "attention_scale",
        "attention_cap",
        "logit_cap",
        "logit_divisor",
        "num_experts",
        "experts_per_token",
        "expert_size",
        "norm_experts",
        "dense_layers",
        "partial",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "truncate",
        "short_factors",
        "long_factors",
    ]
)


class Kind(NamedTuple):
    """A kind of drafter.

    Attributes:
      model_type: in its config.json. title: in messages.
    """

    model_type: str
    title: str


def target_fingerprint(folder: str | os.PathLike[str]) -> str:
    """SHA-256 over a target's geometry and a fixed sample of every tensor, rounded to bfloat16.

    It is taken from the files, and so is the same whatever dtype the target is loaded in.

    Raises:
      UserError: the folder is no checkpoint, or a tensor is missing.
    """
    folder = Path(folder)
    config = load_config(folder)
    tensors = open_target(folder, config)
    geometry = _geometry(config)
    for name in NOT_IDENTITY:
        del geometry[name]
    digest = hashlib.sha256(json.dumps(geometry, sort_keys=True).encode())
    for name in sorted(weight_names(config)):
        if name not in tensors:
            raise UserError(f"{folder} lacks {name}, which its config.json describes.")
        view = tensors[name].view()
        rows = view.get_shape()[0]
        for row in np.linspace(0, rows - 1, min(rows, _SAMPLED_ROWS)).astype(int).tolist():
            part = view[row : row + 1][..., :_SAMPLED_COLUMNS]
            digest.update(part.astype(jnp.bfloat16).tobytes())
    return digest.hexdigest()


def _geometry(config: Any) -> dict[str, Any]:
    """The fields of a configuration; later ones only where they say something, or old fingerprints would change."""
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in _LATER and value == field.default:
            continue
        found[field.name] = _geometry(value) if dataclasses.is_dataclass(value) else value
    return found


def check_target(kind: Kind, folder: Path, fingerprint: str, target: Target) -> None:
    """Raises `UserError` where a drafter was trained for another target."""
    if fingerprint != target_fingerprint(target.path):
        raise UserError(
            f"The {kind.title} drafter in {folder} was trained for another target than the model in "
            f"{target.path}: train one for it with `jax-specdec train {kind.model_type}`."
        )


def save_own(
    kind: Kind,
    folder: str | os.PathLike[str],
    fields: dict[str, Any],
    shapes: Params,
    params: Params,
    fingerprint: str,
    dtype: Any,
    max_shard_bytes: int,
) -> None:
    """Writes a drafter; a folder that exists keeps its other files.

    Args:
      fields: of its config.json. shapes: its own parameters as shapes. fingerprint: of its target.

    Raises:
      RunError: the disk is full or read-only.
    """
    dtype = jnp.dtype(dtype)
    config = {
        "model_type": kind.model_type,
        "dtype": dtype.name,
        **fields,
        "target": fingerprint,
    }
    with new_folder(Path(folder)) as new:
        write_json(new / "config.json", config)
        write_tensors(new, own_weights(shapes), params, dtype, max_shard_bytes)


def read_fields(kind: Kind, folder: Path) -> tuple[dict[str, Any], str]:
    """The fields of a folder's config.json, and the target's fingerprint there.

    Raises:
      UserError: it is missing, broken, or not that of such a drafter.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} is no {kind.title} checkpoint: it has no config.json.")
    found = read_json(path)
    if found.pop("model_type", None) != kind.model_type:
        raise UserError(
            f"{folder} holds no {kind.title} drafter: the model_type of its config.json differs."
        )
    found.pop("dtype", None)
    fingerprint = found.pop("target", None)
    if not isinstance(fingerprint, str):
        raise UserError(f"{path} does not say which target the drafter was trained for.")
    return found, fingerprint


def make_config(kind: Kind, make: type[C], fields: dict[str, Any], where: str) -> C:
    """A configuration from JSON values, checked.

    Raises:
      UserError: unknown or missing fields, or wrong values, with `where` they are.
    """
    try:
        return make(**fields)
    except (TypeError, ValueError) as error:
        reason = str(error).replace(f"{make.__name__}.__init__() ", "")
        raise UserError(f"{where} does not describe a {kind.title} drafter: {reason}.") from None


def read_own(folder: Path, shapes: Params, places: Any = None) -> Params:
    """The parameters that are not shared, in the dtype of `shapes`.

    Args:
      places: a tree of `NamedSharding`, None for the default device.

    Raises:
      UserError: keys or shapes differ from the configuration; all of them are listed.
    """
    return read_weights(folder, open_tensors(folder), own_weights(shapes), shapes, places)


def read_weights(
    folder: Path,
    tensors: dict[str, Stored],
    weights: dict[str, Weight],
    shapes: Params,
    places: Any = None,
) -> Params:
    """A drafter's own parameters from open files.

    Args:
      tensors: as `open_tensors` returns them. weights: every tensor that there should be, by its name.
      places: see `read_own`.

    Raises:
      UserError: missing, unexpected or misshapen tensors; all of them are listed.
    """
    check_tensors(folder, tensors, weights)
    if places is not None:
        by_path: dict[Any, dict[str, Weight]] = {}
        for name, weight in weights.items():
            by_path.setdefault(weight.path, {})[name] = weight

        def read(path: Any, leaf: Any, place: Any) -> Any:
            keys = layouts.keys(path)
            parts = sharded.reader(by_path[keys], tensors, None)
            return sharded.place(keys, leaf.shape, leaf.dtype, place, parts)

        return jax.tree_util.tree_map_with_path(read, shapes, places)
    hosts = jax.tree.map(lambda leaf: aligned(leaf.shape, leaf.dtype), shapes)
    for name, weight in weights.items():
        host: Any = hosts
        for key in weight.path:
            host = host[key]
        read_weight(host, weight, tensors[name])
    return layouts.put_tree(hosts)


def own_weights(shapes: Params) -> dict[str, Weight]:
    """Our own layout: every array as it is, by its path, such as `layers.0.cross.q`."""
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    weights = [Weight(layouts.keys(path), leaf.shape) for path, leaf in leaves]
    return {".".join(map(str, weight.path)): weight for weight in weights}
