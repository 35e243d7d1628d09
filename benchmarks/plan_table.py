"""Plans of well-known models on TPU slices, by the real compiler: `python benchmarks/plan_table.py --out FILE`.

Needs the TPU compiler (libtpu); about two minutes a case on one core. Prints the table of docs/sharding.md.
"""

import argparse
import json
from pathlib import Path

from jax_specdec.cli import make_parser
from jax_specdec.cli.plan import answer

CONFIGS = Path(__file__).parent / "configs"
CASES = [
    *(("llama-3-8b", "v5e:2x4", batch) for batch in (1, 8, 64)),
    *(("llama-3-8b", "v6e:2x2", batch) for batch in (1, 8, 64)),
    *(("llama-3-70b", "v6e:4x4", batch) for batch in (1, 8, 64)),
    ("qwen3-32b", "v6e:2x4", 8),
    ("vicuna-7b", "v5e:2x4", 8),
]
CONTEXT = 4096


def row(found: dict, model: str) -> str:
    gib = 2**30
    mesh = ",".join(f"{name}={size}" for name, size in found["mesh"].items())
    memory, program = found["memory"], found.get("program")
    if program is None:
        need = memory["total"] / gib
        return (
            f"| {model} | {found['topology']} ({mesh}) | {found['batch_size']} | no: {need:.1f} of "
            f"{memory['capacity'] / gib:.1f} | | | | |"
        )
    part, seconds = program["round"], found["tokens_per_second"]
    reduced = program["collectives"]["all-reduce"]
    return (
        f"| {model} | {found['topology']} ({mesh}) | {found['batch_size']} | {part['total'] / gib:.2f} of "
        f"{memory['capacity'] / gib:.1f} | {part['temporaries'] / 2**20:.0f} MiB | {reduced['count']}, "
        f"{reduced['bytes'] / 2**20:.1f} MiB | {found['round_s'] * 1e3:.1f} ms | "
        f"{found['plain_tokens_per_second']:,.0f} / {seconds['3.0']:,.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", required=True, help="JSON; cases that it holds are not planned again"
    )
    parser.add_argument("--model", help="only this one, such as llama-3-8b")
    args = parser.parse_args()
    out = Path(args.out)
    done = json.loads(out.read_text()) if out.exists() else {}
    for model, topology, batch in CASES:
        if args.model not in (None, model):
            continue
        name = f"{model} {topology} {batch}"
        if name not in done:
            command = ["plan", "--model", str(CONFIGS / f"{model}.json"), "--topology", topology]
            command += ["--batch-size", str(batch), "--context", str(CONTEXT)]
            done[name] = answer(make_parser().parse_args(command))
            out.write_text(json.dumps(done, indent=1, sort_keys=True) + "\n")
        print(row(done[name], model), flush=True)


if __name__ == "__main__":
    main()
