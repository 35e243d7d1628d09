"""The caches after any number of rejections are what a fresh prefill of the text would have made."""

import functools

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_specdec import DecodeLoop
from jax_specdec.core import cache as kv
from jax_specdec.core.drafter import Outcome, rollback
from jax_specdec.drafters.lm import LmDrafter

LAYERS, HEADS, DIM, SLOTS = 2, 2, 4, 20


def filled(batch, lengths, stacked, seed=0):
    """A cache whose live slots are random and whose other slots are NaN."""
    rng = np.random.default_rng(seed)
    live = np.arange(SLOTS)[None, :] < np.asarray(lengths)[:, None]
    k, v = rng.normal(size=(2, LAYERS, batch, HEADS, SLOTS, DIM)).astype(np.float32)
    k, v = (np.where(live[None, :, None, :, None], x, np.nan) for x in (k, v))
    if not stacked:
        k, v = tuple(map(jnp.asarray, k)), tuple(map(jnp.asarray, v))
    else:
        k, v = jnp.asarray(k), jnp.asarray(v)
    return kv.KVCache(k, v, jnp.asarray(lengths, jnp.int32))


def new_rows(batch, nodes, stacked, seed=1):
    rng = np.random.default_rng(seed)
    k, v = rng.normal(size=(2, LAYERS, batch, nodes, HEADS, DIM)).astype(np.float32)
    if stacked:
        return jnp.asarray(k), jnp.asarray(v)
    return tuple(map(jnp.asarray, k)), tuple(map(jnp.asarray, v))


def test_empty_cache():
    for stacked in (False, True):
        cache = kv.init_cache(3, 2, 4, 16, 8, jnp.bfloat16, stacked=stacked)
        assert cache.stacked == stacked and cache.slots == 16
        assert jax.tree.leaves(cache.k)[0].dtype == jnp.bfloat16
        assert jnp.stack(cache.k).shape == (3, 2, 4, 16, 8)
        assert cache.length.tolist() == [0, 0]


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("batch", [1, 3, 18])  # one slice per row, and one scatter
@pytest.mark.parametrize("tree", [False, True])
def test_commit_writes_the_path(batch, stacked, tree):
    """Row by row: what was there stays, the accepted path follows, and the length says so."""
    rng = np.random.default_rng(batch)
    lengths = rng.integers(0, SLOTS - 6, batch)
    counts = rng.integers(0, 4, batch)
    counts[0] = 3
    path = np.sort(rng.integers(0, 6, (batch, 4)), axis=1) if tree else None
    cache, new = filled(batch, lengths, stacked), new_rows(batch, 6, stacked)
    for after in (None, jnp.asarray(rng.normal(size=(batch, 6, 8)), jnp.float32)):
        got = jax.jit(kv.commit)(
            cache,
            new,
            jnp.asarray(counts, jnp.int32),
            None if path is None else jnp.asarray(path, jnp.int32),
            after=after,
        )
        assert got.length.tolist() == (lengths + counts).tolist()
        for old, fresh, out in (
            (cache.k, new[0], got.k),
            (cache.v, new[1], got.v),
        ):
            old, fresh, out = (np.stack(list(map(np.asarray, x))) for x in (old, fresh, out))
            for b in range(batch):
                n, c = lengths[b], counts[b]
                nodes = np.arange(c) if path is None else path[b, :c]
                np.testing.assert_array_equal(out[:, b, :, :n], old[:, b, :, :n])
                want = fresh[:, b, nodes].swapaxes(1, 2)
                np.testing.assert_array_equal(out[:, b, :, n : n + c], want)


def test_waiting_changes_nothing():
    start = jnp.asarray([0, 5, 7, 3], jnp.int32)
    for value in (0.0, -0.0, -3.5, np.inf, -np.inf, np.nan, 1e-45):
        after = jnp.full((4,), value, jnp.float32)
        np.testing.assert_array_equal(kv._wait_for(start, after), start)


def test_rows_are_converted_to_the_dtype_of_the_cache():
    cache = kv.init_cache(LAYERS, 1, HEADS, SLOTS, DIM, jnp.bfloat16)
    got = kv.commit(cache, new_rows(1, 2, False), jnp.asarray([2], jnp.int32))
    assert got.k[0].dtype == jnp.bfloat16


def test_rollback_is_a_minimum():
    outcome = Outcome(*(jnp.asarray(x, jnp.int32) for x in ([8, 7, 5], [[0]] * 3, [0] * 3)))
    assert rollback(jnp.asarray([9, 6, 6], jnp.int32), outcome).tolist() == [8, 6, 5]


# After a run


@functools.partial(jax.jit, static_argnums=0)
def _keys_values(decoder, params, tokens):
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    positions = jnp.broadcast_to(positions, tokens.shape)
    return decoder.apply(params, tokens, positions, logits=False).new


def assert_is_prefill(cache, decoder, params, tokens):
    """Below its length the cache holds what one pass over the text gives."""
    fresh = _keys_values(decoder, params, jnp.asarray(tokens))
    for held, want in zip((cache.k, cache.v), fresh, strict=True):
        for layer, expected in zip(held, want, strict=True):
            for b, n in enumerate(np.asarray(cache.length)):
                np.testing.assert_allclose(
                    np.asarray(layer)[b, :, :n],
                    np.asarray(expected)[b, :n].swapaxes(0, 1),
                    atol=2e-4,
                    rtol=2e-3,
                )


PROMPTS = h.prompts_of((1, 7, 2, 12))
TREE = (0, 0, 1, 2, 3, 0, 5, 6, 1, 8, 8, 2, 5, 0)
MIXED = {"temperature": [0.0, 1.0, 0.3, 1.7], "seed": [1, 2, 3, 4]}


@pytest.fixture(scope="module")
def plain():
    return h.decode(h.plain_loop(), h.all_params(), PROMPTS, h.sampling_of(4, **MIXED))


CASES = {
    "chain": lambda: (LmDrafter(h.TARGET, 3), lambda _: {"lm": h.close_params()}),
    "siblings": lambda: (
        h.Siblings(LmDrafter(h.TARGET, 3)),
        lambda _: {"lm": h.close_params()},
    ),
    "tree": lambda: (h.Oracle(TREE), lambda text: h.Oracle.params(text, holes=0.2)),
}


@pytest.mark.parametrize("name", CASES)
def test_caches_after_a_run(name, plain):
    drafter, params = CASES[name]()
    params = params(plain.text)
    got = h.decode(
        DecodeLoop(h.TARGET, drafter), h.all_params(**params), PROMPTS, h.sampling_of(4, **MIXED)
    )
    h.assert_identical(got, plain)
    assert got.stats.accepted.sum() < got.stats.drafted.sum(), "nothing was rejected"
    state = got.state
    assert (state.view.cache.length == state.text.length - 1).all()
    assert_is_prefill(state.view.cache, h.TARGET, h.target_params(), got.text)
    if name != "tree":
        lm = state.drafts["lm"]
        assert (lm.length <= state.text.length).all()
        assert (lm.length >= state.text.length - 2).all(), "the drafter lags by two at most"
        assert_is_prefill(lm, h.TARGET, params["lm"], got.text)


def poison(cache):
    """NaN in every slot that is not live."""
    dead = jnp.arange(cache.slots, dtype=jnp.int32)[None] >= cache.length[:, None]
    dead = dead[:, None, :, None]

    def kill(x):
        return jnp.where(dead, jnp.float32(jnp.nan), x)

    return cache.replace(k=tuple(map(kill, cache.k)), v=tuple(map(kill, cache.v)))


@jax.jit
def spoiled(state):
    place = jnp.arange(state.text.tokens.shape[1], dtype=jnp.int32)[None]
    junk = jnp.where(place < state.text.length[:, None], state.text.tokens, 17)
    return state.replace(
        view=state.view.replace(cache=poison(state.view.cache)),
        drafts={"lm": poison(state.drafts["lm"])},
        text=state.text.replace(tokens=junk),
    )


def test_garbage_behind_the_length_never_leaks(plain):
    """NaN behind every cache's length and other tokens behind the text, before each round."""
    loop = DecodeLoop(h.TARGET, LmDrafter(h.TARGET, 3), logprobs=True)
    params = h.all_params(lm=h.close_params())
    tokens, lengths = h.pad(PROMPTS)
    sampling, ids = h.sampling_of(4, **MIXED), jnp.arange(4, dtype=jnp.int32)
    state = h.start(loop, params, tokens, lengths, sampling, ids, capacity=48)
    for _ in range(10):
        state = h.run(loop, params, spoiled(state), jnp.int32(1))
    state = h.run(loop, params, state, jnp.int32(99))
    got = h.result(state)
    h.assert_identical(got, plain)
    assert np.isfinite(got.stats.logprobs).all()
