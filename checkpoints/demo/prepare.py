"""Writes the demo's `train.jsonl`, `heldout.jsonl` and prompt files from a folder of public data sets.

    python checkpoints/demo/prepare.py DATA OUT

DATA holds gsm8k/{train,test}.jsonl, tinystories/stories.jsonl, mbpp/mbpp.jsonl, books/books.jsonl.gz
and spec_bench/question.jsonl. The last 500 stories, MBPP tasks above 400, every GSM8K test problem and
Spec-Bench stay out of the training text; their prompts are written to `prompts/`, with the beginnings of
the training texts as `train`.
"""

import argparse
import gzip
import json
import random
from pathlib import Path

BOOK_SHARE = 0.05  # of the training characters
HELDOUT_EVERY = 50  # one document in so many is held out of training


def read(path: Path) -> list[dict]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def problem(record: dict) -> str:
    return f"Question: {record['question'].strip()}\nAnswer: {record['answer'].strip()}"


def task(record: dict) -> str:
    code = record["code"].replace("\r\n", "\n").replace("\t", "    ").strip()
    return f"Task: {record['text'].strip()}\nCode:\n{code}"


def opening(story: str, words: int = 24) -> str:
    return " ".join(story.split(" ")[:words])


def beginning(text: str, rng: random.Random) -> str:
    """What a model would be asked to continue so as to write such a text."""
    for mark in ("\nAnswer:", "\nCode:\n"):
        if mark in text:
            return text.partition(mark)[0] + mark
    return opening(text, rng.randrange(4, 32))


def held_out_prompts(data: Path) -> dict[str, list[str]]:
    """Prompts by data set, from the splits that are not trained on."""
    question = "Question: {}\nAnswer:"
    stories = read(data / "tinystories/stories.jsonl")[-500:]
    return {
        "gsm8k": [
            question.format(row["question"].strip()) for row in read(data / "gsm8k/test.jsonl")
        ],
        "mbpp": [
            f"Task: {row['text'].strip()}\nCode:\n"
            for row in read(data / "mbpp/mbpp.jsonl")
            if row["task_id"] > 400
        ],
        "stories": [opening(row["text"].strip()) for row in stories],
        "spec_bench": [row["turns"][0] for row in read(data / "spec_bench/question.jsonl")],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    rng = random.Random(0)

    texts = [row["text"].strip() for row in read(args.data / "tinystories/stories.jsonl")[:-500]]
    texts += [problem(row) for row in read(args.data / "gsm8k/train.jsonl")]
    mbpp = read(args.data / "mbpp/mbpp.jsonl")
    texts += [task(row) for row in mbpp if row["task_id"] <= 400]
    rng.shuffle(texts)
    heldout, train = texts[::HELDOUT_EVERY], []
    for index, text in enumerate(texts):
        if index % HELDOUT_EVERY:
            train.append(text)

    with gzip.open(args.data / "books/books.jsonl.gz", "rt", encoding="utf-8") as lines:
        books = [json.loads(line)["text"] for line in lines]
    wanted = int(sum(map(len, train)) * BOOK_SHARE / (1 - BOOK_SHARE))
    while wanted > 0:
        book = rng.choice(books)
        start = rng.randrange(max(1, len(book) - 2000))
        passage = book[start : start + 2000].partition(". ")[2].strip()
        train.append(passage)
        wanted -= len(passage)
    rng.shuffle(train)

    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("heldout", heldout)):
        with (args.out / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for text in rows:
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        print(f"{name}: {len(rows)} documents, {sum(map(len, rows)):,} characters")

    folder = args.out / "prompts"
    folder.mkdir(exist_ok=True)
    # For `train regenerate`: beginnings of training documents.
    prompts_of = {**held_out_prompts(args.data), "train": [beginning(t, rng) for t in train]}
    for name, prompts in prompts_of.items():
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for index, prompt in enumerate(prompts):
                record = {"id": f"{name}/{index}", "prompt": prompt}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        print(f"prompts/{name}: {len(prompts)} prompts")


if __name__ == "__main__":
    main()
