"""SmolLM2 from its GGUF file against transformers: weights, token ids, greedy answers, and what they cost.

    python benchmarks/smollm2_identity.py --data DATA --out benchmarks/results/smollm2_identity.json

DATA holds `spec_bench/question.jsonl`, whose questions are asked in the chat template, the second turn behind the
answer to the first, and the other sets of `checkpoints/demo/prepare.py`, for texts. With `--speeds`, on a quiet machine, the
arms take turns, prompt by prompt, after a run that compiles, and prompt lookup of transformers is one of them.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from _common import machine, write_json

import jax_specdec as sd
from jax_specdec.checkpoints import smollm2
from jax_specdec.checkpoints.target_tensors import load_config, open_target
from jax_specdec.text.chat import chat_ids

# Files of DATA, and the field that is a text.
TEXTS = {
    "spec_bench/question.jsonl": "turns",
    "gsm8k/test.jsonl": "answer",
    "mbpp/mbpp.jsonl": "code",
    "tinystories/stories.jsonl": "text",
    "instructions/heldout.jsonl": "prompt",
}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Transformers:
    """`generate` of transformers on PyTorch, on the dequantized file; with prompt lookup where `lookup` is not 0."""

    def __init__(self, model: Any, tokens: int, lookup: int = 0):
        self.model, self.tokens = model, tokens
        self.options = {"prompt_lookup_num_tokens": lookup} if lookup else {}

    def run(self, ids: list[int]) -> tuple[list[int], float]:
        import torch

        inputs = torch.tensor([ids])
        began = time.perf_counter()
        with torch.inference_mode():
            out = self.model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=self.tokens,
                do_sample=False,
                **self.options,
            )
        return out[0, len(ids) :].tolist(), time.perf_counter() - began


class Ours:
    """Speculative or plain decoding."""

    def __init__(self, target: sd.Target, drafter: str, tokens: int):
        self.decoder = sd.SpeculativeDecoder(target, sd.load_drafter(drafter, target), margins=True)
        self.tokens, self.margins = tokens, [0.0]

    def run(self, ids: list[int]) -> tuple[list[int], float]:
        (out,) = self.decoder.generate([ids], max_new_tokens=self.tokens)
        self.margins = out.margins
        return out.token_ids, out.stats.wall_time_s


def compare_weights(path: Path, model: Any) -> dict[str, Any]:
    theirs = {name: value.numpy() for name, value in model.state_dict().items()}
    ours = open_target(path, load_config(path))
    same = [
        np.asarray(stored.view()[...]).tobytes() == theirs[name].tobytes()
        for name, stored in ours.items()
    ]
    return {"tensors": len(same), "equal_bits": sum(same)}


def compare_tokens(path: Path, tokenizer: Any, data: Path, count: int) -> dict[str, Any]:
    """Against transformers' reading of the file, with and without the first step of SmolLM's tokenizer.json."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    texts = []
    for file, key in TEXTS.items():
        found = (record[key] for record in lines(data / file))
        texts += list(
            itertools.islice(("\n".join(x) if isinstance(x, list) else x for x in found), count)
        )

    def ids(of: Any) -> list[list[int]]:
        return of(texts, add_special_tokens=False)["input_ids"]

    ours, as_read = ids(tokenizer), ids(theirs)
    steps = [pre_tokenizers.Digits(individual_digits=True)]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    published = ids(theirs)
    return {
        "texts": len(texts),
        "tokens": sum(map(len, ours)),
        "equal": sum(a == b for a, b in zip(ours, published, strict=True)),
        "equal_without_digits": sum(a == b for a, b in zip(ours, as_read, strict=True)),
    }


def difference(arm: Ours, ids: list[int], want: list[int]) -> dict[str, Any]:
    """Where an answer leaves another, and by how much the target's best logit leads there."""
    place = next(i for i, (a, b) in enumerate(itertools.zip_longest(ids, want)) if a != b)
    return {"place": place, "margin": arm.margins[place] if place < len(ids) else None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--file", type=Path, help="the GGUF file; default: where `make smollm2` put it"
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--drafters", default="none,max-gram:6")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--speeds", action="store_true")
    parser.add_argument("--out")
    args = parser.parse_args()

    import torch
    import transformers
    from transformers import AutoModelForCausalLM, GgufConfig

    path = (args.file or smollm2.find()).resolve()
    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    target = sd.load_target(path, dtype="float32")
    record: dict[str, Any] = {
        "machine": machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "file": path.name,
        "weights": compare_weights(path, model),
        "tokenizer": compare_tokens(path, target.tokenizer, args.data, 200),
    }
    print(record["weights"], record["tokenizer"], file=sys.stderr, flush=True)

    arms: dict[str, Any] = {"transformers": Transformers(model, args.max_new_tokens)}
    if args.speeds:
        arms["transformers prompt lookup"] = Transformers(model, args.max_new_tokens, 10)
    ours = args.drafters.split(",")
    arms |= {name: Ours(target, name, args.max_new_tokens) for name in ours}
    questions = lines(args.data / "spec_bench/question.jsonl")
    rows = []
    for place in np.linspace(0, len(questions) - 1, args.prompts).astype(int):
        messages: list[dict[str, str]] = []
        for turn, text in enumerate(questions[place]["turns"], 1):
            messages.append({"role": "user", "content": text})
            prompt = chat_ids(target.tokenizer, messages)
            for name in ours if args.speeds else ():
                arms[name].run(prompt)
            answers = {name: arm.run(prompt) for name, arm in arms.items()}
            want = answers["transformers"][0]
            row = {
                "question": questions[place]["question_id"],
                "turn": turn,
                "prompt_tokens": len(prompt),
                "tokens": len(want),
                "equal": {name: ids == want for name, (ids, _) in answers.items()},
                "smallest_margin": min(arms[ours[0]].margins),
                "differences": {
                    name: difference(arms[name], answers[name][0], want)
                    for name in ours
                    if answers[name][0] != want
                },
            }
            if args.speeds:
                row["seconds"] = {name: round(s, 3) for name, (_, s) in answers.items()}
            rows.append(row)
            print(rows[-1], file=sys.stderr, flush=True)
            said = target.tokenizer.decode(want, skip_special_tokens=True)
            messages.append({"role": "assistant", "content": said})
    record |= {
        "answers": len(rows),
        "max_new_tokens": args.max_new_tokens,
        "equal": {name: sum(row["equal"][name] for row in rows) for name in arms},
    }
    if args.speeds:
        record["tokens_per_second"] = {
            name: round(statistics.median(row["tokens"] / row["seconds"][name] for row in rows), 2)
            for name in arms
        }
    record["rows"] = rows
    print({key: value for key, value in record.items() if key != "rows"})
    if args.out:
        write_json(args.out, record)


if __name__ == "__main__":
    main()
