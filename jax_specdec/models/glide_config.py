"""The frozen description of a GliDe drafter (Du et al., arXiv 2402.02082, section 4.1)."""

import dataclasses
from typing import Any

from jax_specdec.models.config import MAX_LAYERS, ModelConfig, RopeConfig


@dataclasses.dataclass(frozen=True)
class GliDeConfig:
    """A small decoder whose layers also attend to the keys and values of a frozen target.

    The vocabulary, rotary embedding and norm epsilon are the target's, and so is the geometry of the
    cross-attention; the rest is here. The defaults are ours; `paper` is the published form.

    Attributes:
      num_heads, num_kv_heads, head_dim: of the self-attention.
      target_layers: the target layer that each layer reads, counted from 0, or below 0 from the end.
        Empty: evenly spread, layer m = 1 .. n reading the one at m L / (n + 1); the paper reads
        the last ones.
      cross_attention: False leaves it out, which is the paper's "vanilla drafter", the control.
      cross_norm: an RMS norm before the cross-attention, as in LongSpec (arXiv 2502.17421); the paper's
        code has none.
      final_norm: an RMS norm before the head; LongSpec has none.
      share: embedding and head are the target's, frozen and not stored; otherwise the drafter has its
        own, as in the paper. Where the widths differ a projection lies between.
      hidden_input: each token's embedding has the target's last hidden state added, normed and projected,
        of the last position whose keys the token sees, as EAGLE does (arXiv 2401.15077) with that of the
        position before.
      hidden_delays: how many projections of that state there are, one for each delay (see `trained_delay`) from 1
        on, the last for all larger ones: what a state says of a token depends on how far behind it is.
      qkv_bias: the query, key and value projections have biases (LongSpec).
      window: sliding window of the self-attention in tokens, or None.
      trained_delay: the largest delay of training, see `jax_specdec.training.glide_mask`: the distance
        from a query to the last key of the target that it sees. The i-th token of a draft is predicted
        at delay i, so this is the longest draft.
    """

    hidden_size: int
    mlp_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_layers: int = 1
    target_layers: tuple[int, ...] = ()
    cross_attention: bool = True
    cross_norm: bool = True
    final_norm: bool = True
    share: bool = True
    hidden_input: bool = False
    hidden_delays: int = 1
    qkv_bias: bool = False
    window: int | None = None
    trained_delay: int = 16

    def __post_init__(self):
        for name in (
            "hidden_size",
            "mlp_size",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "num_layers",
            "hidden_delays",
            "trained_delay",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_layers > MAX_LAYERS:
            raise ValueError(f"{self.num_layers} layers are above {MAX_LAYERS}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, for rotary embeddings, got {self.head_dim}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} key heads evenly"
            )
        if self.hidden_delays > 1 and not self.hidden_input:
            raise ValueError(f"hidden_delays of {self.hidden_delays} need hidden_input")
        if self.hidden_delays > self.trained_delay:
            raise ValueError(
                f"hidden_delays must be at most trained_delay, {self.trained_delay}, got {self.hidden_delays}"
            )
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")
        if self.target_layers and len(self.target_layers) != self.num_layers:
            raise ValueError(
                f"{len(self.target_layers)} target_layers for {self.num_layers} layers"
            )

    @classmethod
    def like(cls, decoder: ModelConfig, **fields: Any) -> "GliDeConfig":
        """Layers of the shape of a decoder's, its target's for instance."""
        names = ("hidden_size", "mlp_size", "num_heads", "num_kv_heads", "head_dim")
        return cls(**{**{name: getattr(decoder, name) for name in names}, **fields})

    @classmethod
    def paper(cls, num_layers: int = 1) -> "GliDeConfig":
        """The published form: width 4096, one layer (two for a target of 33B), trained in blocks of 5.

        MLP width and heads are the defaults of its code; the paper does not say.
        """
        return cls(
            hidden_size=4096,
            mlp_size=11008,
            num_heads=32,
            num_kv_heads=32,
            head_dim=128,
            num_layers=num_layers,
            target_layers=tuple(range(-num_layers, 0)),
            cross_norm=False,
            share=False,
            trained_delay=5,
        )

    def decoder(self, target: ModelConfig) -> ModelConfig:
        """What it is without cross-attention: a decoder with the target's vocabulary and positions."""
        return ModelConfig(
            vocab_size=target.vocab_size,
            hidden_size=self.hidden_size,
            mlp_size=self.mlp_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            context=target.context,
            rope=target.rope or RopeConfig(),  # of a target that learned its positions
            norm_eps=target.norm_eps,
            qkv_bias=self.qkv_bias,
            windows=(self.window,) * self.num_layers,
        )

    @property
    def sees_target(self) -> bool:
        """Whether anything of the target but its embedding and head is read."""
        return self.cross_attention or self.hidden_input

    def layers_read(self, target: ModelConfig) -> tuple[int, ...]:
        """The target layer that each layer attends to, counted from 0.

        Raises:
          ValueError: the target has no such layer.
        """
        count, parts = target.num_layers, self.num_layers + 1
        layers = self.target_layers or tuple(m * count // parts for m in range(1, parts))
        if min(layers) < -count or max(layers) >= count:
            raise ValueError(f"target_layers {layers} are not among the target's {count} layers")
        return tuple(layer % count for layer in layers)
