"""How often each token of a long draft is accepted, by its position: what the horizontal cascade rests on.

    python benchmarks/acceptance.py --prompts runs/data --out benchmarks/results/acceptance.json \\
        --plot docs/acceptance.png

Greedy, held-out prompts; the figure is Figure 2 of arXiv 2312.11462 for these drafters. A token counts as
accepted if all before it were.
"""

import argparse
from pathlib import Path

from _common import machine, read_prompts, write_json

import jax_specdec as sd
from jax_specdec.specs import language as specs
from jax_specdec.tuning.measure import acceptance_by_position

SETS = ("gsm8k", "mbpp", "stories", "spec_bench")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="checkpoints/demo/target")
    parser.add_argument("--prompts", required=True, help="folder written by prepare.py")
    parser.add_argument("--drafters", default="lm:30,glide:16,max-gram:30,prompt-lookup:30")
    parser.add_argument("--per-set", type=int, default=16)
    parser.add_argument("--keep-last", type=int, default=256, help="prompt tokens kept")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--out", required=True)
    parser.add_argument("--plot", help="a PNG")
    args = parser.parse_args()

    target = sd.load_target(args.model, dtype="float32")
    encode = sd.SpeculativeDecoder(target).encode
    prompts = [
        encode(record["prompt"])[-args.keep_last :]
        for record in read_prompts(args.prompts, SETS, args.per_set)
    ]
    rows = {}
    for spec in specs.split(args.drafters):
        decoder = sd.SpeculativeDecoder(target, sd.load_drafter(spec, target), budget=False)
        answers = list(decoder.generate(prompts, max_new_tokens=args.max_new_tokens, batch_size=16))
        accepted = acceptance_by_position(answers)
        rows[spec] = {"accepted_per_pos": accepted, "tau": 1 + sum(accepted)}
        some = " ".join(f"{a:.3f}" for a in accepted[:8])
        print(f"{spec:24} tau {rows[spec]['tau']:.2f}  {some} ...", flush=True)
    record = {"machine": machine(), "prompts": len(prompts), "new_tokens": args.max_new_tokens}
    write_json(args.out, record | {"arms": rows})
    if args.plot:
        plot(Path(args.plot), {spec: row["accepted_per_pos"] for spec, row in rows.items()})


def plot(path: Path, arms: dict[str, list[float]]) -> None:
    axes = sd.plots.acceptance(arms)
    path.parent.mkdir(parents=True, exist_ok=True)
    axes.figure.savefig(path, dpi=120)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
