"""Compiles for H100 and A100 on a machine without a GPU: the kernels, and one whole round.

    pip install -e . 'jax[cuda13]==0.11.2'              # 4 GB of wheels, so apart from the tests
    python tests/aot/gpu_kernels.py [--out benchmarks/results/gpu_kernels.json]

XLA compiles for a target that is described by text; NVIDIA's assembler then says how many registers, how
much shared memory and how many spills each kernel has. Exits with status 1 where one spills, or where a
round copies its cache.
"""

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import nvidia
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import commit, tree_attention

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from hlo import computations
from rounds import cache_copies, round_of

TARGETS = {
    "h100": """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 name: "NVIDIA H100 80GB HBM3"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
""",
    "a100": """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 167936 threads_per_core_limit: 2048 core_count: 108 fpus_per_core: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 2039000000000 l2_cache_size: 41943040 clock_rate_ghz: 1.41
  device_memory_size: 84974239744 shared_memory_per_block_optin: 166912
  cuda_compute_capability { major: 8 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 name: "NVIDIA A100-SXM4-80GB"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA A100-SXM4-80GB"
""",
}
ARCHITECTURES = {"h100": "sm_90a", "a100": "sm_80"}
LAYERS, KV_HEADS = 4, 8
OURS = "tree_attention_combine|tree_attention|commit"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out")
    args = parser.parse_args()
    rows = []
    for target in TARGETS:
        with tempfile.TemporaryDirectory() as folder:
            # XLA reads its flags once: a process for each target.
            flags = f"--xla_dump_to={folder} --xla_gpu_dump_llvmir=true --xla_dump_emitter_re=.*"
            environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
            command = [sys.executable, __file__, "--compile", target, folder]
            subprocess.run(command, check=True, env=environment)
            rows += resources(target, Path(folder))
            rows.append(json.loads((Path(folder) / "round.json").read_text()))
    for row in rows:
        print(json.dumps(row))
    if args.out:
        Path(args.out).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {args.out}")
    return 1 if any(row.get("spilled_bytes") or row.get("cache_copies") for row in rows) else 0


def compile_all(target: str, folder: Path) -> None:
    """Compiles every program; the PTX that XLA leaves in `folder` moves to one of the program's name."""
    for name, _ in programs(target):
        for file in folder.iterdir():
            if file.suffix == ".ptx":
                (folder / name).mkdir(exist_ok=True)
                file.rename(folder / name / file.name)
            elif file.is_file():
                file.unlink()
        print(f"compiled {name} for {target}", file=sys.stderr, flush=True)
    (folder / "round.json").write_text(json.dumps(round_on(target)))


def resources(target: str, folder: Path) -> Iterator[dict]:
    """What the assembler says of our kernels, among all of XLA's."""
    (assembler,) = (p for root in nvidia.__path__ for p in Path(root).rglob("bin/ptxas"))
    for file in sorted(folder.glob("*/*.ptx")):
        architecture = f"--gpu-name={ARCHITECTURES[target]}"
        if not re.search(rf"\.entry ({OURS})", file.read_text()):
            continue
        command = [str(assembler), "-v", architecture, str(file), "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        for about in said.split("Compiling entry function '")[1:]:
            kernel = re.match(OURS, about)
            if kernel:
                yield {
                    "target": target,
                    "program": file.parent.name,
                    "kernel": kernel[0],
                    "registers": _number(r"Used (\d+) registers", about),
                    "shared_bytes": _number(r"(\d+) bytes smem", about),
                    "spilled_bytes": _number(r"(\d+) bytes spill stores", about)
                    + _number(r"(\d+) bytes spill loads", about),
                }


def _number(pattern: str, said: str) -> int:
    found = re.search(pattern, said)
    return int(found[1]) if found else 0


def mesh_of(target: str) -> Mesh:
    """One described GPU."""
    described = topologies.get_topology_desc(
        platform="cuda", topology="1x1x1", target_config=TARGETS[target]
    )
    return Mesh(np.array(described.devices), ("x",))


def round_on(target: str) -> dict:
    """What one round of four layers takes beside its arguments, and how many kernels it starts.

    Counted are the kernels of the loop over rounds itself: each once, and loops and branches, such as
    the one over a draft's steps, as one.
    """
    mesh = mesh_of(target)
    everywhere = NamedSharding(mesh, PartitionSpec())
    layers, batch, context = 4, 1, 8192
    sizes = {"layers": layers, "batch": batch, "context": context}
    loop, (params, state) = round_of(mesh, **sizes, layer_loop="unroll")

    def shape(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)

    args = jax.tree.map(shape, (params, state, jax.ShapeDtypeStruct((), "int32")))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(loop.run, donate_argnums=1).lower(*args).compile()
    print(f"compiled a round for {target}", file=sys.stderr, flush=True)
    memory, text = compiled.memory_analysis(), compiled.as_text()
    every = computations(text)
    (entry,) = re.findall(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
    (body,) = (name for line in every[entry] for name in re.findall(r"body=%?([\w.\-]+)", line))
    kinds = ("fusion", "custom-call", "copy", "while", "conditional")
    started = [x for x in every[body] if re.search(rf" ({'|'.join(kinds)})\(", x)]
    caches = 2 * state.view.cache.k.size * state.view.cache.k.dtype.itemsize
    assert memory.alias_size_in_bytes >= caches, "the caches are not aliased"
    return {
        "target": target,
        "program": f"round of {layers} layers, b{batch} s{context}",
        "kernels": len(started),
        "temporary_bytes": memory.temp_size_in_bytes,
        "cache_copies": len(cache_copies(text, state.view.cache.slots)),
    }


def programs(target: str) -> Iterator[tuple[str, jax.stages.Compiled]]:
    """Every shape of every kernel, compiled."""
    mesh = mesh_of(target)
    everywhere = NamedSharding(mesh, PartitionSpec())

    def shape(dtype, *dims):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=everywhere)

    def compiled(name, function, *arrays):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return name, jax.jit(function).lower(*arrays).compile()

    def attention(b, t, s, g, d, dtype, cache=None, chain=False, **options):
        q = shape(dtype, b, t, KV_HEADS * g, d)
        new = shape(dtype, b, t, KV_HEADS, d)
        old = shape(cache or dtype, LAYERS, b, KV_HEADS, s, d)
        arrays = [q, new, new, old, old, shape("int32", b)]
        if not chain:
            arrays.append(shape("int32", b, t, -(-t // 32)))
        call = functools.partial(tree_attention, layer=1, backend="triton", **options)
        if cache == "int8":
            arrays += [shape("float32", LAYERS, KV_HEADS)] * 2

            def call(*arrays):
                *arrays, k_scale, v_scale = arrays
                scales = {"k_scale": k_scale, "v_scale": v_scale}
                return tree_attention(*arrays, layer=1, backend="triton", **scales)

        name = " ".join([f"attention b{b} t{t} s{s} g{g} d{d}", cache or dtype])
        return compiled(" ".join([name, *options]), call, *arrays)

    for b, t, s in ((1, 1, 8192), (8, 1, 32768), (1, 16, 8192), (8, 32, 32768), (1, 64, 32768)):
        yield attention(b, t, s, 4, 128, "bfloat16")
    yield attention(3, 7, 1000, 7, 80, "bfloat16")
    yield attention(3, 7, 1000, 1, 64, "float32", window=300)
    yield attention(2, 33, 2048, 4, 256, "bfloat16", soft_cap=30.0)
    yield attention(2, 33, 2048, 4, 256, "float32")
    yield attention(2, 128, 4096, 8, 128, "bfloat16", return_lse=True)
    yield attention(1, 256, 8192, 4, 128, "bfloat16", chain=True)
    yield attention(8, 8, 8192, 4, 128, "bfloat16", cache="int8")
    for dtype in ("bfloat16", "float32"):
        cache = shape(dtype, LAYERS, 8, KV_HEADS, 8192, 128)
        new = shape(dtype, LAYERS, 8, 16, KV_HEADS, 128)
        row = shape("int32", 8)
        arrays = (cache, cache, new, new, row, row, shape("int32", 8, 8))
        yield compiled(f"commit {dtype}", functools.partial(commit, backend="triton"), *arrays)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--compile"]:
        compile_all(sys.argv[2], Path(sys.argv[3]))
    else:
        sys.exit(main())
