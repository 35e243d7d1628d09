"""This checkout against another one: the same prompts, arm by arm, the two in turn.

    python benchmarks/versions.py --before ../older --out benchmarks/results/versions.json

Each checkout runs in a process of its own, warm, and one decodes while the other waits. A ratio below 1 means
that this checkout takes less time. Both read the demo checkpoint of their own tree.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ARMS = (
    "none",
    "max-gram:6",
    "lm:4",
    "glide:7",
    "glide:5+cape:16",
    "cascade(lm[max-gram:4]:2, max-gram:4)",
)
HERE = Path(__file__).resolve().parents[1]


def work(tokens: int) -> None:
    """Decodes what standard input names, `arm` or `arm records`, and answers with milliseconds per token."""
    import jax_specdec as sd
    from jax_specdec.demo import PROMPTS

    folder = Path(sd.__file__).resolve().parents[1] / "checkpoints/demo/target"
    target = sd.load_target(folder, dtype="float32")
    decoders: dict[str, Any] = {}
    prompts = [p.prompt for p in PROMPTS]
    for line in sys.stdin:
        name = line.strip()
        spec = name.removesuffix(" records")
        if name not in decoders:
            options = {"logprobs": True, "margins": True} if name != spec else {}
            decoders[name] = sd.SpeculativeDecoder(target, sd.load_drafter(spec, target), **options)
        answers = list(decoders[name].generate(prompts, max_new_tokens=tokens, ignore_eos=True))
        spent = sum(a.stats.wall_time_s for a in answers) / sum(a.stats.num_tokens for a in answers)
        print(json.dumps({"ms": 1e3 * spent, "ids": [a.token_ids for a in answers]}), flush=True)


class Process:
    """A checkout at work."""

    def __init__(self, folder: Path, tokens: int):
        command = [sys.executable, str(Path(__file__).resolve()), "--work", "--tokens", str(tokens)]
        env = {**os.environ, "PYTHONPATH": str(folder), "JAX_PLATFORMS": "cpu"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, env=env, cwd=folder
        )

    def ask(self, name: str) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(name, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.process.args} ended at {name}")
        return json.loads(answer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path, help="another checkout, with its checkpoints")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--arms", default=";".join(ARMS), help="separated by semicolons")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.tokens)
        return
    from _common import machine, write_json

    before, after = Process(args.before.resolve(), args.tokens), Process(HERE, args.tokens)
    rows = []
    for arm in args.arms.split(";"):
        # The statistics that were always kept are options now: "records" keeps them.
        names = {
            "before": (before, arm),
            "after": (after, arm),
            "records": (after, f"{arm} records"),
        }
        first = {key: process.ask(name) for key, (process, name) in names.items()}
        spent: dict[str, list[float]] = {key: [] for key in names}
        for _ in range(args.repeats):
            for key, (process, name) in names.items():
                spent[key].append(process.ask(name)["ms"])
        ms = {key: statistics.median(values) for key, values in spent.items()}
        # The fastest of several is what another program on the machine disturbed least.
        fastest = {key: min(values) for key, values in spent.items()}
        rows.append(
            {
                "arm": arm,
                "ms_per_token": ms,
                "fastest_ms_per_token": fastest,
                "ratio": ms["after"] / ms["before"],
                "ratio_of_fastest": fastest["after"] / fastest["before"],
                "ratios": [a / b for a, b in zip(spent["after"], spent["before"], strict=True)],
                "records_cost": ms["records"] / ms["after"],
                "same_greedy_texts": sum(
                    a == b
                    for a, b in zip(
                        first["before"]["ids"][:5], first["after"]["ids"][:5], strict=True
                    )
                ),
            }
        )
        print({k: v for k, v in rows[-1].items() if k != "ratios"}, file=sys.stderr)
    record = {"machine": machine(), "tokens": args.tokens, "repeats": args.repeats, "rows": rows}
    if args.out:
        write_json(args.out, record)


if __name__ == "__main__":
    main()
