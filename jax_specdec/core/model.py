"""The model contract: any target, and the body of any drafter that is a model.

A model is a frozen dataclass (static under jit) of pure functions. Its cache is an opaque pytree: others
read only its `length`, so a target need not have keys and values.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax

from jax_specdec._types import Array, Float, Int, Params


class Output(NamedTuple):
    """What one forward pass returns.

    Attributes:
      logits: `float32[B, T, V]`, or None where they were not asked for.
      hidden: `[B, T, E]`, what `Model.head` reads.
      new: what `Model.commit` needs of the T tokens; nobody else looks at it.
      taps: `[B, T, E]` by tap, of those asked for.
    """

    logits: Float[Array, "B T V"] | None
    hidden: Float[Array, "B T E"]
    new: Any
    taps: dict[int, Float[Array, "B T E"]]


@runtime_checkable
class Cache(Protocol):
    """What a model remembers of the committed tokens."""

    @property
    def length(self) -> Int[Array, " B"]:
        """Committed tokens of each row."""
        ...


@runtime_checkable
class Model(Protocol):
    """Reads tokens, a chain or a tree of them at a time, beside a cache that `apply` does not write.

    A *tap* names a hidden state: layer i's output is tap i, counted from 0, and the embedding is tap -1.
    None of them is normed.
    """

    @property
    def vocab_size(self) -> int: ...

    def init_cache(self, batch: int, slots: int) -> Any:
        """An empty cache for texts of `slots` tokens, the widest draft behind them included."""
        ...

    def apply(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        cache: Any,
        ancestors: Int[Array, "B T W"] | None = None,
        *,
        taps: tuple[int, ...] = (),
        logits: bool = True,
    ) -> Output:
        """One forward pass over tokens that follow the cache.

        Args:
          positions: absolute.
          ancestors: bit j of row i is set iff token j is token i or above it; None for a chain.
          taps: hidden states to return. logits: False leaves the head out.
        """
        ...

    def commit(
        self,
        cache: Any,
        output: Output,
        count: Int[Array, " B"],
        path: Int[Array, "B Q"] | None = None,
    ) -> Any:
        """The cache with the first `count[b]` tokens of the path in it; 0 leaves a row as it is.

        Args:
          path: index of the token at each depth; None where they are 0, 1, 2, ...
        """
        ...

    def rollback(self, cache: Any, length: Int[Array, " B"]) -> Any:
        """The cache as it was at `length[b] <= cache.length[b]`.

        A drafter's cache is rolled back by what was rejected. A target's is rolled back only while a prompt
        is read, at the end of a full text buffer, by less than a chunk; and where it `rewinds`, to what a
        changed text has in common with the old one.
        """
        ...

    def head(self, params: Params, hidden: Float[Array, "B T E"]) -> Float[Array, "B T V"]:
        """Logits of `Output.hidden`."""
        ...

    def axes(self) -> tuple[Any, Any]:
        """Logical axis names of parameters and cache: trees like them, of a tuple of names per array.

        `vocab`, `embed`, `heads` (query and key heads with their widths), `kv_heads`, `mlp`, `layer`, `batch`
        and `slots`; None for an axis that has no name. What a mesh shards is up to its rules.
        """
        ...


def rewinds(model: Any) -> bool:
    """Whether a model says, by an attribute of this name, that its caches go back to any length.

    `rollback` then takes a cache to any length up to its own, and the slots of a shorter cache may be copied
    into those of a longer one. A conversation needs both to keep what was read.
    """
    return bool(getattr(model, "rewinds", False))


def tap_shapes(
    model: Model, params: Params, batch: int, taps: tuple[int, ...]
) -> dict[int, jax.ShapeDtypeStruct]:
    """Shape and dtype of each tap of one token per row."""
    if not taps:
        return {}
    token = jax.ShapeDtypeStruct((batch, 1), "int32")

    def probe(params, token):
        cache = model.init_cache(batch, 1)
        return model.apply(params, token, token, cache, taps=taps, logits=False).taps

    return jax.eval_shape(probe, params, token)
