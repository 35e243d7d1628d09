"""One whole round at the shapes of Llama-3-8B: draft, verify, accept, commit."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jax_specdec import DecodeLoop, Decoder, ModelConfig, make_sampling
from jax_specdec.drafters.glide import GliDeDrafter
from jax_specdec.expansions.cape import Cape
from jax_specdec.expansions.expand import Expand
from jax_specdec.models.glide import GliDe
from jax_specdec.models.glide_config import GliDeConfig

SHAPE = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "mlp_size": 14336,
    "num_heads": 32,
    "num_kv_heads": 8,
    "head_dim": 128,
}
DEPTH = 32


def round_of(mesh: Mesh, *, layers: int, batch: int, context: int, layer_loop: Any):
    """A loop with GliDe and CaPE of 16 nodes, and shapes of its parameters and state on a described device."""
    config = ModelConfig(**SHAPE, num_layers=layers, context=context)
    target = Decoder(config, "bfloat16", layer_loop, stacked_cache=True)
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

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return loop, jax.eval_shape(arguments)


def cache_copies(text: str, slots: int) -> list[str]:
    """Lines of a compiled program that copy what is as long as the cache."""
    size = f"{slots},{SHAPE['head_dim']}]"
    return [line for line in text.splitlines() if size in line and " copy" in line]
