"""`first(a, b)`: of several drafters the first that finds something.

Copying where the text repeats itself and a model where it does not: a copy costs next to nothing, and runs for
many tokens where it is right; but most of the time there is nothing to copy. Suffix decoding combines the two in this
way (Oliaro et al., arXiv 2411.04975, section 4); a horizontal cascade has them the other way round (`drafters.cascade`).
"""

import dataclasses
import functools

import jax.numpy as jnp
from jax import lax

from jax_specdec._types import Array, Bool
from jax_specdec.core.draft import Text, chain
from jax_specdec.core.drafter import Drafter, Info, accepted_prefix
from jax_specdec.drafters.composed import Composed, check_models, taps_of
from jax_specdec.errors import UserError


@dataclasses.dataclass(frozen=True)
class First(Composed):
    """Drafters of chains, each asked where none before it has found a token.

    With a budget a round asks one of them: the one that pays most of those that have something to propose, see
    `alternatives`.

    Raises:
      UserError: no drafters, a drafter of trees or of nothing, or one name for two models.
    """

    drafters: tuple[Drafter, ...]

    def __post_init__(self):
        if not self.drafters:
            raise UserError("There must be a drafter to ask first.")
        for drafter in self.drafters:
            if not drafter.info.is_chain or not drafter.info.depth:
                raise UserError(
                    f"The drafter {drafter.info.name!r} drafts no chain to be asked for."
                )
        check_models(self.info)

    @property
    def parts(self):
        return self.drafters

    @functools.cached_property
    def alternatives(self) -> "tuple[First, ...]":
        """Each drafter alone; none where there is but one. See `core.drafter.ways_of`."""
        if len(self.drafters) == 1:
            return ()
        return tuple(First((drafter,)) for drafter in self.drafters)

    def available(self, text: Text) -> Bool[Array, "B N"]:
        """Which of the alternatives have something to propose, as far as that can be said beforehand."""
        always = jnp.ones_like(text.length, dtype=bool)
        finds = [getattr(drafter, "finds", None) for drafter in self.drafters]
        return jnp.stack([always if find is None else find(text) for find in finds], axis=1)

    @property
    def info(self) -> Info:
        return self._info

    @functools.cached_property
    def _info(self) -> Info:
        infos = [drafter.info for drafter in self.drafters]
        depth = max(info.depth for info in infos)
        return Info(
            name=",".join(info.name for info in infos),
            nodes=depth,
            depth=depth,
            sizes=tuple(sorted({size for info in infos for size in info.sizes})),
            sources=tuple(dict.fromkeys(name for info in infos for name in info.sources)),
            taps=taps_of(infos),
            rewinds=all(info.rewinds for info in infos),
            models=tuple(use for info in infos for use in info.models),
            noise=any(info.noise for info in infos),
        )

    def draft(self, params, states, ctx):
        text, depth = ctx.text, self.info.depth
        batch = text.length.shape[0]
        tokens = jnp.zeros((batch, depth), jnp.int32)
        count = jnp.zeros((batch,), jnp.int32)
        source = jnp.zeros((batch, depth), jnp.int32)
        probability = jnp.ones((batch, depth), jnp.float32)
        carry = (states, tokens, count, source, probability, jnp.bool_(True))
        ctx = ctx.replace(return_q=False, return_top=False)
        for drafter in self.drafters:
            carry = self._ask(drafter, carry, params, ctx)
        states, tokens, count, source, probability, _ = carry
        valid = jnp.arange(depth, dtype=jnp.int32)[None] < count[:, None]
        draft = chain(text, tokens, valid=valid, probability=probability)
        return draft.replace(source=draft.source.at[:, 1:].set(source)), states

    def _ask(self, drafter: Drafter, carry, params, ctx):
        """One drafter, for the rows that lack a draft; not at all where none does."""
        info, depth, text = drafter.info, self.info.depth, ctx.text
        label = jnp.asarray(
            [0, *(self.info.sources.index(name) + 1 for name in info.sources)], jnp.int32
        )

        def lacking(count):
            return ctx.active & (count == 0)

        def call(carry):
            states, tokens, count, source, probability, _ = carry
            need = lacking(count)
            draft, states = drafter.draft(params, states, ctx.replace(active=need))
            found = jnp.sum(draft.valid[:, 1:], axis=1, dtype=jnp.int32)
            more = ((0, 0), (0, depth - info.depth))

            def put(new, old):
                return jnp.where(need[:, None], jnp.pad(new[:, 1:], more), old)

            found = jnp.where(need, found, 0)
            # A drafter may draft for rows that do not ask, too: of these nothing is kept.
            states = drafter.commit(states, accepted_prefix(text.length, found, info.depth))
            return (
                states,
                put(draft.tokens, tokens),
                jnp.where(need, found, count),
                put(jnp.take(label, draft.source), source),
                put(draft.probability, probability),
                jnp.bool_(False),
            )

        asked = lax.while_loop(lambda carry: carry[-1] & jnp.any(lacking(carry[2])), call, carry)
        return (*asked[:-1], jnp.bool_(True))
