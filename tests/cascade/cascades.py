"""Cascades of small drafters, and their parameters."""

import dataclasses
import functools

import helpers as h
import jax
import jax.numpy as jnp

from jax_specdec.drafters.bigram import Bigram
from jax_specdec.drafters.cascade import Cascade, Horizontal
from jax_specdec.drafters.early_exit import Stop
from jax_specdec.drafters.lm import LmDrafter
from jax_specdec.drafters.max_gram import MaxGram
from jax_specdec.drafters.prompt_lookup import PromptLookup

LM, LM2 = LmDrafter(h.TARGET, 1), LmDrafter(h.TARGET, 1, name="lm2")
MIXED = {"temperature": (0.0, 1.0, 0.7, 0.0, 1.0), "top_k": (0, 2, 0, 0, 0)}


@functools.cache
def params():
    """Of a drafter that agrees with the target now and then, and of one that agrees with it."""
    first = h.close_params()
    return {"lm": first, "lm2": h.perturbed(first, 0.2), "bigram": jnp.arange(h.VOCAB)[::-1]}


def reviewed(length=4, budgets=None, **fields):
    return Cascade(LM, (MaxGram(length),), budgets or (length,), **fields)


def three_levels(**fields):
    """K = [[2, 2, 3], [0, 1, 2], [0, 0, 3]]."""
    inner = Cascade(LM2, (MaxGram(3),), (3,), **fields)
    outer = Cascade(LM, (inner, MaxGram(2)), (1, 2), **fields)
    return Horizontal((outer, inner, MaxGram(3)), (2, 2, 3))


CASCADES = {
    "vicuna": Horizontal((reviewed(3), MaxGram(3)), (2, 3)),
    "cut": Horizontal((reviewed(3), PromptLookup(4)), (2, 3), cut=True),
    "cut to one": Horizontal((reviewed(2),), (1,), cut=True),
    "three levels": three_levels(),
    "lenient": three_levels(lenience=4.0, copies=True),
    "horizontal": Horizontal((LmDrafter(h.TARGET, 2), Bigram(1), MaxGram(2)), (2, 2, 2)),
    "unsure": Horizontal(
        (dataclasses.replace(LM, length=3, stop=Stop("confidence", 0.3)), MaxGram(2)), (3, 2)
    ),
    "generating": Cascade(LM, (LmDrafter(h.TARGET, 2, name="lm2"),), (3,), lenience=2.0),
}


PROMPTS = h.prompts_of((1, 2, 5, 9, 3))


@functools.partial(jax.jit, static_argnums=0)
def all_logits(decoder, params, tokens):
    cache = decoder.init_cache(1, tokens.shape[1])
    place = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    return decoder.apply(params, tokens, place, cache).logits[0]
