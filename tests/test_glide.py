"""GliDe: the module against float64 arithmetic, decoding against training, and the contract."""

import dataclasses
import functools

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_specdec import DecodeLoop, Decoder, UserError
from jax_specdec.core import cache as kv
from jax_specdec.core.acceptance import Unverified
from jax_specdec.core.context import TargetView, last_seen, make_context
from jax_specdec.drafters.glide import GliDeDrafter, GliDeReader
from jax_specdec.expansions.beam_search import BeamSearch
from jax_specdec.expansions.cape import Cape
from jax_specdec.expansions.dynamic_tree import DynamicTree
from jax_specdec.expansions.expand import Expand
from jax_specdec.expansions.siblings import Fixed, PathProbability
from jax_specdec.models import RopeConfig, stack_layers
from jax_specdec.models.glide import CrossAttention, GliDe, glimpse_text, glimpse_view
from jax_specdec.models.glide_config import GliDeConfig
from jax_specdec.models.rope import rope_angles
from jax_specdec.testing import check_drafter
from jax_specdec.training.config import GliDeRecipe
from jax_specdec.training.glide import Pair

TEMPERATURES = (0.0, 0.3, 1.0, 1.7)


def config_like(target, **fields):
    names = ("hidden_size", "mlp_size", "num_heads", "num_kv_heads", "head_dim", "num_layers")
    return GliDeConfig(**{name: getattr(target, name) for name in names} | fields)


@functools.cache
def pair(layers, hidden=False):
    """A target of `layers` layers, and a drafter of its shape that agrees with it now and then."""
    target, params = (h.SMALL, h.small_params()) if layers == 1 else (h.TARGET, h.target_params())
    model = GliDe(config_like(target.config, hidden_input=hidden), target.config)
    own = model.init(jax.random.key(5))
    cross = [{**block["cross"], "out": block["cross"]["out"] * 4.0} for block in own["layers"]]
    near = h.perturbed({"layers": params["layers"], "norm": params["norm"]}, 0.15)
    blocks = zip(near["layers"], cross, strict=True)
    own = {**own, **near, "layers": tuple({**block, "cross": c} for block, c in blocks)}
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
    glimpse = glimpse_view(TargetView(cache), jnp.asarray(visible), t.windows)
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
    for layer, options in ((0, {}), (1, {"scale": 0.7, "soft_cap": 2.0}), (1, {})):
        a = glimpse_text((keys, values), visible, t.windows, **options)(q, layer)
        b = glimpse_view(TargetView(cache), visible, t.windows, **options)(q, layer)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert (np.asarray(a)[:, 0] == 0).all()


def test_the_last_hidden_state_that_is_seen():
    """Garbage behind what is committed does not matter, and nothing seen is 0."""
    hidden = jnp.asarray(np.arange(12.0).reshape(1, 4, 3) + 1, jnp.float32).at[:, 2:].set(jnp.nan)
    got = last_seen(hidden, jnp.asarray([[0, 1, 2, 2]], jnp.int32))
    assert got[0].tolist() == [[0, 0, 0], [1, 2, 3], [4, 5, 6], [4, 5, 6]]


def test_each_delay_has_its_projection_of_the_hidden_state():
    target, params, *_ = pair(1)
    fields = {"cross_attention": False, "hidden_input": True, "hidden_delays": 3, "hidden_size": 24}
    model = GliDe(config_like(target.config, **fields), target.config)
    own = model.init(jax.random.key(0))
    own["hidden_in"] = jax.random.normal(jax.random.key(1), own["hidden_in"].shape)
    one = GliDe(dataclasses.replace(model.config, hidden_delays=1), target.config)
    tokens = jnp.full((5, 1), 3, jnp.int32)
    hidden = jax.random.normal(jax.random.key(2), (5, 1, target.config.hidden_size))

    def scores(model, own, delay):
        cache, joined = model.decoder.init_cache(5, 8), model.join(own, params)
        place = jnp.full((5, 1), 4, jnp.int32)
        visible = None if delay is None else place + 1 - delay
        options = {"hidden": hidden, "visible": visible}
        return model.apply(joined, tokens, place, None, cache, **options).logits

    got = scores(model, own, jnp.asarray([[1], [2], [3], [4], [9]], jnp.int32))
    for row, projection in enumerate([0, 1, 2, 2, 2]):
        part = own["hidden_in"][:, 24 * projection : 24 * (projection + 1)]
        want = scores(one, {**own, "hidden_in": part}, None)[row]
        np.testing.assert_allclose(got[row], want, rtol=1e-4, atol=1e-4)


def test_a_draft_projects_the_hidden_state_once():
    target, params, *_ = pair(1)
    fields = {"cross_attention": False, "hidden_input": True, "hidden_delays": 3}
    model = GliDe(config_like(target.config, **fields), target.config)
    own = model.init(jax.random.key(0))
    own["hidden_in"] = jax.random.normal(jax.random.key(1), own["hidden_in"].shape)
    joined = model.join(own, params)
    cache = target.init_cache(2, 8).replace(length=jnp.asarray([3, 5], jnp.int32))
    hidden = jax.random.normal(jax.random.key(2), (2, 8, target.config.hidden_size))
    reader = GliDeReader(model, TargetView(cache, {target.config.num_layers - 1: hidden}))
    once = reader.for_draft(joined)

    def scores(reader, ahead):
        place, tokens = cache.length[:, None] + ahead, jnp.full((2, 1), 3, jnp.int32)
        return np.asarray(reader.apply(joined, tokens, place, reader.init_cache(2, 8)).logits)

    for ahead in range(4):
        np.testing.assert_array_equal(scores(once, ahead), scores(reader, ahead))
    assert (scores(once, -1) != scores(reader, -1)).any(), "a token that sees less of the target"


def test_wrong_numbers_of_projections():
    target, *_ = pair(1)
    with pytest.raises(ValueError, match="hidden_delays of 2 need hidden_input"):
        config_like(target.config, hidden_delays=2)
    with pytest.raises(ValueError, match="hidden_delays must be at most trained_delay, 4, got 5"):
        config_like(target.config, hidden_input=True, hidden_delays=5, trained_delay=4)
    with pytest.raises(ValueError, match="hidden_delays must be at least 1"):
        config_like(target.config, hidden_input=True, hidden_delays=0)


@pytest.mark.parametrize("kind", [Cape(9), DynamicTree(12, 3), None], ids=["cape", "tree", "chain"])
@pytest.mark.parametrize("batch", [4, 17])
def test_hidden_states_that_the_loop_keeps_are_the_targets(kind, batch):
    """After accepted chains and branches; rows written one by one, and in one scatter."""
    target, params, model, joined = pair(1, True)
    drafter = GliDeDrafter(model, 3)
    loop = DecodeLoop(target, drafter if kind is None else Expand(drafter, kind))
    sampling = h.sampling_of(batch, temperature=[TEMPERATURES[i % 4] for i in range(batch)])
    prompts = h.prompts_of([1 + i % 13 for i in range(batch)])
    got = h.decode(loop, h.all_params(target=params, glide=joined), prompts, sampling)
    assert kind is None or got.stats.accepted[:, 2].sum() > 0, "a branch was accepted"
    tokens = jnp.asarray(got.text)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    want = np.asarray(jax.jit(target.apply)(params, tokens, positions).hidden)
    for row, length in enumerate(got.state.view.cache.length):
        held = got.state.view.taps[target.config.num_layers - 1][row, :length]
        np.testing.assert_allclose(held, want[row, :length], rtol=2e-4, atol=2e-4)
    plain = h.decode(h.plain_loop(target=target), h.all_params(target=params), prompts, sampling)
    assert not plain.state.view.taps


def test_shapes_and_sharing():
    t = h.CONFIG
    assert config_like(t).layers_read(t) == (0, 1)
    assert config_like(t, num_layers=1).layers_read(t) == (1,)
    assert config_like(t, target_layers=(1, 0)).layers_read(t) == (1, 0)
    assert config_like(t, target_layers=(-1, -2)).layers_read(t) == (1, 0)
    deep = dataclasses.replace(t, num_layers=18, windows=())
    assert [config_like(t, num_layers=n).layers_read(deep) for n in (1, 2)] == [(9,), (6, 12)]
    assert GliDeConfig.paper(2).layers_read(deep) == (16, 17)
    with pytest.raises(ValueError, match="not among the target's 2 layers"):
        GliDe(config_like(t, num_layers=3, target_layers=(0, 1, 2)), t)
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


# Layers of target and drafter, and whether the target's hidden state is an input.
PAIRS = pytest.mark.parametrize(
    "kind", [(1, False), (2, False), (1, True), (2, True)], ids=["1", "2", "1+hidden", "2+hidden"]
)


def after_rounds(kind, length, rounds):
    """A loop's state after some rounds, with rejections behind it."""
    target, params, model, joined = pair(*kind)
    loop = DecodeLoop(target, GliDeDrafter(model, length))
    all_params = h.all_params(target=params, glide=joined)
    tokens, lengths = h.pad(h.prompts_of([1, 2, 7, 12]))
    sampling = h.sampling_of(4, temperature=TEMPERATURES, max_new_tokens=40)
    ids = jnp.arange(4, dtype=jnp.int32)
    state = h.start(loop, all_params, tokens, lengths, sampling, ids, capacity=64)
    return loop, all_params, h.run(loop, all_params, state, jnp.int32(rounds))


@PAIRS
def test_drafting_is_the_training_forward_with_the_right_visibility(kind):
    """Whatever was accepted or rejected before, each token is drafted as training would predict it."""
    length = 5
    target, _, model, joined = pair(*kind)
    teacher = Pair(model, target, GliDeRecipe())
    hot = h.sampling_of(4, temperature=1.0)

    @functools.partial(jax.jit, static_argnums=0)
    def draft(drafter, params, state):
        fields = {"keys": state.keys, "return_q": True}
        ctx = make_context(state.text, state.view, hot, h.VOCAB, **fields)
        return drafter.draft(params, state.drafts, ctx)[0]

    @jax.jit
    def teach(params, joined, tokens, root):
        """Training's forward; delay 1 up to the root, from where the delay grows with the draft."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        visible = jnp.minimum(positions, root[:, None])
        tokens = jnp.pad(tokens, ((0, 0), (0, 1)))
        reading = teacher.read(params, tokens)
        return jnp.exp(teacher.drafter_reads(joined, params, reading, tokens, visible))

    for rounds in (0, 4):
        loop, params, state = after_rounds(kind, length, rounds)
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
    ("rule", "kind"),
    [
        (Cape(9), (1, False)),
        (Cape(9), (2, True)),
        (Fixed(9), (1, False)),
        (PathProbability(9), (2, False)),
        (DynamicTree(12, 3), (1, True)),
        (DynamicTree(12, 3), (2, False)),
        (BeamSearch(10), (1, False)),
        (BeamSearch(10), (2, True)),
    ],
    ids=str,
)
def test_expansions(rule, kind):
    target, params, model, joined = pair(*kind)
    prompts = h.prompts_of([1, 3, 8, 13])
    fields = {"temperature": TEMPERATURES, "top_k": [0, 2, 0, 0], "top_p": [1.0, 1.0, 0.8, 1.0]}
    sampling = h.sampling_of(4, **fields, max_new_tokens=20)
    plain = h.decode(h.plain_loop(target=target), h.all_params(target=params), prompts, sampling)
    loop = DecodeLoop(target, Expand(GliDeDrafter(model, 3), rule))
    got = h.decode(loop, h.all_params(target=params, glide=joined), prompts, sampling)
    h.assert_identical(got, plain)
    assert got.stats.accepted[:, 2].sum() > 0, "nothing beside the chain was ever accepted"


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        ((1, False), None),
        ((2, False), None),
        ((1, True), Cape(9)),
        ((2, True), DynamicTree(12, 3)),
    ],
)
def test_contract(kind, rule):
    """Of trees the committed path need not lie in order, in the hidden states as in the keys."""
    target, params, model, joined = pair(*kind)
    drafter = GliDeDrafter(model, 3)
    assert bool(drafter.info.taps) == kind[1]
    check_drafter(
        drafter if rule is None else Expand(drafter, rule),
        {"glide": joined},
        target,
        params,
        max_new_tokens=8,
    )


@pytest.mark.parametrize("length", [1, 4])
def test_text_that_the_drafter_writes(length):
    """Every token is the drafter's, predicted as the place in its block says; limits hold."""
    target, params, model, joined = pair(1)
    loop = DecodeLoop(target, GliDeDrafter(model, length), Unverified())
    prompts, limit = h.prompts_of([1, 3, 8, 13]), 18
    sampling = h.sampling_of(4, max_new_tokens=limit)
    got = h.decode(loop, h.all_params(target=params, glide=joined), prompts, sampling)
    tokens, starts = jnp.asarray(got.text), np.asarray([len(p) for p in prompts])
    place = np.arange(tokens.shape[1])[None] - (starts[:, None] - 1)
    root = np.where(place < 0, 99, starts[:, None] - 1 + place // length * length)
    visible = np.minimum(np.arange(tokens.shape[1])[None], root).astype(np.int32)
    teacher, tokens = Pair(model, target, GliDeRecipe()), jnp.pad(tokens, ((0, 0), (0, 1)))
    reading = teacher.read(params, tokens)
    said = teacher.drafter_reads(joined, params, reading, tokens, jnp.asarray(visible))
    best, said = np.argmax(said, axis=-1), np.sort(said, axis=-1)
    for row, start in enumerate(starts):
        assert len(got.tokens[row]) == limit
        for i, token in enumerate(got.tokens[row]):
            at = start - 1 + i
            near = said[row, at, -1] - said[row, at, -2] < h.NEAR_TIE
            assert near or token == best[row, at]
    plain = h.decode(h.plain_loop(target=target), h.all_params(target=params), prompts, sampling)
    assert got.tokens != plain.tokens


VARIANTS = {
    "vanilla, own head, window": {"cross_attention": False, "share": False, "window": 4},
    "vanilla, hidden state": {"cross_attention": False, "hidden_input": True, "hidden_size": 24},
    "projections by delay": {"hidden_input": True, "hidden_delays": 2, "trained_delay": 2},
    "narrow, greedy": {"hidden_size": 24, "num_layers": 1, "qkv_bias": True, "final_norm": False},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_decode(name):
    target, params, *_ = pair(1)
    fields = {"num_layers": 1, **VARIANTS[name]}
    model = GliDe(config_like(target.config, **fields), target.config)
    own = model.init(jax.random.key(2))
    if "hidden_in" in own:
        own["hidden_in"] = jax.random.normal(jax.random.key(3), own["hidden_in"].shape)
    joined = model.join(own, params)
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
    assert GliDeDrafter(model, 16).info.depth == 16
    with pytest.raises(UserError, match="trained for at most 16: draft 16 tokens or fewer"):
        GliDeDrafter(model, 17)
    vanilla = dataclasses.replace(model.config, cross_attention=False)
    assert GliDeDrafter(GliDe(vanilla, model.target), 17).info.depth == 17
    with pytest.raises(UserError, match="trained for at most 16"):
        GliDeDrafter(GliDe(dataclasses.replace(vanilla, hidden_input=True), model.target), 17)


@pytest.mark.parametrize("name", ["num_heads", "num_kv_heads", "num_layers", "head_dim"])
@pytest.mark.parametrize("value", [0, -2])
def test_shapes_that_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got {value}"):
        config_like(h.CONFIG, **{name: value})
