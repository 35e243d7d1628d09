"""`train regenerate`: what a target or its drafter writes, as training data for drafters."""

import argparse
import json
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from jax_specdec.cli import common
from jax_specdec.errors import UserError
from jax_specdec.text.jsonl import read_jsonl
from jax_specdec.text.prompts import read_prompts


def register(kinds: Any) -> None:
    parser = kinds.add_parser(
        "regenerate",
        help="text to train drafters on, as a target or a drafter writes it",
        description="Answers a prompt file and writes one document per prompt, prompt and answer together, "
        "to train drafters on: what the target writes (sequence-level distillation, arXiv 1606.07947), "
        "or what the drafter does (on-policy data, arXiv 2310.08461).",
        examples=(
            "--model DIR --prompts FILE --out WRITTEN",
            "--prompts FILE --out WRITTEN --temperature 0 --temperature 0.7 --resume",
        ),
    )
    group = common.model_group(parser)
    common.add_model(group)
    common.add_drafter(group)
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        required=True,
        help='JSONL of {"id", "prompt"}, or of {"id", "messages"} (a chat, in the chat template)',
    )
    parser.add_argument("--out", metavar="FILE", required=True, help="JSONL to write")
    parser.add_argument(
        "--resume", action="store_true", help="keep what OUT holds and go on behind it"
    )
    parser.add_argument(
        "--writer",
        choices=("target", "drafter"),
        default="target",
        help="drafter: every token that --drafter (lm or glide) proposes becomes text, right or wrong",
    )
    for flag, default, text in (
        ("--max-new-tokens", 160, "the longest answer"),
        ("--keep-last", 256, "tokens of each prompt, of a chat in its template, too"),
        ("--batch-size", 32, "prompts at a time"),
        ("--seed", 0, "of sampled text"),
    ):
        text = f"{text} (default: {default})"
        parser.add_argument(flag, type=int, default=default, metavar="N", help=text)
    parser.add_argument(
        "--temperature",
        type=float,
        action="append",
        metavar="X",
        help="0, the default, is greedy; given several times, the prompts take them in turn",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.keep_last < 1 or args.batch_size < 1:
        raise UserError("--keep-last and --batch-size must be at least 1.")
    records = read_prompts(args.prompts, chats=True)
    temperatures = list(islice(cycle(args.temperature or [0.0]), len(records)))
    out = Path(args.out)
    done = _written(out, args.resume)
    if done > len(records):
        raise UserError(
            f"{out} holds {done} documents and {args.prompts} only {len(records)} prompts."
        )

    from jax_specdec.core.sampling import make_sampling
    from jax_specdec.pipeline import SpeculativeDecoder

    make_sampling(
        len(records), max_new_tokens=args.max_new_tokens, temperature=temperatures, seed=args.seed
    )
    from tqdm.auto import tqdm

    target, drafter = common.load(args)
    if args.writer == "drafter":
        from jax_specdec.training.on_policy import unverified

        rule = unverified(drafter.drafter)
        decoder = SpeculativeDecoder(target, drafter, rule=rule, budget=False)
    else:
        decoder = SpeculativeDecoder(target, drafter)
    todo = records[done:]
    if not todo:
        common.say(f"{out} is complete: {done} documents.")
        return 0
    prompts = [
        decoder.encode(record.messages or record.prompt)[-args.keep_last :] for record in todo
    ]
    answers = decoder.generate(
        prompts,
        max_new_tokens=args.max_new_tokens,
        temperature=temperatures[done:],
        # A seed of its own for each prompt: a resumed run writes what an uninterrupted one would.
        seed=[(args.seed + index) % 2**32 for index in range(done, len(records))],
        own_seed=True,
        batch_size=min(args.batch_size, len(todo)),
        ids=[record.id for record in todo],
        progress=False,  # there is a bar of prompts
    )
    tokens = 0
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") as file:
        bar = tqdm(total=len(records), initial=done, unit="prompt")
        for record, prompt, answer in zip(todo, prompts, answers, strict=True):
            text = target.tokenizer.decode(prompt) if record.messages else record.prompt
            document = {
                "id": record.id,
                "text": text + answer.text,
                "token_ids": prompt + answer.token_ids,
            }
            file.write(json.dumps(document, ensure_ascii=False) + "\n")
            file.flush()
            tokens += len(answer.token_ids)
            bar.update()
        bar.close()
    common.say(f"Wrote {out}: {len(todo)} answers, {tokens:,} tokens.")
    return 0


def _written(out: Path, resume: bool) -> int:
    """Documents that OUT holds already; a last line that was cut off is taken away."""
    if not out.exists():
        return 0
    if not resume:
        raise UserError(f"{out} exists: pass --resume to go on behind it, or name another file.")
    content = out.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        out.write_bytes(whole)
    return sum(1 for _ in read_jsonl(out))
