"""`tune`: measure costs and acceptance, and choose draft lengths from them."""

import argparse
import json
from pathlib import Path
from typing import Any

from jax_specdec.cli import common
from jax_specdec.errors import UserError


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "tune",
        help="choose draft lengths and budgets from measured costs and acceptance",
        description="Measures the cost of verifying T nodes, of drafting, and acceptance on real "
        "prompts; chooses each drafter's length, its nodes with an expansion, and the default drafter.",
    )
    common.add_model(parser)
    parser.add_argument(
        "--drafters",
        metavar="A,B,...",
        help="drafters to tune, with an expansion (`lm+path`) or without, and `cascade` for the best cascade "
        "of them (default: all drafters that there are)",
    )
    parser.add_argument("--draft", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument(
        "--prompts", action="append", required=True, metavar="FILE.jsonl", help="repeatable"
    )
    parser.add_argument("--per-file", type=int, default=8, metavar="N", help="prompts of each file")
    parser.add_argument("--longest", type=int, default=12, metavar="N", help="lengths up to this")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N")
    parser.add_argument(
        "--out", metavar="FILE.json", help="default: draft_lengths.json beside the model's folder"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from jax_specdec.checkpoints.targets import load_target
    from jax_specdec.specs import language as specs
    from jax_specdec.specs.build import available_drafters, load_drafter, parse_drafter
    from jax_specdec.specs.defaults import LENGTHS_FILE
    from jax_specdec.text.prompts import read_prompts
    from jax_specdec.tuning.tune import tune

    for name in ("per_file", "longest", "max_new_tokens", "batch_size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1.")
    wanted = specs.split(args.drafters) if args.drafters else []
    names = [parse_drafter(name).key for name in wanted]
    folders = common.draft_folders(args.draft)
    prompts = [
        record.prompt for path in args.prompts for record in read_prompts(path)[: args.per_file]
    ]
    target = load_target(common.model_source(args), dtype=args.dtype)
    found = tune(
        target,
        lambda spec: load_drafter(spec, target, drafts=folders),
        names or available_drafters(target, folders),
        prompts,
        longest=args.longest,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        report=common.say,
    )
    out = Path(args.out) if args.out else target.path.parent / LENGTHS_FILE
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    common.say(f"default {found['default']}; wrote {out}")
    return 0
