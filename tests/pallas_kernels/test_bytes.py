"""What the TPU kernel copies from HBM, counted over its grid by `benchmarks/kernel_bytes.py`."""

import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from pallas_kernels import tuning

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import kernel_bytes

WIDE = 48 * 1024


@pytest.mark.parametrize("nodes", [1, 8, 16])
@pytest.mark.parametrize(("blocks", "more"), [(20, 1), (22, 0), (30, 200)])
def test_little_more_than_what_is_live(nodes, blocks, more):
    config = tuning.tpu(jnp.bfloat16, 128, 4 * nodes)
    length = min(blocks * config.keys + more, WIDE)
    arrays = kernel_bytes.call(1, nodes, [length], WIDE)
    moved = sum(kernel_bytes.count(arrays, config).values())
    assert moved <= 1.05 * kernel_bytes.needed(arrays)


def test_rows_pay_for_their_own_length():
    config = tuning.TpuConfig(heads=8, keys=512)
    short = kernel_bytes.count(kernel_bytes.call(2, 8, [512, 512], 8192), config)
    mixed = kernel_bytes.count(kernel_bytes.call(2, 8, [512, 8192], 8192), config)
    block = 2 * 8 * 512 * 128 * 2
    assert short["cache"] == 2 * block
    assert mixed["cache"] == 17 * block


def test_a_window_is_all_that_is_read():
    config = tuning.TpuConfig(heads=8, keys=512)
    arrays = kernel_bytes.call(1, 8, [8192], 8192)
    windowed = kernel_bytes.count(arrays, config, window=1024)
    block = 2 * 8 * 512 * 128 * 2
    assert windowed["cache"] <= 3 * block
    assert kernel_bytes.count(arrays, config)["cache"] == 16 * block
