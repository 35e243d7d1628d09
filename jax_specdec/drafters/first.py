"""`first(a, b)`: of several drafters the first that finds something.

Copying where the text repeats itself and a model where it does not: a copy costs next to nothing, and runs for
many tokens where it is right; but most of the time there is nothing to copy. Suffix decoding combines the two in this
way (Oliaro et al., arXiv 2411.04975, section 4); a horizontal cascade has them the other way round (`drafters.cascade`).
"""

import dataclasses
import functools

from jax_specdec.core.drafter import Info
from jax_specdec.drafters.cascade import Horizontal
from jax_specdec.errors import UserError


@dataclasses.dataclass(frozen=True)
class First(Horizontal):
    """Drafters of chains, each asked where none before it has found a token: turns in which one token is wanted.

    With a budget a round asks one of them: the one that pays most of those that have something to propose, see
    `alternatives`.

    Raises:
      UserError: no drafters, a drafter of trees or of nothing, or one name for two models.
    """

    budgets: tuple[int, ...] = dataclasses.field(init=False, default=())
    cut: bool = dataclasses.field(init=False, default=False)

    def __post_init__(self):
        if not self.drafters:
            raise UserError("There must be a drafter to ask first.")
        object.__setattr__(self, "budgets", (1, *[0] * (len(self.drafters) - 1)))
        self.check_drafters()

    @functools.cached_property
    def alternatives(self) -> tuple[Horizontal, ...]:
        """Each drafter alone, see `core.drafter.ways_of`."""
        return tuple(Horizontal((drafter,), (1,)) for drafter in self.drafters)

    @functools.cached_property
    def _info(self) -> Info:
        """That of the turns; but a drafter behind one that always finds something is an alternative, too."""
        infos = [drafter.info for drafter in self.drafters]
        depth = max(info.depth for info in infos)
        return dataclasses.replace(
            super()._info,
            nodes=depth,
            depth=depth,
            sizes=tuple(sorted({size for info in infos for size in info.sizes})),
            distribution=False,
            models=tuple(use for info in infos for use in info.models),
        )
