"""A draft model whose logits are of another vocabulary: cut or padded, or translated token by token."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from jax_specdec._types import Array, Float, Int, Params
from jax_specdec.core.model import Model, Output, rewinds
from jax_specdec.core.numerics import NEG_INF
from jax_specdec.models.draft_vocabulary import is_in_draft_vocabulary


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A draft model beside a target with more or fewer rows of logits for the same tokenizer.

    Rows that the target lacks are cut. A token that the model lacks is never drafted, its logit being -inf,
    and is read as token 0: which tokens are drafted is no matter of exactness.

    Attributes:
      vocab_size: rows of the logits.
    """

    model: Any  # a `Model`, of trees where trees are grown
    vocab_size: int

    @property
    def windows(self) -> tuple[int | None, ...]:
        return self.model.windows

    @property
    def rewinds(self) -> bool:
        return rewinds(self.model)

    def blank(self, batch: int, nodes: int) -> Any:
        return self.model.blank(batch, nodes)

    def init_cache(self, batch: int, slots: int) -> Any:
        return self.model.init_cache(batch, slots)

    def apply(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        cache: Any,
        ancestors: Int[Array, "B T W"] | None = None,
        **options: Any,
    ) -> Output:
        known = self._read(params, tokens)
        out = self.model.apply(self._own(params), known, positions, cache, ancestors, **options)
        return out if out.logits is None else out._replace(logits=self._fit(params, out.logits))

    def commit(self, cache: Any, output: Output, count: Any, path: Any = None) -> Any:
        return self.model.commit(cache, output, count, path)

    def rollback(self, cache: Any, length: Int[Array, " B"]) -> Any:
        return self.model.rollback(cache, length)

    def head(self, params: Params, hidden: Float[Array, "B T E"]) -> Float[Array, "B T V"]:
        return self._fit(params, self.model.head(self._own(params), hidden))

    def axes(self) -> tuple[Any, Any]:
        return self.model.axes()

    def _own(self, params: Params) -> Params:
        return params

    def _read(self, params: Params, tokens: Int[Array, "B T"]) -> Int[Array, "B T"]:
        del params
        return jnp.where(tokens < self.model.vocab_size, tokens, 0)

    def _fit(self, params: Params, logits: Float[Array, "B T R"]) -> Float[Array, "B T V"]:
        if is_in_draft_vocabulary(params):  # tokens that both have
            return logits
        missing = max(self.vocab_size - logits.shape[-1], 0)
        pad = ((0, 0), (0, 0), (0, missing))
        return jnp.pad(logits[..., : self.vocab_size], pad, constant_values=NEG_INF)


@dataclasses.dataclass(frozen=True)
class Translated(Fitted):
    """A draft model of another tokenizer: of the tokens that both have it drafts, the others it only reads.

    Its distribution is its own on the shared tokens (token-level intersection, arXiv 2502.05202).
    Its parameters are `{"model", "ids": int32[V], "shared": bool[V]}`, see `checkpoints.vocabulary.Shared`.
    """

    def axes(self) -> tuple[Any, Any]:
        params, cache = self.model.axes()
        return {"model": params, "ids": (None,), "shared": (None,)}, cache

    def _own(self, params: Params) -> Params:
        return params["model"]

    def _read(self, params: Params, tokens: Int[Array, "B T"]) -> Int[Array, "B T"]:
        return params["ids"][tokens]

    def _fit(self, params: Params, logits: Float[Array, "B T R"]) -> Float[Array, "B T V"]:
        return jnp.where(params["shared"], logits[..., params["ids"]], NEG_INF)


def fit_vocabulary(model: Model, vocab_size: int) -> Model:
    """The model itself where it has as many rows."""
    return model if model.vocab_size == vocab_size else Fitted(model, vocab_size)
