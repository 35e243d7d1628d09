"""What TPU compilers make of the kernel's inner path: bundles, spills, and time beside that of its copies.

    python benchmarks/tpu_schedule.py --out benchmarks/results/tpu_schedule.json

Compiles for generations that are not there and reads the compiler's final schedule. A bundle is a cycle; the
path counted is a block of the prefix that every query sees in full, the one that repeats. Copies are
counted at the published bandwidth. The dumps are undocumented: a libtpu without them ends this with an error.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from _common import write_json

REPOSITORY = Path(__file__).resolve().parents[1]
# Published per core: clock in GHz, HBM in TB/s.
CHIPS = {"v4": (1.05, 0.615), "v5e": (1.5, 0.82), "v6e": (1.75, 1.64), "tpu7x": (1.9, 3.7)}
DIM, KV_HEADS, GROUPS, SLOTS = 128, 8, 4, 8192


def compile_one(generation: str, nodes: int, config: str) -> None:
    """In a process of its own, whose flags say where the compiler dumps."""
    sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests" / "aot")]
    import jax
    from chips import compile_for

    from pallas_kernels import tree_attention, tuning

    if config:
        chosen = tuning.TpuConfig(**json.loads(config))
        tuning.tpu = lambda *_: chosen
    q = jax.ShapeDtypeStruct((1, nodes, KV_HEADS * GROUPS, DIM), "bfloat16")
    new = jax.ShapeDtypeStruct((1, nodes, KV_HEADS, DIM), "bfloat16")
    cache = jax.ShapeDtypeStruct((1, KV_HEADS, SLOTS, DIM), "bfloat16")
    length = jax.ShapeDtypeStruct((1,), "int32")
    bits = jax.ShapeDtypeStruct((1, nodes, -(-nodes // 32)), "int32")
    # A result that another generation's compilation left in a cache has no dump.
    jax.config.update("jax_enable_compilation_cache", False)
    compile_for(generation, tree_attention, q, new, new, cache, cache, length, bits)
    used = tuning.tpu(q.dtype, DIM, nodes * GROUPS)
    print(json.dumps({"heads": used.heads, "keys": used.keys, "chunk": used.chunk}))


def schedule(generation: str, nodes: int, config: dict | None = None) -> dict:
    """Bundles and vector spills of the unmasked block, and the times that follow."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        wanted = json.dumps(config) if config else ""
        said = subprocess.run(
            [sys.executable, __file__, "--compile", generation, str(nodes), wanted],
            env={**os.environ, "LIBTPU_INIT_ARGS": flags, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )
        if said.returncode:
            return {"failed": said.stderr.strip().splitlines()[-1][:200]}
        found = sorted(Path(folder).glob("*tree_attention*final_bundles.txt"))
        lines = [
            line
            for file in found
            if "schedule" not in file.name
            for line in file.read_text().splitlines()
        ]
    used = json.loads(said.stdout.strip().splitlines()[-1])
    # Among the regions are the bodies of the kernel's `when`s, in order: start, whole block, masked block,
    # end. The masked block does what the whole one does and more, and is the longest of all.
    starts = [i for i, line in enumerate(lines) if re.match(r"\s*0x[0-9a-f]+ PF:", line)]
    regions = [
        [line for line in lines[i:j] if re.match(r"\s*0x[0-9a-f]+ ", line)]
        for i, j in itertools.pairwise(starts)
    ]
    longest = max(range(len(regions)), key=lambda i: len(regions[i]), default=0)
    if longest == 0 or 3 * len(regions[longest - 1]) < len(regions[longest]):
        raise SystemExit("This libtpu dumps no schedule that can be read here.")
    body = regions[longest - 1]
    spills = sum(len(re.findall(r"vst[^;]*_spill", line)) for line in body)
    clock, bandwidth = CHIPS[generation]
    moved = 2 * used["heads"] * used["keys"] * DIM * 2
    compute, copies = len(body) / clock / 1e3, moved / bandwidth / 1e6
    return used | {
        "generation": generation,
        "rows": nodes * GROUPS,
        "bundles": len(body),
        "vector_spills": spills,
        "compute_us": round(compute, 3),
        "copies_us": round(copies, 3),
        "compute_over_copies": round(compute / copies, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generations", default=",".join(CHIPS))
    parser.add_argument("--nodes", default="1,8,16,32,64")
    parser.add_argument("--configs", help="JSON list of block sizes, instead of the tables'")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    configs = json.loads(args.configs) if args.configs else [None]
    rows = []
    for generation in args.generations.split(","):
        for nodes in map(int, args.nodes.split(",")):
            for config in configs:
                rows.append(schedule(generation, nodes, config))
                print(json.dumps(rows[-1]), flush=True)
    write_json(args.out, {"head_dim": DIM, "groups": GROUPS, "kv_heads": KV_HEADS, "rows": rows})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--compile"]:
        compile_one(sys.argv[2], int(sys.argv[3]), sys.argv[4])
    else:
        main()
