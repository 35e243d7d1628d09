"""The model contract: a target and a drafter's body without keys and values; `Decoder.axes`."""

import dataclasses

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recurrent as r

from jax_specdec import DecodeLoop, Decoder, UserError
from jax_specdec.core.acceptance import MATCH, Reject
from jax_specdec.core.model import Model
from jax_specdec.drafters.bigram import Bigram
from jax_specdec.drafters.cascade import Cascade
from jax_specdec.drafters.glide import GliDeDrafter
from jax_specdec.drafters.lm import LmDrafter
from jax_specdec.drafters.max_gram import MaxGram
from jax_specdec.drafters.prompt_lookup import PromptLookup
from jax_specdec.expansions.cape import Cape
from jax_specdec.expansions.dynamic_tree import DynamicTree
from jax_specdec.expansions.expand import Expand
from jax_specdec.models.glide import GliDe
from jax_specdec.models.glide_config import GliDeConfig
from jax_specdec.testing import check_drafter

PROMPTS = h.prompts_of([5, 1, 9, 12, 7, 3], seed=3)
TEMPERATURES = [0.0, 1.0, 0.6, 0.0, 1.4, 0.0]
LM = LmDrafter(r.MODEL, 3)


def sampling(**fields):
    return h.sampling_of(len(PROMPTS), **{"temperature": TEMPERATURES, "seed": 5, **fields})


def params(**drafts):
    return h.all_params(target=r.weights(), **drafts)


def table():
    with jax.ensure_compile_time_eval():
        return jnp.asarray(np.random.default_rng(0).integers(0, h.VOCAB, h.VOCAB), jnp.int32)


# Name -> drafter and its parameters.
DRAFTERS = {
    "max-gram": lambda: (MaxGram(4), {}),
    "prompt-lookup": lambda: (PromptLookup(3), {}),
    "bigram": lambda: (Bigram(2), {"bigram": table()}),
    "lm of its own kind": lambda: (LM, {"lm": r.close_weights()}),
    "lm of another kind": lambda: (LmDrafter(h.SMALL, 3), {"lm": h.small_params()}),
    "lm[max-gram]": lambda: (Cascade(LM, (MaxGram(3),), (3,)), {"lm": r.close_weights()}),
    "lm+cape": lambda: (Expand(LM, Cape(14)), {"lm": r.close_weights()}),
}


@pytest.fixture(scope="module")
def plain():
    """Plain decoding of this target; twice its rows are greedy."""
    return h.decode(h.plain_loop(target=r.MODEL), params(), PROMPTS, sampling())


def test_it_is_a_model():
    assert isinstance(r.MODEL, Model)


def test_plain_decoding_is_an_independent_one(plain):
    """At temperature 0, in float64, one token after the other."""
    for row, prompt in enumerate(PROMPTS):
        if TEMPERATURES[row] == 0:
            assert plain.tokens[row] == r.greedy(r.weights(), prompt, 24)
    assert len({token for row in plain.tokens for token in row}) > 10


@pytest.mark.parametrize("name", DRAFTERS)
def test_every_drafter_gives_the_text_of_plain_decoding(name, plain):
    drafter, drafts = DRAFTERS[name]()
    got = h.decode(DecodeLoop(r.MODEL, drafter, MATCH), params(**drafts), PROMPTS, sampling())
    h.assert_identical(got, plain, ties=0)
    accepted = got.stats.accepted.sum()
    assert accepted > (20 if "lm of its" in name else 0) and (got.stats.rounds < 24).any()


@pytest.mark.parametrize("name", ["lm of its own kind", "lm+cape", "max-gram"])
def test_reject(name, plain):
    """Greedy rows are plain decoding's, sampled rows run to their ends."""
    drafter, drafts = DRAFTERS[name]()
    got = h.decode(DecodeLoop(r.MODEL, drafter, Reject()), params(**drafts), PROMPTS, sampling())
    for row, temperature in enumerate(TEMPERATURES):
        assert len(got.tokens[row]) == 24
        if temperature == 0:
            assert got.tokens[row] == plain.tokens[row]
    assert got.stats.accepted.sum() > 0


def test_its_drafter_keeps_the_contract():
    check_drafter(LM, {"lm": r.close_weights()}, r.MODEL, r.weights())


@pytest.mark.parametrize("broken", ["tree", "rollback"])
def test_broken_models_are_found(broken, plain):
    """The negative controls: a tree read as a chain, and states that cannot be rolled back."""
    if broken == "tree":
        model, drafter = r.OneLine(h.VOCAB, 24), Expand(LM, Cape(14))
        got = h.decode(
            DecodeLoop(model, drafter), params(lm=r.close_weights()), PROMPTS, sampling()
        )
        with pytest.raises(AssertionError, match="differs at token"):
            h.assert_identical(got, plain)
        return
    drafter = LmDrafter(r.NoWayBack(h.VOCAB, 24), 3)
    with pytest.raises(AssertionError, match="is what was rejected rolled back"):
        check_drafter(drafter, {"lm": r.close_weights()}, r.MODEL, r.weights())


def test_what_needs_keys_and_values_is_refused():
    fields = ("hidden_size", "mlp_size", "num_heads", "num_kv_heads", "head_dim")
    shape = GliDeConfig(**{name: getattr(h.SMALL_CONFIG, name) for name in fields})
    model = GliDe(shape, h.SMALL_CONFIG)
    joined = model.join(model.init(jax.random.key(0)), h.small_params())
    loop = DecodeLoop(r.MODEL, GliDeDrafter(model, 2))
    with pytest.raises(UserError) as error:
        h.decode(loop, params(glide=joined), PROMPTS, sampling())
    assert str(error.value) == (
        "This drafter reads the target's keys and values, and the target's StateCache has none."
    )
    with pytest.raises(UserError, match="cannot grow trees"):
        Expand(LM, DynamicTree(8))


# Logical axes


def is_names(x) -> bool:
    return type(x) is tuple and all(name is None or isinstance(name, str) for name in x)


SHAPES = {
    "plain": h.CONFIG,
    "tied": dataclasses.replace(h.CONFIG, tied_head=True),
    "norms and biases": dataclasses.replace(
        h.CONFIG, qk_norm=True, qkv_bias=True, out_bias=True, num_layers=3, windows=()
    ),
}


def modelled(name):
    """A model and the shapes of its parameters."""
    if name == "recurrence":
        return r.MODEL, jax.eval_shape(lambda: r.MODEL.init(0))
    loop, shape = name.split(maxsplit=1)
    fields = {"stacked_cache": True} if loop == "stacked" else {"layer_loop": loop}
    model = Decoder(SHAPES[shape], **fields)
    return model, jax.eval_shape(model.init, jax.random.key(0))


@pytest.mark.parametrize(
    "name",
    ["recurrence", *(f"{loop} {s}" for loop in ("unroll", "scan", "stacked") for s in SHAPES)],
)
def test_axes_fit_parameters_and_cache(name):
    model, weights = modelled(name)
    cache = jax.eval_shape(lambda: model.init_cache(5, 37))
    sizes = {"vocab": model.vocab_size, "batch": 5}
    if name != "recurrence":
        c = model.config
        sizes |= {"embed": c.hidden_size, "kv_heads": c.num_kv_heads, "layer": c.num_layers}
    for axes, leaves in zip(model.axes(), (weights, cache), strict=True):
        names, tree = jax.tree.flatten(axes, is_leaf=is_names)
        arrays, want = jax.tree.flatten(leaves)
        assert tree == want
        for given, array in zip(names, arrays, strict=True):
            assert is_names(given) and len(given) == array.ndim
            for axis, size in zip(given, array.shape, strict=True):
                assert sizes.get(axis, size) == size, (given, array.shape)
