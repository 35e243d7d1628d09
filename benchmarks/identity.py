"""Every drafter gives plain decoding's tokens, and plain greedy decoding gives transformers'.

    python benchmarks/identity.py --prompts runs/data --out benchmarks/results/identity.json

100 GSM8K test problems and 100 Spec-Bench prompts (their last 896 tokens), at temperature 0 and at
temperatures 0.3, 1 and 1.7 mixed in one batch with equal seeds, at batch 1 and ragged batch 8. *Identical*
means equal, or that at the first difference the two best scores of plain decoding are within 1e-3; such
near-ties are counted.
"""

import argparse
import sys
from pathlib import Path

from _common import machine, read_prompts, write_json

import jax_specdec as sd
from jax_specdec.pipeline import NEAR_TIE

TEMPERATURES = (0.3, 1.0, 1.7)


def compare(plain, other) -> str:
    """`equal`, `near tie` or `different`, for one prompt."""
    a, b = plain.token_ids, other if isinstance(other, list) else other.token_ids
    if a == b:
        return "equal"
    at = next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
    near = at < len(plain.margins) and plain.margins[at] < NEAR_TIE
    return "near tie" if near else "different"


def transformers_greedy(folder: str, prompts, tokens: int, eos: tuple[int, ...]):
    """`generate` of transformers on PyTorch in float32, or None where torch is not installed."""
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError:
        return None
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answers = []
    for ids in prompts:
        inputs = torch.tensor([ids])
        with torch.inference_mode():
            out = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=tokens,
                do_sample=False,
                eos_token_id=list(eos),
                pad_token_id=0,
            )
        answers.append(out[0, len(ids) :].tolist())
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="checkpoints/demo/target")
    parser.add_argument("--prompts", required=True, help="folder written by prepare.py")
    parser.add_argument(
        "--drafters",
        default="lm:4,max-gram:8,prompt-lookup:6,bigram:3,lm:4+cape:16,lm:6+fixed:16,lm:4+path:16,"
        "lm:5+tree:20,lm:4+beam:13",
    )
    parser.add_argument("--per-set", type=int, default=100)
    parser.add_argument("--keep-last", type=int, default=896)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--no-peer", action="store_true", help="leave transformers out")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()

    target = sd.load_target(args.model, dtype="float32")
    encode = sd.SpeculativeDecoder(target).encode
    context, tokens = target.config.context, args.max_new_tokens
    prompts = []
    for record in read_prompts(args.prompts, ("gsm8k", "spec_bench"), args.per_set):
        ids = target.tokenizer(record["prompt"], verbose=False)["input_ids"]
        prompts.append(encode(ids[-min(args.keep_last, context - tokens) :]))
    settings = {
        "T=0": 0.0,
        "T mixed": [TEMPERATURES[i % 3] for i in range(len(prompts))],
    }

    def answers(decoder, batch, temperature):
        return list(
            decoder.generate(
                prompts,
                max_new_tokens=tokens,
                temperature=temperature,
                seed=7,
                batch_size=batch,
            )
        )

    plain_decoder = sd.SpeculativeDecoder(target)
    plain = {name: answers(plain_decoder, 1, t) for name, t in settings.items()}
    rows, failed = [], 0

    def count(name: str, setting: str, batch: int, others) -> None:
        nonlocal failed
        verdicts = [compare(a, b) for a, b in zip(plain[setting], others, strict=True)]
        row = {"arm": name, "setting": setting, "batch": batch, "prompts": len(verdicts)}
        row |= {kind: verdicts.count(kind) for kind in ("equal", "near tie", "different")}
        if not isinstance(others[0], list):
            steps = sum(o.stats.num_spec_steps for o in others)
            row["mean_acceptance_length"] = sum(o.stats.num_tokens for o in others) / steps
        failed += row["different"]
        rows.append(row)
        print(row, file=sys.stderr)

    peer = (
        None
        if args.no_peer
        else transformers_greedy(args.model, prompts, tokens, target.config.eos_ids)
    )
    if peer is not None:
        count("transformers", "T=0", 1, peer)
    for spec in ("none", *args.drafters.split(",")):
        decoder = sd.SpeculativeDecoder(target, sd.load_drafter(spec, target))
        for batch in (1, 8):
            for name, temperature in settings.items():
                if (spec, batch) != ("none", 1):
                    count(spec, name, batch, answers(decoder, batch, temperature))
    record = {
        "machine": machine(),
        "model": str(Path(args.model)),
        "dtype": "float32",
        "new_tokens": tokens,
        "near_tie_margin": NEAR_TIE,
        "plain_near_ties": {k: sum(a.stats.near_ties for a in v) for k, v in plain.items()},
        "tokens_compared_per_row": {k: sum(len(a.token_ids) for a in v) for k, v in plain.items()},
        "rows": rows,
    }
    write_json(args.out, record)
    if failed:
        sys.exit(f"{failed} answers differ from plain decoding")


if __name__ == "__main__":
    main()
