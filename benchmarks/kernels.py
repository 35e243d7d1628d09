"""Tree attention by every back-end of this device and by its peers, against copy bandwidth.

    python benchmarks/kernels.py --out benchmarks/results/kernels.json --plot docs/kernels.png

A point is a number of tree nodes T, cache slots S, live slots, rows B and query heads per KV head G. Every
arm attends along the same random trees. Ours take the draft beside the cache; the peers take caches that
the draft has been written into, a dense mask, and read the whole capacity. Calls are chained inside one
program, over as many caches as keep them from staying in the processor's own memory. Arms take turns;
times are medians over the repeats. The error is the largest over the rows looked at, relative to
the largest output of a float64 computation.
"""

import argparse
import functools
import itertools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from _common import machine, spread, write_json

from pallas_kernels import masks, tree_attention

# A chain of calls reads at least so many bytes of caches, where memory allows.
TOUCHED = {"cpu": 1 << 28, "gpu": 1 << 29, "tpu": 1 << 28}


def random_trees(rng: np.random.Generator, rows: int, nodes: int) -> np.ndarray:
    """bool[B, T, T], ancestors-or-self."""
    seen = np.broadcast_to(np.eye(nodes, dtype=bool), (rows, nodes, nodes)).copy()
    for row in range(rows):
        for node in range(1, nodes):
            seen[row, node] |= seen[row, rng.integers(0, node)]
    return seen


class Point:
    """The arrays of one point, in every form that an arm wants."""

    def __init__(self, *, nodes, slots, live, rows, groups, kv_heads, dim, dtype, copies, seed=0):
        self.shape = dict(
            nodes=nodes, slots=slots, live=live, rows=rows, groups=groups, copies=copies
        )
        self.slots, self.live, self.nodes = slots, live, nodes
        rng = np.random.default_rng(seed)
        self.seen = random_trees(rng, rows, nodes)
        keys = iter(jax.random.split(jax.random.key(seed), 2 * copies + 3))

        def some(*shape):
            return jax.random.normal(next(keys), shape, dtype)

        self.q = some(rows, nodes, kv_heads * groups, dim)
        self.new = [some(rows, nodes, kv_heads, dim) for _ in range(2)]
        self.caches = [
            tuple(some(rows, kv_heads, slots, dim) for _ in range(2)) for _ in range(copies)
        ]
        self.length = jnp.full((rows,), live, jnp.int32)
        self.ancestors = masks.pack(jnp.asarray(self.seen))
        size = self.q.dtype.itemsize
        per_slot = 2 * rows * kv_heads * dim * size
        self.bytes = per_slot * (live + nodes) + 2 * self.q.size * size
        self.flops = 4 * self.q.size * (live + nodes)

    def written(self):
        """Caches with the draft behind the live slots, and the dense mask bool[B, T, S + T].

        The capacity grows by T, so that a full cache has room, too.
        """
        dense = np.zeros((self.seen.shape[0], self.nodes, self.slots + self.nodes), bool)
        dense[:, :, : self.live] = True
        dense[:, :, self.live : self.live + self.nodes] = self.seen
        new = [x.swapaxes(1, 2) for x in self.new]
        spare = ((0, 0), (0, 0), (0, self.nodes), (0, 0))
        caches = [
            tuple(
                jnp.pad(old, spare).at[:, :, self.live : self.live + self.nodes].set(x)
                for old, x in zip(pair, new, strict=True)
            )
            for pair in self.caches
        ]
        return caches, jnp.asarray(dense)

    def expected(self, row: int) -> np.ndarray:
        """float64[T, N, D] of one row with the last cache."""
        k, v = (np.asarray(x[row, :, : self.live], np.float64) for x in self.caches[-1])
        k_new, v_new = (np.asarray(x[row], np.float64).swapaxes(0, 1) for x in self.new)
        k, v = np.concatenate([k, k_new], 1), np.concatenate([v, v_new], 1)
        q = np.asarray(self.q[row], np.float64)
        t, n, d = q.shape
        grouped = q.reshape(t, k.shape[0], -1, d)
        scores = np.einsum("tkgd,ksd->tkgs", grouped, k, optimize=True) * d**-0.5
        mask = np.concatenate([np.ones((t, self.live), bool), self.seen[row]], 1)
        scores = np.where(mask[:, None, None], scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out = np.einsum("tkgs,ksd->tkgd", weights, v, optimize=True)
        return (out / weights.sum(-1, keepdims=True)).reshape(t, n, d)


class JaxArm:
    """`attend(q, k, v)` chained over a point's caches, `times` times over, in one program."""

    def __init__(self, attend: Callable, q, caches, extra, times: int):
        def chain(q, caches, extra):
            def once(_, q):
                for k, v in caches:
                    # What follows depends on what came before, and stays of its size.
                    q = q + attend(q, k, v, *extra) * q.dtype.type(1e-3)
                return q

            return jax.lax.fori_loop(0, times, once, q)

        args = (q, caches, extra)
        self.run_once = functools.partial(jax.jit(chain).lower(*args).compile(), *args)
        single = jax.jit(attend)
        self.answer = lambda: np.asarray(single(q, *caches[-1], *extra), np.float32)
        self.calls = times * len(caches)

    def seconds(self) -> float:
        began = time.perf_counter()
        jax.block_until_ready(self.run_once())
        return (time.perf_counter() - began) / self.calls


def dense(q, k, v, mask):
    """Scores over the whole capacity under a dense mask, as XLA compiles it."""
    b, t, n, d = q.shape
    heads = k.shape[1]
    grouped = q.reshape(b, t, heads, n // heads, d)
    wide = {"precision": "highest", "preferred_element_type": jnp.float32}
    scores = jnp.einsum("btkgd,bksd->bkgts", grouped, k, **wide) * d**-0.5
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -jnp.inf), axis=-1)
    out = jnp.einsum("bkgts,bksd->btkgd", weights.astype(v.dtype), v, **wide)
    return out.reshape(q.shape).astype(q.dtype)


def dot_product(q, k, v, mask):
    """`jax.nn.dot_product_attention`, whose caches are [B, S, K, D]."""
    with jax.default_matmul_precision("highest"):
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])


class TorchArm:
    """A peer of PyTorch on the same numbers; on a GPU its calls are replayed as one graph."""

    def __init__(self, kind: str, point: Point, caches, mask, times: int):
        import torch

        self.torch = torch
        self.on_gpu = torch.cuda.is_available()
        device = "cuda" if self.on_gpu else "cpu"

        def tensor(x):
            if x.dtype == jnp.bool_:
                return torch.from_numpy(np.array(x)).to(device)
            narrow = getattr(torch, x.dtype.name)
            return torch.from_numpy(np.array(x.astype(jnp.float32))).to(device, narrow)

        q = tensor(point.q.swapaxes(1, 2))
        caches = [tuple(tensor(x) for x in pair) for pair in caches]
        mask = tensor(mask)[:, None]
        if kind == "torch sdpa":
            attend = functools.partial(
                torch.nn.functional.scaled_dot_product_attention, attn_mask=mask, enable_gqa=True
            )
        else:
            from torch.nn.attention.flex_attention import create_block_mask, flex_attention

            def seen(b, h, i, j):
                return mask[b, 0, i, j]

            b, _, t, s = mask.shape
            blocks = create_block_mask(seen, b, None, t, s, device=device)
            compiled = torch.compile(flex_attention)
            attend = functools.partial(compiled, block_mask=blocks, enable_gqa=True)

        def chain():
            x = q
            for _ in range(times):
                for k, v in caches:
                    x = x + attend(x, k, v) * 1e-3
            return x

        self.calls = times * len(caches)
        self.chain = chain
        with torch.inference_mode():
            self.out = attend(q, *caches[-1])
            chain()
            if self.on_gpu:
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    chain()
                self.chain = graph.replay

    def answer(self):
        return self.out.float().cpu().numpy().swapaxes(1, 2)

    def seconds(self) -> float:
        with self.torch.inference_mode():
            began = time.perf_counter()
            self.chain()
            if self.on_gpu:
                self.torch.cuda.synchronize()
            return (time.perf_counter() - began) / self.calls


def arms_of(point: Point, names: list[str], times: int) -> dict[str, Callable]:
    """Arm by name, made when it is called."""

    def ours(backend):
        def attend(q, k, v, k_new, v_new, length, ancestors):
            return tree_attention(q, k_new, v_new, k, v, length, ancestors, backend=backend)

        extra = (*point.new, point.length, point.ancestors)
        return JaxArm(attend, point.q, point.caches, extra, times)

    def peer(attend, swapped):
        caches, mask = point.written()
        if swapped:
            caches = [tuple(jnp.array(x.swapaxes(1, 2)) for x in pair) for pair in caches]
        return JaxArm(attend, point.q, caches, (mask,), times)

    def torch(kind):
        return TorchArm(kind, point, *point.written(), times)

    def make(name):
        if name == "dense":
            return peer(dense, swapped=False)
        if name == "dot_product_attention":
            return peer(dot_product, swapped=True)
        return torch(name) if name.startswith("torch") else ours(name)

    return {name: functools.partial(make, name) for name in names}


def copy_bandwidth(platform: str) -> float:
    """Bytes read and written a second by a copy of a large array, the best of several."""
    size = (1 << 28) if platform == "cpu" else (1 << 31)
    source = jnp.ones((size // 4,), jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    jax.block_until_ready(copy(source))
    best = 0.0
    for _ in range(10):
        began = time.perf_counter()
        jax.block_until_ready(copy(source))
        best = max(best, 2 * size / (time.perf_counter() - began))
    return best


def default_arms(platform: str) -> list[str]:
    ours = {"gpu": ["triton"], "tpu": ["mosaic_tpu"]}.get(platform, [])
    names = [*ours, "xla", "dense", "dot_product_attention"]
    try:
        import torch
    except ImportError:
        return names
    if platform == "cpu" or (platform == "gpu" and torch.cuda.is_available()):
        names += ["torch sdpa", "torch flex"]
    return names


def integers(text: str) -> list[int]:
    return [int(x) for x in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=integers, default=[1, 8, 16, 32, 64])
    parser.add_argument("--slots", type=integers, default=[1024, 8192, 32768, 131072])
    parser.add_argument("--live", type=integers, help="live slots; all, if left out")
    parser.add_argument("--rows", type=integers, default=[1, 8, 32])
    parser.add_argument("--groups", type=integers, default=[1, 4, 8])
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default=None, help="bfloat16 on accelerators, float32 on CPU")
    parser.add_argument("--arms", help="comma-separated; all that this device has, if left out")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-gib", type=float, default=16, help="larger caches are left out")
    parser.add_argument("--out", required=True)
    parser.add_argument("--plot", help="a PNG")
    args = parser.parse_args()

    platform = jax.default_backend()
    dtype = jnp.dtype(args.dtype or ("float32" if platform == "cpu" else "bfloat16"))
    names = args.arms.split(",") if args.arms else default_arms(platform)
    bandwidth = copy_bandwidth(platform)
    print(f"{jax.devices()[0].device_kind}: copies at {bandwidth / 1e9:.0f} GB/s")
    points = []
    for slots, rows, groups, nodes in itertools.product(
        args.slots, args.rows, args.groups, args.nodes
    ):
        size = 2 * rows * args.kv_heads * slots * args.head_dim * dtype.itemsize
        # The peers have copies of the caches of their own.
        if 3 * size > args.max_gib * 2**30:
            print(f"left out: {rows} rows of {slots} slots, {size / 2**30:.1f} GiB of caches")
            continue
        copies = max(1, min(8, TOUCHED[platform] // size))
        for live in args.live or [slots]:
            if live > slots:
                continue
            point = Point(
                nodes=nodes,
                slots=slots,
                live=live,
                rows=rows,
                groups=groups,
                kv_heads=args.kv_heads,
                dim=args.head_dim,
                dtype=dtype,
                copies=copies,
            )
            points.append(measure(point, names, args.repeats, bandwidth))
            record = {
                "machine": machine(),
                "copy_bytes_per_second": bandwidth,
                "dtype": dtype.name,
                "kv_heads": args.kv_heads,
                "head_dim": args.head_dim,
                "points": points,
            }
            write_json(args.out, record, quiet=True)
    print(f"wrote {args.out}")
    if args.plot:
        plot(args.plot, record)


def measure(point: Point, names: list[str], repeats: int, bandwidth: float) -> dict:
    """Times and errors of every arm at one point."""
    # A program takes some 20 ms at the bandwidth of copies.
    times = int(np.clip(0.02 * bandwidth / (point.bytes * point.shape["copies"]), 1, 64))
    arms, found = {}, {}
    checked = sorted({0, point.q.shape[0] - 1})
    want = {row: point.expected(row) for row in checked}
    for name, make in arms_of(point, names, times).items():
        try:
            arm = make()
            out = arm.answer()
            arm.seconds()
        except Exception as error:  # a peer that cannot do a point must not end the run
            found[name] = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}
            continue
        errors = [np.abs(out[row] - want[row]).max() / np.abs(want[row]).max() for row in checked]
        arms[name] = arm
        found[name] = {"error": float(max(errors))}
    seconds = {name: [] for name in arms}
    for _ in range(repeats):
        for name, arm in arms.items():
            seconds[name].append(arm.seconds())
    for name, taken in seconds.items():
        found[name] |= {
            "seconds": spread(taken),
            "fraction_of_copy_bandwidth": point.bytes / statistics.median(taken) / bandwidth,
        }
    row = point.shape | {"bytes": point.bytes, "flops": point.flops, "arms": found}
    some = "  ".join(
        f"{name} {x['seconds']['median'] * 1e6:.0f} us ({x['fraction_of_copy_bandwidth']:.2f})"
        if "seconds" in x
        else f"{name} failed"
        for name, x in found.items()
    )
    print(", ".join(f"{k} {v}" for k, v in point.shape.items()), "|", some, flush=True)
    return row


def plot(path: str, record: dict) -> None:
    """A roofline: arithmetic a second against arithmetic per byte, below the bandwidth of copies."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    by_arm: dict[str, list[tuple[float, float]]] = {}
    for point in record["points"]:
        for name, arm in point["arms"].items():
            if "seconds" in arm:
                rate = point["flops"] / arm["seconds"]["median"]
                by_arm.setdefault(name, []).append((point["flops"] / point["bytes"], rate))
    for name, pairs in by_arm.items():
        x, y = zip(*sorted(pairs), strict=True)
        axes.plot(x, np.array(y) / 1e12, marker="o", markersize=4, linestyle="none", label=name)
    line = np.array(sorted({x for pairs in by_arm.values() for x, _ in pairs}))
    roof = line * record["copy_bytes_per_second"] / 1e12
    axes.plot(line, roof, color="black", linewidth=1, label="bandwidth of copies")
    axes.set_xscale("log", base=2)
    axes.set(
        yscale="log",
        xlabel="FLOP per byte of live keys, values, queries and outputs",
        ylabel="TFLOP a second",
        title=jax.devices()[0].device_kind,
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
