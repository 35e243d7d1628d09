"""Medusa heads of the published project, by the names of their tensors (FasterDecoding/Medusa).

`medusa_head.K.L.linear.weight` and `.bias` are the residual blocks of head K, and `medusa_head.K.N.weight`
behind the last of N blocks is its output matrix. The prefix is left out where the heads are in a file of
their own, `medusa_lm_head.safetensors`. How many there are is read from the names: the config.json beside
them is known to say otherwise.
"""

import os
import re
from pathlib import Path
from typing import Any

from jax_specdec._types import Params
from jax_specdec.checkpoints.medusa import KIND
from jax_specdec.checkpoints.target_bound import make_config, read_weights
from jax_specdec.checkpoints.targets import Target
from jax_specdec.checkpoints.tensor_files import Stored, open_tensors
from jax_specdec.errors import UserError
from jax_specdec.models.hf import Weight
from jax_specdec.models.medusa import Medusa, MedusaConfig

STEM = "medusa_lm_head"
_BLOCK = re.compile(r"(medusa_head\.)?(\d+)\.(\d+)\.linear\.(weight|bias)")
# A target that was saved with its heads.
_IGNORED = re.compile(r"model\..*|lm_head\..*|base_model\..*")


def is_medusa(folder: Path) -> bool:
    """Whether a folder holds heads in this layout."""
    return any(map(_BLOCK.fullmatch, _open(folder)))


def import_medusa(
    folder: str | os.PathLike[str], target: Target, dtype: Any = "float32"
) -> tuple[Medusa, Params]:
    """Heads for a target, and their own parameters, as `save_medusa` takes them.

    Raises:
      UserError: another layout, or tensors that do not fit it or the target; all are listed.
    """
    folder = Path(folder)
    tensors = {name: file for name, file in _open(folder).items() if not _IGNORED.fullmatch(name)}
    blocks = [found for found in map(_BLOCK.fullmatch, tensors) if found]
    if not blocks:
        raise UserError(
            f"{folder} holds no Medusa heads: no tensor is called medusa_head.0.0.linear.weight."
        )
    fields = {
        "num_heads": 1 + max(int(found[2]) for found in blocks),
        "num_layers": 1 + max(int(found[3]) for found in blocks),
        "share": False,
    }
    model = Medusa(make_config(KIND, MedusaConfig, fields, str(folder)), target.config, dtype)
    weights = medusa_names(model, blocks[0][1] or "")
    return model, read_weights(folder, tensors, weights, model.shapes())


def medusa_names(model: Medusa, prefix: str = "medusa_head.") -> dict[str, Weight]:
    """Every tensor of the heads."""
    embed, vocab = model.target.hidden_size, model.target.vocab_size
    layers, weights = model.config.num_layers, {}
    for head in range(model.config.num_heads):
        for layer in range(layers):
            at, name = ("heads", head, layer), f"{prefix}{head}.{layer}.linear"
            weights[f"{name}.weight"] = Weight((*at, "weight"), (embed, embed), transposed=True)
            weights[f"{name}.bias"] = Weight((*at, "bias"), (embed,))
        out = Weight(("out", head), (vocab, embed), transposed=True)
        weights[f"{prefix}{head}.{layers}.weight"] = out
    return weights


def _open(folder: Path) -> dict[str, Stored]:
    apart = any(folder.glob(f"{STEM}.safetensors*"))
    return open_tensors(folder, STEM) if apart else open_tensors(folder)
