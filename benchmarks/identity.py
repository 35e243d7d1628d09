"""Every drafter gives plain decoding's tokens, and plain greedy decoding gives transformers'.

    python benchmarks/identity.py --prompts runs/data --out benchmarks/results/identity.json
    python benchmarks/identity.py --expansions --prompts runs/data --out benchmarks/results/identity.json
    python benchmarks/identity.py --cascades --prompts runs/data --out benchmarks/results/identity.json

100 GSM8K test problems and 100 Spec-Bench prompts (their last 896 tokens), at temperature 0 and at
temperatures 0.3, 1 and 1.7 mixed in one batch with equal seeds, at batch 1 and ragged batch 8. *Identical*
means equal, or that at the first difference the two best scores of plain decoding are within 1e-3; such
near-ties are counted.

The second command adds the matrix of expansions to that record: `glide`, or `lm` where that has no checkpoint,
as a chain and with every expansion, at draft lengths 1 to 6, on 12 prompts of each set (their last 160 tokens)
and 48 new tokens at ragged batch 8. The third adds cascades, up to three levels deep, on the same prompts at
batch 1 and 8.
"""

import argparse
import json
import sys
from pathlib import Path

from _common import machine, read_prompts, write_json

import jax_specdec as sd
from jax_specdec.drafters import registry
from jax_specdec.generation import near_tie
from jax_specdec.specs import language as specs
from jax_specdec.specs.whole import expansions_of

NEAR_TIE = near_tie("float32")
TEMPERATURES = (0.3, 1.0, 1.7)
CASCADES = (
    "lm[max-gram:4]:2",
    "cascade(lm:3, max-gram:4)",
    "cascade(lm[max-gram:4]:2, max-gram:4)",
    "cascade(lm[max-gram:4]:2, max-gram:4; cut)",
    "cascade(lm[max-gram:4; lenience=3]:2, prompt-lookup:3)",
    "cascade(lm[confidence=0.4]:4, max-gram:3)",
    "cascade(glide[max-gram:3]:2, max-gram:3)",
    "cascade(glide[lm[max-gram:3]:1, max-gram:2; lenience=5]:2, lm[max-gram:3]:1, max-gram:3; cut)",
    "lm[glide[bigram:2; lenience=2]:1; lenience=4]:2",
    "lm[max-gram:3; lenience=2]:2+cape:16",
    "csd-vicuna-tree",
)


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


def check(target, prompts, tokens: int, arms, peer=None):
    """Compares arms `(specification, batch)` with plain decoding at batch 1: `(record, answers that differ)`.

    Args:
      prompts: token ids. peer: greedy answers of another library, or None.
    """
    settings = {
        "T=0": 0.0,
        "T mixed": [TEMPERATURES[i % 3] for i in range(len(prompts))],
    }
    rows = []

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

    def count(name: str, setting: str, batch: int, others) -> None:
        words = [compare(a, b) for a, b in zip(plain[setting], others, strict=True)]
        row = {"arm": name, "setting": setting, "batch": batch, "prompts": len(words)}
        row |= {word: words.count(word) for word in ("equal", "near tie", "different")}
        if not isinstance(others[0], list):
            steps = sum(o.stats.num_spec_steps for o in others)
            row["mean_acceptance_length"] = sum(o.stats.num_tokens for o in others) / steps
        rows.append(row)
        print(row, file=sys.stderr)

    plain_decoder = sd.SpeculativeDecoder(target, margins=True)
    plain = {name: answers(plain_decoder, 1, t) for name, t in settings.items()}
    if peer is not None:
        count("transformers", "T=0", 1, peer)
    for spec, batch in arms:
        drafter = sd.load_drafter(spec, target)
        decoder = sd.SpeculativeDecoder(target, drafter)
        for name, temperature in settings.items():
            count(drafter.spec, name, batch, answers(decoder, batch, temperature))
    record = {
        "machine": machine(),
        "model": str(target.path),
        "dtype": "float32",
        "new_tokens": tokens,
        "near_tie_margin": NEAR_TIE,
        "plain_near_ties": {k: sum(a.stats.near_ties for a in v) for k, v in plain.items()},
        "tokens_compared_per_row": {k: sum(len(a.token_ids) for a in v) for k, v in plain.items()},
        "rows": rows,
    }
    return record, sum(row["different"] for row in rows)


def expansion_arms(home: Path, lengths) -> list[tuple[str, int]]:
    """`glide`, or `lm` where that has no checkpoint in `home`, plain and with every expansion, at batch 8."""
    name = "glide" if (home / "glide").is_dir() else "lm"
    return [
        (f"{name}:{length}{suffix}", 8)
        for name in (name, "medusa")
        if (home / name).is_dir()
        for length in lengths
        if length <= registry.longest(name, home / name)
        for suffix in ("", *(f"+{rule}" for rule in expansions_of(registry.of(name))))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="checkpoints/demo/target")
    parser.add_argument("--prompts", required=True, help="folder written by prepare.py")
    parser.add_argument(
        "--drafters",
        default="lm:4,glide:7,max-gram:8,prompt-lookup:6,bigram:3,glide:5+cape:16,lm:6+fixed:16,lm:4+path:16,"
        "lm:5+tree:20,lm:4+beam:13",
    )
    parser.add_argument(
        "--expansions", action="store_true", help="the matrix of expansions instead"
    )
    parser.add_argument("--cascades", action="store_true", help="the matrix of cascades instead")
    parser.add_argument("--lengths", default="1,2,3,4,5,6", help="draft lengths of the matrix")
    parser.add_argument("--per-set", type=int, help="prompts; default: 100, of the matrix 12")
    parser.add_argument("--keep-last", type=int, help="default: 896, of the matrix 160")
    parser.add_argument("--max-new-tokens", type=int, help="default: 64, of the matrix 48")
    parser.add_argument("--no-peer", action="store_true", help="leave transformers out")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()

    target, out = sd.load_target(args.model, dtype="float32"), Path(args.out)
    encode = sd.SpeculativeDecoder(target).encode
    matrix = "expansions" if args.expansions else "cascades" if args.cascades else None
    tokens = args.max_new_tokens or (48 if matrix else 64)
    per_set = args.per_set or (12 if matrix else 100)
    keep = args.keep_last or (160 if matrix else 896)
    prompts = []
    for record in read_prompts(args.prompts, ("gsm8k", "spec_bench"), per_set):
        ids = target.tokenizer(record["prompt"], verbose=False)["input_ids"]
        prompts.append(encode(ids[-min(keep, target.config.context - tokens) :]))
    if matrix:
        lengths = [int(n) for n in args.lengths.split(",")]
        arms = [(spec, batch) for spec in CASCADES for batch in (1, 8)]
        if args.expansions:
            arms = expansion_arms(target.path.parent, lengths)
        record, failed = check(target, prompts, tokens, arms)
        record = {matrix: record}
    else:
        peer = None
        if not args.no_peer:
            peer = transformers_greedy(args.model, prompts, tokens, target.config.eos_ids)
        wanted = ("none", *specs.split(args.drafters))
        arms = [
            (spec, batch) for spec in wanted for batch in (1, 8) if (spec, batch) != ("none", 1)
        ]
        record, failed = check(target, prompts, tokens, arms, peer)
    found = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    write_json(out, found | record)
    if failed:
        sys.exit(f"{failed} answers differ from plain decoding")


if __name__ == "__main__":
    main()
