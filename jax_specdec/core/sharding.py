"""Where arrays lie on a mesh: logical axis names of the models, mapped to mesh axes by rules.

A model says what an axis is (`Model.axes`), `ShardingRules` which mesh axis it is divided over, and
`Sharding` joins them with a mesh. XLA partitions the program and puts in the collectives; divided by hand are
only the kernels, which it cannot see into (`pallas_kernels.Partition`), and the choice of a token, for which
it takes two reductions (`core.numerics.best`).
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_specdec._types import Array
from jax_specdec.errors import RunError, UserError, a_kind
from pallas_kernels import Partition

MeshAxes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """The mesh axis, or axes, over which each logical axis is divided; None keeps it whole.

    The defaults are Megatron's tensor parallelism (Shoeybi et al., arXiv 1909.08053, section 3) with a
    vocabulary-parallel embedding and head, and rows over `data`.

    Attributes:
      heads, kv_heads: query heads go where their KV head goes, so these are equal.
    """

    batch: MeshAxes = "data"
    heads: MeshAxes = "tensor"
    kv_heads: MeshAxes = "tensor"
    mlp: MeshAxes = "tensor"
    vocab: MeshAxes = "tensor"
    embed: MeshAxes = None
    layer: MeshAxes = None
    slots: MeshAxes = None

    def __post_init__(self):
        if self.heads != self.kv_heads:
            raise UserError(
                f"heads and kv_heads must lie on the same mesh axes, got {self.heads!r} and {self.kv_heads!r}."
            )
        if self.layer is not None or self.slots is not None:
            raise UserError("Layers and cache slots cannot be divided over a mesh.")

    def spec(self, names: Sequence[str | None]) -> PartitionSpec:
        """The `PartitionSpec` of an array with these logical axes.

        Raises:
          UserError: one mesh axis would divide two of them, or a name that there is no rule for.
        """
        axes: list[MeshAxes] = []
        for name in names:
            if name is not None and name not in RULES:
                raise UserError(
                    f"There is no rule for the axis {name!r}; rules name {', '.join(RULES)}."
                )
            axes.append(None if name is None else getattr(self, name))
        used = [axis for entry in axes for axis in _as_tuple(entry)]
        twice = sorted({axis for axis in used if used.count(axis) > 1})
        if twice:
            shown = ", ".join(str(name) for name in names)
            raise UserError(
                f"The mesh axis {twice[0]!r} would divide an array of axes ({shown}) twice."
            )
        return PartitionSpec(*axes)


RULES = tuple(field.name for field in dataclasses.fields(ShardingRules))
# What a drafter follows unless told otherwise: its rows lie with the target's, its weights everywhere.
REPLICATED = ShardingRules(heads=None, kv_heads=None, mlp=None, vocab=None)


@dataclasses.dataclass(frozen=True)
class Sharding:
    """Rules on a mesh.

    Attributes:
      mesh: with axes of the type Auto (XLA divides the program), concrete or abstract; those of a described
        topology serve to compile.

    Raises:
      UserError: a rule names an axis that the mesh has not, or an axis is of another type.
    """

    mesh: Mesh
    rules: ShardingRules = ShardingRules()

    def __post_init__(self):
        if not hasattr(self.mesh, "axis_names"):
            raise UserError(f"mesh must be a mesh of jax.make_mesh, not {a_kind(self.mesh)}.")
        names = self.mesh.axis_names
        for rule in RULES:
            for axis in _as_tuple(getattr(self.rules, rule)):
                if axis not in names:
                    raise UserError(
                        f"The rules divide {rule} over the mesh axis {axis!r}, and the mesh has "
                        f"{', '.join(map(str, names))}."
                    )
        if any(kind != AxisType.Auto for kind in self.mesh.axis_types):
            raise UserError(
                "The axes of the mesh must be of the type Auto: jax.make_mesh(..., axis_types=(AxisType.Auto, ...))."
            )

    @property
    def replicated(self) -> "Sharding":
        """The same mesh for what every device holds whole."""
        return dataclasses.replace(
            self, rules=dataclasses.replace(REPLICATED, batch=self.rules.batch)
        )

    def size(self, name: str) -> int:
        """Into how many parts a logical axis is divided."""
        return math.prod(self.mesh.shape[axis] for axis in _as_tuple(getattr(self.rules, name)))

    def of(self, *names: str | None) -> NamedSharding:
        """Where an array of these logical axes lies."""
        return NamedSharding(self.mesh, self.rules.spec(names))

    def spec_of(self, shape: Sequence[int], *names: str | None) -> PartitionSpec:
        """`ShardingRules.spec` for a shape: rows that do not divide, as a single one, lie on every device."""
        whole = "batch" in names and shape[names.index("batch")] % self.size("batch")
        return self.rules.spec([None if whole and name == "batch" else name for name in names])

    def constrain(self, x: Array, *names: str | None) -> Array:
        """`x`, and XLA knows where it lies, see `spec_of`."""
        place = NamedSharding(self.mesh, self.spec_of(x.shape, *names))
        return lax.with_sharding_constraint(x, place)

    def rows(self, tree: Any) -> Any:
        """`constrain` for a tree of arrays with one entry per row."""
        return jax.tree.map(lambda x: self.constrain(x, "batch", *[None] * (x.ndim - 1)), tree)

    def whole(self, tree: Any) -> Any:
        """`of` for a tree of arrays, or shapes, that every device holds."""
        return jax.tree.map(lambda x: self.of(*[None] * len(x.shape)), tree)

    def tree(self, axes: Any) -> Any:
        """`of` for a tree of tuples of names, as `Model.axes` has."""
        return jax.tree.map(lambda names: self.of(*names), axes, is_leaf=is_names)


def sharding_of(model: Any) -> Sharding | None:
    """Where a model lies; models need not know of meshes."""
    return getattr(model, "sharding", None)


def constrain(sharding: Sharding | None, x: Array, *names: str | None) -> Array:
    """`Sharding.constrain`; on one device `x` as it is."""
    return x if sharding is None else sharding.constrain(x, *names)


def partition_of(sharding: Sharding | None) -> Partition | None:
    """How kernels are divided, None on one device."""
    if sharding is None:
        return None
    return Partition(sharding.mesh, sharding.rules.batch, sharding.rules.kv_heads)


def shapes_at(arrays: Any, places: Any) -> Any:
    """A tree of arrays as shapes that lie at `places`, to compile for."""
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arrays, places
    )


def held_per_device(arrays: Any) -> int:
    """The bytes that one device holds of a tree of arrays, or of shapes that lie somewhere."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(arrays)
    )


def on_its_mesh(method: Callable) -> Callable:
    """A method of something with a `target`, traced with the mesh of the target set, where it has one.

    What is divided by hand, and what XLA divides badly otherwise, goes by the mesh that is set.
    """

    @functools.wraps(method)
    def inside(self: Any, *args: Any, **options: Any) -> Any:
        sharding = sharding_of(self.target)
        if sharding is None:
            return method(self, *args, **options)
        with jax.sharding.use_abstract_mesh(sharding.mesh.abstract_mesh):
            return method(self, *args, **options)

    return inside


def put(x: Any, place: NamedSharding) -> Array:
    """An array that every process holds whole, where it shall lie; each puts down the parts of its own devices."""
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, place, lambda index: x[index])


def put_rows(rows: Any, sharding: Sharding | None) -> Any:
    """Arrays of one entry per row, of the host or of a device, where rows lie.

    Args:
      sharding: the target's; None is the default device.
    """
    if sharding is None:
        return jax.tree.map(jnp.asarray, rows)
    return jax.device_put(jax.tree.map(np.asarray, rows), row_places(rows, sharding))


def put_whole(arrays: Any, sharding: Sharding | None) -> Any:
    """Arrays that every process holds whole, on every device."""
    if sharding is None:
        return arrays
    return jax.tree.map(put, jax.tree.map(np.asarray, arrays), sharding.whole(arrays))


def row_places(rows: Any, sharding: Sharding) -> Any:
    """Where arrays of one entry per row lie: a tree of `NamedSharding`."""

    def place(path: Any, x: Any) -> NamedSharding:
        shared = getattr(path[-1], "name", None) == "stop_table"  # the automaton of all rows
        return sharding.of(None if shared else "batch", *[None] * (len(x.shape) - 1))

    return jax.tree_util.tree_map_with_path(place, rows)


def to_host(arrays: Any) -> Any:
    """Arrays of devices as numpy, on every process the whole of them."""
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(arrays, tiled=True)
    return jax.device_get(arrays)


def everywhere(flag: bool) -> bool:
    """Whether it is so on every process."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.asarray(flag)).all())


def check_agreement(value: Any) -> None:
    """Raises a RunError where processes were given different values: they would wait for each other for ever."""
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256(repr(value).encode()).digest()[:8]
    all_digests = multihost_utils.process_allgather(np.frombuffer(digest, np.uint32))
    if (all_digests != all_digests[0]).any():
        raise RunError("The processes were given different requests, and must be given the same.")


def is_names(value: Any) -> bool:
    """Whether this is the names of one array's axes, and no tuple of further arrays."""
    return isinstance(value, tuple) and all(isinstance(x, (str, type(None))) for x in value)


def _as_tuple(axes: MeshAxes) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else axes
