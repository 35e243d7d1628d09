"""Decoding speed on real prompts: transformers, plain decoding and every drafter, in one run.

    python benchmarks/decode.py --prompts runs/data --out benchmarks/results/decode.json

All arms answer the same prompts with the same number of new tokens (end-of-text ignored), warm, greedy, at
batch 1; the arms take turns prompt by prompt, and the whole is repeated. Times are from the start of the
prefill to the last token. Where every round is alike, without a budget, the cost model's prediction and the parts
of a round stand beside what was measured.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from _common import machine, read_prompts, spread, write_json

import jax_specdec as sd
from jax_specdec.specs import language as specs
from jax_specdec.tuning.costs import Costs
from jax_specdec.tuning.measure import acceptance_by_position, draft_arm, verify_arm

SETS = ("gsm8k", "mbpp", "stories", "spec_bench")


class Arm:
    """One way of decoding: `run(prompt ids) -> (token ids, seconds, prefill seconds)`."""

    def __init__(self, target, drafter, tokens: int, budget: bool = True):
        self.decoder = sd.SpeculativeDecoder(target, drafter, budget=budget)
        self.tokens, self.budget = tokens, budget
        self.answers: list = []

    def run(self, ids):
        (out,) = self.decoder.generate([ids], max_new_tokens=self.tokens, ignore_eos=True)
        self.answers.append(out)
        return out.token_ids, out.stats.wall_time_s, out.stats.prefill_time_s


class Transformers:
    """The peer: `generate` of transformers on PyTorch, on the same folder."""

    def __init__(self, folder, tokens: int, dtype: str, threads: int):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.torch, self.tokens = torch, tokens
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        self.model.generation_config.eos_token_id = None

    def run(self, ids):
        inputs = self.torch.tensor([ids])
        began = time.perf_counter()
        with self.torch.inference_mode():
            out = self.model.generate(
                inputs,
                attention_mask=self.torch.ones_like(inputs),
                max_new_tokens=self.tokens,
                do_sample=False,
                pad_token_id=0,
            )
        return out[0, len(ids) :].tolist(), time.perf_counter() - began, float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="checkpoints/demo/target")
    parser.add_argument("--prompts", required=True, help="folder written by prepare.py")
    parser.add_argument(
        "--drafters",
        default="auto,lm,glide,glide+cape,max-gram,prompt-lookup,bigram",
        help="specifications; SPEC@DIR takes the checkpoint from DIR, and /off behind either leaves out the budget",
    )
    parser.add_argument("--per-set", type=int, default=8)
    parser.add_argument("--keep-last", type=int, default=256, help="prompt tokens kept")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--no-peer", action="store_true", help="leave transformers out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()

    target = sd.load_target(args.model, dtype=args.dtype)
    encode = sd.SpeculativeDecoder(target).encode
    records = {name: read_prompts(args.prompts, (name,), args.per_set) for name in SETS}
    prompts = [
        encode(record["prompt"])[-args.keep_last :] for some in records.values() for record in some
    ]
    sets = [name for name, some in records.items() for _ in some]
    tokens = args.max_new_tokens

    loaded, without = {"plain": None}, set()
    for item in specs.split(args.drafters):
        off = item.endswith("/off")
        spec, _, folder = item.removesuffix("/off").partition("@")
        wanted = sd.default_spec(target) if spec == "auto" else spec
        drafts = {spec.partition(":")[0]: folder} if folder else None
        drafter = sd.load_drafter(wanted, target, drafts=drafts)
        name = f"{Path(folder).name} ({drafter.spec})" if folder else drafter.spec
        name = f"default ({drafter.spec})" if spec == "auto" else name
        if off:
            name = f"{name} without budget"
            without.add(name)
        loaded[name] = drafter
    arms: dict = {
        name: Arm(target, drafter, tokens, name not in without) for name, drafter in loaded.items()
    }
    if args.dtype != "float32":  # the baseline is the faster plain decoding
        arms["plain float32"] = Arm(sd.load_target(args.model, dtype="float32"), None, tokens)
    if not args.no_peer:
        try:
            peer = Transformers(args.model, tokens, args.dtype, args.threads)
            arms = {"transformers": peer, **arms}
        except ImportError:
            print(
                "transformers on PyTorch is not installed here: its arm is left out",
                file=sys.stderr,
            )

    for name, arm in arms.items():  # compile and warm every program
        for ids in {len(i): i for i in prompts}.values():
            arm.run(ids)
        if isinstance(arm, Arm):
            arm.answers.clear()
        print(f"warm: {name}", file=sys.stderr)

    # The parts, measured alone on prompts short, middling and long. They take turns with the prompts,
    # so that a machine that grows slower does so for both.
    by_length = sorted(prompts, key=len)
    texts = [by_length[len(prompts) * sixths // 6] for sixths in (1, 3, 5)]
    used = {d.drafter.info.nodes + 1 for d in loaded.values() if d} | {1, 2, 4, 8, 16}
    parts: dict = {}
    answers = [arms["plain"].run(text)[0] for text in texts]
    arms["plain"].answers.clear()
    for i, text in enumerate(texts):
        parts |= {("verify", t, i): verify_arm(target, t, [text], rounds=64) for t in used}
        for name, drafter in loaded.items():
            if drafter is not None:
                answer = [answers[i]]
                parts["draft", name, i] = draft_arm(target, drafter, [text], tokens // 2, answer)
    taken: dict = {key: [] for key in parts}

    # seconds[arm][repeat] = sum over prompts
    seconds = {name: [0.0] * args.repeats for name in arms}
    decode_only = {name: [0.0] * args.repeats for name in arms}
    first: dict = {name: [] for name in arms}
    of_set = {name: dict.fromkeys(SETS, 0.0) for name in arms}
    for repeat in range(args.repeats):
        for number, ids in enumerate(prompts):
            for name, arm in arms.items():
                out, wall, prefill = arm.run(ids)
                assert len(out) == tokens, (name, len(out))
                seconds[name][repeat] += wall
                decode_only[name][repeat] += wall - prefill
                of_set[name][sets[number]] += wall
                if repeat == 0:
                    first[name].append(out)
            if number % max(1, len(prompts) // 4) == 0:
                for key, part in parts.items():
                    taken[key].append(part())
    cost = {
        (kind, what): spread(
            np.mean([taken[kind, what, i] for i in range(len(texts))], axis=0).tolist()
        )
        for kind, what, i in sorted(parts, key=str)
        if i == 0
    }
    verify = {t: cost["verify", t]["median"] for t in sorted(used)}

    count = len(prompts) * tokens
    plain = seconds["plain"]
    best_plain = min(
        (seconds[name] for name in ("plain", "plain float32") if name in arms), key=sum
    )
    rows = {}
    for name, arm in arms.items():
        ratio = [p / s for p, s in zip(plain, seconds[name], strict=True)]
        row = {
            "seconds": seconds[name],
            "tokens_per_second": spread([count / s for s in seconds[name]]),
            "speed_over_plain": spread(ratio),
            "speed_over_best_plain": spread(
                [p / s for p, s in zip(best_plain, seconds[name], strict=True)]
            ),
            "same_tokens_as_plain": sum(
                a == b for a, b in zip(first[name], first["plain"], strict=True)
            ),
        }
        row["by_set"] = {
            key: of_set["plain"][key] / took for key, took in of_set[name].items() if took
        }
        drafter = loaded.get(name)
        if drafter is not None:
            rounds = sum(a.stats.num_spec_steps for a in arm.answers)
            measured = statistics.median(
                p / s for p, s in zip(decode_only["plain"], decode_only[name], strict=True)
            )
            row |= {
                "tau": sum(len(a.token_ids) for a in arm.answers) / rounds,
                "decode_speed_over_plain": measured,
            }
        if drafter is not None and not arm.budget:
            length, nodes = drafter.drafter.info.depth, drafter.drafter.info.nodes + 1
            costs = Costs(verify, {length: cost["draft", name]["median"]})
            accepted = acceptance_by_position(arm.answers)
            predicted = costs.speedup(accepted, length, nodes)
            loop = sum(decode_only[name]) / rounds
            row |= {
                "accepted_per_pos": accepted,
                "predicted_decode_speed_over_plain": predicted,
                "measured_over_predicted": measured / predicted,
                "round_s": loop,
                "sum_of_parts_s": costs.round(length, nodes),
                "loop_over_parts": loop / costs.round(length, nodes),
            }
        if isinstance(arm, Arm):
            row["peak_memory_bytes"] = arm.decoder.peak_memory()
            if drafter is not None:
                row["accepted_by_proposer"] = {
                    source: sum(a.stats.per_drafter[source]["accepted"] for a in arm.answers)
                    for source in drafter.drafter.info.sources
                }
        rows[name] = row

    record = {
        "machine": machine(),
        "model": str(Path(args.model)),
        "dtype": args.dtype,
        "prompts": len(prompts),
        "prompt_tokens": spread([len(p) for p in prompts]),
        "new_tokens": tokens,
        "v": {t: verify[t] / verify[1] for t in verify},
        "parts_s": {" ".join(map(str, key)): value for key, value in cost.items()},
        "arms": rows,
    }
    heads = [*SETS, "predicted", "loop/parts"]
    print(
        f"{'arm':36}{'tokens/s':>10}{'x plain':>9}{'tau':>7}" + "".join(f"{x:>12}" for x in heads)
    )
    for name, row in rows.items():
        numbers = [row["by_set"].get(key) for key in SETS]
        numbers += [
            row.get(key) for key in ("predicted_decode_speed_over_plain", "loop_over_parts")
        ]
        print(
            f"{name:36}{row['tokens_per_second']['median']:10.1f}"
            f"{row['speed_over_plain']['median']:9.2f}{row.get('tau', 1.0):7.2f}"
            + "".join(f"{'' if x is None else f'{x:.2f}':>12}" for x in numbers)
        )
    print("v(T):", {t: round(float(np.round(v, 3)), 3) for t, v in record["v"].items()})
    write_json(args.out, record)


if __name__ == "__main__":
    main()
