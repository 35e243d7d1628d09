"""Kernels on a mesh: batch rows and KV heads are independent, so each device computes its own."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

Axes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class Partition:
    """The mesh axes over which a kernel's arrays are divided.

    Attributes:
      batch, kv_heads: mesh axes, or None where every device has all. Query heads go with their KV head.
    """

    mesh: Mesh
    batch: Axes = None
    kv_heads: Axes = None

    def spec(self, axes: str) -> PartitionSpec:
        """`B` is the batch and `K` the KV heads, or query heads; other letters are whole."""
        where = {"B": self.batch, "K": self.kv_heads}
        return PartitionSpec(*(where.get(axis) for axis in axes))

    def _of_rows(self, rows: int) -> "Partition":
        names = (self.batch,) if isinstance(self.batch, str) else self.batch or ()
        if rows % math.prod(self.mesh.shape[name] for name in names):
            return dataclasses.replace(self, batch=None)
        return self

    def call(
        self,
        function: Callable,
        args: dict[str, Any],
        axes: dict[str, str],
        out: Any,
        rows: int,
    ) -> Any:
        """`function(**args)` on every device, with its part of each argument.

        Args:
          axes: by argument, a letter for each of its axes. out: the same for what is returned, a tree of strings.
            Arguments that are None stay None.
          rows: of the batch. Those that do not divide, as a single one, lie on every device.
        """
        here = self._of_rows(rows)
        given = {name: value for name, value in args.items() if value is not None}
        absent = dict.fromkeys(args.keys() - given.keys())
        specs = {name: here.spec(axes[name]) for name in given}
        # What a kernel's result varies over is not known to JAX.
        local = jax.shard_map(
            lambda given: function(**given, **absent),
            mesh=self.mesh,
            in_specs=(specs,),
            out_specs=jax.tree.map(here.spec, out),
            check_vma=False,
        )
        return local(given)
