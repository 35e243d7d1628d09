"""`demo`: plain and speculative decoding side by side."""

import argparse
from typing import Any

from jax_specdec.cli import common


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="plain and speculative decoding side by side",
        description="Decodes a few built-in prompts plainly and speculatively, shows who proposed each "
        "token, checks that both give the same text, and compares the speeds.",
        examples=("", "--drafter lm:5+cape:16", "--drafter max-gram:6 --max-new-tokens 64"),
    )
    group = common.model_group(parser)
    common.add_model(group)
    common.add_drafter(group)
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: 128")
    parser.add_argument(
        "--chat",
        action="store_true",
        help="questions in the model's chat template (default for smollm2)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per prompt")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    common.at_least_one(args, "max_new_tokens")
    from jax_specdec.checkpoints import smollm2
    from jax_specdec.demo import PROMPTS, chat_prompts, run_demo

    target, drafter = common.load(args)
    prompts = PROMPTS
    if args.chat or args.model == smollm2.NAME:
        prompts = chat_prompts(target.tokenizer)
    options = {"max_new_tokens": args.max_new_tokens, "as_json": args.json, "prompts": prompts}
    return run_demo(target, drafter, **options)
