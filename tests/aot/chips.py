"""A described TPU chip, and programs compiled for it."""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
# What a program may use of one chip, as `jax.Device` sees it: tpu7x shows its two cores as devices.
HBM_GIB = {"v4": 31, "v5e": 15, "v6e": 31, "tpu7x": 93}

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


@functools.cache
def chip(generation: str) -> Mesh:
    """A mesh of one chip."""
    described = topologies.get_topology_desc(
        platform="tpu", topology_name=TOPOLOGIES[generation]
    )
    return Mesh(np.array(described.devices[:1]), ("chip",))


def compile_for(generation: str, function: Callable, *args: Any, **jit: Any) -> Any:
    """`function` compiled for arguments of these shapes and dtypes on one chip."""
    mesh = chip(generation)
    everywhere = NamedSharding(mesh, PartitionSpec())

    def placed(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function, **jit).lower(*jax.tree.map(placed, args)).compile()
