"""The Pallas back-ends of tree attention in their interpreters."""

import numpy as np
import pytest
from attention_suite import TreeAttentionSuite, cache_only, make_case, quantised
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import _triton, tuning


class _Interpreted(TreeAttentionSuite):
    """A Pallas back-end in its interpreter, with blocks small enough that these cases have many."""

    @pytest.fixture(autouse=True)
    def _small_blocks(self, monkeypatch):
        small = tuning.TpuConfig(heads=2, keys=64, rows=32, chunk=32)
        monkeypatch.setattr(tuning, "tpu", lambda *_: small)
        monkeypatch.setattr(tuning, "gpu", lambda *_: tuning.GpuConfig(keys=32, rows=32))
        monkeypatch.setattr(tuning, "multiprocessors", lambda: 24)


class TestMosaicTpu(_Interpreted):
    backend = "mosaic_tpu"
    interpret = True


class TestMosaicTpuMachine:
    """The interpreter that models the TPU: copies, semaphores, memory that nobody has written."""

    suite = type("_Machine", (TestMosaicTpu,), {"__test__": False})()
    suite.interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    _small_blocks = _Interpreted._small_blocks

    def check(self, case, **options):
        self.suite.check(case, **options)
        assert not races()

    @pytest.mark.parametrize("lengths", [(0, 1, 300), (64, 127, 129)])
    def test_lengths(self, lengths):
        self.check(make_case(t=9, lengths=lengths))

    @pytest.mark.parametrize("explicit", [False, True])
    def test_window(self, explicit):
        self.check(make_case(t=12, chain=not explicit), explicit=explicit, window=70)

    def test_large_tree(self):
        self.check(make_case(t=40, g=1, d=128, k=1), soft_cap=3.0)

    def test_visible(self):
        visible = np.random.default_rng(1).integers(0, 200, (3, 5)).astype(np.int32)
        self.check(cache_only(make_case(t=5), visible))

    def test_bfloat16(self):
        self.check(make_case(t=5, g=4, dtype="bfloat16"))

    def test_int8(self):
        self.check(quantised(make_case(t=5, dtype="bfloat16")))


def races():
    """Whether the interpreter has seen a race in its last run."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    found = interpret_pallas_call.races
    return found is not None and found.races_found


class TestTriton(_Interpreted):
    backend = "triton"
    interpret = True

    @pytest.mark.parametrize("splits", [1, 3, 64])
    def test_splits(self, monkeypatch, splits):
        """One kernel where there is one split; else a second, which takes more than it holds at a time."""
        monkeypatch.setattr(tuning, "multiprocessors", lambda: 6 * splits)
        monkeypatch.setattr(_triton, "TOGETHER", 4)
        self.check(make_case(t=5), salt=(3, splits))
        self.check(make_case(t=33, g=3, d=80), salt=(3, splits), window=90)
        self.check(quantised(make_case(t=5)), salt=(3, splits))
