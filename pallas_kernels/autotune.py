"""Measures block sizes and splits on the device at hand, and writes its table.

    python -m pallas_kernels.autotune [--out FILE]

A table of this package is read from `pallas_kernels/tuned/`, named after the device kind; rerun the
command, commit the file, and every run on that kind of device computes the same to the last bit.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import _mosaic_tpu, _triton, masks, tuning

# Entries of a table, by T * G of a KV head: the first that fits a call decides.
ROWS = (8, 16, 32, 64, 128, 256, 1024)
SHAPES = (
    ("bfloat16", 64),
    ("bfloat16", 128),
    ("bfloat16", 256),
    ("float32", 128),
    ("float32", 256),
)
# Choices are compared by the sum of times relative to the best, over these (rows of a batch, slots).
LOADS = ((1, 8192), (8, 8192), (1, 32768))
KV_HEADS, GROUPS, LAYERS = 8, 4, 4


def candidates(platform: str, rows: int, head_dim: int, itemsize: int) -> Iterator[Any]:
    """Configurations worth trying for so many query rows of a KV head."""
    if platform == "tpu":
        for heads, keys in itertools.product((1, 2, 4, 8), (256, 512, 1024, 2048)):
            # Two buffers each of keys and values must leave room in 16 MiB of scoped memory.
            if 4 * heads * keys * head_dim * itemsize > 8 << 20:
                continue
            for chunk in (256, 512, 1024, 2048):
                if chunk <= keys:
                    yield tuning.TpuConfig(heads, keys, min(max(rows, 16), 256), chunk)
        return
    for keys, block, warps, stages, waves in itertools.product(
        (32, 64, 128), (16, 32, 64, 128), (2, 4, 8), (1, 2, 3), (1, 2, 4)
    ):
        # A block of more rows than there are wastes them; accumulators must fit the registers.
        wasted = block > max(rows, 16)
        spilled = block * (head_dim + keys) > 128 * 128 * warps / 4
        if not wasted and not spilled:
            yield tuning.GpuConfig(keys, block, warps, stages, waves)


def arguments(batch: int, slots: int, rows: int, head_dim: int, dtype: str) -> tuple[Any, ...]:
    """Random arrays of one call: `rows / GROUPS` nodes, each the child of the one before, over a full cache."""
    nodes = max(1, rows // GROUPS)
    groups = rows // nodes
    keys = iter(jax.random.split(jax.random.key(0), 5))

    def some(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape, dtype)

    new = (batch, nodes, KV_HEADS, head_dim)
    cache = (LAYERS, batch, KV_HEADS, slots, head_dim)
    q = some(batch, nodes, KV_HEADS * groups, head_dim)
    seen = np.tril(np.ones((nodes, nodes), bool))
    bits = masks.pack(jnp.broadcast_to(jnp.asarray(seen)[None], (batch, nodes, nodes)))
    length = jnp.full((batch,), slots, jnp.int32)
    tree = bits if nodes <= 128 else None
    return q, some(*new), some(*new), some(*cache), some(*cache), length, tree


def seconds(platform: str, config: Any, arrays: tuple[Any, ...], repeats: int = 5) -> float:
    """The median time of a call, of a chain over the layers."""
    backend = _mosaic_tpu if platform == "tpu" else _triton
    attend = functools.partial(
        backend.attend,
        scale=arrays[0].shape[-1] ** -0.5,
        soft_cap=None,
        window=None,
        visible=None,
        k_scale=None,
        v_scale=None,
        return_lse=False,
        config=config,
    )

    @jax.jit
    def chain(q, *rest):
        def once(i, q):
            out, _ = attend(q, *rest, layer=i % LAYERS)
            return q + out * q.dtype.type(1e-3)

        return jax.lax.fori_loop(0, 4 * LAYERS, once, q)

    jax.block_until_ready(chain(*arrays))
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(chain(*arrays))
        taken.append(time.perf_counter() - began)
    return statistics.median(taken) / (4 * LAYERS)


def best(platform: str, rows: int, head_dim: int, dtype: str, say) -> Any:
    """The candidate with the smallest sum of relative times over `LOADS`."""
    totals: dict[Any, float] = {}
    itemsize = jnp.dtype(dtype).itemsize
    configs = list(candidates(platform, rows, head_dim, itemsize))
    for batch, slots in LOADS:
        arrays = arguments(batch, slots, rows, head_dim, dtype)
        times = {}
        for config in configs:
            try:
                times[config] = seconds(platform, config, arrays)
            except Exception as error:  # too much shared memory, too many registers
                say(f"{config} cannot run: {str(error)[:100]}")
        least = min(times.values())
        for config, taken in times.items():
            totals[config] = totals.get(config, 0.0) + taken / least
        configs = list(times)
    return min(configs, key=lambda config: totals[config])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measures block sizes on this device.")
    parser.add_argument("--out", help="a JSON file; the package's own, if left out")
    parser.add_argument("--rows", help="comma-separated, instead of all")
    args = parser.parse_args(argv)
    here = tuning.device()
    if here.platform not in tuning.DEFAULT_TABLE:
        print(
            f"There is nothing to tune on {here.platform}: run this on a TPU or a GPU.",
            file=sys.stderr,
        )
        return 2
    wanted = [int(x) for x in args.rows.split(",")] if args.rows else ROWS
    entries = []
    for dtype, head_dim in SHAPES:
        for rows in wanted:
            config = best(here.platform, rows, head_dim, dtype, lambda x: print(x, file=sys.stderr))
            entries.append(
                {
                    "bytes": jnp.dtype(dtype).itemsize,
                    "head_dim": head_dim,
                    "rows": rows,
                    "config": dataclasses.asdict(config),
                }
            )
            print(json.dumps(entries[-1]), flush=True)
    table = {"device": here.kind, "source": f"measured, jax {jax.__version__}", "entries": entries}
    if here.platform == "gpu":
        table["multiprocessors"] = jax.devices()[0].core_count
    out = Path(args.out or str(tuning.file_of(here.kind)))
    lines = ",\n".join("  " + json.dumps(entry) for entry in table.pop("entries"))
    head = json.dumps(table)[1:-1]
    out.write_text("{" + head + ', "entries": [\n' + lines + "\n]}\n", encoding="utf-8")
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
