"""The frozen description of a decoder: every difference between families is a field here.

A further family is one entry in `jax_specdec.models.families.FAMILIES` and, where its arithmetic differs,
one field here that `jax_specdec.models.layers.Block` reads.
"""

import dataclasses
import math
from typing import Literal

from jax_specdec.models.parameters import layer_parameters, model_parameters

# Far above any model there is: a damaged count must not become a list of that many layers.
MAX_LAYERS = 10_000
MAX_EXPERTS = 1_000_000  # in all layers together


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding (Su et al., arXiv 2104.09864) and its context extensions.

    `linear` divides positions by `factor` (Chen et al., arXiv 2306.15595). `dynamic` raises the base with
    the length of a text beyond `original_context`; each token is rotated by the base of the text that it
    ends, as in token-by-token decoding. `yarn` divides long wavelengths by `factor` and leaves short ones, with a
    ramp between `beta_slow` and `beta_fast` rotations over `original_context` (Peng et al., arXiv 2309.00071).
    `longrope` has a divisor for each frequency, `short_factors` in a model whose context is at most
    `original_context` and `long_factors` above (Ding et al., arXiv 2402.13753). `llama3` divides only the
    long wavelengths, with a ramp between `original_context / high_freq_factor` and
    `original_context / low_freq_factor` (Llama 3.1 release).

    Attributes:
      partial: the share of each head, its first dimensions, that is rotated.
      attention_factor: on cosines and sines, and so, squared, on scores (`yarn`, `longrope`).
      truncate: the ramp of `yarn` begins and ends at whole dimensions.
    """

    theta: float = 10_000.0
    kind: Literal["default", "linear", "dynamic", "yarn", "longrope", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    partial: float = 1.0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def __post_init__(self):
        for name in (
            "theta",
            "factor",
            "low_freq_factor",
            "original_context",
            "partial",
            "attention_factor",
            "beta_fast",
            "beta_slow",
        ):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"the rotary embedding's {name} is {value}")
        if self.partial > 1:
            raise ValueError(f"the rotary embedding's partial is {self.partial}, above 1")
        if self.kind == "llama3" and not self.high_freq_factor > self.low_freq_factor:
            raise ValueError(
                f"the rotary embedding's high_freq_factor {self.high_freq_factor} is not above its "
                f"low_freq_factor {self.low_freq_factor}"
            )
        if not all(x > 0 and math.isfinite(x) for x in self.short_factors + self.long_factors):
            raise ValueError("the rotary embedding has a short or long factor that is not above 0")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder of chosen parts; the defaults are Llama's.

    Attributes:
      mlp_size: width of the MLP; of a mixture, that of the layers without experts.
      family: the Hugging Face `model_type` it is written back as.
      rope: the rotary embedding, None for none (GPT-2). local_rope: of layers with a window, where it is
        another (Gemma 3). unrotated: layers that have none (SmolLM3), counted from 0.
      learned_positions: how many positions have a vector that is added to the embedding (GPT-2).
      norm: `rms`; `rms1`, which multiplies by 1 + weight (Gemma); `layer`, with mean and bias (GPT-2).
      norms: where each branch has them: `pre`, before it; `post`, behind it (OLMo-2); `both` (Gemma 2).
      parallel: attention and MLP read the same input (GPT-NeoX).
      windows: per layer, the sliding window in tokens, or None for full attention.
      qkv_bias: q, k and v projections have a bias (Qwen2; Llama with `attention_bias`).
      out_bias: the attention output projection has one too (Llama with `attention_bias`).
      mlp_bias: the projections of the MLP have biases.
      qk_norm: RMS norm over each head of q and k before the rotary embedding (Qwen3).
      wide_qk_norm: that norm runs over all heads at once (OLMo-2).
      gated: the MLP is act(gate) * up; otherwise act(up).
      activation: `gelu_tanh` is its approximation by a tanh.
      embed_scale: on embeddings. residual_scale: on what each branch adds.
      attention_scale: on scores, None for head_dim ** -0.5. attention_cap: scores become
        cap * tanh(score / cap). logit_cap: the same for logits. logit_divisor: of logits.
      num_experts: of each mixture layer, 0 for none; each token goes through the `experts_per_token` of the
        highest router probability. expert_size: width of each.
      norm_experts: the probabilities of the chosen experts are made to sum to 1.
      dense_layers: of a mixture, the layers with an ordinary MLP.
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
    rope: RopeConfig | None = RopeConfig()
    norm_eps: float = 1e-5
    tied_head: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    local_rope: RopeConfig | None = None
    unrotated: tuple[int, ...] = ()
    learned_positions: int = 0
    norm: Literal["rms", "rms1", "layer"] = "rms"
    norms: Literal["pre", "post", "both"] = "pre"
    parallel: bool = False
    wide_qk_norm: bool = False
    mlp_bias: bool = False
    gated: bool = True
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    attention_scale: float | None = None
    attention_cap: float | None = None
    logit_cap: float | None = None
    logit_divisor: float = 1.0
    num_experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    norm_experts: bool = True
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self):
        if self.num_layers > MAX_LAYERS:
            raise ValueError(f"{self.num_layers} layers are above {MAX_LAYERS}")
        if self.num_experts * self.num_layers > MAX_EXPERTS:
            raise ValueError(
                f"{self.num_experts} experts in {self.num_layers} layers are above {MAX_EXPERTS}"
            )
        if not self.windows:
            object.__setattr__(self, "windows", (None,) * self.num_layers)
        if len(self.windows) != self.num_layers:
            raise ValueError(f"{len(self.windows)} windows for {self.num_layers} layers")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} key heads evenly"
            )
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"{self.experts_per_token} experts for each token are not among {self.num_experts}"
            )
        for name in ("attention_scale", "attention_cap", "logit_cap", "logit_divisor"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} is {value}")
        for rope in (self.rope, self.local_rope):
            if rope is not None:
                self._check(rope)

    def _check(self, rope: RopeConfig) -> None:
        rotated = rope_width(rope, self.head_dim)
        if rotated < 2 or rotated % 2:
            raise ValueError(
                f"the rotary embedding turns {rotated} of {self.head_dim} dimensions of a head, and "
                "turns pairs"
            )
        if rope.kind == "dynamic" and rotated < 4:
            raise ValueError(f"a dynamic rotary embedding of {rotated} dimensions is undefined")
        for factors in (rope.short_factors, rope.long_factors) if rope.kind == "longrope" else ():
            if len(factors) != rotated // 2:
                raise ValueError(
                    f"the rotary embedding has {len(factors)} short or long factors for "
                    f"{rotated // 2} frequencies"
                )

    def rope_of(self, layer: int) -> RopeConfig | None:
        """The rotary embedding of a layer, counted from 0."""
        if layer in self.unrotated:
            return None
        if self.local_rope is not None and self.windows[layer] is not None:
            return self.local_rope
        return self.rope

    def has_experts(self, layer: int) -> bool:
        """Whether a layer, counted from 0, is a mixture."""
        return self.num_experts > 0 and layer not in self.dense_layers

    def within(self, context: int | None) -> "ModelConfig":
        """The same for texts of up to `context` tokens.

        None is all that it takes, but for `longrope` what its short factors serve: they are for short texts, and
        a text that grew beyond would have to be read again with the others.

        Raises:
          ValueError: more than it takes.
        """
        if context is None:
            rope = self.rope
            if rope is None or rope.kind != "longrope":
                return self
            context = min(rope.original_context, self.context)
        if not 1 <= context <= self.context:
            raise ValueError(f"a context of {context} is not among 1 to {self.context} tokens")
        return dataclasses.replace(self, context=context)

    @property
    def scale(self) -> float:
        """The factor on attention's scores."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def uniform(self) -> bool:
        """Whether all layers are alike but for their weights, so that they can be scanned."""
        layers = range(self.num_layers)
        kinds = {(self.windows[i], self.rope_of(i), self.has_experts(i)) for i in layers}
        return len(kinds) == 1

    @property
    def mlp_sizes(self) -> tuple[int, ...]:
        """The widths of the MLPs that there are."""
        mixed = [self.has_experts(layer) for layer in range(self.num_layers)]
        return (self.expert_size,) * any(mixed) + (self.mlp_size,) * (not all(mixed))

    def parameter_count(self, experts: int | None = None) -> int:
        """Number of parameters, a tied embedding counted once.

        Args:
          experts: how many of each mixture layer are counted, None for all.
        """
        mixtures = sum(self.has_experts(layer) for layer in range(self.num_layers))
        shown = self if experts is None else dataclasses.replace(self, num_experts=experts)
        own = sum(math.prod(p.shape) for p in model_parameters(self).values())
        mixed, plain = (
            sum(math.prod(p.shape) for p in layer_parameters(shown, kind).values())
            for kind in (True, False)
        )
        return own + mixtures * mixed + (self.num_layers - mixtures) * plain


def rope_width(rope: RopeConfig, head_dim: int) -> int:
    """How many dimensions of a head are rotated."""
    return int(head_dim * rope.partial)
