"""Texts do not depend on the process's random number settings, and noise reaches far into the tail."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import random as extend
from prng_texts import texts

from jax_specdec.core import prng

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def usual():
    """The texts in this process."""
    return texts()


def elsewhere(settings):
    """The texts in another process."""
    paths = [str(ROOT), str(ROOT / "tests")]
    env = {**os.environ, **settings, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(ROOT / "tests/contracts/prng_texts.py")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("JAX_DEFAULT_PRNG_IMPL", "rbg"),
        ("JAX_DEFAULT_PRNG_IMPL", "unsafe_rbg"),
        ("JAX_THREEFRY_PARTITIONABLE", "0"),
        ("JAX_THREEFRY_PARTITIONABLE", "1"),
    ],
)
def test_texts_are_the_same_under_other_settings(name, value, usual):
    assert elsewhere({name: value}) == usual


def test_keys_of_another_generator_are_refused(usual, monkeypatch):
    """The negative control: they would give other texts, and cannot be used."""
    assert usual["lm"] == usual["medusa"]
    monkeypatch.setattr(prng, "IMPL", "rbg")
    keys, start = jnp.zeros((1, 4), jnp.uint32), jnp.zeros((1,), jnp.int32)
    # The second where shapes are checked.
    with pytest.raises((AssertionError, TypeError), match=r"another generator|'keys'"):
        prng.position_noise(keys, start, 1, 8)
    key = jax.random.key(0, impl="threefry2x32")
    bits = []
    for partitionable in (False, True):
        with jax.threefry_partitionable(partitionable):
            bits.append(jax.random.bits(key, (8,)))
    assert (bits[0] != bits[1]).any()


# The tail of the noise


def test_bits_are_threefry():
    """Those of JAX's own generator."""
    key = jnp.asarray([5, 0xFFFFFFF7], jnp.uint32)
    high, low = prng.threefry(key, jnp.zeros((9,), jnp.uint32), jnp.arange(9, dtype=jnp.uint32))
    with jax.threefry_partitionable(True):
        want = jax.random.bits(jax.random.wrap_key_data(key, impl="threefry2x32"), (9,))
    assert (high ^ low == want).all()
    counters = jnp.concatenate([jnp.zeros((9,), jnp.uint32), jnp.arange(9, dtype=jnp.uint32)])
    assert (extend.threefry_2x32(key, counters) == jnp.concatenate([high, low])).all()


def test_noise_is_gumbel_far_into_the_tail(monkeypatch):
    """Of all 64 bits, so that tokens rarer than e^-16 are drawn, as often as they are."""
    high = np.asarray([0, 0, 0, 0, 1, 77, 1 << 9, 1 << 21, 1 << 31, (1 << 32) - (1 << 9)])
    low = np.asarray([1, 1 << 9, 1 << 17, (1 << 32) - 1, 0, 5, 12345, 1 << 31, 9, 0])
    words = tuple(jnp.asarray(word, jnp.uint32) for word in (high, low))
    monkeypatch.setattr(prng, "threefry", lambda *args: words)
    keys, start = jnp.zeros((1, 2), jnp.uint32), jnp.zeros((1,), jnp.int32)
    noise = np.asarray(prng.position_noise(keys, start, 1, len(high)))[0, 0]
    above = (high + low / 2**32) / 2**32  # the chance of more noise
    np.testing.assert_allclose(noise, -np.log(-np.log1p(-above)), rtol=1e-5)
    assert noise.max() > 44
    # All zeros and all ones are finite, too.
    ends = jnp.asarray([0, 0xFFFFFFFF], jnp.uint32)
    monkeypatch.setattr(prng, "threefry", lambda *args: (ends, ends))
    noise = np.asarray(prng.position_noise(keys, start, 1, 2))[0, 0]
    assert 44 < noise[0] < 45 and -3 < noise[1] < -2.5
    # The negative control: the usual mode ends before e^-16, whatever the bits.
    ones = extend.define_prng_impl(
        key_shape=(2,),
        seed=lambda seed: jnp.zeros((2,), jnp.uint32),
        split=lambda key, shape: jnp.zeros((*shape, 2), jnp.uint32),
        random_bits=lambda key, width, shape: jnp.full(shape, 0xFFFFFFFF, jnp.uint32),
        fold_in=lambda key, data: key,
        name="all ones",
        tag="ones",
    )
    assert jax.random.gumbel(jax.random.key(0, impl=ones), (4,), mode="low").max() < 16
