"""Medusa: heads on the target's last hidden state, each of which predicts one further token.

Cai et al., arXiv 2401.10774, section 2.1.1. A hidden state that predicts the token at position p is all
that head k reads to predict the one at p + k. As in the published code it is read behind the target's final
norm, where the target's own head reads it. Each head is residual blocks x + SiLU(W x + b) and an output
matrix. Nothing of one head depends on another, nor on the tokens between.

Axis letters as in `models.decoder`. Parameters:

    {"heads": (({"weight": [E, E], "bias": [E]}, ... one per block), ... one per head),
     "out": ([E, V], ... one per head)}

where `out` is absent if the heads share the target's own output matrix, which is then joined with them as
`head` or `embed`. The target's final norm is joined always.
"""

import dataclasses
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_specdec._types import Array, Params
from jax_specdec.models import layers
from jax_specdec.models.config import MAX_LAYERS, ModelConfig
from jax_specdec.models.products import matmul


@dataclasses.dataclass(frozen=True)
class MedusaConfig:
    """The shape of the heads; widths and vocabulary are the target's.

    Attributes:
      num_heads: the longest draft.
      num_layers: residual blocks of each head; the paper has one.
      share: the heads end in the target's own output matrix, frozen and not stored. Otherwise each has one
        of its own, as in the paper, which starts as a copy of the target's.

    Raises:
      ValueError: a count below 1, or a value of another type.
    """

    num_heads: int = 4
    num_layers: int = 1
    share: bool = True

    def __post_init__(self):
        for name in ("num_heads", "num_layers"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be at least 1, got {value!r}")
            if value > MAX_LAYERS:
                raise ValueError(f"{name} is {value}, above {MAX_LAYERS}")
        if not isinstance(self.share, bool):
            raise ValueError(f"share must be true or false, got {self.share!r}")


class ResidualBlock(nn.Module):
    """x + SiLU(W x + b), which is x before any training: W and b start at 0."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`x [B, T, E]` -> the same."""
        zeros, embed = nn.initializers.zeros, x.shape[-1]
        weight = self.param("weight", zeros, (embed, embed), self.dtype)
        bias = self.param("bias", zeros, (embed,), self.dtype)
        return x + nn.silu(matmul(x, weight) + bias[None, None])


@dataclasses.dataclass(frozen=True)
class Medusa:
    """The heads of a `MedusaConfig` for a target: `init` and what they say, no state.

    Attributes:
      dtype: of parameters and activations.
    """

    config: MedusaConfig
    target: ModelConfig
    dtype: Any = jnp.float32

    def __post_init__(self):
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))

    def init(self, target_params: Params) -> Params:
        """Parameters of its own before any training, when every head says what the target's does."""
        c = self.config
        block = ResidualBlock(self.dtype)
        x = jnp.zeros((1, 1, self.target.hidden_size), self.dtype)

        def fresh() -> Params:  # nothing is random
            return dict(block.init(jax.random.key(0), x)["params"])

        heads = range(c.num_heads)
        params: Params = {
            "heads": tuple(tuple(fresh() for _ in range(c.num_layers)) for _ in heads)
        }
        if not c.share:
            tied = "head" not in target_params
            out = target_params["embed"].T if tied else target_params["head"]
            params["out"] = tuple(jnp.array(out, self.dtype, copy=True) for _ in heads)
        return params

    def shapes(self) -> Params:
        """Its own parameters as shapes and dtypes."""
        t = self.target
        out = jax.ShapeDtypeStruct((t.hidden_size, t.vocab_size), self.dtype)
        return jax.eval_shape(self.init, {"head": out})

    def parameter_count(self) -> int:
        """Number of its own parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.shapes()))

    def join(self, params: Params, target_params: Params) -> Params:
        """Its own parameters and the target's norm and, if shared, output matrix, not copied."""
        names = [name for name in ("norm", "norm_bias") if name in target_params]
        if self.config.share:
            names.append("head" if "head" in target_params else "embed")
        return {**params, **{name: target_params[name] for name in names}}

    def head(self, params: Params, hidden: Array, index: int) -> Array:
        """What one head, counted from 0, says at every position.

        Args:
          params: as `join` returns them. hidden: `[B, T, E]`, the target's, before its final norm.

        Returns:
          Scores `float32[B, T, V]`.
        """
        return self._unembed(params, self.states(params, hidden, index), index)

    def states(self, params: Params, hidden: Array, index: int) -> Array:
        """What the output matrix of one head reads, `[B, T, E]`; arguments as of `head`."""
        return self._read(params, self._norm(params, hidden), index)

    def first(self, params: Params, hidden: Array, count: int) -> Array:
        """What the first `count` heads say of one position.

        Args:
          params: as `join` returns them. hidden: `[B, 1, E]`, the target's, before its final norm.

        Returns:
          Scores `float32[B, count, V]`.
        """
        x = self._norm(params, hidden)
        read = [self._read(params, x, index) for index in range(count)]
        if self.config.share:  # one product for all
            return layers.head(self.target, params, jnp.concatenate(read, axis=1))
        said = [self._unembed(params, y, index) for index, y in enumerate(read)]
        return jnp.concatenate(said, axis=1)

    def _norm(self, params: Params, hidden: Array) -> Array:
        return layers.norm(self.target, params, "norm", hidden.astype(self.dtype))

    def _read(self, params: Params, x: Array, index: int) -> Array:
        block = ResidualBlock(self.dtype)
        for weights in params["heads"][index]:
            x = cast(Array, block.apply({"params": weights}, x))
        return x

    def _unembed(self, params: Params, x: Array, index: int) -> Array:
        matrix = params if self.config.share else {**params, "head": params["out"][index]}
        return layers.head(self.target, matrix, x)
