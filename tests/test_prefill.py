"""Reading text in chunks of any width and by any lag is reading it at once."""

import functools

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_cache import assert_is_prefill

from jax_specdec.core import cache as kv
from jax_specdec.core.prefill import read_text
from jax_specdec.models import Decoder, stack_layers

SLOTS = 24


@functools.partial(jax.jit, static_argnames=("chunk", "scan"))
def read(cache, tokens, upto, *, chunk, scan=False):
    decoder = Decoder(h.CONFIG, layer_loop="scan") if scan else h.TARGET
    params = stack_layers(h.target_params()) if scan else h.target_params()
    return read_text(decoder, params, cache, tokens, upto, chunk)


def empty(batch, stacked=False):
    c = h.CONFIG
    return kv.init_cache(
        c.num_layers, batch, c.num_kv_heads, SLOTS, c.head_dim, jnp.float32, stacked=stacked
    )


def text_of(width=SLOTS):
    return jnp.asarray(np.random.default_rng(0).integers(0, h.VOCAB, (3, width)), jnp.int32)


@pytest.mark.parametrize("width", [SLOTS, 20])  # the text may be narrower than the cache
@pytest.mark.parametrize("chunk", [1, 5, 7, 24, 256])
def test_any_chunk_is_one_pass(chunk, width):
    """Widths that do not divide the text, and one past the end of the cache, moved back."""
    tokens = text_of(width)
    upto = jnp.asarray([width, 0, 13], jnp.int32)
    cache = read(empty(3), tokens, upto, chunk=chunk)
    assert cache.length.tolist() == upto.tolist()
    assert_is_prefill(cache, h.TARGET, h.target_params(), tokens)


def test_any_lag():
    """Rows that lag by nothing, by one, by many; rows that are ahead stay where they are."""
    tokens = text_of()
    cache = read(empty(3), tokens, jnp.asarray([3, 20, 9], jnp.int32), chunk=7)
    for upto in ([4, 20, 9], [4, 5, 16], [23, 20, 16], [24, 24, 24]):
        before = np.asarray(cache.length)
        cache = read(cache, tokens, jnp.asarray(upto, jnp.int32), chunk=7)
        assert cache.length.tolist() == np.maximum(before, upto).tolist()
        assert_is_prefill(cache, h.TARGET, h.target_params(), tokens)


def test_nothing_to_read_changes_nothing():
    tokens = text_of()
    upto = jnp.asarray([3, 20, 9], jnp.int32)
    cache = read(empty(3), tokens, upto, chunk=7)
    again = read(cache, tokens, upto, chunk=7)
    for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_scanned_layers():
    tokens, upto = text_of(), jnp.asarray([24, 0, 13], jnp.int32)
    got = read(empty(3, stacked=True), tokens, upto, chunk=7, scan=True)
    assert got.length.tolist() == upto.tolist()
    assert_is_prefill(got, h.TARGET, h.target_params(), tokens)


def test_garbage_is_not_read():
    """Other tokens behind the end, and NaN in the empty slots, do not matter."""
    tokens = text_of()
    upto = jnp.asarray([6, 20, 9], jnp.int32)
    cache = empty(3)
    dirty = jax.tree.map(lambda x: x if x.ndim == 1 else jnp.full_like(x, jnp.nan), cache)
    place = jnp.arange(SLOTS, dtype=jnp.int32)[None]
    junk = jnp.where(place < upto[:, None], tokens, 1)
    got = read(dirty, junk, upto, chunk=7)
    assert_is_prefill(got, h.TARGET, h.target_params(), tokens)
