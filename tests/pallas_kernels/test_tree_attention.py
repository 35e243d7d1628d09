"""The tree attention op: its reference, its masks, and the calls that it refuses."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_attention_pallas
import test_attention_xla
from attention_suite import ARRAYS, TreeAttentionSuite, expected, make_case, pack

from pallas_kernels import BACKENDS, masks, tree_attention


class TestReference(TreeAttentionSuite):
    backend = "reference"

    def test_float64(self):
        case = make_case(t=9, dtype="float64")
        with jax.enable_x64(True):
            out, _ = self.call(case)
        want, _ = expected(case)
        assert out.dtype == jnp.float64
        np.testing.assert_allclose(out, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("size", [1, 31, 32, 33, 64, 70])
def test_masks(size):
    seen = np.random.default_rng(size).random((2, 3, size)) < 0.5
    bits = masks.pack(jnp.asarray(seen))
    assert bits.dtype == jnp.int32
    np.testing.assert_array_equal(bits, pack(seen))
    np.testing.assert_array_equal(masks.unpack(bits, size), seen)
    np.testing.assert_array_equal(masks.popcount(bits), seen.sum(-1))
    chain = masks.unpack(masks.chain(size), size)
    np.testing.assert_array_equal(chain, np.tril(np.ones((size, size), bool)))


def test_unpack_too_many():
    with pytest.raises(ValueError, match=r"33 bits do not fit.*\(2, 1\)"):
        masks.unpack(jnp.zeros((2, 1), jnp.int32), 33)


def test_automatic_backend_is_said_once(caplog):
    case = make_case(t=3, slots=77, lengths=(5,))
    arrays = {x: case[x] for x in ARRAYS}
    with caplog.at_level(logging.DEBUG, logger="pallas_kernels"):
        for _ in range(2):
            out = jax.eval_shape(lambda arrays: tree_attention(**arrays), arrays)
    assert out.shape == case["q"].shape
    said = [x.getMessage() for x in caplog.records if x.name.startswith("pallas_kernels")]
    assert len(said) == 1 and "xla" in said[0]


GOOD = {
    "q": ((2, 5, 4, 8), "float32"),
    "k_new": ((2, 5, 2, 8), "float32"),
    "v_new": ((2, 5, 2, 8), "float32"),
    "k_cache": ((2, 2, 16, 8), "float32"),
    "v_cache": ((2, 2, 16, 8), "float32"),
    "length": ((2,), "int32"),
}
INT8 = {
    "k_cache": ((2, 2, 16, 8), "int8"),
    "v_cache": ((2, 2, 16, 8), "int8"),
    "k_scale": ((2,), "float32"),
    "v_scale": ((2,), "float32"),
}


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"q": ((2, 5, 32), "float32")}, {}, r"q must be \[B, T, N, D\], got \(2, 5, 32\)"),
        ({"q": ((2, 5, 3, 8), "float32")}, {}, r"\(2, 5, 3, 8\).*\(2, 2, 16, 8\)"),
        ({"q": ((2, 5, 4, 6), "float32")}, {}, r"\(2, 5, 4, 6\).*\(2, 2, 16, 8\)"),
        ({"k_new": ((2, 4, 2, 8), "float32")}, {}, r"k_new must be \(2, 5, 2, 8\).*\(2, 4, 2, 8\)"),
        ({"v_new": None}, {}, "both or neither"),
        ({"v_cache": ((2, 2, 17, 8), "float32")}, {}, r"\(2, 2, 16, 8\).*\(2, 2, 17, 8\)"),
        ({"length": ((3,), "int32")}, {}, r"length must be int32\(2,\).*\(3,\)"),
        ({"length": ((2,), "float32")}, {}, r"length must be int32"),
        ({"ancestors": ((2, 5, 2), "int32")}, {}, r"ancestors must be int32\(2, 5, 1\)"),
        ({"v_new": ((2, 5, 2, 8), "bfloat16")}, {}, "one floating dtype.*v_new bfloat16"),
        ({}, {"layer": 0}, r"with layer the caches must be \[L, B, K, S, D\]"),
        ({"k_new": None, "v_new": None}, {"window": 3}, "window"),
        ({"visible": ((2, 5), "int32")}, {}, "visible"),
        ({"k_new": None, "v_new": None, "ancestors": ((2, 5, 1), "int32")}, {}, "ancestors"),
        ({}, {"window": 0}, "window must be at least 1"),
        ({}, {"soft_cap": 0.0}, "soft_cap must be positive"),
        ({}, {"backend": "cuda"}, "'cuda' does not exist; there are 'reference', 'xla'"),
        ({}, {"backend": "triton"}, "'triton' needs a GPU, and this is cpu"),
        ({}, {"backend": "mosaic_tpu"}, "'mosaic_tpu' needs a TPU, and this is cpu"),
        ({}, {"backend": "xla", "interpret": True}, "'xla' has no interpreter"),
        ({}, {"interpret": True}, "interpret needs a backend"),
        ({"k_scale": ((2,), "float32")}, {}, "both or neither"),
        (
            {"k_scale": ((2,), "float32"), "v_scale": ((2,), "float32")},
            {},
            "int8 caches, not of float32",
        ),
        (
            INT8 | {"k_scale": ((3,), "float32")},
            {},
            r"k_scale must be float32\(2,\).*\(3,\)",
        ),
        (
            {"k_cache": ((2, 2, 16, 8), "int8"), "v_cache": ((2, 2, 16, 8), "int8")},
            {},
            "int8 caches go",
        ),
    ],
)
def test_errors(change, options, message):
    arrays = {
        name: None if spec is None else jax.ShapeDtypeStruct(*spec)
        for name, spec in (GOOD | change).items()
    }
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda arrays: tree_attention(**arrays, **options), arrays)


def test_every_backend_has_a_suite():
    suites = [
        TestReference,
        test_attention_xla.TestXla,
        test_attention_pallas.TestMosaicTpu,
        test_attention_pallas.TestTriton,
    ]
    assert all(issubclass(x, TreeAttentionSuite) for x in suites)
    assert set(BACKENDS) <= {x.backend for x in suites}
