"""`glide`: a small decoder that reads the target's keys and values drafts a chain, token by token.

Du et al., arXiv 2402.02082, sections 4.1 and 4.2. A token at position p sees the committed keys of the
target before p: all of them where it is committed itself (delay 1), those before the root where it is
drafted (the i-th token of a draft is predicted at delay i).
"""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp

from jax_specdec._types import Array, Params
from jax_specdec.core import cache as kv
from jax_specdec.core.drafter import TargetView
from jax_specdec.drafters.early_exit import Stop
from jax_specdec.drafters.neural import CATCH_UP, NeuralDrafter
from jax_specdec.errors import UserError
from jax_specdec.models.decoder import Output
from jax_specdec.models.glide import GliDe, glimpse_cache, last_seen


@dataclasses.dataclass(frozen=True)
class GliDeDrafter(NeuralDrafter):
    """A drafter that reads the target's cache in place.

    Attributes:
      model: parameters are those of `GliDe.join`.
      length: tokens per draft, at most the largest delay that the model was trained for.

    Raises:
      UserError: a longer draft.
    """

    model: GliDe
    length: int
    name: str = "glide"
    proposal: Literal["matched", "greedy"] = "matched"
    stop: Stop | None = None

    def __post_init__(self):
        if self.reach is not None and self.length > self.reach:
            raise UserError(
                f"Token {self.length} of a draft is predicted {self.length} places behind the last key of "
                f"the target that is known, and this GliDe drafter was trained for at most "
                f"{self.reach}: draft {self.reach} tokens or fewer."
            )

    @property
    def keeps_drafts(self) -> bool:
        """Whether the keys of accepted drafts are kept.

        Those of the first layer depend on the text alone, unless the target's hidden state is an input.
        Those of further layers depend on what the cross-attention saw: accepted tokens are read again,
        at delay 1, so that a draft is a function of the text, and sees all that is known.
        """
        c = self.model.config
        return not c.hidden_input and (c.num_layers == 1 or not c.cross_attention)

    @property
    def reads_hidden(self) -> bool:
        return self.model.config.hidden_input

    @property
    def reach(self):
        config = self.model.config
        return config.trained_delay if config.sees_target else None

    @property
    def body(self):
        return self.model.decoder

    @property
    def catch_up(self):
        return CATCH_UP if self.keeps_drafts else max(CATCH_UP, self.length + 1)

    def reader(self, view):
        return _Reader(self.model, view)

    def kept(self, cache, view):
        if self.keeps_drafts:
            return cache
        committed = view.cache.length + 1  # in a cascade the text holds drafts, too
        return cache.replace(length=jnp.minimum(cache.length, committed))


@dataclasses.dataclass(frozen=True, eq=False)
class _Reader:
    """`GliDe` beside the target's committed tokens, as a `neural.Model`."""

    model: GliDe
    view: TargetView

    def apply(
        self,
        params: Params,
        tokens: Array,
        positions: Array,
        cache: kv.KVCache,
        ancestors: Array | None = None,
        *,
        drafted: tuple[Any, Any] | None = None,
        logits: bool = True,
    ) -> Output:
        known = self.view.cache.length
        visible = jnp.minimum(positions, known[:, None])
        glimpse = glimpse_cache(self.view.cache, visible, self.model.target.windows)
        hidden = None
        if self.model.config.hidden_input:
            assert self.view.hidden is not None, "the loop keeps them for such a drafter"
            hidden = last_seen(self.view.hidden, visible)
        return self.model.apply(
            params,
            tokens,
            positions,
            glimpse,
            cache,
            ancestors,
            hidden=hidden,
            drafted=drafted,
            logits=logits,
        )

    def head(self, params: Params, hidden: Array) -> Array:
        return self.model.head(params, hidden)
