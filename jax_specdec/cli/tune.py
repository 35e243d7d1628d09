"""`tune`: measure costs and acceptance, and choose draft lengths from them."""

import argparse
from pathlib import Path
from typing import Any

from jax_specdec.cli import common
from jax_specdec.errors import UserError


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "tune",
        help="choose draft lengths from measured costs and acceptance",
        description="Measures the cost of verifying T nodes, of drafting, and acceptance on real "
        "prompts; chooses each drafter's length, its nodes with an expansion, and the default drafter.",
        examples=(
            "--prompts FILE",
            "--model DIR --drafters lm,max-gram,first --prompts FILE --batch-size 8",
        ),
    )
    common.add_model(parser)
    parser.add_argument(
        "--drafters",
        metavar="A,B,...",
        help="drafters to tune, by name, with an expansion (`lm+path`) or without, `cascade` for the best "
        "cascade of them (a `first` where that is as fast), and `first` for the best of copying and a model behind it (default: "
        "all drafters that there are, and `first` where a model is among them)",
    )
    parser.add_argument(
        "--draft",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="where a drafter's checkpoint is (default: the folder NAME beside the model)",
    )
    parser.add_argument(
        "--prompts",
        action="append",
        required=True,
        metavar="FILE",
        help='JSONL of {"id", "prompt"}, of text as it will be met, or of {"id", "messages"} (a chat, in the chat '
        "template); may be given several times",
    )
    for flag, default, text in (
        ("--per-file", 8, "prompts of each file"),
        ("--longest", 15, "tokens of a draft, at most"),
        ("--max-new-tokens", 64, "the longest answer"),
        ("--batch-size", 1, "prompts at a time"),
    ):
        text = f"{text} (default: {default})"
        parser.add_argument(flag, type=int, default=default, metavar="N", help=text)
    common.add_int8(parser)
    common.add_keep_programs(parser)
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="what was measured for other models, devices, dtypes, batch sizes and parts in int8 is kept there (default: "
        "draft_lengths.json beside the model's folder; for a model of the hub, in the user's cache)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from jax_specdec.checkpoints.targets import load_target
    from jax_specdec.doctor import writable
    from jax_specdec.loading import keep_compiled
    from jax_specdec.specs.build import Drafters, check_taken
    from jax_specdec.specs.defaults import add_record, lengths_file, read_records
    from jax_specdec.specs.language import split
    from jax_specdec.text.prompts import read_prompts
    from jax_specdec.tuning.tune import check_names, tune

    for name in ("per_file", "longest", "max_new_tokens", "batch_size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1.")
    names = split(args.drafters) if args.drafters else []
    check_names(names)  # before anything is loaded
    folders = common.draft_folders(args.draft)
    prompts = [
        record.messages or record.prompt
        for path in args.prompts
        for record in read_prompts(path, chats=True)[: args.per_file]
    ]
    if common.keeps_programs(args):
        keep_compiled()
    target = load_target(common.model_source(args), dtype=args.dtype, int8=args.int8)
    options = {"batch_size": args.batch_size, "int8": args.draft_int8}
    drafters = Drafters(target, drafts=folders, **options)
    names = names or _all_of(drafters)
    check_taken([spec.name for spec in check_names(names)[0]], args.draft_int8)
    out = Path(args.out) if args.out else lengths_file(drafters.home)
    read_records(out)  # before an hour of measuring
    place = writable("tune", "The measurements are kept in", out.parent)
    if place.state == "fail":
        raise UserError(f"{place.text}: name another file with --out.")
    found = tune(
        target,
        drafters,
        names,
        prompts,
        longest=args.longest,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
        report=common.say,
    )
    if args.draft_int8:
        found["draft_int8"] = list(args.draft_int8)
    add_record(out, found)
    common.say(f"default {found['default']}; wrote {out}")
    return 0


def _all_of(drafters: Any) -> list[str]:
    """What is tuned where nothing is named."""
    from jax_specdec.drafters import registry
    from jax_specdec.specs.language import FIRST

    names = drafters.available()
    models = any(registry.of(name).distribution for name in names)
    return [*names, FIRST] if models else names
