"""Checkpoints onto a mesh: the same values as on one device, and no more bytes than are needed."""

import math

import jax
import meshes as m
import numpy as np
import pytest

from jax_specdec import UserError
from jax_specdec.checkpoints import sharded, tensor_files
from jax_specdec.checkpoints.targets import load_config, load_target
from jax_specdec.core.sharding import ShardingRules
from jax_specdec.models.tensor_parallel import divide

pytestmark = pytest.mark.filterwarnings("ignore:Some donated buffers")


@pytest.mark.parametrize("layer_loop", ["unroll", "scan"])
@pytest.mark.parametrize(("data", "tensor"), [(1, 2), (2, 4)])
def test_values(tiny_checkpoints, layer_loop, data, tensor):
    path = tiny_checkpoints / "target"
    rules = ShardingRules(vocab="tensor" if vocab_divides(path, tensor) else None)
    one = load_target(path, layer_loop=layer_loop, tokenizer=False)
    got = load_target(
        path, layer_loop=layer_loop, tokenizer=False, mesh=m.mesh_of(data, tensor), rules=rules
    )
    want = divide(one.params, one.config, got.decoder)
    jax.tree.map(np.testing.assert_array_equal, got.params, want)
    places = jax.tree.map(lambda x: x.sharding, got.params)
    assert places == jax.tree.map(lambda x: x.sharding, want)


def vocab_divides(path, tensor: int) -> bool:
    return load_config(path).vocab_size % tensor == 0


def test_each_part_is_read_once(tiny_checkpoints, monkeypatch):
    """What is on several devices is read once, and nothing is read that lies on none of this process."""
    read = []
    real = tensor_files.read_into

    def counting(part, file_slice, transposed, index=None):
        read.append(part.nbytes)
        real(part, file_slice, transposed, index)

    monkeypatch.setattr(sharded, "read_into", counting)
    path = tiny_checkpoints / "target"
    rules = ShardingRules(vocab=None)
    got = load_target(path, tokenizer=False, mesh=m.mesh_of(2, 2), rules=rules)
    held = sum(x.nbytes for x in jax.tree.leaves(got.params))
    assert sum(read) == held

    # Of two processes each has half the devices: what it reads is its share.
    read.clear()
    names = got.decoder.axes()[0]["layers"][0]["qkv"]
    leaf = got.params["layers"][0]["qkv"]
    place = got.sharding.of(*names)

    class Half:
        """The sharding as a process sees it that has the devices of one tensor shard."""

        @staticmethod
        def addressable_devices_indices_map(shape):
            whole = place.addressable_devices_indices_map(shape)
            return dict(list(whole.items())[::2])

    with pytest.raises(AttributeError):  # JAX wants all parts; reading comes before
        sharded.place(
            ("qkv",), leaf.shape, leaf.dtype, Half(), lambda index, host: read.append(host.nbytes)
        )
    assert sum(read) == leaf.nbytes // 2


def test_runs_of_columns():
    runs = list(sharded.runs(np.array([4, 5, 6, 0, 1, 9])))
    assert runs == [(0, 4, 3), (3, 0, 2), (5, 9, 1)]


def test_wrong_use(tiny_checkpoints):
    path = tiny_checkpoints / "target"
    with pytest.raises(UserError, match="Sharding rules need a mesh"):
        load_target(path, tokenizer=False, rules=ShardingRules())
    with pytest.raises(
        UserError, match="4 query heads and 2 KV heads do not divide over 8 devices"
    ):
        load_target(path, tokenizer=False, mesh=m.mesh_of(1, 8))


def test_bytes_of_a_device(tiny_checkpoints):
    from jax_specdec.checkpoints.memory import bytes_per_device

    got = load_target(
        tiny_checkpoints / "target",
        tokenizer=False,
        mesh=m.mesh_of(2, 2),
        rules=ShardingRules(vocab=None),
    )
    want = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(got.params)
    )
    assert bytes_per_device(got.decoder) == want
