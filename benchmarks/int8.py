"""What int8 weights and caches change: agreement with the whole target, acceptance, memory.

    python benchmarks/int8.py --prompts runs/data --out benchmarks/results/int8.json

PROMPTS is a folder that `checkpoints/demo/prepare.py` wrote. Every arm is one target (float32, bfloat16, and each
with int8 parts) with the same drafter, in the same parts or whole. Agreement is of plain greedy texts, with those of
the target in float32: how many are equal, and how many tokens the rest have in common before they part. Arms that OUT
holds, of the same prompts and drafter, are not run again.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import jax
from _common import machine, read_prompts, write_json

import jax_specdec as sd

DEMO = Path(__file__).resolve().parents[1] / "checkpoints/demo/target"
SETS = ("stories", "gsm8k", "mbpp")
ARMS = [
    ("float32", (), ()),
    ("float32", ("weights",), ("weights",)),
    ("float32", ("cache",), ()),
    ("bfloat16", (), ()),
    ("bfloat16", ("weights", "cache"), ("weights",)),
]


def common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(DEMO))
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--drafter", default="glide:7")
    parser.add_argument("--per-set", type=int, default=6)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--keep-last", type=int, default=160)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    sets = [name for name in SETS if (Path(args.prompts) / f"prompts/{name}.jsonl").is_file()]
    texts = [record["prompt"] for record in read_prompts(args.prompts, sets, args.per_set)]
    options = {"max_new_tokens": args.max_new_tokens, "batch_size": 6, "seed": 5}
    record = {"machine": machine(), "drafter": args.drafter, "prompts": len(texts)}
    record["max_new_tokens"] = args.max_new_tokens
    out, rows, reference = Path(args.out), [], None
    if out.is_file():
        before = json.loads(out.read_text(encoding="utf-8"))
        rows = before.pop("rows")
        if before != record:
            raise SystemExit(f"{out} has rows of other prompts, settings or machines.")
    done = [(row["dtype"], tuple(row["int8"]), tuple(row["draft_int8"])) for row in rows]
    for arm in ARMS:
        if reference is not None and arm in done:
            continue
        dtype, int8, draft_int8 = arm
        target = sd.load_target(args.model, dtype=dtype, int8=int8)
        drafter = sd.load_drafter(args.drafter, target, int8=draft_int8)
        plain, fast = sd.SpeculativeDecoder(target), sd.SpeculativeDecoder(target, drafter)
        prompts = [plain.encode(text)[-args.keep_last :] for text in texts]
        whole = list(plain.generate(prompts, temperature=0.0, **options))
        reference = whole if reference is None else reference
        if arm in done:
            continue
        row = {
            "dtype": dtype,
            "int8": list(int8),
            "draft_int8": list(draft_int8),
            "parameter_bytes": sum(x.nbytes for x in jax.tree.leaves(target.params)),
            "equal": sum(a.token_ids == b.token_ids for a, b in zip(whole, reference, strict=True)),
            "median_common_tokens": statistics.median(
                common(a.token_ids, b.token_ids) for a, b in zip(whole, reference, strict=True)
            ),
        }
        for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            answers = list(fast.generate(prompts, temperature=temperature, **options))
            rounds = sum(a.stats.num_spec_steps for a in answers)
            row[f"tau_{name}"] = sum(a.stats.num_tokens for a in answers) / rounds
            own = whole
            if temperature:
                own = plain.generate(prompts, temperature=temperature, **options)
            row[f"same_as_plain_{name}"] = sum(
                a.token_ids == b.token_ids for a, b in zip(answers, own, strict=True)
            )
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
        write_json(out, {**record, "rows": rows}, quiet=True)


if __name__ == "__main__":
    main()
