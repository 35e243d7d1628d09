"""GliDe: the module against float64 arithmetic, decoding against training, and the contract."""

import dataclasses
import functools

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_specdec import DecodeLoop, Decoder, UserError
from jax_specdec import cache as kv
from jax_specdec.drafters.base import TargetView
from jax_specdec.drafters.expand import Cape, Expand, Fixed, PathProbability
from jax_specdec.drafters.glide import GliDeDrafter
from jax_specdec.drafters.growth import BeamSearch, DynamicTree
from jax_specdec.models import RopeConfig, stack_layers
from jax_specdec.models.decoder import rope_angles
from jax_specdec.models.glide import CrossAttention, GliDe, glimpse_cache, glimpse_text
from jax_specdec.models.glide_config import GliDeConfig
from jax_specdec.sampling import Noise, shared_noise
from jax_specdec.testing import check_drafter

TEMPERATURES = (0.0, 0.3, 1.0, 1.7)


def config_like(target, **fields):
    names = ("hidden_size", "mlp_size", "num_heads", "num_kv_heads", "head_dim", "num_layers")
    return GliDeConfig(**{name: getattr(target, name) for name in names} | fields)


@functools.cache
def pair(layers):
    """A target of `layers` layers, and a drafter of its shape that agrees with it now and then."""
    target, params = (h.SMALL, h.small_params()) if layers == 1 else (h.TARGET, h.target_params())
    model = GliDe(config_like(target.config), target.config)
    own = model.init(jax.random.key(5))
    cross = [{**block["cross"], "out": block["cross"]["out"] * 4.0} for block in own["layers"]]
    near = h.perturbed({"layers": params["layers"], "norm": params["norm"]}, 0.15)
    blocks = zip(near["layers"], cross, strict=True)
    own = {**near, "layers": tuple({**block, "cross": c} for block, c in blocks)}
    return target, params, model, model.join(own, params)


# The module


def rotate(x, positions, theta):
    """Rotary embedding of x [T, N, D] in float64."""
    half = x.shape[-1] // 2
    angle = positions[:, None] * theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


CASES = {
    "plain": ({}, {}),
    "no norm, biases": ({"cross_norm": False, "qkv_bias": True}, {}),
    "normed queries": ({}, {"qk_norm": True}),
    "window": ({}, {"windows": (4, 4)}),
    "other base": ({}, {"rope": RopeConfig(theta=500.0)}),
    "one key head": ({}, {"num_kv_heads": 1}),
}


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_cross_attention_in_float64(case, stacked):
    """Ragged rows, queries that see nothing, and NaN where nothing is committed."""
    fields, target_fields = CASES[case]
    t = dataclasses.replace(h.CONFIG, **target_fields)
    c = config_like(t, hidden_size=24, **fields)
    rng = np.random.default_rng(0)
    lengths, slots, width = np.array([0, 5, 11]), 12, 3
    shape = (t.num_layers, 3, t.num_kv_heads, slots, t.head_dim)
    keys, values = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    for row, length in enumerate(lengths):
        keys[:, row, :, length:] = values[:, row, :, length:] = np.nan
    x = rng.normal(size=(3, width, 24)).astype(np.float32)
    positions = np.array([[0, 1, 2], [3, 5, 6], [10, 11, 12]], np.int32)
    visible = np.minimum(positions, lengths[:, None]).astype(np.int32)
    angles = rope_angles(t.rope, t.head_dim, jnp.asarray(positions))
    cross = CrossAttention(c, t)
    weights = cross.init(jax.random.key(1), jnp.asarray(x), angles, lambda q: q)["params"]
    weights = jax.tree.map(
        lambda w: w + jax.random.normal(jax.random.key(w.size), w.shape), weights
    )
    per_layer = (lambda a: jnp.asarray(a)) if stacked else (lambda a: tuple(map(jnp.asarray, a)))
    cache = kv.KVCache(per_layer(keys), per_layer(values), jnp.asarray(lengths, jnp.int32))
    glimpse = glimpse_cache(cache, jnp.asarray(visible), t.windows)
    got = cross.apply({"params": weights}, jnp.asarray(x), angles, lambda q: glimpse(q, 1))

    w = jax.tree.map(lambda a: np.asarray(a, np.float64), weights)
    group = t.num_heads // t.num_kv_heads
    want = x.astype(np.float64)
    for row in range(3):
        y = norm(x[row].astype(np.float64), w["norm"], t.norm_eps) if c.cross_norm else x[row]
        q = y @ w["q"] + w.get("q_bias", 0)
        q = q.reshape(width, t.num_heads, t.head_dim)
        if t.qk_norm:
            q = norm(q, w["q_norm"], t.norm_eps)
        q = rotate(q, positions[row], t.rope.theta)
        out = np.zeros(q.shape)
        for i in range(width):
            first = 0 if t.windows[1] is None else max(0, visible[row, i] - t.windows[1])
            seen = slice(first, visible[row, i])
            for head in range(t.num_heads):
                k, v = (a[1, row, head // group, seen].astype(np.float64) for a in (keys, values))
                if len(k):
                    weight = np.exp(k @ q[i, head] / t.head_dim**0.5)
                    out[i, head] = weight @ v / weight.sum()
        want[row] += out.reshape(width, -1) @ w["out"]
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_training_sees_what_decoding_sees():
    t = dataclasses.replace(h.CONFIG, windows=(None, 3))
    rng = np.random.default_rng(1)
    keys, values = (
        tuple(jnp.asarray(rng.normal(size=(2, 9, 2, 8)), jnp.float32) for _ in range(2))
        for _ in range(2)
    )
    q = jnp.asarray(rng.normal(size=(2, 9, 4, 8)), jnp.float32)
    visible = jnp.asarray(rng.integers(0, 10, (2, 9)), jnp.int32).at[:, 0].set(0)
    in_cache = tuple(x.swapaxes(1, 2) for x in keys), tuple(x.swapaxes(1, 2) for x in values)
    cache = kv.KVCache(*in_cache, jnp.full((2,), 9, jnp.int32))
    for layer in range(2):
        a = glimpse_text((keys, values), visible, t.windows)(q, layer)
        b = glimpse_cache(cache, visible, t.windows)(q, layer)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert (np.asarray(a)[:, 0] == 0).all()


def test_shapes_and_sharing():
    t = h.CONFIG
    assert config_like(t).layers_read(t) == (0, 1)
    assert config_like(t, num_layers=1).layers_read(t) == (1,)
    assert config_like(t, target_layers=(1, 0)).layers_read(t) == (1, 0)
    with pytest.raises(ValueError, match="not among the target's 2 layers"):
        GliDe(config_like(t, num_layers=3), t)
    shared = GliDe(config_like(t, num_layers=1), t)
    params = shared.join(shared.init(jax.random.key(0)), h.target_params())
    # The very arrays of the target, not copies.
    assert params["embed"] is h.target_params()["embed"]
    assert params["head"] is h.target_params()["head"]
    own = GliDe(config_like(t, num_layers=1, share=False), t)
    extra = own.parameter_count() - shared.parameter_count()
    assert extra == 2 * t.vocab_size * t.hidden_size
    paper = GliDeConfig.paper()
    assert (paper.cross_norm, paper.share, paper.trained_delay) == (False, False, 5)
    # The table of the paper's sizes for a target of 7B: 236M beside embedding and head.
    seven = dataclasses.replace(
        t, vocab_size=32000, hidden_size=4096, num_heads=32, num_kv_heads=32, head_dim=128
    )
    assert round(GliDe(paper, seven).parameter_count() / 1e6) == 498


# Drafting


def after_rounds(layers, length, rounds):
    """A loop's state after some rounds, with rejections behind it."""
    target, params, model, joined = pair(layers)
    loop = DecodeLoop(target, GliDeDrafter(model, length))
    all_params = h.all_params(target=params, glide=joined)
    tokens, lengths = h.pad(h.prompts_of([1, 2, 7, 12]))
    sampling = h.sampling_of(4, temperature=TEMPERATURES, max_new_tokens=40)
    ids = jnp.arange(4, dtype=jnp.int32)
    state = h.start(loop, all_params, tokens, lengths, sampling, ids, capacity=64)
    return loop, all_params, h.run(loop, all_params, state, jnp.int32(rounds))


@pytest.mark.parametrize("layers", [1, 2])
def test_drafting_is_the_training_forward_with_the_right_visibility(layers):
    """Whatever was accepted or rejected before, each token is drafted as training would predict it."""
    length = 5
    target, _, model, joined = pair(layers)
    hot = h.sampling_of(4, temperature=1.0)
    rows = jnp.ones((4,), bool), jnp.full((4,), 99, jnp.int32)

    @functools.partial(jax.jit, static_argnums=0, compiler_options=h.QUICK)
    def draft(drafter, params, state):
        gumbel = shared_noise(state.keys, hot, state.text.length, length + 1, h.VOCAB)
        noise, view = Noise(gumbel, return_q=True), TargetView(state.cache)
        return drafter.draft(params, state.drafts, state.text, view, hot, noise, *rows)[0]

    @functools.partial(jax.jit, compiler_options=h.QUICK)
    def teach(params, joined, tokens, root):
        """Training's forward; delay 1 up to the root, from where the delay grows with the draft."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        seen = target.apply(params, tokens, positions, logits=False)
        visible = jnp.minimum(positions, root[:, None])
        glimpse = glimpse_text(seen.new_kv, visible, target.config.windows)
        return jax.nn.softmax(model.apply(joined, tokens, positions, glimpse).logits, axis=-1)

    for rounds in (0, 4):
        loop, params, state = after_rounds(layers, length, rounds)
        got = draft(loop.drafter, params["drafters"], state)
        if rounds:
            accepted, drafted = state.stats.accepted.sum(), state.stats.drafted.sum()
            assert 0 < accepted < drafted, "both rejections and acceptances are wanted"
        lengths = np.asarray(state.text.length)
        tokens = np.asarray(state.text.tokens).copy()
        for row, n in enumerate(lengths):
            tokens[row, n : n + length] = got.tokens[row, 1:]
        want = teach(params["target"], joined, jnp.asarray(tokens), state.text.length - 1)
        for row, n in enumerate(lengths):
            np.testing.assert_allclose(got.q[row], want[row, n - 1 : n - 1 + length], atol=2e-4)


@pytest.mark.parametrize(
    ("layers", "length"), [*((1, n) for n in range(1, 7)), *((2, n) for n in (2, 5))]
)
def test_text_is_plain_decodings(layers, length):
    """A ragged batch, greedy rows and sampled ones."""
    target, params, model, joined = pair(layers)
    prompts = h.prompts_of([1, 3, 8, 13])
    sampling = h.sampling_of(4, temperature=TEMPERATURES, max_new_tokens=20)
    plain = h.decode(h.plain_loop(target=target), h.all_params(target=params), prompts, sampling)
    loop = DecodeLoop(target, GliDeDrafter(model, length))
    got = h.decode(loop, h.all_params(target=params, glide=joined), prompts, sampling)
    h.assert_identical(got, plain)
    accepted, drafted = got.stats.accepted.sum(), got.stats.drafted.sum()
    assert 0.1 < accepted / drafted < 0.95


@pytest.mark.parametrize(
    ("rule", "layers"),
    [
        (Cape(9), 1),
        (Fixed(9), 1),
        (PathProbability(9), 2),
        (DynamicTree(12, 3), 1),
        (DynamicTree(12, 3), 2),
        (BeamSearch(10), 1),
        (BeamSearch(10), 2),
    ],
    ids=str,
)
def test_expansions(rule, layers):
    target, params, model, joined = pair(layers)
    prompts = h.prompts_of([1, 3, 8, 13])
    fields = {"temperature": TEMPERATURES, "top_k": [0, 2, 0, 0], "top_p": [1.0, 1.0, 0.8, 1.0]}
    sampling = h.sampling_of(4, **fields, max_new_tokens=20)
    plain = h.decode(h.plain_loop(target=target), h.all_params(target=params), prompts, sampling)
    loop = DecodeLoop(target, Expand(GliDeDrafter(model, 3), rule))
    got = h.decode(loop, h.all_params(target=params, glide=joined), prompts, sampling)
    h.assert_identical(got, plain)
    assert got.stats.accepted[:, 2].sum() > 0, "nothing beside the chain was ever accepted"


@pytest.mark.parametrize("layers", [1, 2])
def test_contract(layers):
    target, params, model, joined = pair(layers)
    check_drafter(
        GliDeDrafter(model, 3),
        {"glide": joined},
        target,
        params,
        max_new_tokens=8,
        compiler_options=h.QUICK,
    )


VARIANTS = {
    "vanilla, own head, window": {"cross_attention": False, "share": False, "window": 4},
    "narrow, greedy": {"hidden_size": 24, "num_layers": 1, "qkv_bias": True, "final_norm": False},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_decode(name):
    target, params, *_ = pair(1)
    fields = {"num_layers": 1, **VARIANTS[name]}
    model = GliDe(config_like(target.config, **fields), target.config)
    joined = model.join(model.init(jax.random.key(2)), params)
    prompts, sampling = h.prompts_of([2, 9]), h.sampling_of(2, temperature=(0.0, 1.0))
    plain = h.decode(h.plain_loop(target=target), h.all_params(target=params), prompts, sampling)
    drafter = GliDeDrafter(model, 2, proposal="greedy" if "greedy" in name else "matched")
    all_params = h.all_params(target=params, glide=joined)
    h.assert_identical(h.decode(DecodeLoop(target, drafter), all_params, prompts, sampling), plain)


def test_targets_whose_layers_are_scanned():
    """One stacked cache: the layer that the drafter reads is a slice that is taken in place."""
    target, params, model, joined = pair(2)
    scanned = Decoder(target.config, layer_loop="scan")
    loop = DecodeLoop(scanned, GliDeDrafter(model, 3))
    prompts, sampling = h.prompts_of([2, 9]), h.sampling_of(2, temperature=(0.0, 1.0))
    got = h.decode(loop, h.all_params(target=stack_layers(params), glide=joined), prompts, sampling)
    plain = h.decode(h.plain_loop(target=target), h.all_params(target=params), prompts, sampling)
    h.assert_identical(got, plain)


def test_a_draft_beyond_the_trained_delay_is_refused():
    _, _, model, _ = pair(1)
    assert GliDeDrafter(model, 16).depth == 16
    with pytest.raises(UserError, match="trained for at most 16: draft 16 tokens or fewer"):
        GliDeDrafter(model, 17)
    vanilla = dataclasses.replace(model.config, cross_attention=False)
    assert GliDeDrafter(GliDe(vanilla, model.target), 17).depth == 17
