"""`medusa`: heads on the target's last hidden state draft a chain at once, each its own token.

Cai et al., arXiv 2401.10774, section 2.1.1. The hidden state that predicted the root is the last that the
target's cache holds, and head k says what comes k places behind the root. The drafter has no state and reads
no text: a draft is a function of that hidden state and the noise.

What a head says does not depend on the tokens before it, so the candidates of a depth are the same below
every node, and a tree of them (`expansions.static_tree`) costs no more than a chain.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax import lax

from jax_specdec._types import Array, Float, Int
from jax_specdec.core.confidence import chain_fields
from jax_specdec.core.context import Context, Proposal, TargetView, tokens_of
from jax_specdec.core.draft import Text, chain
from jax_specdec.core.drafter import ModelUse, StatelessDrafter, chain_info
from jax_specdec.drafters import registry
from jax_specdec.errors import UserError
from jax_specdec.models.draft_vocabulary import in_draft_vocabulary
from jax_specdec.models.medusa import Medusa


@dataclasses.dataclass(frozen=True)
class MedusaDrafter(StatelessDrafter):
    """A drafter of Medusa heads.

    Attributes:
      model: parameters are those of `Medusa.join`.
      length: tokens per draft, at most as many as there are heads.
      accuracies: per head, how often its i-th best candidate is the target's token; what a static tree is
        chosen by. Empty where nobody measured them.
      proposal: `matched` draws with the shared noise, `greedy` proposes each head's best.

    Raises:
      UserError: more tokens than heads.
    """

    model: Medusa
    length: int
    name: str = "medusa"
    accuracies: tuple[tuple[float, ...], ...] = ()
    proposal: Proposal = "matched"

    def __post_init__(self):
        if self.length > self.max_depth:
            raise UserError(
                f"This Medusa drafter has {self.max_depth} heads, one for each token of a draft, and was asked "
                f"for {self.length}: draft {self.max_depth} tokens or fewer."
            )

    @property
    def max_depth(self) -> int:
        """How many places behind the last committed token it may predict."""
        return self.model.config.num_heads

    @property
    def _tap(self) -> int:
        return self.model.target.num_layers - 1

    @property
    def info(self):
        use = ModelUse(self.name, self.model, self.length, self.max_depth)
        return chain_info(
            self.name,
            self.length,
            taps=(self._tap,),
            distribution=True,
            models=(use,),
            chances="after",
        )

    def scores(self, params: Any, text: Text, view: TargetView) -> Float[Array, "B P V"]:
        """What the heads say of the next `length` tokens of a text."""
        known = view.length[:, None]
        hidden = view.tap(self._tap, known)  # 0 where the root is the first token
        # In a cascade others may have drafted behind the committed text: their places' heads are skipped.
        ahead = text.length[:, None] - 1 - known

        def further() -> Array:
            head = ahead + jnp.arange(self.length, dtype=jnp.int32)[None]
            head = jnp.minimum(head, self.max_depth - 1)[..., None]
            return jnp.take_along_axis(
                self.model.first(params, hidden, self.max_depth), head, axis=1
            )

        def nearest() -> Array:
            return self.model.first(params, hidden, self.length)

        return lax.cond(jnp.any(ahead > 0), further, nearest)

    def draft(self, params, states, ctx):
        weights, words = params[self.name], None
        if ctx.may_score_some:  # as in `NeuralDrafter.draft`
            weights, words = in_draft_vocabulary(weights)
        logits = self.scores(weights, ctx.text, ctx.view)
        if ctx.law.has_history:
            scores, choice = self._one_by_one(logits, ctx)
        else:
            scores = ctx.scores(logits)
            chosen = ctx.perturbed(scores, 0, self.proposal, self.length, words)
            choice = ctx.argmax(chosen)
            scores = scores if ctx.return_q else chosen
        fields = chain_fields(scores, choice, ctx, words)
        return chain(ctx.text, tokens_of(choice, words), **fields), states

    def _one_by_one(
        self, logits: Float[Array, "B P V"], ctx: Context
    ) -> tuple[Float[Array, "B P V"], Int[Array, "B P"]]:
        """Scores as `chain_fields` takes them and tokens, each with those before it in its history."""
        scores, tokens = [], jnp.zeros((logits.shape[0], self.length), jnp.int32)
        line = jnp.arange(self.length, dtype=jnp.int32)[None, None]
        for depth in range(self.length):
            here = ctx.scores(logits[:, depth : depth + 1], tokens, line < depth)
            chosen = ctx.perturbed(here, depth, self.proposal)
            tokens = tokens.at[:, depth].set(ctx.argmax(chosen)[:, 0])
            scores.append(here if ctx.return_q else chosen)
        return jnp.concatenate(scores, axis=1), tokens


def _read(folder: Path) -> Any:
    from jax_specdec.checkpoints.medusa import read_medusa_config

    return read_medusa_config(folder)


def _of(model: Medusa, request: registry.Request) -> registry.Make:
    return functools.partial(MedusaDrafter, model, name=request.name, accuracies=request.config[1])


def _make(request: registry.Request) -> registry.Make:
    from jax_specdec.checkpoints.medusa import fitted_medusa

    model = fitted_medusa(request.folder, request.target, request.dtype, request.config)
    return _of(model, request)


def _load(request: registry.Request) -> tuple[registry.Make, dict[str, Any]]:
    from jax_specdec.checkpoints.medusa import load_medusa

    model, params, _ = load_medusa(request.folder, request.target, request.dtype, request.config)
    return _of(model, request), {request.name: params}


def _describe(request: registry.Request, batch: int, slots: int) -> dict[str, Any]:
    """The target's hidden states are kept for them."""
    from jax_specdec.checkpoints.memory import parameter_bytes

    (config, accuracies, _), target = request.config, request.target.config
    size = jnp.dtype(request.dtype).itemsize
    model = Medusa(config, target, request.dtype)
    count, own = model.parameter_count(), parameter_bytes(model.shapes(), request.int8)
    hidden = batch * slots * target.hidden_size * size
    return {
        "path": str(request.folder),
        "num_heads": config.num_heads,
        "own_parameters": count,
        "accuracies": accuracies,
        "memory": {"parameters": own, "cache": hidden, "total": own + hidden},
    }


def _adopt(given: registry.Foreign) -> bool:
    from jax_specdec.checkpoints.import_medusa import import_medusa, is_medusa
    from jax_specdec.checkpoints.medusa import save_medusa

    if not is_medusa(given.source):
        return False
    given.write(save_medusa, *import_medusa(given.source, given.target))
    return True


KIND = registry.register(
    registry.Kind(
        "medusa",
        _make,
        _load,
        usual_length=3,
        needs_checkpoint=True,
        distribution=True,
        independent=True,
        read=_read,
        longest=lambda request: request.config[0].num_heads,
        describe=_describe,
        adopt=_adopt,
    )
)
