"""Prints texts of tiny models as JSON: a program for other settings of JAX's random numbers."""

import json

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np

from jax_specdec import DecodeLoop
from jax_specdec.drafters.lm import LmDrafter
from jax_specdec.drafters.medusa import MedusaDrafter
from jax_specdec.models.medusa import Medusa, MedusaConfig


def random(seed, shapes, scale):
    """Parameters by NumPy, whose numbers no setting of JAX changes."""
    rng = np.random.default_rng(seed)

    def one(leaf):
        drawn = rng.normal(size=leaf.shape) * scale if len(leaf.shape) > 1 else np.ones(leaf.shape)
        return jnp.asarray(drawn, leaf.dtype)

    return jax.tree.map(one, shapes)


def texts() -> dict[str, list[list[int]]]:
    """What four sampled rows say, by drafter."""
    shapes = jax.eval_shape(h.TARGET.init, jax.random.key(0))
    target, other = (random(seed, shapes, 0.16) for seed in (0, 1))
    near = jax.tree.map(lambda a, b: a * 0.95 + b * 0.05, target, other)
    heads = Medusa(MedusaConfig(num_heads=2), h.CONFIG)
    own = heads.join(random(2, heads.shapes(), 0.1), target)
    sampling = h.sampling_of(4, temperature=0.9, seed=8)
    out = {}
    for name, drafter, params in (
        ("lm", LmDrafter(h.TARGET, 3), near),
        ("medusa", MedusaDrafter(heads, 2), own),
    ):
        params = {"target": target, "drafters": {name: params}}
        got = h.decode(DecodeLoop(h.TARGET, drafter), params, h.prompts_of([5, 1, 9, 4]), sampling)
        out[name] = got.tokens
    return out


if __name__ == "__main__":
    print(json.dumps(texts()))
