"""What the parts of a round cost."""

import os
from collections.abc import Callable
from typing import Any

from jax_specdec.checkpoints.targets import Target
from jax_specdec.core.budget import RoundCosts
from jax_specdec.core.loop import DecodeLoop
from jax_specdec.errors import UserError
from jax_specdec.specs.build import LoadedDrafter

Given = RoundCosts | str | os.PathLike[str] | None


class CostTables:
    """The costs of a decoder's rounds, by the rows of a batch.

    Args:
      loop: of several widths. given: a table.

    Raises:
      UserError: the table of another loop.
    """

    def __init__(
        self, target: Target, loop: DecodeLoop, loaded: LoadedDrafter, given: Given = None
    ):
        if given is not None and not isinstance(given, RoundCosts):
            raise UserError("Costs are given as RoundCosts.")
        if given is not None:
            loop.check_costs(given)
        self._given, self._loop = given, loop

    def get(
        self, arrays: Any, begin: Callable, run: Callable, progress: bool | None = None
    ) -> RoundCosts:
        """The costs for a batch of these rows.

        Args:
          arrays: as `DecodeLoop.start` takes them. begin, run: the programs that decode the batch, with their
            parameters: arrays and costs to a state, a state and a number of rounds to the next one.
          progress: whether to say what was measured.
        """
        unknown = self._loop.unknown_costs()
        assert unknown is not None
        return unknown if self._given is None else self._given
