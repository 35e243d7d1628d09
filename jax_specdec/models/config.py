"""The frozen description of a decoder: every difference between families is a field here.

A further family is one entry in `jax_specdec.models.hf.FAMILIES` and, where its arithmetic differs,
one field here that `jax_specdec.models.decoder.Block` reads.
"""

import dataclasses
import math
from typing import Literal

# Far above any model there is: a damaged count must not become a list of that many layers.
MAX_LAYERS = 10_000


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding (Su et al., arXiv 2104.09864) and its two context extensions.

    `linear` divides positions by `factor` (Chen et al., arXiv 2306.15595). `llama3` divides only the
    long wavelengths, with a ramp between `original_context / high_freq_factor` and
    `original_context / low_freq_factor` (Llama 3.1 release).
    """

    theta: float = 10_000.0
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def __post_init__(self):
        for name in ("theta", "factor", "low_freq_factor", "original_context"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"the rotary embedding's {name} is {value}")
        if self.kind == "llama3" and not self.high_freq_factor > self.low_freq_factor:
            raise ValueError(
                f"the rotary embedding's high_freq_factor {self.high_freq_factor} is not above its "
                f"low_freq_factor {self.low_freq_factor}"
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Llama-family decoder.

    Attributes:
      family: the Hugging Face `model_type` it is written back as.
      windows: per layer, the sliding window in tokens, or None for full attention.
      qkv_bias: q, k and v projections have a bias (Qwen2; Llama with `attention_bias`).
      out_bias: the attention output projection has one too (Llama with `attention_bias`).
      qk_norm: RMS norm over each head of q and k before the rotary embedding (Qwen3).
      eos_ids: token ids that end a text; empty where the checkpoint names none.
    """

    vocab_size: int
    hidden_size: int
    mlp_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context: int
    family: str = "llama"
    rope: RopeConfig = RopeConfig()
    norm_eps: float = 1e-5
    tied_head: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None

    def __post_init__(self):
        if self.num_layers > MAX_LAYERS:
            raise ValueError(f"{self.num_layers} layers are above {MAX_LAYERS}")
        if not self.windows:
            object.__setattr__(self, "windows", (None,) * self.num_layers)
        if len(self.windows) != self.num_layers:
            raise ValueError(f"{len(self.windows)} windows for {self.num_layers} layers")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} key heads evenly"
            )

    def parameter_count(self) -> int:
        """Number of parameters, a tied embedding counted once."""
        n, k, d, e, f = (
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.hidden_size,
            self.mlp_size,
        )
        block = e * (n + 2 * k) * d + n * d * e + 3 * e * f + 2 * e
        block += (n + 2 * k) * d if self.qkv_bias else 0
        block += e if self.out_bias else 0
        block += 2 * d if self.qk_norm else 0
        return self.vocab_size * e * (1 if self.tied_head else 2) + self.num_layers * block + e
