"""SmolLM2 from its GGUF file against transformers: weights, token ids, greedy answers, and what they cost.

    python benchmarks/smollm2_identity.py --data DATA --out benchmarks/results/smollm2_identity.json

DATA holds `spec_bench/question.jsonl`, whose questions are asked in the chat template, the second turn behind the
answer to the first, and the other sets of `checkpoints/demo/prepare.py`, for texts. With `--speeds`, on a quiet machine,
the arms take turns, prompt by prompt, after a run that compiles, and prompt lookup of transformers is one of them.
"""

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from _common import lines, machine, write_json

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


class Transformers:
    """`generate` of transformers on PyTorch, on the dequantized file; with prompt lookup where `lookup` is not 0."""

    def __init__(self, model: Any, target: sd.Target, tokens: int, lookup: int = 0):
        self.model, self.ends, self.tokens = model, target.config.eos_ids, tokens
        self.options = {"prompt_lookup_num_tokens": lookup} if lookup else {}

    def run(self, prompts: list[list[int]]) -> tuple[list[list[int]], float]:
        import torch

        width = max(map(len, prompts))
        inputs = torch.full((len(prompts), width), self.ends[0])
        mask = torch.zeros_like(inputs)
        for row, ids in enumerate(prompts):
            inputs[row, width - len(ids) :], mask[row, width - len(ids) :] = torch.tensor(ids), 1
        began = time.perf_counter()
        with torch.inference_mode():
            out = self.model.generate(
                inputs,
                attention_mask=mask,
                max_new_tokens=self.tokens,
                do_sample=False,
                pad_token_id=self.ends[0],
                **self.options,
            )
        seconds = time.perf_counter() - began
        return [self.whole(row) for row in out[:, width:].tolist()], seconds

    def whole(self, ids: list[int]) -> list[int]:
        """Without what stands behind the end of the text."""
        ends = [i for i, token in enumerate(ids) if token in self.ends]
        return ids[: ends[0] + 1] if ends else ids


class Ours:
    """Speculative or plain decoding; `margins` are those of the last run, by row."""

    def __init__(self, target: sd.Target, drafter: str, tokens: int):
        self.decoder = sd.SpeculativeDecoder(target, sd.load_drafter(drafter, target), margins=True)
        self.tokens, self.margins = tokens, [[0.0]]

    def run(self, prompts: list[list[int]]) -> tuple[list[list[int]], float]:
        began = time.perf_counter()
        out = self.decoder(prompts, batch_size=len(prompts), max_new_tokens=self.tokens)
        self.margins = [answer.margins for answer in out]
        return [answer.token_ids for answer in out], time.perf_counter() - began


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


def difference(margins: list[float], ids: list[int], want: list[int]) -> dict[str, Any]:
    """Where an answer leaves another, and by how much the target's best logit leads there."""
    place = next(i for i, (a, b) in enumerate(itertools.zip_longest(ids, want)) if a != b)
    return {"place": place, "margin": margins[place] if place < len(ids) else None}


def compare_answers(
    arms: dict[str, Any], jobs: list[dict[str, Any]], warm: bool
) -> list[dict[str, Any]]:
    """Some prompts at once through every arm; one record a prompt, the first arm's answer in it."""
    prompts = [job["prompt"] for job in jobs]
    ours = [name for name, arm in arms.items() if isinstance(arm, Ours)]
    for name in ours if warm else ():
        arms[name].run(prompts)
    answers = {name: arm.run(prompts) for name, arm in arms.items()}
    rows = []
    for i, job in enumerate(jobs):
        want = answers["transformers"][0][i]
        got = {name: answers[name][0][i] for name in arms}
        margins = {name: arms[name].margins[i] for name in ours}
        rows.append(
            {
                "question": job["question"],
                "turn": job["turn"],
                "prompt_tokens": len(job["prompt"]),
                "tokens": len(want),
                "equal": {name: ids == want for name, ids in got.items()},
                "smallest_margin": min(margins[ours[0]]),
                "differences": {
                    name: difference(margins[name], got[name], want)
                    for name in ours
                    if got[name] != want
                },
                "answer": want,
            }
        )
        if warm:
            rows[-1]["seconds"] = {name: round(s, 3) for name, (_, s) in answers.items()}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--file", type=Path, help="the GGUF file; default: where `make smollm2` put it"
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--drafters", default="none,max-gram:6")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8, help="prompts decoded at once")
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

    arms: dict[str, Any] = {"transformers": Transformers(model, target, args.max_new_tokens)}
    if args.speeds:
        arms["transformers prompt lookup"] = Transformers(model, target, args.max_new_tokens, 10)
    arms |= {name: Ours(target, name, args.max_new_tokens) for name in args.drafters.split(",")}
    questions = lines(args.data / "spec_bench/question.jsonl")
    asked = [questions[i] for i in np.linspace(0, len(questions) - 1, args.prompts).astype(int)]
    rows: list[dict[str, Any]] = []
    chats = {question["question_id"]: [] for question in asked}
    for turn in (1, 2):
        jobs = []
        for question in asked:
            if len(question["turns"]) >= turn:
                chat = chats[question["question_id"]]
                chat.append({"role": "user", "content": question["turns"][turn - 1]})
                job = {"question": question["question_id"], "turn": turn}
                jobs.append({**job, "prompt": chat_ids(target.tokenizer, chat)})
        jobs.sort(key=lambda job: len(job["prompt"]))
        size = 1 if args.speeds else args.batch
        for start in range(0, len(jobs), size):
            for row in compare_answers(arms, jobs[start : start + size], args.speeds):
                said = target.tokenizer.decode(row.pop("answer"), skip_special_tokens=True)
                chats[row["question"]].append({"role": "assistant", "content": said})
                rows.append(row)
                print(row, file=sys.stderr, flush=True)
            whole = {**record, **summary(arms, rows, args), "rows": rows}
            if args.out:
                write_json(args.out, whole, quiet=True)
    print({key: value for key, value in whole.items() if key != "rows"})


def summary(
    arms: dict[str, Any], rows: list[dict[str, Any]], args: argparse.Namespace
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "answers": len(rows),
        "max_new_tokens": args.max_new_tokens,
        "equal": {name: sum(row["equal"][name] for row in rows) for name in arms},
    }
    if args.speeds:
        found["tokens_per_second"] = {
            name: round(statistics.median(row["tokens"] / row["seconds"][name] for row in rows), 2)
            for name in arms
        }
    return found


if __name__ == "__main__":
    main()
