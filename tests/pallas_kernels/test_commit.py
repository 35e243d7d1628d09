"""Writing accepted paths into stacked caches: every back-end against plain assignment, bit by bit."""

import functools
import importlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import COMMIT_BACKENDS, commit

module = importlib.import_module("pallas_kernels.commit")  # whose name is its function's


@pytest.fixture(autouse=True)
def _strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def make_case(*, start, count, layers=3, k=2, t=7, d=64, slots=80, depth=4, dtype="bfloat16"):
    """Random caches and nodes; a path of `depth` random nodes, or None for the chain."""
    rng = np.random.default_rng(0)
    b = len(start)

    def some(*shape):
        if dtype == "int8":
            return rng.integers(-127, 128, shape).astype(np.int8)
        return rng.normal(size=shape).astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))

    path = None
    if depth is not None:
        path = np.stack([np.sort(rng.permutation(t)[:depth]) for _ in range(b)]).astype(np.int32)
    case = {
        "k_cache": some(layers, b, k, slots, d),
        "v_cache": some(layers, b, k, slots, d),
        "k_new": some(layers, b, t, k, d),
        "v_new": some(layers, b, t, k, d),
        "start": np.array(start, np.int32),
        "count": np.array(count, np.int32),
        "path": path,
    }
    if dtype != "int8":  # what is not live may be anything
        for row, length in enumerate(start):
            case["k_cache"][:, row, :, length:] = np.nan
    return case


def expected(case):
    caches = case["k_cache"].copy(), case["v_cache"].copy()
    for row, (start, count) in enumerate(zip(case["start"], case["count"], strict=True)):
        for p in range(count):
            node = p if case["path"] is None else case["path"][row, p]
            caches[0][:, row, :, start + p] = case["k_new"][:, row, node]
            caches[1][:, row, :, start + p] = case["v_new"][:, row, node]
    return caches


class CommitSuite:
    """What every back-end must satisfy. A subclass names its back-end."""

    backend: str
    interpret = False
    exact = True  # nothing but the accepted slots is written

    def check(self, case):
        arrays = jax.tree.map(jnp.asarray, case)
        run = functools.partial(commit, backend=self.backend, interpret=self.interpret)
        got = jax.jit(run)(**arrays)
        for cache, want in zip(got, expected(case), strict=True):
            cache = np.array(cache)
            if not self.exact:
                for row, end in enumerate(case["start"] + case["count"]):
                    cache[:, row, :, end:] = want[:, row, :, end:]
            # As bytes, so that NaN is what it was.
            np.testing.assert_array_equal(cache.view(np.uint8), want.view(np.uint8))

    @pytest.mark.parametrize("start", [(0, 13, 76), (31, 32, 33), (15, 16, 63)])
    @pytest.mark.parametrize("count", [(4, 3, 1), (0, 4, 4)])
    def test_rows(self, start, count):
        self.check(make_case(start=start, count=count))

    def test_full(self):
        self.check(make_case(start=(76, 76, 76), count=(4, 4, 4)))

    def test_chain(self):
        self.check(make_case(start=(0, 13, 70), count=(7, 2, 1), depth=None))

    def test_one_row_and_one_node(self):
        self.check(make_case(start=(5,), count=(1,), t=1, depth=None))

    def test_long_path(self):
        self.check(make_case(start=(3, 30), count=(40, 37), t=64, depth=40))

    @pytest.mark.parametrize("dtype", ["float32", "int8"])
    @pytest.mark.parametrize("d", [64, 80, 128])
    def test_dtypes(self, dtype, d):
        self.check(make_case(start=(5, 30, 60), count=(4, 1, 3), dtype=dtype, d=d))

    def test_slots_that_are_no_multiple_of_a_tile(self):
        self.check(make_case(start=(5, 40, 45), count=(4, 4, 4), slots=49))

    def test_one_layer(self):
        case = make_case(start=(5, 40), count=(4, 2), layers=1)
        single = {x: v[0] if x[1:] in ("_cache", "_new") else v for x, v in case.items()}
        run = functools.partial(commit, backend=self.backend, interpret=self.interpret)
        got = jax.jit(run)(**jax.tree.map(jnp.asarray, single))
        for cache, want in zip(got, expected(case), strict=True):
            for row, end in enumerate(case["start"] + case["count"]):
                np.testing.assert_array_equal(cache[row, :, :end], want[0, row, :, :end])


class TestXla(CommitSuite):
    backend = "xla"
    exact = False

    def test_many_rows(self):
        start = tuple(range(0, 40, 2))
        self.check(make_case(start=start, count=(3,) * len(start)))


class TestMosaicTpu(CommitSuite):
    backend = "mosaic_tpu"
    interpret = True

    @pytest.mark.parametrize(
        ("held", "block"), [(1 << 20, (1, 4)), (1 << 18, (1, 1)), (2 << 20, (2, 4))]
    )
    def test_blocks_of_some_layers_and_heads(self, monkeypatch, held, block):
        monkeypatch.setattr(module, "_MAX_HELD_BYTES", held)
        assert module._tpu_block(layers=2, heads=4, dim=64, width=160, itemsize=2) == block
        case = make_case(start=(5, 30), count=(4, 2), t=150, depth=None, layers=2, k=4, slots=192)
        self.check(case)


class TestMosaicTpuMachine:
    """The interpreter that models the TPU."""

    def test_rows(self):
        suite = TestMosaicTpu()
        suite.interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
        # This interpreter takes whole blocks only.
        suite.check(make_case(start=(0, 13, 92), count=(4, 3, 0), d=128, slots=96))
        from jax._src.pallas.mosaic.interpret import interpret_pallas_call

        assert not interpret_pallas_call.races.races_found


class TestTriton(CommitSuite):
    backend = "triton"
    interpret = True


def test_every_backend_has_a_suite():
    assert set(COMMIT_BACKENDS) == {x.backend for x in CommitSuite.__subclasses__()}


GOOD = {
    "k_cache": ((2, 3, 2, 16, 8), "float32"),
    "v_cache": ((2, 3, 2, 16, 8), "float32"),
    "k_new": ((2, 3, 5, 2, 8), "float32"),
    "v_new": ((2, 3, 5, 2, 8), "float32"),
    "start": ((3,), "int32"),
    "count": ((3,), "int32"),
}


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"v_cache": ((2, 3, 2, 17, 8), "float32")}, {}, r"16, 8\).*17, 8\) differ"),
        ({"k_cache": ((16, 8), "float32"), "v_cache": ((16, 8), "float32")}, {}, r"got \(16, 8\)"),
        ({"k_new": ((2, 3, 2, 5, 8), "float32")}, {}, r"k_new must be \(2, 3, T, 2, 8\)"),
        ({"v_new": ((2, 3, 4, 2, 8), "float32")}, {}, r"\(2, 3, 5, 2, 8\).*\(2, 3, 4, 2, 8\)"),
        ({"v_new": ((2, 3, 5, 2, 8), "bfloat16")}, {}, "caches' dtype float32, got bfloat16"),
        ({"start": ((2,), "int32")}, {}, r"start must be int32\(3,\), got int32\(2,\)"),
        ({"count": ((3,), "float32")}, {}, "count must be int32"),
        ({"path": ((2, 4), "int32")}, {}, r"path must be int32\(3, P\), got int32\(2, 4\)"),
        ({"path": ((3, 17), "int32")}, {}, "a path of 17 nodes does not fit"),
        ({}, {"backend": "cuda"}, "'cuda' does not exist; there are 'xla'"),
        ({}, {"backend": "triton"}, "'triton' does not run on cpu"),
    ],
)
def test_errors(change, options, message):
    arrays = {x: jax.ShapeDtypeStruct(*spec) for x, spec in (GOOD | change).items()}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda arrays: commit(**arrays, **options), arrays)
