"""The tensors of a checkpoint by their Hugging Face names, and where each lies in our parameter tree."""

import dataclasses
import re
from collections.abc import Iterator

import numpy as np

from jax_specdec.models.config import ModelConfig
from jax_specdec.models.families import FAMILIES, Family
from jax_specdec.models.parameters import layer_parameters, model_parameters

# What follows from the configuration, or serves a quantized cache alone: transformers reads none of it.
IGNORED = re.compile(
    r"(.*\.)?rotary_emb\.(original_)?(inv_freq|cos_cached|sin_cached)"
    r"|.*\.self_attn\.([qkv]_proj\.|attn\.)?(q|k|v|kv|prob)_scale"
    r"|(.*\.)?(attn|attention)\.(masked_)?bias"
)


@dataclasses.dataclass(frozen=True)
class Weight:
    """Where a Hugging Face tensor lies in the parameter tree of `Decoder`, unrolled.

    Attributes:
      path: keys into the tree, such as `("layers", 3, "qkv")`.
      shape: the tensor's shape in the file; matrices are `[out, in]`, but for those of GPT-2.
      transposed: ours is `[in, out]`; embeddings `[V, E]` and vectors are stored as they are.
      start: first index of its part of our last axis, where ours joins several tensors.
      expert: index of its part of our first axis, where ours holds a matrix for each expert.
      heads: the file has the columns of `qkv` head by head, queries, keys and values of each; 0: as ours.
    """

    path: tuple[str | int, ...]
    shape: tuple[int, ...]
    transposed: bool = False
    start: int = 0
    expert: int | None = None
    heads: int = 0

    @property
    def part(self) -> tuple[int, ...]:
        """Shape of its part of our array."""
        return self.shape[::-1] if self.transposed else self.shape

    @property
    def order(self) -> np.ndarray | None:
        """Of each column of its part, the one that it is in the file; None for the same."""
        if not self.heads:
            return None
        columns = np.arange(self.part[-1]).reshape(self.heads, 3, -1)
        return np.swapaxes(columns, 0, 1).reshape(-1)

    def within(self, array: np.ndarray, stacked: bool = False) -> np.ndarray:
        """Its part of our array, a view.

        Args:
          stacked: the first axis is that of layers.
        """
        array = array[self.path[1]] if stacked else array
        array = array if self.expert is None else array[self.expert]
        return array[..., self.start : self.start + self.part[-1]]


def weight_names(config: ModelConfig) -> dict[str, Weight]:
    """Every tensor of a checkpoint, by its Hugging Face name.

    Tensors of one fused parameter follow each other, in the order of their parts.
    """
    return dict(_weights(config))


def name_of(config: ModelConfig, parameter: str) -> str:
    """The tensor of a parameter that is not in a layer, such as `embed`."""
    return _name(FAMILIES[config.family].names[parameter])


def _weights(c: ModelConfig) -> Iterator[tuple[str, Weight]]:
    family = FAMILIES[c.family]
    own = model_parameters(c)
    last = [name for name in own if name not in ("embed", "positions")]

    def top(name: str) -> tuple[str, Weight]:
        shape = own[name].shape
        transposed = name == "head"
        stem, bias = name.removesuffix("_bias"), name.endswith("_bias")
        shape = shape[::-1] if transposed else shape
        return _name(family.names[stem], bias), Weight((name,), shape, transposed)

    for name in own:
        if name not in last:
            yield top(name)
    for layer in range(c.num_layers):
        yield from _layer_weights(c, family, layer)
    for name in last:
        yield top(name)


def _layer_weights(c: ModelConfig, family: Family, layer: int) -> Iterator[tuple[str, Weight]]:
    sizes = {
        "qkv": [n * c.head_dim for n in (c.num_heads, c.num_kv_heads, c.num_kv_heads)],
        "gate_up": [c.mlp_size] * 2,
        "experts_up": [c.expert_size] * 2,
    }
    base = str(family.names["layer"]).format(layer)
    for name, (shape, _) in layer_parameters(c, c.has_experts(layer)).items():
        stem, bias = name.removesuffix("_bias"), name.endswith("_bias")
        named = family.names[stem]
        experts = range(c.num_experts) if name.startswith("experts") else (None,)
        shape = shape[1:] if name.startswith("experts") else shape
        transposed = len(shape) == 2 and not family.untransposed
        heads = c.num_heads if family.by_head and stem == "qkv" else 0
        for expert in experts:
            parts = (named,) if isinstance(named, str) else named
            widths = shape[-1:] if len(parts) == 1 else sizes[stem]
            start = 0
            for template, width in zip(parts, widths, strict=True):
                part = (*shape[:-1], width)
                part = part[::-1] if transposed else part
                weight = Weight(("layers", layer, name), part, transposed, start, expert, heads)
                yield base + _name(template, bias).format(expert), weight
                start += width


def _name(module: object, bias: bool = False) -> str:
    return f"{module}.{'bias' if bias else 'weight'}"
