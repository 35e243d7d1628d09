"""How a round divides over 1 to 256 devices: `python benchmarks/scaling.py --out benchmarks/results/scaling.json`.

Two things, and no measured time. By arithmetic, for Llama-3-70B with drafts of 7 tokens on TPU v6e: what each device
holds, reads and sends, and the roofline of a round, for every mesh data x tensor. And for a narrow model of the
same heads, compiled for as many simulated CPU devices: the collectives of the program, counted, beside the formula.
"""

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any

os.environ["JAX_NUM_CPU_DEVICES"] = "256"
os.environ["JAX_PLATFORMS"] = "cpu"

from _common import write_json
from matplotlib import pyplot as plt

from jax_specdec.checkpoints.tensor_files import read_json
from jax_specdec.cli.plan import ShapedDrafter
from jax_specdec.models.config import ModelConfig
from jax_specdec.models.hf import config_from_hf
from jax_specdec.specs.whole import parse_drafter
from jax_specdec.tuning import plan
from jax_specdec.tuning.hardware import CPU, TPUS, Topology

LARGE = Path(__file__).parent / "configs/llama-3-70b.json"
DRAFT, CONTEXT, BATCHES = 7, 8192, (1, 8, 64)
COUNTS = tuple(2**n for n in range(9))
NARROW = ModelConfig(
    vocab_size=2048,
    hidden_size=512,
    mlp_size=1024,
    num_layers=2,
    num_heads=64,
    num_kv_heads=8,
    head_dim=16,
    context=512,
)
MIB, GIB = 2**20, 2**30


def meshes(config: ModelConfig, devices: int, batch: int) -> list[dict[str, int]]:
    """What divides rows, heads, MLP and vocabulary."""
    sizes = (config.num_heads, config.mlp_size, config.vocab_size)
    return [
        {"data": devices // tensor, "tensor": tensor}
        for tensor in (2**n for n in range(9))
        if devices % tensor == 0
        and not any(size % tensor for size in sizes)
        and batch % (devices // tensor) == 0
    ]


def by_arithmetic(config: ModelConfig, devices: int, batch: int) -> list[dict[str, Any]]:
    rows = []
    for sizes in meshes(config, devices, batch):
        topology = Topology(f"v6e, {devices} devices", TPUS["v6e"], devices)
        question = plan.Question(config, topology, sizes, batch, CONTEXT, "bfloat16")
        parts = plan.parts_by_arithmetic(question, 0, DRAFT + 1)
        need = parts["parameters"] + parts["cache"] + parts["scratch"]
        rows.append(
            {
                "devices": devices,
                "batch": batch,
                **sizes,
                "held": need,
                "fits": need <= topology.hardware.memory,
                "read": parts["bytes"],
                "reduced": parts["reduced"],
                "collectives": parts["collectives"],
                "round_s": plan.seconds(question, parts)["total"],
            }
        )
    return rows


def counted(devices: int, batch: int) -> list[dict[str, Any]]:
    """The collectives of the narrow model's compiled round."""
    rows = []
    for sizes in meshes(NARROW, devices, batch):
        topology = Topology(f"cpu:{devices}", CPU, devices)
        question = plan.Question(NARROW, topology, sizes, batch, 256, "float32")
        drafter = ShapedDrafter(parse_drafter(f"max-gram:{DRAFT}"), {}, Path(), NARROW)
        found = plan.compiled(question, drafter.make)
        parts = plan.parts_by_arithmetic(question, 0, DRAFT + 1)
        kinds = found["collectives"]
        reduced = kinds.get("all-reduce", {"count": 0, "bytes": 0})
        rows.append(
            {
                "devices": devices,
                "batch": batch,
                **sizes,
                "all_reduces": reduced["count"],
                "bytes": reduced["bytes"],
                "other": {k: v for k, v in kinds.items() if k != "all-reduce" and v["count"]},
                "formula": {"all_reduces": parts["collectives"], "bytes": parts["reduced"]},
                "held": found["round"]["total"],
            }
        )
        print(rows[-1], flush=True)
    return rows


def best(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    fitting = [row for row in rows if row["fits"]]
    return min(fitting, key=lambda row: row["round_s"]) if fitting else None


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained", sharey=True)
    for at, batch in zip(axes, BATCHES, strict=True):
        for tensor in (8, 16, 32, 64):
            line = [r for r in rows if (r["batch"], r["tensor"]) == (batch, tensor) and r["fits"]]
            if line:
                at.plot(
                    [r["devices"] for r in line],
                    [batch / r["round_s"] for r in line],
                    marker="o",
                    label=f"tensor={tensor}",
                )
        at.set_xscale("log", base=2)
        at.set_yscale("log")
        at.set_xticks(COUNTS, [str(n) for n in COUNTS])
        at.set_title(f"batch {batch}")
        at.set_xlabel("devices (the rest along data)")
        at.grid(alpha=0.3)
    axes[0].set_ylabel("row rounds per second, at most")
    axes[2].legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--plot", default=str(Path(__file__).parents[1] / "docs/scaling.png"))
    args = parser.parse_args()
    config = dataclasses.replace(config_from_hf(read_json(LARGE), None), context=CONTEXT)
    rows = [r for n in COUNTS for batch in BATCHES for r in by_arithmetic(config, n, batch)]
    print("| devices | batch | mesh | a device holds | reads | sends | round |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for n in COUNTS:
        for batch in BATCHES:
            here = [r for r in rows if (r["devices"], r["batch"]) == (n, batch)]
            row = best(here)
            if row is None:
                continue
            print(
                f"| {n} | {batch} | data={row['data']}, tensor={row['tensor']} | {row['held'] / GIB:.1f} GiB | "
                f"{row['read'] / GIB:.2f} GiB | {row['reduced'] / MIB:.1f} MiB, {row['collectives']:.0f} "
                f"collectives | {row['round_s'] * 1e3:.1f} ms |"
            )
    draw(rows, Path(args.plot))
    programs = [r for n in COUNTS for batch in (1, 64) for r in counted(n, batch)]
    record = {"draft": DRAFT, "context": CONTEXT, "arithmetic": rows, "compiled": programs}
    write_json(args.out, record)


if __name__ == "__main__":
    main()
