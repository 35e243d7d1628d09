"""Drafters of a small target, loops with a budget, and costs of their rounds."""

import functools

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
from loop_runs import MIXED, RAGGED, TREE

from jax_specdec import DecodeLoop
from jax_specdec.core.budget import RoundCosts
from jax_specdec.core.drafter import ways_of
from jax_specdec.drafters.bigram import Bigram
from jax_specdec.drafters.cascade import Cascade, Horizontal
from jax_specdec.drafters.first import First
from jax_specdec.drafters.glide import GliDeDrafter
from jax_specdec.drafters.lm import LmDrafter
from jax_specdec.drafters.max_gram import MaxGram
from jax_specdec.drafters.medusa import MedusaDrafter
from jax_specdec.drafters.prompt_lookup import PromptLookup
from jax_specdec.expansions.cape import Cape
from jax_specdec.expansions.dynamic_tree import DynamicTree
from jax_specdec.expansions.expand import Expand
from jax_specdec.models.glide import GliDe
from jax_specdec.models.glide_config import GliDeConfig
from jax_specdec.models.medusa import Medusa, MedusaConfig

LM, GRAM = LmDrafter(h.SMALL, 6), MaxGram(5)
GLIDE = GliDe(GliDeConfig.like(h.SMALL_CONFIG), h.SMALL_CONFIG)
HEADS = Medusa(MedusaConfig(num_heads=3), h.SMALL_CONFIG)


@functools.cache
def close():
    """Of a drafter of the target's shape that agrees with it about half the time."""
    return h.perturbed(h.small_params(), 0.25)


def params_of(**drafters):
    return h.all_params(target=h.small_params(), **drafters)


def loop_of(drafter, **fields):
    return DecodeLoop(h.SMALL, drafter, **fields).budgeted()


def decode(loop, drafters, batch=RAGGED, sampling=None, **options):
    """The ragged mixed batch, or others."""
    sampling = h.sampling_of(4, **MIXED) if sampling is None else sampling
    return h.decode(loop, params_of(**drafters), h.prompts_of(batch), sampling, **options)


def costs_of(loop, verify=1.0, draft=0.1):
    """A wider verification costs `verify` more for every doubling, a drafted token `draft`, in each other way half."""
    v = [1 + verify * np.log2(w) for w in loop.widths]
    depth, ways = np.arange(loop.window), ways_of(loop.drafter)
    c = [
        np.where(depth <= way.info.depth, draft / 2**place * depth, np.inf)
        for place, way in enumerate(ways)
    ]
    return RoundCosts(jnp.asarray(v, jnp.float32), jnp.asarray(np.stack(c), jnp.float32))


def joined(model, seed):
    target = h.small_params()
    own = model.init(target) if model is HEADS else model.init(jax.random.key(seed))
    return model.join(h.perturbed(own, 0.5), target)


# Drafter, and its parameters from the answer.
CASES = {
    "max-gram": (GRAM, lambda _: {}),
    "prompt-lookup": (PromptLookup(4), lambda _: {}),
    "bigram": (Bigram(2), lambda _: {"bigram": jnp.arange(h.VOCAB)[::-1]}),
    "lm": (LM, lambda _: {"lm": close()}),
    "siblings": (h.Siblings(LmDrafter(h.SMALL, 3)), lambda _: {"lm": close()}),
    "tree with holes": (h.Oracle(TREE), lambda text: h.Oracle.params(text, holes=0.3)),
    "glide": (GliDeDrafter(GLIDE, 3), lambda _: {"glide": joined(GLIDE, 3)}),
    "glide+cape": (
        Expand(GliDeDrafter(GLIDE, 3), Cape(9)),
        lambda _: {"glide": joined(GLIDE, 3)},
    ),
    "medusa": (MedusaDrafter(HEADS, 3), lambda _: {"medusa": joined(HEADS, 3)}),
    "cascade": (Cascade(LmDrafter(h.SMALL, 1), (MaxGram(3),), (3,)), lambda _: {"lm": close()}),
    "horizontal": (
        Horizontal((LmDrafter(h.SMALL, 2), Bigram(1), MaxGram(2)), (2, 1, 2)),
        lambda _: {"lm": close(), "bigram": jnp.arange(h.VOCAB)[::-1]},
    ),
    "grown": (Expand(LmDrafter(h.SMALL, 3), DynamicTree(9)), lambda _: {"lm": close()}),
    "first": (First((MaxGram(5, min_match=2), LM)), lambda _: {"lm": close()}),
    "first of three": (
        First((PromptLookup(4, min_ngram=2), GliDeDrafter(GLIDE, 3), Bigram(1))),
        lambda _: {"glide": joined(GLIDE, 3), "bigram": jnp.arange(h.VOCAB)[::-1]},
    ),
}
UNTRAINED = ("bigram", "glide", "glide+cape", "medusa")

# Wide rounds that cost nothing, rounds that pay now and then, and drafting that never does.
TABLES = ((0.0, 0.0), (0.2, 0.05), (5.0, 0.3))
