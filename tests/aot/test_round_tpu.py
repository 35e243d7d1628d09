"""One whole round, compiled for TPU: draft, verify, accept, commit, at the shapes of Llama-3-8B.

As many of its 32 layers as a chip holds beside embedding, head, drafter and cache (`layers_that_fit`); the layers
are a scan, so that depth changes sizes and not the program.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest
from chips import HBM_GIB, TOPOLOGIES, chip, compile_for, loaded, needs_libtpu
from rounds import DEPTH, SHAPE, cache_copies, round_of

pytestmark = needs_libtpu


def layers_that_fit(generation: str, batch: int, context: int) -> int:
    """Layers of weights and cache beside embedding, head, drafter and a margin for activations."""
    e, f, v = SHAPE["hidden_size"], SHAPE["mlp_size"], SHAPE["vocab_size"]
    n, k, d = SHAPE["num_heads"], SHAPE["num_kv_heads"], SHAPE["head_dim"]
    layer = 2 * (e * (n + 2 * k) * d + n * d * e + 3 * e * f)
    cache = 2 * 2 * batch * k * d * (context + 256)
    margin = 5 << 29
    free = int(HBM_GIB[generation] * 2**30) - 2 * 2 * v * e - 2 * layer - cache - margin
    return min(DEPTH, free // (layer + cache))


QUICK = {
    ("v5e", 8, 32768)
}  # runs with every test; one shape of each other generation in the slow part


def _mark(case: tuple[str, int, int]) -> tuple:
    if case in QUICK:
        return ()
    one_each = case[1:] == (8, 32768) or case == ("v5e", 1, 8192)
    return (pytest.mark.slow if one_each else pytest.mark.more,)


CASES = [
    pytest.param(*case, marks=_mark(case))
    for case in itertools.product(TOPOLOGIES, (1, 8), (8192, 32768))
]


@pytest.mark.parametrize(("generation", "batch", "context"), CASES)
def test_round(generation, batch, context):
    layers = layers_that_fit(generation, batch, context)
    assert layers >= 4
    sizes = {"layers": layers, "batch": batch, "context": context}
    loop, (params, state) = round_of(chip(generation), **sizes, layer_loop="scan")
    # The schedule is not what is looked at, and a good one takes twice as long to find.
    options = {"exec_time_optimization_effort": -1.0}
    run = functools.partial(compile_for, generation, donate_argnums=1, compiler_options=options)
    compiled = run(loop.run, loaded(generation, params), state, jnp.int32(1))
    text = compiled.as_text()
    names = ("tree_attention", "commit")
    assert all(name in text for name in names)
    # Weights are copied into VMEM ahead of their use; caches stay where they are.
    assert cache_copies(text, state.view.cache.slots) == []
    memory = compiled.memory_analysis()
    caches = 2 * state.view.cache.k.size * state.view.cache.k.dtype.itemsize
    assert memory.alias_size_in_bytes >= caches
    logits = 4 * batch * loop.nodes * SHAPE["vocab_size"]
    assert memory.temp_size_in_bytes < 16 * logits + (256 << 20)


def test_weights_are_put_down_by_a_program_that_compiles():
    """What `layouts.put` asks of a TPU7x: from the default layout to ours, one array at a time."""
    shape = jax.ShapeDtypeStruct((4, 4096, 6144), jnp.bfloat16)
    (ours,) = loaded("tpu7x", {"qkv": shape}).values()
    compiled = compile_for("tpu7x", lambda x: x, shape, out_shardings=ours.format)
    layout = compiled.output_formats.layout
    assert layout == ours.format.layout != compiled.input_formats[0][0].layout
    assert compiled.memory_analysis().temp_size_in_bytes < 1 << 20
