"""Bytes that the TPU kernel moves for a verification, counted from its grid and index maps.

    python benchmarks/kernel_bytes.py --out benchmarks/results/kernel_bytes.json

A block is copied when its index differs from the step's before. The kernel is not run: the call is
intercepted, and its index maps are evaluated over the whole grid.
"""

import argparse
import itertools
from unittest import mock

import jax.numpy as jnp
import numpy as np
from _common import machine, write_json

from pallas_kernels import _mosaic_tpu, masks, tuning


def count(arrays, config: tuning.TpuConfig, **options) -> dict[str, int]:
    """Bytes moved between HBM and VMEM by one call, by operand."""
    caught = {}

    def pallas_call(kernel, *, grid_spec, out_shape, **_):
        def call(*operands):
            caught.update(spec=grid_spec, operands=operands, out=out_shape)
            return [jnp.zeros(x.shape, x.dtype) for x in out_shape]

        return call

    defaults = {
        "layer": None,
        "scale": 1.0,
        "soft_cap": None,
        "window": None,
        "visible": None,
        "k_scale": None,
        "v_scale": None,
        "return_lse": False,
    }
    with mock.patch.object(_mosaic_tpu.pl, "pallas_call", pallas_call):
        _mosaic_tpu.attend(*arrays, **{**defaults, **options}, config=config)
    spec, operands = caught["spec"], caught["operands"]
    scalars = [np.asarray(x) for x in operands[: spec.num_scalar_prefetch]]
    blocked = list(operands[spec.num_scalar_prefetch :]) + list(caught["out"])
    specs = list(spec.in_specs) + list(spec.out_specs)
    grid = [int(n) for n in spec.grid]
    moved = {"queries and outputs": 0, "draft": 0, "cache": 0}
    last = [None] * len(specs)
    for step in itertools.product(*map(range, grid)):
        for i, (array, block) in enumerate(zip(blocked, specs, strict=True)):
            index = tuple(int(x) for x in block.index_map(*step, *scalars))
            if index == last[i]:
                continue
            last[i] = index
            # The last block of an axis ends with it.
            size = array.dtype.itemsize
            for at, wide, have in zip(index, block.block_shape, array.shape, strict=True):
                size *= min(wide or 1, have - at * (wide or 1))
            kind = "cache" if array.ndim == 5 else "draft" if i in _draft(specs) else None
            moved[kind or "queries and outputs"] += size
    return moved


def _draft(specs) -> tuple[int, ...]:
    """The operands that hold the draft: the new keys and values, and who sees whom."""
    return (1, 2, 3) if len(specs) > 5 else (1,)


def call(b, t, length, slots, *, k=8, g=4, d=128):
    """Arrays of a call, bfloat16: zeros, whose values do not matter."""
    q = jnp.zeros((b, t, k * g, d), jnp.bfloat16)
    new = jnp.zeros((b, t, k, d), jnp.bfloat16)
    cache = jnp.zeros((b, k, slots, d), jnp.bfloat16)
    bits = jnp.broadcast_to(masks.chain(t)[None], (b, t, masks.num_words(t)))
    return q, new, new, cache, cache, jnp.asarray(length, jnp.int32), bits


def needed(arrays) -> int:
    """Bytes of live keys and values, the draft's included, queries and outputs."""
    q, new, _, cache, _, length, _ = arrays
    live = 2 * int(jnp.sum(length)) * cache.shape[1] * cache.shape[3] * cache.dtype.itemsize
    return live + 2 * new.nbytes + 2 * q.nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    rows = []
    for t in (1, 8, 16):
        config = tuning.tpu(jnp.bfloat16, 128, 4 * t)
        for blocks in (1, 4, 20, 31):
            for lengths in ([blocks * config.keys], [blocks * config.keys + 1]):
                arrays = call(1, t, lengths, 64 * 1024)
                moved = count(arrays, config)
                total = sum(moved.values())
                rows.append(
                    {"nodes": t, "length": lengths[0], "live_blocks": blocks, "moved": moved}
                    | {"over_needed": total / needed(arrays)}
                )
                print(f"T {t}, {lengths[0]} live: {total / needed(arrays):.3f} of what is needed")
    write_json(args.out, {"machine": machine(), "points": rows})


if __name__ == "__main__":
    main()
