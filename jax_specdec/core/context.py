"""What a drafter sees: the text, the target beside it, the law, the noise, and what is left to do."""

import dataclasses
from typing import Any, Literal

import flax.struct
import jax.numpy as jnp

from jax_specdec._types import Array, Bool, Float, Int, Params, UInt
from jax_specdec.core import prng
from jax_specdec.core.budget import Thrift
from jax_specdec.core.draft import Text
from jax_specdec.core.law import Law
from jax_specdec.core.model import Model, Output, tap_shapes
from jax_specdec.core.numerics import argmax
from jax_specdec.core.sampling import Sampling
from jax_specdec.core.sharding import Sharding, constrain
from jax_specdec.errors import UserError
from pallas_kernels import write_rows

Proposal = Literal["matched", "greedy"]


class TargetView(flax.struct.PyTreeNode):
    """Read access to the target: its cache, and the taps that the drafter asked for.

    Attributes:
      cache: the target's own. It covers positions `0 .. length - 1`, those of the text without its root.
      taps: `[B, S, E]` by tap (see `Model`), the hidden states of the same positions.
    """

    cache: Any
    taps: dict[int, Float[Array, "B S E"]] = flax.struct.field(default_factory=dict)

    @property
    def length(self) -> Int[Array, " B"]:
        """Positions that the target has read and committed."""
        return self.cache.length

    def kv(self, layer: Any) -> dict[str, Any]:
        """Keys and values of a layer as arguments of `tree_attention`, see `KVCache.layer`.

        Raises:
          UserError: the target has none.
        """
        if not hasattr(self.cache, "layer"):
            raise UserError(
                f"This drafter reads the target's keys and values, and the target's "
                f"{type(self.cache).__name__} has none."
            )
        return self.cache.layer(layer)

    def tap(self, name: int, visible: Int[Array, "B T"]) -> Float[Array, "B T E"]:
        """The hidden state of the last position that each query sees, 0 for none.

        Args:
          visible: each query sees the positions before it.
        """
        return last_seen(self.taps[name], visible)


def tokens_of(columns: Int[Array, "*s"], words: Int[Array, " R"] | None) -> Int[Array, "*s"]:
    """Tokens by the column of their scores; `words` as in `Context.perturbed`."""
    return columns if words is None else words[columns]


def last_seen(hidden: Float[Array, "B S E"], visible: Int[Array, "B T"]) -> Float[Array, "B T E"]:
    """`hidden` at the last position that each query sees; 0 for none.

    Args:
      visible: each query sees the positions before it.
    """
    last = jnp.take_along_axis(hidden, jnp.maximum(visible - 1, 0)[..., None], axis=1)
    return jnp.where((visible > 0)[..., None], last, jnp.zeros((), hidden.dtype))


@dataclasses.dataclass(frozen=True)
class Tapped:
    """A model whose cache is a `TargetView`: it keeps the taps of what it commits."""

    model: Model
    taps: tuple[int, ...] = ()

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    def init_view(self, params: Params, batch: int, slots: int) -> TargetView:
        """An empty view; the parameters tell the taps' widths and dtypes."""
        shapes = tap_shapes(self.model, params, batch, self.taps)
        taps = {
            tap: jnp.zeros((batch, slots, shape.shape[-1]), shape.dtype)
            for tap, shape in shapes.items()
        }
        return TargetView(self.model.init_cache(batch, slots), taps)

    def apply(
        self, params, tokens, positions, cache: TargetView, ancestors=None, *, logits=True
    ) -> Output:
        """`Model.apply` beside `view.cache`."""
        return self.model.apply(
            params, tokens, positions, cache.cache, ancestors, taps=self.taps, logits=logits
        )

    def commit(self, cache: TargetView, output: Output, count, path=None) -> TargetView:
        """`Model.commit`, and the same rows of the taps."""
        start, taps = cache.length, {}
        for tap, old in cache.taps.items():
            new = output.taps[tap].astype(old.dtype)
            if path is not None:
                new = jnp.take_along_axis(new, path[..., None], axis=1)
            taps[tap] = write_rows(old[:, None], new[:, None], start)[:, 0]
        return TargetView(self.model.commit(cache.cache, output, count, path), taps)

    def rollback(self, cache: TargetView, length: Int[Array, " B"]) -> TargetView:
        """`Model.rollback`; taps behind the length are garbage."""
        return cache.replace(cache=self.model.rollback(cache.cache, length))


class Context(flax.struct.PyTreeNode):
    """All that a drafter sees.

    Attributes:
      text: the committed text; in a cascade, with what was drafted so far behind it.
      view: the target, which has read `view.length` positions of the committed text.
      law: temperature, filters and processors, see `scores`.
      keys: `uint32[B, 2]`, key data of each row: of `noise`, and for draws of a drafter's own.
      active: `bool[B]`; rows that are not active may hold anything.
      budget: `int32[B]`, tokens that the row may still emit; drafting deeper is of no use.
      return_q: static; the draft must hand over the distribution it was drawn from (rejection rule).
      return_chance: static; a drafter that can (`Info.chances`) must say of each token of its chain how likely it is to be right.
      thrift: where a draft ends because more of it would not pay, None for nowhere.
      return_top: static; a drafter with a distribution must report its probability of every node and the
        best children. They cost passes over the vocabulary, so only their readers ask for them.
      sharding: static; the target's, whose scores lie over its vocabulary, None on one device.
      vocab_size: static, V. role: static, which noise: `prng.ROLE_MATCH`, or `ROLE_DRAFT` where the rule has draws of its own.
      node_noise: `float32[B, T, V]`, for a rule of acceptance: the shared noise of the target's token behind each node. None while
        drafting, and where the rule needs the drafts' distribution: what they were drawn with must not decide.
    """

    text: Text
    view: TargetView
    law: Law
    keys: UInt[Array, "B 2"]
    active: Bool[Array, " B"]
    budget: Int[Array, " B"]
    return_q: bool = flax.struct.field(pytree_node=False, default=False)
    return_top: bool = flax.struct.field(pytree_node=False, default=False)
    return_chance: bool = flax.struct.field(pytree_node=False, default=False)
    thrift: Thrift | None = None
    sharding: Sharding | None = flax.struct.field(pytree_node=False, default=None)
    vocab_size: int = flax.struct.field(pytree_node=False, kw_only=True)
    role: int = flax.struct.field(pytree_node=False, default=prng.ROLE_MATCH)
    node_noise: Float[Array, "B T V"] | None = None

    @property
    def may_score_some(self) -> bool:
        """Static: whether a drafter may work on scores of some tokens, of which it drafts, instead of all V.

        Not where its distribution is asked for, where a processor reads whole logits, and on a mesh, where noise and
        scores lie over the vocabulary.
        """
        return not self.return_q and not self.law.has_history and self.sharding is None

    def scores(
        self,
        logits: Float[Array, "B T V"],
        drafted: Int[Array, "B M"] | None = None,
        on_path: Bool[Array, "#B T M"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Log-weights of the law at each of T nodes, given the drafted tokens on the way to each.

        Args:
          drafted: tokens behind the text. on_path: which of them lead to each node, itself included;
            they lie in the order of their depths. None: nothing is drafted yet.
        """
        return self.law.scores(logits, self.text, drafted, on_path)

    def perturbed(
        self,
        scores: Float[Array, "B T V"],
        depth: Array | int,
        proposal: Proposal,
        depths: int = 1,
        words: Int[Array, " R"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Scores whose argmax is the token at `depth`: with the shared noise, unless the proposal is greedy.

        Under the rejection rule a token must be drawn from the distribution that is handed over, whatever
        the proposal.

        Args:
          depths: 1 for tokens of one depth, T for those of T depths from `depth` on.
          words: the token of each of R columns, where `scores` are not of all V (`may_score_some`).
        """
        if proposal == "greedy" and not self.return_q:
            return scores
        return scores + self.noise(depth, depths, words)

    def noise(
        self, depth: Array | int = 0, depths: int = 1, words: Int[Array, " R"] | None = None
    ) -> Float[Array, "B P V"]:
        """The Gumbel noise that drafting and verification share, 0 in rows at temperature 0.

        It is a function of row, position and token, and made where it is wanted: nobody keeps it.

        Args:
          depth: `[b, i]` is for the scores of the token at position `text.length[b] + depth + i`. depths: P.
          words: the tokens it is wanted of, in place of all V.
        """
        start, sampling = self.text.length + depth, self.law.sampling
        noise = prng.shared_noise(
            self.keys, sampling, start, depths, self.vocab_size, self.role, words
        )
        return (
            noise if words is not None else constrain(self.sharding, noise, "batch", None, "vocab")
        )

    def argmax(self, scores: Float[Array, "B T V"]) -> Int[Array, "B T"]:
        """The best token at each of T nodes, with one reduction where scores lie over a mesh."""
        return argmax(scores, self.sharding)


def make_context(
    text: Text,
    view: TargetView,
    sampling: Sampling,
    vocab_size: int,
    **fields: Any,
) -> Context:
    """A context outside of the loop: all rows active, nothing limits them, the whole text is prompt.

    Args:
      fields: of `Context`, in place of these defaults.
    """
    rows = text.length.shape
    usual: dict[str, Any] = {
        "law": Law(sampling, text.length),
        "keys": jnp.zeros((*rows, 2), jnp.uint32),
        "active": jnp.ones(rows, bool),
        "budget": jnp.full(rows, 1 << 20, jnp.int32),
    }
    return Context(text=text, view=view, vocab_size=vocab_size, **{**usual, **fields})
