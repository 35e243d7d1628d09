"""Trained Medusa heads of a small target, drafters with them, and plain decoding's answers."""

import functools

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_specdec.drafters.medusa import MedusaDrafter
from jax_specdec.expansions.static_tree import StaticTree
from jax_specdec.models.medusa import Medusa, MedusaConfig
from jax_specdec.training import medusa
from jax_specdec.training.config import MedusaRecipe, TrainConfig

TEMPERATURES = (0.0, 0.3, 1.0, 1.7)
MODEL = Medusa(MedusaConfig(num_heads=4, share=False), h.SMALL_CONFIG)
TREE = StaticTree(10)


@functools.cache
def texts() -> np.ndarray:
    """What the target writes, `int32[B, T+1]`."""
    rows = 12
    sampling = h.sampling_of(rows, temperature=[0.0, 0.5, 1.0] * 4, max_new_tokens=200)
    loop, params = h.plain_loop(target=h.SMALL), h.all_params(target=h.small_params())
    got = h.decode(loop, params, h.prompts_of([3] * rows), sampling, capacity=100)
    return np.stack([row[:96] for row in got.tokens]).astype(np.int32)


@functools.cache
def trained():
    """Heads that are right now and then: `(own parameters, joined ones, accuracies)`."""
    config = TrainConfig(steps=1, sequence_length=95)
    target, tokens = h.small_params(), jnp.asarray(texts())
    with (
        jax.ensure_compile_time_eval(),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        recipe = MedusaRecipe(loss="forward_kl")
        objective = medusa.make_objective(MODEL, h.SMALL, target, recipe, config)
        optimizer, own = optax.adam(1e-2), objective.init(jax.random.key(0))

        @jax.jit
        def fit(own):
            def step(carry, _):
                own, state = carry
                grads = jax.grad(objective.loss)(own, target, tokens, jax.random.key(0))
                updates, state = optimizer.update(grads, state, own)
                return (optax.apply_updates(own, updates), state), None

            return jax.lax.scan(step, (own, optimizer.init(own)), None, length=150)[0][0]

        own = fit(own)
        accuracies = medusa.calibrate(MODEL, h.SMALL, own, target, list(texts()), 95, 4)
    return own, MODEL.join(own, target), accuracies


def drafter(length=3, **fields) -> MedusaDrafter:
    return MedusaDrafter(MODEL, length, accuracies=trained()[2], **fields)


def params(**more):
    return h.all_params(target=h.small_params(), medusa=trained()[1], **more)


@functools.cache
def plain_answers():
    sampling = h.sampling_of(4, temperature=TEMPERATURES, top_k=[0, 2, 0, 0], max_new_tokens=28)
    loop, given = h.plain_loop(target=h.SMALL), h.all_params(target=h.small_params())
    return sampling, h.decode(loop, given, h.prompts_of([1, 3, 8, 13]), sampling)
