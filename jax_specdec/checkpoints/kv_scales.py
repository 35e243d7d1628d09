"""The scales of an int8 cache, measured on what the model itself writes."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from jax_specdec.core.cache import KVScales
from jax_specdec.core.generate import make_generate
from jax_specdec.core.sampling import make_sampling
from jax_specdec.core.sharding import put_rows, to_host

if TYPE_CHECKING:
    from jax_specdec.checkpoints.targets import Target

ROWS, TOKENS = 4, 128
# The largest value of other texts may be larger than that of these.
MARGIN = 1.1


def measure_scales(target: "Target") -> KVScales:
    """Scales by layer and KV head: the largest of the keys, and of the values, of sampled text, and a tenth more.

    Values beyond 127 scales are cut. No data is needed, and the same target gives the same scales.
    """
    decoder, sharding = target.decoder, target.sharding
    batch = ROWS * (1 if sharding is None else sharding.size("batch"))
    new = min(TOKENS, target.config.context - 2)
    tokens = np.random.default_rng(0).integers(0, target.vocab_size, (batch, 2), np.int32)
    if target.config.bos_id is not None:
        tokens[:, 0] = target.config.bos_id
    sampling = make_sampling(batch, max_new_tokens=new, temperature=1.0, seed=0)
    lengths, numbers = np.full((batch,), 2, np.int32), np.arange(batch, dtype=np.int32)
    rows = put_rows((tokens, lengths, sampling, numbers), sharding)
    generate = jax.jit(make_generate(decoder, max_new_tokens=new))
    text, _ = generate({"target": target.params, "drafters": {}}, *rows)

    @jax.jit
    def largest(params, tokens, length):
        position = jnp.broadcast_to(
            jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape
        )
        keys, values = decoder.apply(params, tokens, position, logits=False).new
        there = (position < length[:, None])[:, :, None, None]

        def of(x):  # [B, T, K, D]
            return jnp.max(jnp.where(there, jnp.abs(x.astype(jnp.float32)), 0.0), axis=(0, 1, 3))

        return jnp.stack([of(x) for x in keys]), jnp.stack([of(x) for x in values])

    found = to_host(largest(target.params, text.tokens, text.length))
    k, v = (np.maximum(x * np.float32(MARGIN / 127), np.float32(1e-8)) for x in found)
    return KVScales(k, v)
