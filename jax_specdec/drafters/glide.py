"""`glide`: a small decoder that reads the target's keys and values drafts a chain, token by token.

Du et al., arXiv 2402.02082, sections 4.1 and 4.2. A token at position p sees the committed keys of the
target before p: all of them where it is committed itself (delay 1), those before the root where it is
drafted (the i-th token of a draft is predicted at delay i).
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jax_specdec._types import Array, Params
from jax_specdec.core.cache import KVCache
from jax_specdec.core.context import Proposal, TargetView
from jax_specdec.core.model import Output
from jax_specdec.drafters import registry
from jax_specdec.drafters.early_exit import Stop
from jax_specdec.drafters.neural import PENDING, NeuralDrafter
from jax_specdec.errors import UserError
from jax_specdec.models.decoder import Decoder
from jax_specdec.models.glide import GliDe, glimpse_view
from jax_specdec.models.glide_config import GliDeConfig


def _max_depth(config: GliDeConfig) -> int | None:
    """How far behind the last key of the target it may draft: as far as in training, if it reads any."""
    return config.trained_delay if config.sees_target else None


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
    proposal: Proposal = "matched"
    stop: Stop | None = None

    def __post_init__(self):
        if self.max_depth is not None and self.length > self.max_depth:
            raise UserError(
                f"Token {self.length} of a draft is predicted {self.length} places behind the last key of "
                f"the target that is known, and this GliDe drafter was trained for at most "
                f"{self.max_depth}: draft {self.max_depth} tokens or fewer."
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
    def taps(self):
        return (self.model.target.num_layers - 1,) if self.model.config.hidden_input else ()

    @property
    def max_depth(self):
        return _max_depth(self.model.config)

    @property
    def body(self):
        return GliDeReader(self.model, None)

    @property
    def pending(self):
        return PENDING if self.keeps_drafts else max(PENDING, self.length + 1)

    def reader(self, view):
        return GliDeReader(self.model, view)

    def draft_reader(self, params, view):
        return GliDeReader(self.model, view).for_draft(params[self.name])

    def settle(self, cache, ctx):
        if self.keeps_drafts:
            return cache
        committed = ctx.view.length + 1  # in a cascade the text holds drafts, too
        return cache.replace(length=jnp.minimum(cache.length, committed))


@dataclasses.dataclass(frozen=True)
class GliDeReader:
    """`GliDe` beside the target's committed tokens: a `Model` whose cache is the self-attention's.

    Attributes:
      view: None where only the cache is handled.
      projected: `[B, 1, D, E]`, see `for_draft`.
    """

    model: GliDe
    view: TargetView | None = dataclasses.field(compare=False)
    projected: Array | None = dataclasses.field(default=None, compare=False)

    def for_draft(self, params: Params) -> "GliDeReader":
        """The same for tokens behind all that the target has read: the hidden state that they see is projected once."""
        if not self.model.config.hidden_input:
            return self
        assert self.view is not None
        projected = self._project(params, self.view, self.view.length[:, None])
        return dataclasses.replace(self, projected=projected)

    def _project(self, params: Params, view: TargetView, visible: Array) -> Array:
        """`GliDe.project` of the target's hidden state at the last position that each token sees."""
        return self.model.project(params, view.tap(self.model.target.num_layers - 1, visible))

    @property
    def decoder(self) -> Decoder:
        """What its own cache belongs to."""
        return self.model.decoder

    @property
    def rewinds(self) -> bool:
        return self.decoder.rewinds

    @property
    def vocab_size(self) -> int:
        return self.model.target.vocab_size

    def init_cache(self, batch: int, slots: int) -> KVCache:
        return self.decoder.init_cache(batch, slots)

    def commit(self, cache, output, count, path=None) -> KVCache:
        return self.decoder.commit(cache, output, count, path)

    def rollback(self, cache, length) -> KVCache:
        return self.decoder.rollback(cache, length)

    def blank(self, batch: int, nodes: int) -> tuple[Any, Any]:
        return self.decoder.blank(batch, nodes)

    @property
    def windows(self) -> tuple[int | None, ...]:
        return self.decoder.windows

    def axes(self):
        """Those of its decoder; the cross-attention's are the target's (see `GliDe`)."""
        return self.decoder.axes()

    def apply(
        self,
        params: Params,
        tokens: Array,
        positions: Array,
        cache: KVCache,
        ancestors: Array | None = None,
        *,
        drafted: tuple[Any, Any] | None = None,
        taps: tuple[int, ...] = (),
        logits: bool = True,
    ) -> Output:
        assert self.view is not None and not taps, "a drafter reads beside a target"
        view, model = self.view, self.model
        visible = jnp.minimum(positions, view.length[:, None])
        target = model.target
        glimpse = glimpse_view(
            view,
            visible,
            target.windows,
            model.sharding,
            scale=target.scale,
            soft_cap=target.attention_cap,
        )
        projected = self.projected
        if model.config.hidden_input and projected is None:
            projected = self._project(params, view, visible)
        return model.apply(
            params,
            tokens,
            positions,
            glimpse,
            cache,
            ancestors,
            projected=projected,
            visible=visible,
            drafted=drafted,
            logits=logits,
        )

    def head(self, params: Params, hidden: Array) -> Array:
        return self.model.head(params, hidden)


def _read(folder: Path) -> Any:
    from jax_specdec.checkpoints.glide import read_glide_config

    return read_glide_config(folder)


def _longest(request: registry.Request) -> int:
    limit = _max_depth(request.config[0])
    return registry.LONGEST if limit is None else limit


def _of(model: GliDe, request: registry.Request) -> registry.Make:
    return functools.partial(GliDeDrafter, model, name=request.name)


def _make(request: registry.Request) -> registry.Make:
    from jax_specdec.checkpoints.glide import fitted_glide

    return _of(fitted_glide(request.folder, request.target, request.dtype, request.config), request)


def _load(request: registry.Request) -> tuple[registry.Make, dict[str, Any]]:
    from jax_specdec.checkpoints.glide import load_glide

    model, params = load_glide(request.folder, request.target, request.dtype, request.config)
    return _of(model, request), {request.name: params}


def _describe(request: registry.Request, batch: int, slots: int) -> dict[str, Any]:
    """It reads its target's cache, and shares maybe embedding and head."""
    from jax_specdec.checkpoints.glide import make_glide
    from jax_specdec.checkpoints.memory import memory_plan, parameter_bytes

    target, size = request.target.config, jnp.dtype(request.dtype).itemsize
    model = make_glide(request.config[0], target, request.dtype)
    count, own = model.parameter_count(), parameter_bytes(model.shapes(), request.int8)
    cache = memory_plan(model.decoder.config, request.dtype, batch, slots).cache
    if model.config.hidden_input:  # the target's hidden states are kept for it
        cache += batch * slots * target.hidden_size * size
    memory = {"parameters": own, "cache": cache, "total": own + cache}
    return {"path": str(request.folder), "own_parameters": count, "memory": memory}


def _adopt(given: registry.Foreign) -> bool:
    from jax_specdec.checkpoints.glide import save_glide
    from jax_specdec.checkpoints.import_glide import import_glide, is_glide

    if not is_glide(given.source):
        return False
    given.write(save_glide, *import_glide(given.source, given.target))
    return True


KIND = registry.register(
    registry.Kind(
        "glide",
        _make,
        _load,
        needs_checkpoint=True,
        numbered=True,
        verifies=True,
        distribution=True,
        grows=True,
        ends_early=True,
        read=_read,
        longest=_longest,
        describe=_describe,
        adopt=_adopt,
    )
)
