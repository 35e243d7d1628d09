"""When a cascade beats its verifier alone: the best budgets at other costs than this machine's.

    python benchmarks/budgets.py --prompts runs/data --out benchmarks/results/budgets.json

Each neural drafter's chains are recorded at every token of greedy answers, and every draft length and
cascade with Max-Gram is played on them (`jax_specdec.tuning.cascades`): tokens a round and calls, which do not
depend on the machine. The table combines them with costs: c, a step of the drafter in tokens of plain
decoding, and v(16), a verification of 16 tokens, where v grows linearly with the tokens. A verification
of several tokens grows likewise. Max-Gram is free.
"""

import argparse
import itertools

from _common import machine, read_prompts, write_json
from tabulate import tabulate

import jax_specdec as sd
from jax_specdec.specs.language import CASCADE, Spec
from jax_specdec.specs.sizes import depth_of
from jax_specdec.specs.whole import parse_drafter
from jax_specdec.tuning.cascades import candidates, play
from jax_specdec.tuning.replay import record

SETS = ("gsm8k", "mbpp", "stories", "spec_bench")
STEPS = (0.02, 0.05, 0.1, 0.2, 0.3)
WIDTHS = (1.0, 1.1, 1.5, 2.3)


def seconds(spec: Spec, calls, c: float, slope: float) -> float:
    """Of one round, in tokens of plain decoding."""

    def width(tokens: int) -> float:
        return 1 + slope * (tokens - 1)

    first = spec.inner[0]
    if not first.inner:
        return width(1 + depth_of(spec)) + c * (first.length or 0)
    verified = 1 + (first.inner[0].length or 0)
    return width(1 + depth_of(spec)) + calls[0] * c * width(verified)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="checkpoints/demo/target")
    parser.add_argument("--prompts", required=True, help="folder written by prepare.py")
    parser.add_argument("--drafters", default="lm,glide")
    parser.add_argument("--longest", type=int, default=15, help="of a draft")
    parser.add_argument("--per-set", type=int, default=4)
    parser.add_argument("--keep-last", type=int, default=256, help="prompt tokens kept")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()

    target = sd.load_target(args.model, dtype="float32")
    fast = sd.SpeculativeDecoder(target, sd.load_drafter("lm:7", target), budget=False)
    prompts = [
        fast.encode(found["prompt"])[-args.keep_last :]
        for found in read_prompts(args.prompts, SETS, args.per_set)
    ]
    answers = fast.generate(prompts, max_new_tokens=args.max_new_tokens, batch_size=8)
    texts = [ids + out.token_ids for ids, out in zip(prompts, answers, strict=True)]
    starts = [len(ids) for ids in prompts]

    played = []
    for name in args.drafters.split(","):
        drafter = sd.load_drafter(f"{name}:{args.longest}", target)
        chains = {name: record(target, drafter, texts, starts, everywhere=True)}
        alone = [
            Spec(CASCADE, inner=(parse_drafter(f"{name}:{n}"),)) for n in range(1, args.longest + 1)
        ]
        several = candidates(
            [name], args.longest, range(1, 13), proposed=(2, 4, 6, 10), behind=(2, 4, 6, 10)
        )
        for spec in itertools.chain(alone, several):
            found = play(spec, texts, chains)
            played.append((name, spec, spec in alone, found))
    rows = []
    for name, c, v16 in itertools.product(args.drafters.split(","), STEPS, WIDTHS):
        speeds = {
            kind: max(
                (found.tau / seconds(spec, found.calls, c, (v16 - 1) / 15), str(spec), found.tau)
                for drafter, spec, single, found in played
                if drafter == name and single == kind
            )
            for kind in (True, False)
        }
        (alone, length, _), (best, cascade, tau) = speeds[True], speeds[False]
        rows.append(
            {
                "drafter": name,
                "c": c,
                "v16": v16,
                "alone": length.removeprefix(f"{CASCADE}(").removesuffix(")"),
                "alone_speedup": alone,
                "cascade": cascade,
                "cascade_speedup": best,
                "cascade_tau": tau,
                "ratio": best / alone,
            }
        )
    print(tabulate([list(row.values()) for row in rows], headers=list(rows[0]), floatfmt=".2f"))
    record_of_all = [
        {"spec": str(spec), "tau": found.tau, "calls": found.calls} for _, spec, _, found in played
    ]
    write_json(
        args.out,
        {
            "machine": machine(),
            "model": args.model,
            "prompts": len(prompts),
            "new_tokens": args.max_new_tokens,
            "table": rows,
            "played": record_of_all,
        },
    )


if __name__ == "__main__":
    main()
