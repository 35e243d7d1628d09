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


def elsewhere(settings, *args):
    """The texts in another process."""
    paths = [str(ROOT), str(ROOT / "tests")]
    env = {**os.environ, **settings, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(ROOT / "tests/contracts/prng_texts.py"), *args]
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


def test_unpinned_keys_are_found(usual):
    """The negative control: keys of another default would give other texts, and so would other bits."""
    assert usual["lm"] == usual["medusa"]
    other = elsewhere({}, "rbg")
    assert all(a != b for a, b in zip(other["lm"], usual["lm"], strict=True))
    key = jax.random.key(0, impl="threefry2x32")
    bits = []
    for partitionable in (False, True):
        with jax.threefry_partitionable(partitionable):
            bits.append(jax.random.bits(key, (8,)))
    assert (bits[0] != bits[1]).any()


# The tail of the noise


def bits_from_keys():
    """A generator whose bits are its key: word 0 for the first half of what is drawn, then word 1."""

    def random_bits(key, width, shape):
        assert width == 32
        words = key if len(shape) == 2 else key[:1]
        return jnp.broadcast_to(words.reshape(-1, *(1,) * (len(shape) - 1)), shape)

    return extend.define_prng_impl(
        key_shape=(2,),
        seed=lambda seed: jnp.stack([seed, seed]).astype(jnp.uint32),
        split=lambda key, shape: jnp.broadcast_to(key, (*shape, 2)),
        random_bits=random_bits,
        fold_in=lambda key, data: key,
        name="bits from keys",
        tag="bits",
    )


def test_noise_is_gumbel_far_into_the_tail(monkeypatch):
    """Uniforms of 46 bits are transformed, so that tokens rarer than e^-16 are drawn, as often as they are."""
    impl = bits_from_keys()
    monkeypatch.setattr(prng, "IMPL", impl)
    high = np.asarray([0, 0, 0, 0, 0, 1, 5, 1 << 12, 1 << 20, 1 << 22, (1 << 23) - 1])
    low = np.asarray([1, 1 << 8, 1 << 16, 1 << 22, (1 << 23) - 1, 0, 77, 9, 12345, 0, 0])
    keys = jnp.asarray(np.stack([high, low], axis=1).astype(np.uint32) << 9)
    start = jnp.zeros((len(high),), jnp.int32)
    noise = np.asarray(prng.position_noise(keys, start, 1, 4))
    below = high / 2**23 + low / 2**46  # the chance of noise above
    want = -np.log(-np.log1p(-below))
    np.testing.assert_allclose(noise, np.broadcast_to(want[:, None, None], noise.shape), rtol=1e-5)
    assert noise.max() > 31
    # The negative control: the usual mode ends before e^-16, whatever the bits.
    largest = jax.random.wrap_key_data(jnp.full((2,), 0xFFFFFFFF, jnp.uint32), impl=impl)
    assert jax.random.gumbel(largest, (4,), mode="low").max() < 16
