"""`lm`: a smaller model with the target's tokenizer drafts a chain, token by token."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

from jax_specdec.core.context import Proposal
from jax_specdec.core.model import Model
from jax_specdec.drafters import registry
from jax_specdec.drafters.early_exit import Stop
from jax_specdec.drafters.neural import NeuralDrafter
from jax_specdec.models.fitted import fit_vocabulary


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


def _of(decoder: Model, request: registry.Request) -> registry.Make:
    """Its drafters, with logits of the target's vocabulary."""
    body = fit_vocabulary(decoder, request.target.vocab_size)
    return functools.partial(LmDrafter, body, name=request.name)


def _make(request: registry.Request) -> registry.Make:
    from jax_specdec.checkpoints.targets import load_tokenizer
    from jax_specdec.checkpoints.vocabulary import check_vocabulary
    from jax_specdec.models.decoder import Decoder

    target, (config, _) = request.target, request.config
    tokenizer = None if target.tokenizer is None else load_tokenizer(request.folder)
    check_vocabulary(target.tokenizer, target.vocab_size, tokenizer, config.vocab_size)
    return _of(Decoder(config, request.dtype, sharding=request.sharding), request)


def _load(request: registry.Request) -> tuple[registry.Make, dict[str, Any]]:
    from jax_specdec.checkpoints.targets import load_target
    from jax_specdec.checkpoints.vocabulary import check_vocabulary

    target, where = request.target, request.sharding
    mesh, rules = (None, None) if where is None else (where.mesh, where.rules)
    small = load_target(
        request.folder, dtype=request.dtype, mesh=mesh, rules=rules, int8=request.int8
    )
    check_vocabulary(target.tokenizer, target.vocab_size, small.tokenizer, small.vocab_size)
    return _of(small.decoder, request), {request.name: small.params}


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
