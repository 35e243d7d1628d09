"""Drafters of two public projects, by the names of their tensors.

GliDe (NonvolatileMemory/GliDe_with_a_CaPE_ICML_24): a Llama with `cross_attn.{q,o}_proj` in each layer, an
embedding and a head of its own, and no norm before the cross-attention. LongSpec (sail-sg/LongSpec): one
layer of the target's own shape, `glide.*`, with a norm before the cross-attention, none before the target's
head, and key and value projections in the cross-attention that it never uses.

Both are read from safetensors. GliDe's code rotates queries with the default base whatever the target's;
here the target's own rotary embedding is used, which is the same for Llama 2 and Vicuna.
"""

import os
import re
from pathlib import Path
from typing import Any

from jax_specdec._types import Params
from jax_specdec.checkpoints.glide import make_glide
from jax_specdec.checkpoints.target_bound import read_weights
from jax_specdec.checkpoints.targets import Target
from jax_specdec.checkpoints.tensor_files import open_tensors, read_json
from jax_specdec.errors import UserError
from jax_specdec.models.config import MAX_LAYERS
from jax_specdec.models.glide import GliDe
from jax_specdec.models.glide_config import GliDeConfig
from jax_specdec.models.hf_tensors import Weight, weight_names

# The blocks of GliDe's training mask, and the largest shift of LongSpec's training: their longest drafts.
GLIDE_BLOCK = 5
LONGSPEC_SHIFT = 4
LONGSPEC_WINDOW = 512
# Buffers, LongSpec's unused projections, and a target that was saved with its drafter.
_GLIDE_IGNORED = re.compile(r".*\.rotary_emb\..*")
_LONGSPEC_IGNORED = re.compile(
    r".*\.rotary_emb\..*|glide\.cross_attn\.[kv]_proj\..*|model\..*|lm_head\..*"
)


def is_glide(folder: Path) -> bool:
    """Whether a folder holds a drafter of either project."""
    if not any(folder.glob("model.safetensors*")):
        return False
    names = open_tensors(folder)
    return any(name.startswith("glide.") or ".cross_attn.q_proj." in name for name in names)


def import_glide(
    folder: str | os.PathLike[str], target: Target, dtype: Any = "float32"
) -> tuple[GliDe, Params]:
    """A drafter of either project for a target, and its own parameters, as `save_glide` takes them.

    Raises:
      UserError: neither project's layout, or tensors that do not fit it or the target; all are listed.
    """
    folder = Path(folder)
    tensors = open_tensors(folder)
    if any(name.startswith("glide.") for name in tensors):
        config, ignored = _longspec_config(tensors, target), _LONGSPEC_IGNORED
        names = longspec_names
    elif any(".cross_attn.q_proj." in name for name in tensors):
        config, ignored = _glide_config(folder), _GLIDE_IGNORED
        names = glide_names
    else:
        raise UserError(
            f"{folder} holds a drafter of neither GliDe nor LongSpec: no tensor is called glide.* or "
            "*.cross_attn.q_proj.weight."
        )
    model = make_glide(config, target.config, dtype)
    kept = {name: file for name, file in tensors.items() if not ignored.fullmatch(name)}
    return model, read_weights(folder, kept, names(model), model.shapes())


def glide_names(model: GliDe) -> dict[str, Weight]:
    """Every tensor of a GliDe checkpoint: a Llama's, and the cross-attention's."""
    weights = weight_names(model.decoder.config)
    for layer in range(model.config.num_layers):
        weights |= _cross(model, layer, f"model.layers.{layer}.cross_attn.")
    return weights


def longspec_names(model: GliDe) -> dict[str, Weight]:
    """Every tensor of a LongSpec head that is used."""
    prefix, weights = "model.layers.0.", {}
    for name, weight in weight_names(model.decoder.config).items():
        if name.startswith(prefix):
            name = name.removeprefix(prefix).replace("post_attention", "post_cross_attention")
            weights[f"glide.{name}"] = weight
    norm = Weight(("layers", 0, "cross", "norm"), (model.config.hidden_size,))
    return {
        **weights,
        "glide.post_self_attention_layernorm.weight": norm,
        **_cross(model, 0, "glide.cross_attn."),
    }


def _cross(model: GliDe, layer: int, prefix: str) -> dict[str, Weight]:
    width, embed = model.target.num_heads * model.target.head_dim, model.config.hidden_size
    at = ("layers", layer, "cross")
    names = {
        f"{prefix}q_proj.weight": Weight((*at, "q"), (width, embed), transposed=True),
        f"{prefix}o_proj.weight": Weight((*at, "out"), (embed, width), transposed=True),
    }
    if model.config.qkv_bias:
        names[f"{prefix}q_proj.bias"] = Weight((*at, "q_bias"), (width,))
    return names


def _glide_config(folder: Path) -> GliDeConfig:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json, which says the drafter's number of heads.")
    hf = read_json(folder / "config.json")
    try:
        heads = hf["num_attention_heads"]
        return GliDeConfig(
            hidden_size=hf["hidden_size"],
            mlp_size=hf["intermediate_size"],
            num_layers=hf["num_hidden_layers"],
            target_layers=tuple(range(-min(hf["num_hidden_layers"], MAX_LAYERS), 0)),
            num_heads=heads,
            num_kv_heads=hf.get("num_key_value_heads") or heads,
            head_dim=hf["hidden_size"] // heads,
            cross_norm=False,
            share=False,
            trained_delay=hf.get("block_size") or GLIDE_BLOCK,
        )
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder / 'config.json'} does not describe a GliDe drafter: {error}."
        ) from None


def _longspec_config(tensors: dict[str, Any], target: Target) -> GliDeConfig:
    return GliDeConfig.like(
        target.config,
        target_layers=(-1,),
        final_norm=False,
        qkv_bias="glide.self_attn.q_proj.bias" in tensors,
        window=LONGSPEC_WINDOW,
        trained_delay=LONGSPEC_SHIFT,
    )
