"""A described TPU chip, and programs compiled for it on a machine that has none.

libtpu knows the generations by name. `make test` installs it beside the environment, in `aot/`: among the
installed packages it would make every command look for a TPU.
"""

import functools
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_specdec.checkpoints import layouts
from jax_specdec.tuning.plan import uncached

BESIDE = Path(sys.prefix) / "aot" / "libtpu" / "libtpu.so"
FOUND = BESIDE.is_file() or importlib.util.find_spec("libtpu") is not None
if FOUND:
    # Several test workers may load it, and nobody asks a cloud's metadata server.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    if BESIDE.is_file():
        os.environ.setdefault("TPU_LIBRARY_PATH", str(BESIDE))
needs_libtpu = pytest.mark.skipif(not FOUND, reason="libtpu is not installed; `make test` does")

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
# What a program may use of one `jax.Device`, in GiB; the two cores of v4 and of tpu7x show as two devices.
HBM_GIB = {"v4": 15, "v5e": 15.5, "v6e": 31, "tpu7x": 94}


@functools.cache
def chip(generation: str) -> Mesh:
    """A mesh of one chip."""
    jax.devices()  # the machine's own devices come first, so that none of these is looked for
    described = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation])
    return Mesh(np.array(described.devices[:1]), ("chip",))


def compile_for(generation: str, function: Callable, *args: Any, **jit: Any) -> Any:
    """`function` compiled for arguments of these shapes and dtypes on one chip."""
    mesh = chip(generation)
    everywhere = NamedSharding(mesh, PartitionSpec())

    def placed(x: Any) -> jax.ShapeDtypeStruct:
        if getattr(x, "sharding", None) is not None:
            return x
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(function, **jit).lower(*jax.tree.map(placed, args))
    with uncached():
        return lowered.compile()


def loaded(generation: str, params: Any) -> Any:
    """Shapes of a parameter tree, for `compile_for`, as `layouts.put_tree` lays it down on one chip."""
    mesh = chip(generation)
    everywhere = NamedSharding(mesh, PartitionSpec())
    places = jax.tree.map(lambda _: everywhere, params)
    return layouts.shapes_of(params, places, mesh.devices.flat[0].device_kind)
