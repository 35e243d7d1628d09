"""`lm`: a smaller model, by preference with the target's tokenizer, drafts a chain, token by token."""

import dataclasses
import functools
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from jax_specdec.core.context import Proposal
from jax_specdec.core.model import Model
from jax_specdec.drafters import registry
from jax_specdec.drafters.early_exit import Stop
from jax_specdec.drafters.neural import NeuralDrafter
from jax_specdec.models.fitted import Translated, fit_vocabulary

if TYPE_CHECKING:
    from jax_specdec.checkpoints.vocabulary import Shared


@dataclasses.dataclass(frozen=True)
class LmDrafter(NeuralDrafter):
    """Draft-model speculation (Leviathan et al., arXiv 2211.17192).

    Attributes:
      length: tokens per draft.
    """

    decoder: Model
    length: int
    name: str = "lm"
    proposal: Proposal = "matched"
    stop: Stop | None = None

    @property
    def body(self):
        return self.decoder

    def reader(self, view):
        del view
        return self.decoder


def _read(folder: Path) -> Any:
    from jax_specdec.checkpoints.targets import inspect_checkpoint

    return inspect_checkpoint(folder)


def _of(decoder: Model, request: registry.Request, shared: "Shared | None") -> registry.Make:
    """Its drafters, with logits of the target's vocabulary."""
    rows = request.target.vocab_size
    body = fit_vocabulary(decoder, rows) if shared is None else Translated(decoder, rows)
    return functools.partial(LmDrafter, body, name=request.name)


def _match(request: registry.Request, tokenizer: Any, rows: int) -> "Shared | None":
    """The tokens that it can draft, where its tokenizer is another one, which is said."""
    from jax_specdec.checkpoints.vocabulary import match_vocabulary

    target = request.target
    shared = match_vocabulary(target.tokenizer, target.vocab_size, tokenizer, rows)
    if shared is not None:
        warnings.warn(shared.sentence(request.name), stacklevel=4)
    return shared


def _make(request: registry.Request) -> registry.Make:
    from jax_specdec.checkpoints.targets import load_tokenizer
    from jax_specdec.models.decoder import Decoder

    target, (config, _) = request.target, request.config
    tokenizer = None if target.tokenizer is None else load_tokenizer(request.folder)
    shared = _match(request, tokenizer, config.vocab_size)
    decoder = Decoder(config, request.dtype, sharding=request.sharding)
    return _of(decoder, request, shared)


def _load(request: registry.Request) -> tuple[registry.Make, dict[str, Any]]:
    from jax_specdec.checkpoints.draft_vocabulary import narrowed
    from jax_specdec.checkpoints.targets import load_target

    where = request.sharding
    mesh, rules = (None, None) if where is None else (where.mesh, where.rules)
    small = load_target(
        request.folder, dtype=request.dtype, mesh=mesh, rules=rules, int8=request.int8
    )
    shared = _match(request, small.tokenizer, small.vocab_size)
    params = small.params
    if shared is None:
        params = narrowed(request.folder, request.target, params, where, small.vocab_size)
    else:
        place = None if where is None else where.of(None)
        ids, known = (jax.device_put(x, place) for x in (shared.ids, shared.shared))
        params = {"model": params, "ids": ids, "shared": known}
    return _of(small.decoder, request, shared), {request.name: params}


def _describe(request: registry.Request, batch: int, slots: int) -> dict[str, Any]:
    from jax_specdec.checkpoints.memory import memory_plan, sizes_of

    config, stored = request.config
    plan = memory_plan(config, request.dtype, batch, slots, int8=request.int8)
    memory = {**dataclasses.asdict(plan), "total": plan.total}
    return {
        "path": str(request.folder),
        **sizes_of(config),
        "stored_dtype": stored,
        "memory": memory,
    }


KIND = registry.register(
    registry.Kind(
        "lm",
        _make,
        _load,
        needs_checkpoint=True,
        numbered=True,
        verifies=True,
        distribution=True,
        grows=True,
        ends_early=True,
        like_target=True,
        read=_read,
        describe=_describe,
    )
)
