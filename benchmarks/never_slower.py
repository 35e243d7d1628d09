"""Every drafter against plain decoding, category by category, on a model's chat prompts.

    python benchmarks/never_slower.py --model runs/smollm2/target --data DATA --out FILE.json

DATA holds `spec_bench/question.jsonl`, `gsm8k/test.jsonl` and `instructions/heldout.jsonl`; of each of Spec-Bench's
categories, of GSM8K and of the instructions as many prompts are taken, evenly spread. All arms answer the same prompts
greedily, with the same number of new tokens or, with `--until-eos`, to the end that the model makes, warm, and take turns
prompt by prompt, each time in another order. Times are from the start of the prefill to the last token.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
from _common import lines, machine, write_json
from decode import Transformers

import jax_specdec as sd
from jax_specdec.specs import language as specs
from jax_specdec.text.chat import chat_ids

SPEC_BENCH = {  # question.jsonl has eight kinds of MT-bench's, which are one category
    "translation": "translation",
    "summarization": "summarization",
    "qa": "qa",
    "math_reasoning": "math_reasoning",
    "rag": "rag",
}


def questions(data: Path, count: int) -> dict[str, list[str]]:
    """Prompts by category, evenly spread over each."""
    found: dict[str, list[str]] = {}
    for record in lines(data / "spec_bench/question.jsonl"):
        name = SPEC_BENCH.get(record["category"], "mt_bench")
        found.setdefault(name, []).append(record["turns"][0])
    found["gsm8k"] = [record["question"] for record in lines(data / "gsm8k/test.jsonl")]
    found["instructions"] = [r["prompt"] for r in lines(data / "instructions/heldout.jsonl")]
    return {
        name: [some[i] for i in np.linspace(0, len(some) - 1, count).astype(int)]
        for name, some in found.items()
    }


class Ours:
    """One drafter; what it answered last, and how long that took."""

    def __init__(self, target: sd.Target, drafter: Any, options: dict[str, Any], budget: bool):
        self.decoder = sd.SpeculativeDecoder(target, drafter, budget=budget)
        self.options, self.answers = options, []

    def run(self, prompts: list[list[int]]) -> tuple[list[list[int]], float]:
        out = list(self.decoder.generate(prompts, batch_size=len(prompts), **self.options))
        self.answers = out
        return [answer.token_ids for answer in out], out[0].stats.wall_time_s


class Peer:
    """transformers' plain decoding, or its prompt lookup, one prompt at a time."""

    def __init__(self, args: argparse.Namespace, eos_ids: list[int], lookup: int = 0):
        self.one = Transformers(args.model, args.max_new_tokens, args.dtype, args.threads)
        options = self.one.model.generation_config
        options.prompt_lookup_num_tokens = lookup or None
        options.eos_token_id = eos_ids if args.until_eos else None

    def run(self, prompts: list[list[int]]) -> tuple[list[list[int]], float]:
        outs = [self.one.run(ids) for ids in prompts]
        return [out[0] for out in outs], sum(out[1] for out in outs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument(
        "--drafters",
        default="auto,glide,max-gram,prompt-lookup",
        help="specifications; SPEC/off has no budget",
    )
    parser.add_argument("--draft", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--per-category", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="of our arms")
    parser.add_argument("--until-eos", action="store_true", help="answers may end by themselves")
    parser.add_argument("--longest", type=int, default=1024, help="prompt tokens kept, the last")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--peer", action="store_true", help="transformers, plain and prompt lookup")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    if args.peer and args.temperature:
        parser.error("transformers' arms are greedy: leave out --peer or --temperature")

    target = sd.load_target(args.model, dtype=args.dtype)
    drafts = dict(item.split("=", 1) for item in args.draft)
    options = {"max_new_tokens": args.max_new_tokens, "ignore_eos": not args.until_eos}
    options["temperature"] = args.temperature
    arms: dict[str, Any] = {"plain": Ours(target, None, options, budget=True)}
    for item in specs.split(args.drafters):
        spec, _, off = item.partition("/")
        wanted = sd.default_spec(target, args.batch_size) if spec == "auto" else spec
        drafter = sd.load_drafter(wanted, target, drafts=drafts or None, batch_size=args.batch_size)
        name = (
            f"{'auto: ' if spec == 'auto' else ''}{drafter.spec}{' without budget' if off else ''}"
        )
        arms[name] = Ours(target, drafter, options, budget=not off)
    if args.peer:
        eos_ids = list(target.config.eos_ids)
        arms["transformers"] = Peer(args, eos_ids)
        arms["transformers prompt lookup"] = Peer(args, eos_ids, lookup=10)

    jobs = []
    for category, some in questions(args.data, args.per_category).items():
        prompts = [
            chat_ids(target.tokenizer, [{"role": "user", "content": text}])[-args.longest :]
            for text in some
        ]
        jobs += [
            (category, prompts[i : i + args.batch_size])
            for i in range(0, len(prompts), args.batch_size)
        ]
    longest = {}
    for _, prompts in jobs:
        size = arms["plain"].decoder.capacity(max(map(len, prompts)), args.max_new_tokens)
        longest[size, len(prompts)] = prompts
    for name, arm in arms.items():
        for prompts in longest.values() if isinstance(arm, Ours) else list(longest.values())[:1]:
            arm.run(prompts)
        print(f"warm: {name}", file=sys.stderr, flush=True)

    rows = []
    for number, (category, prompts) in enumerate(jobs):
        names = list(arms)
        order = names[number % len(names) :] + names[: number % len(names)]
        taken = {name: arms[name].run(prompts) for name in order}
        row = {
            "category": category,
            "prompt_tokens": [len(ids) for ids in prompts],
            "new_tokens": {name: sum(map(len, taken[name][0])) for name in names},
            "seconds": {name: round(taken[name][1], 4) for name in names},
            "same": {
                name: sum(a == b for a, b in zip(taken[name][0], taken["plain"][0], strict=True))
                for name in names
            },
        }
        ours = {name: arm.answers for name, arm in arms.items() if isinstance(arm, Ours)}
        row["rounds"] = {
            name: sum(a.stats.num_spec_steps for a in answers) for name, answers in ours.items()
        }
        rows.append(row)
        print(category, row["seconds"], file=sys.stderr, flush=True)
        write_json(args.out, summary(args, arms, rows), quiet=True)
    table(summary(args, arms, rows))


def summary(args: argparse.Namespace, arms: dict[str, Any], rows: list[Any]) -> dict[str, Any]:
    categories = list(dict.fromkeys(row["category"] for row in rows))
    found = {}
    for name in arms:
        new = sum(row["new_tokens"][name] for row in rows)
        ratios = {
            category: [
                per_token(row, "plain") / per_token(row, name)
                for row in rows
                if row["category"] == category
            ]
            for category in categories
        }
        every = [ratio for some in ratios.values() for ratio in some]
        seconds = sum(row["seconds"][name] for row in rows)
        found[name] = {
            "tokens_per_second": new / seconds,
            "speed_over_plain": {
                "mean": statistics.mean(every),
                "median": statistics.median(every),
                "min": min(every),
                "max": max(every),
                "of_sums": sum(per_token(row, "plain") * row["new_tokens"][name] for row in rows)
                / seconds,
            },
            "by_category": {
                category: {"mean": statistics.mean(some), "min": min(some), "max": max(some)}
                for category, some in ratios.items()
            },
            "same_tokens_as_plain": sum(row["same"][name] for row in rows),
        }
        if name in rows[0]["rounds"]:
            found[name]["tau"] = new / sum(row["rounds"][name] for row in rows)
    return {
        "machine": machine(),
        "model": args.model,
        "dtype": args.dtype,
        "batch_size": args.batch_size,
        "answers": sum(len(row["prompt_tokens"]) for row in rows),
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "until_eos": args.until_eos,
        "arms": found,
        "rows": rows,
    }


def per_token(row: dict[str, Any], name: str) -> float:
    return row["seconds"][name] / row["new_tokens"][name]


def table(record: dict[str, Any]) -> None:
    categories = list(next(iter(record["arms"].values()))["by_category"])
    print(f"{'arm':36}{'tokens/s':>9}{'x plain':>8}" + "".join(f"{c[:9]:>10}" for c in categories))
    for name, found in record["arms"].items():
        print(
            f"{name:36}{found['tokens_per_second']:9.1f}{found['speed_over_plain']['mean']:8.2f}"
            + "".join(f"{found['by_category'][c]['mean']:10.2f}" for c in categories)
        )


if __name__ == "__main__":
    main()
