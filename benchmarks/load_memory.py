"""Peak host memory of loading a checkpoint, over its size.

    python benchmarks/load_memory.py [--size-mb 2048] [--out benchmarks/results/load_memory.json]
    python benchmarks/load_memory.py --processes 4 --out benchmarks/results/load_memory_processes.json

Writes a synthetic bfloat16 checkpoint in shards, layer by layer, then loads it in fresh processes
while a thread samples the anonymous memory (RssAnon); memory-mapped file pages do not count, since
the system can drop them at any time. With --processes each of them holds an equal part of the model on one
simulated device, and is measured against that part; what it copies out of the files is counted, too.
"""

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
LAYERS = 8
VOCAB = 4096
OUT = REPOSITORY / "benchmarks/results/load_memory.json"


def anonymous_bytes() -> int:
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def write_checkpoint(folder: Path, size: int) -> None:
    """A checkpoint of about `size` bytes with one shard a layer."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    from jax_specdec.models import ModelConfig, config_to_hf
    from jax_specdec.models.hf import weight_names

    # 4 E^2 of attention and 3 E * 2.75 E of MLP a layer, 2 bytes each
    hidden = round((size / (2 * LAYERS * 12.25)) ** 0.5 / 64) * 64
    config = ModelConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        mlp_size=hidden * 11 // 4,
        num_layers=LAYERS,
        num_heads=hidden // 64,
        num_kv_heads=hidden // 64,
        head_dim=64,
        context=4096,
    )
    (folder / "config.json").write_text(json.dumps(config_to_hf(config, "bfloat16")))
    shards: dict[str, list] = {}
    for name, weight in weight_names(config).items():
        layer = weight.path[1] if weight.path[0] == "layers" else "rest"
        shards.setdefault(f"model-{layer}.safetensors", []).append((name, weight.shape))
    rng = np.random.default_rng(0)
    for file, tensors in shards.items():
        values = {
            # Small finite numbers: exponents below 1, any sign and mantissa.
            name: rng.integers(0x3C00, 0x3F00, shape, np.uint16).view(ml_dtypes.bfloat16)
            for name, shape in tensors
        }
        save_file(values, folder / file, metadata={"format": "pt"})
    where = {name: file for file, tensors in shards.items() for name, _ in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def measure(
    folder: Path, layer_loop: str, dtype: str, processes: int = 1, number: int = 0, port: int = 0
) -> dict:
    """Loads in this process, which should be fresh, `number` of so many."""
    import jax

    from jax_specdec.checkpoints import tensor_files
    from jax_specdec.checkpoints.targets import load_target

    mesh = None
    if processes > 1:
        from jax.sharding import AxisType

        jax.distributed.initialize(f"localhost:{port}", processes, number)
        names, types = ("data", "tensor"), (AxisType.Auto,) * 2
        mesh = jax.make_mesh((1, processes), names, axis_types=types)
    jax.devices()
    read, assign = 0, tensor_files._assign

    def counted(to, value) -> None:
        nonlocal read
        read += value.nbytes
        assign(to, value)

    tensor_files._assign = counted
    baseline = peak = anonymous_bytes()
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_bytes())

    thread = threading.Thread(target=sample)
    thread.start()
    start = time.perf_counter()
    target = load_target(folder, dtype=dtype, layer_loop=layer_loop, tokenizer=False, mesh=mesh)
    seconds = time.perf_counter() - start
    done.set()
    thread.join()
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return {
        "layer_loop": layer_loop,
        "dtype": dtype,
        "checkpoint_bytes": size,
        "parameters": sum(x.size for x in jax.tree.leaves(target.params)),
        "baseline_bytes": baseline,
        "peak_bytes": peak - baseline,
        "resident_after_bytes": anonymous_bytes() - baseline,
        "peak_over_share": round((peak - baseline) * processes / size, 3),
        "read_over_share": round(read * processes / size, 3),
        "seconds": round(seconds, 2),
        "jax": jax.__version__,
    }


def measure_fresh(
    folder: Path, layer_loop: str, dtype: str = "bfloat16", processes: int = 1
) -> list[dict]:
    """`measure` in processes of their own, on CPU."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    running = [
        subprocess.Popen(
            [sys.executable, __file__, "--measure", str(folder), layer_loop, dtype]
            + [str(x) for x in (processes, number, port)],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(processes)
    ]
    results = []
    for process in running:
        out, said = process.communicate()
        if process.returncode:
            raise RuntimeError(said)
        results.append(json.loads(out.splitlines()[-1]))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size-mb", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--measure", nargs=6, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        folder, layer_loop, dtype, *numbers = args.measure
        print(json.dumps(measure(Path(folder), layer_loop, dtype, *map(int, numbers))))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), args.size_mb * 2**20)
        options = {"processes": args.processes}
        results = [
            found
            for loop in ("unroll", "scan")
            for found in measure_fresh(Path(folder), loop, **options)
        ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=2) + "\n")
    print(args.out.read_text(), end="")


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    main()
