"""One whole round, compiled for TPU: draft, verify, accept, commit, at the shapes of Llama-3-8B.

As many of its 32 layers as a chip holds beside embedding, head, drafter and cache (`LAYERS`); the layers
are a scan, so that depth changes sizes and not the program.
"""

import jax
import jax.numpy as jnp
import pytest
from chips import HBM_GIB, TOPOLOGIES, compile_for, needs_libtpu
from hlo import large_copies

from jax_specdec import DecodeLoop, Decoder, ModelConfig, make_sampling
from jax_specdec.drafters.expand import Cape, Expand
from jax_specdec.drafters.glide import GliDeDrafter
from jax_specdec.models.glide import GliDe
from jax_specdec.models.glide_config import GliDeConfig

pytestmark = needs_libtpu

SHAPE = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "mlp_size": 14336,
    "num_heads": 32,
    "num_kv_heads": 8,
    "head_dim": 128,
}
DEPTH = 32


def layers_that_fit(generation: str, batch: int, context: int) -> int:
    """Layers of weights and cache beside embedding, head, drafter and a margin for activations."""
    e, f, v = SHAPE["hidden_size"], SHAPE["mlp_size"], SHAPE["vocab_size"]
    n, k, d = SHAPE["num_heads"], SHAPE["num_kv_heads"], SHAPE["head_dim"]
    layer = 2 * (e * (n + 2 * k) * d + n * d * e + 3 * e * f)
    cache = 2 * 2 * batch * k * d * (context + 256)
    margin = 3 << 29
    free = (HBM_GIB[generation] << 30) - 2 * 2 * v * e - 2 * layer - cache - margin
    return min(DEPTH, free // (layer + cache))


def round_of(layers: int, batch: int, context: int):
    """The loop, and shapes of its parameters and state."""
    config = ModelConfig(**SHAPE, num_layers=layers, context=context)
    target = Decoder(config, "bfloat16", "scan")
    shape = {x: SHAPE[x] for x in SHAPE if x != "vocab_size"}
    model = GliDe(GliDeConfig(**shape), config, "bfloat16")
    loop = DecodeLoop(target, Expand(GliDeDrafter(model, 7), Cape(16)))

    def arguments():
        weights = target.init(jax.random.key(0))
        glide = model.join(model.init(jax.random.key(1)), weights)
        sampling = make_sampling(batch, max_new_tokens=128, temperature=1.0)
        tokens = jnp.zeros((batch, 256), jnp.int32)
        ones = jnp.ones((batch,), jnp.int32)
        params = {"target": weights, "drafters": {"glide": glide}}
        return params, loop.start(params, tokens, ones, sampling, ones, capacity=context)

    return loop, jax.eval_shape(arguments)


@pytest.mark.parametrize("context", [8192, 32768])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("generation", TOPOLOGIES)
def test_round(generation, batch, context):
    layers = layers_that_fit(generation, batch, context)
    assert layers >= 4
    loop, (params, state) = round_of(layers, batch, context)
    compiled = compile_for(generation, loop.run, params, state, jnp.int32(1), donate_argnums=1)
    text = compiled.as_text()
    names = ("tree_attention", "commit")
    assert all(name in text for name in names)
    layer = batch * SHAPE["num_kv_heads"] * SHAPE["head_dim"] * context
    assert large_copies(text, layer) == []
    memory = compiled.memory_analysis()
    caches = 2 * state.cache.k.size * state.cache.k.dtype.itemsize
    assert memory.alias_size_in_bytes >= caches
    assert memory.temp_size_in_bytes < 1 << 30
