"""The kernels lowered for accelerators that are not here: what Pallas refuses, it refuses now."""

import functools

import jax
import pytest
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import commit, tree_attention

DEVICES = {
    "tpu": AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu"),
    "cuda": AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu"),
}
CALLS = {"tpu": "tpu_custom_call", "cuda": "__gpu$xla.gpu.triton"}


def lowered(platform, function, *args):
    """The text of `function` for a described device."""
    mesh = AbstractMesh((1,), ("chip",), abstract_device=DEVICES[platform])
    allowed = [export.DisabledSafetyCheck.custom_call(name) for name in CALLS.values()]
    with jax.sharding.use_abstract_mesh(mesh):
        exported = export.export(jax.jit(function), platforms=[platform], disabled_checks=allowed)(
            *args
        )
    return exported.mlir_module()


def shapes(b, t, s, *, k=2, g=4, d=128, layers=3, dtype="bfloat16", cache=None):
    new = jax.ShapeDtypeStruct((b, t, k, d), dtype)
    old = jax.ShapeDtypeStruct((layers, b, k, s, d), cache or dtype)
    row = jax.ShapeDtypeStruct((b,), "int32")
    return [jax.ShapeDtypeStruct((b, t, k * g, d), dtype), new, new, old, old, row]


def bitmask(b, t):
    return jax.ShapeDtypeStruct((b, t, -(-t // 32)), "int32")


@pytest.mark.parametrize("platform", DEVICES)
@pytest.mark.parametrize(
    ("args", "options"),
    [
        ([*shapes(1, 1, 1024), bitmask(1, 1)], {}),
        ([*shapes(3, 33, 1000, g=7, d=80), bitmask(3, 33)], {"window": 300}),
        ([*shapes(2, 16, 512, g=1, d=64, dtype="float32"), bitmask(2, 16)], {"soft_cap": 20.0}),
        (shapes(1, 256, 4096), {"return_lse": True}),
    ],
    ids=["token", "odd", "float32", "prefill"],
)
def test_attention(platform, args, options):
    """The back-end is the platform's own, without being named."""
    call = functools.partial(tree_attention, layer=1, **options)
    assert CALLS[platform] in lowered(platform, call, *args)


@pytest.mark.parametrize("platform", DEVICES)
def test_glimpse(platform):
    q, _, _, k, v, length = shapes(2, 3, 1024)
    visible = jax.ShapeDtypeStruct((2, 3), "int32")

    def call(q, k, v, length, visible):
        return tree_attention(q, None, None, k, v, length, layer=0, visible=visible)

    assert CALLS[platform] in lowered(platform, call, q, k, v, length, visible)


@pytest.mark.parametrize("platform", DEVICES)
def test_int8(platform):
    scale = jax.ShapeDtypeStruct((3, 2), "float32")

    def call(k_scale, v_scale, *arrays):
        return tree_attention(*arrays, layer=1, k_scale=k_scale, v_scale=v_scale)

    args = [scale, scale, *shapes(2, 8, 512, cache="int8"), bitmask(2, 8)]
    assert CALLS[platform] in lowered(platform, call, *args)


@pytest.mark.parametrize("platform", DEVICES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_commit(platform, dtype):
    _, k_new, _, cache, _, row = shapes(2, 8, 512, dtype=dtype)
    new = jax.ShapeDtypeStruct((3, *k_new.shape), dtype)
    path = jax.ShapeDtypeStruct((2, 5), "int32")
    args = (cache, cache, new, new, row, row, path)
    assert CALLS[platform] in lowered(platform, commit, *args)


@pytest.mark.parametrize("platform", DEVICES)
def test_what_no_kernel_takes_goes_to_xla(platform):
    """More nodes than a bitmask kernel holds, or a dtype that it does not know."""
    args = [*shapes(1, 160, 1024), bitmask(1, 160)]
    call = functools.partial(tree_attention, layer=1)
    assert CALLS[platform] not in lowered(platform, call, *args)


def test_an_explicit_back_end_that_cannot_serve():
    mesh = AbstractMesh((1,), ("chip",), abstract_device=DEVICES["tpu"])
    cases = [
        ([*shapes(1, 160, 1024), bitmask(1, 160)], "takes up to 128 tree nodes, not 160"),
        (shapes(1, 2048, 1024), "takes up to 1024 new tokens, not 2048"),
        ([*shapes(1, 4, 1024, d=36), bitmask(1, 4)], "head_dim up to 256 in steps of 8, not 36"),
        ([*shapes(1, 4, 1024, d=512), bitmask(1, 4)], "head_dim up to 256 in steps of 8, not 512"),
        ([*shapes(1, 4, 1024, dtype="float16"), bitmask(1, 4)], "has no float16"),
    ]
    call = functools.partial(tree_attention, layer=1, backend="mosaic_tpu")
    for args, message in cases:
        with jax.sharding.use_abstract_mesh(mesh), pytest.raises(ValueError, match=message):
            jax.eval_shape(call, *args)
    with pytest.raises(ValueError, match="takes up to 128 tree nodes"):
        jax.eval_shape(functools.partial(call, interpret=True), *cases[0][0])
