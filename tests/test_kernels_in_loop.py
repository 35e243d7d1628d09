"""Whole decoding through the Pallas kernels, in their interpreters: the text is plain XLA's."""

import dataclasses
import functools

import helpers as h
import jax
import pytest

import pallas_kernels
from jax_specdec import DecodeLoop, Decoder
from jax_specdec.drafters.glide import GliDeDrafter
from jax_specdec.drafters.lm import LmDrafter
from jax_specdec.expansions.cape import Cape
from jax_specdec.expansions.dynamic_tree import DynamicTree
from jax_specdec.expansions.expand import Expand
from jax_specdec.models import decoder, glide
from jax_specdec.models.glide_config import GliDeConfig
from pallas_kernels import commit, tree_attention

PROMPTS = h.prompts_of([2, 9, 14])
SAMPLING = h.sampling_of(3, temperature=(0.0, 1.0, 0.7), max_new_tokens=(9, 4, 12))


@pytest.fixture(scope="module")
def plain():
    return h.decode(h.plain_loop(), h.all_params(), PROMPTS, SAMPLING, capacity=32)


CAPPED = dataclasses.replace(
    h.CONFIG, attention_cap=4.0, attention_scale=0.5, windows=(6, None), norms="both", norm="rms1"
)


@pytest.fixture(scope="module")
def capped_plain():
    target = Decoder(CAPPED)
    params = h.all_params(target=h.weights(target, 0))
    return h.decode(h.plain_loop(target=target), params, PROMPTS, SAMPLING, capacity=32)


@pytest.fixture(params=["mosaic_tpu", "triton"])
def kernels(request, monkeypatch):
    """All attention and every commit by one back-end; counts the calls that were traced."""
    counts = {"attention": 0, "commit": 0}

    def counted(name, function):
        run = functools.partial(function, backend=request.param, interpret=True)

        def call(*args, **options):
            counts[name] += 1
            return run(*args, **options)

        return call

    attention = counted("attention", tree_attention)
    monkeypatch.setattr(decoder, "tree_attention", attention)
    monkeypatch.setattr(glide, "tree_attention", attention)
    monkeypatch.setattr(pallas_kernels, "commit", counted("commit", commit))
    jax.clear_caches()  # what was traced before knows other kernels
    yield counts
    jax.clear_caches()


def glide_pair(target):
    fields = ("hidden_size", "mlp_size", "num_heads", "num_kv_heads", "head_dim")
    shape = GliDeConfig(**{field: getattr(h.CONFIG, field) for field in fields})
    model = glide.GliDe(shape, target.config)
    return model, model.join(h.weights(model, 5), h.target_params())


@pytest.mark.parametrize("drafter", ["lm+cape", "lm+tree", "glide"])
def test_text_is_the_same(kernels, drafter, plain):
    target = Decoder(h.CONFIG, stacked_cache=True)
    if drafter == "glide":
        model, params = glide_pair(target)
        loop, drafts = DecodeLoop(target, GliDeDrafter(model, 3)), {"glide": params}
    else:
        rule = Cape(8) if drafter == "lm+cape" else DynamicTree(12)
        loop = DecodeLoop(target, Expand(LmDrafter(target, 3), rule))
        drafts = {"lm": h.close_params()}
    got = h.decode(loop, h.all_params(**drafts), PROMPTS, SAMPLING, capacity=32)
    h.assert_identical(got, plain)
    assert kernels["attention"] > 2 and kernels["commit"] > 1
    if drafter != "glide":
        assert got.stats.accepted.sum() > 3


@pytest.mark.parametrize("drafter", ["lm+cape", "glide"])
def test_caps_scales_and_windows(capped_plain, kernels, drafter):
    """As Gemma 2 has them, of the target and of what reads its keys."""
    target = Decoder(CAPPED, stacked_cache=True)
    params = h.weights(target, 0)
    if drafter == "glide":
        model = glide.GliDe(GliDeConfig.like(CAPPED), CAPPED)
        chain, drafts = GliDeDrafter(model, 3), {"glide": model.join(h.weights(model, 5), params)}
    else:
        chain, drafts = LmDrafter(target, 3), {"lm": h.perturbed(params, 0.1)}
    loop = DecodeLoop(target, Expand(chain, Cape(8)))
    params = h.all_params(target=params, **drafts)
    h.assert_identical(h.decode(loop, params, PROMPTS, SAMPLING, capacity=32), capped_plain)
    assert kernels["attention"] > 2 and kernels["commit"] > 1
