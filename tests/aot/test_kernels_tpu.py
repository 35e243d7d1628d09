"""Each kernel, compiled for real TPU generations: shapes of Llama-3-8B, and odd ones."""

import functools

import jax
import jax.numpy as jnp
import pytest
from chips import TOPOLOGIES, compile_for, needs_libtpu

from pallas_kernels import commit, tree_attention

pytestmark = needs_libtpu

# One generation runs with every test, all of them by `make aot`.
GENERATIONS = [
    pytest.param(name, marks=() if name == "v5e" else pytest.mark.slow) for name in TOPOLOGIES
]
# (layers, K, D) of Llama-3-8B, four of its layers.
LLAMA = (4, 8, 128)


def attention_shapes(b, t, s, g=4, llama=LLAMA, dtype="bfloat16", cache=None):
    layers, k, d = llama
    new = jax.ShapeDtypeStruct((b, t, k, d), dtype)
    old = jax.ShapeDtypeStruct((layers, b, k, s, d), cache or dtype)
    length = jax.ShapeDtypeStruct((b,), "int32")
    return [jax.ShapeDtypeStruct((b, t, k * g, d), dtype), new, new, old, old, length]


def bitmask(b, t):
    return jax.ShapeDtypeStruct((b, t, -(-t // 32)), "int32")


def attend(*arrays, **options):
    return tree_attention(*arrays, layer=jnp.int32(2), **options)


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize(
    ("b", "t", "s"), [(1, 1, 8192), (8, 1, 32768), (1, 16, 8192), (8, 32, 32768), (1, 64, 32768)]
)
def test_verification(generation, b, t, s):
    args = [*attention_shapes(b, t, s), bitmask(b, t)]
    compiled = compile_for(generation, attend, *args)
    assert "tpu_custom_call" in compiled.as_text()
    # The cache is read where it lies.
    assert compiled.memory_analysis().temp_size_in_bytes < 32 << 20


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        (attention_shapes(3, 7, 1000, g=7, llama=(3, 2, 80)), {}),
        (attention_shapes(3, 7, 1000, g=1, llama=(3, 3, 64), dtype="float32"), {"window": 300}),
        (attention_shapes(2, 33, 2048, llama=(3, 2, 256)), {"soft_cap": 30.0}),
        (attention_shapes(1, 1, 1000, g=1), {"window": 300, "soft_cap": 30.0, "return_lse": True}),
        (attention_shapes(2, 128, 4096, g=8), {"return_lse": True}),
        (attention_shapes(1, 256, 8192), {"chain": True}),
    ],
    ids=["odd", "float32 window", "soft cap", "one row", "large", "prefill"],
)
def test_options(generation, shapes, options):
    options = dict(options)
    chain = options.pop("chain", False)
    b, t = shapes[0].shape[:2]
    args = shapes if chain else [*shapes, bitmask(b, t)]
    compile_for(generation, functools.partial(attend, **options), *args)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_cache_only(generation):
    """GliDe's cross-attention: a step of one token, whose visible length is its own."""
    q, _, _, k, v, length = attention_shapes(8, 2, 8192)

    def glimpse(q, k, v, length, visible):
        return attend(q, None, None, k, v, length, visible=visible)

    compile_for(generation, glimpse, q, k, v, length, jax.ShapeDtypeStruct((8, 2), "int32"))


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("nodes", [1, 8])
def test_int8(generation, nodes):
    args = [*attention_shapes(8, nodes, 8192, cache="int8"), bitmask(8, nodes)]
    scales = [jax.ShapeDtypeStruct((4, 8), "float32")] * 2

    def quantised(k_scale, v_scale, *arrays):
        return attend(*arrays, k_scale=k_scale, v_scale=v_scale)

    compile_for(generation, quantised, *scales, *args)


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize(
    ("b", "t", "depth", "dtype", "shape"),
    [
        (1, 8, None, "bfloat16", (32, 8, 8192, 128)),
        (8, 64, 8, "bfloat16", (4, 8, 32768, 128)),
        (2, 5, 3, "float32", (3, 2, 1000, 80)),
        (2, 5, 3, "int8", (4, 8, 1024, 128)),
    ],
)
def test_commit(generation, b, t, depth, dtype, shape):
    layers, k, s, d = shape
    cache = jax.ShapeDtypeStruct((layers, b, k, s, d), dtype)
    new = jax.ShapeDtypeStruct((layers, b, t, k, d), dtype)
    count = jax.ShapeDtypeStruct((b,), "int32")
    args = [cache, cache, new, new, count, count]
    if depth is not None:
        args.append(jax.ShapeDtypeStruct((b, depth), "int32"))
    memory = compile_for(generation, commit, *args, donate_argnums=(0, 1)).memory_analysis()
    size = 2 * layers * b * k * s * d * cache.dtype.itemsize
    assert memory.alias_size_in_bytes >= size  # rows of less than a tile take more
    assert memory.temp_size_in_bytes < 32 << 20


@pytest.mark.parametrize(
    ("b", "dtype", "shape"),
    [(8, "bfloat16", (32, 4, 4128, 128)), (1, "float32", (2, 32, 4128, 128))],
    ids=["many layers", "many heads"],
)
def test_commit_of_a_chunk_of_prompt(b, dtype, shape):
    """256 new rows a head are far more than a block of the cache; v5e has the least memory for them."""
    layers, k, s, d = shape
    cache = jax.ShapeDtypeStruct((layers, b, k, s, d), dtype)
    new = jax.ShapeDtypeStruct((layers, b, 256, k, d), dtype)
    count = jax.ShapeDtypeStruct((b,), "int32")
    compile_for("v5e", commit, cache, cache, new, new, count, count, donate_argnums=(0, 1))
