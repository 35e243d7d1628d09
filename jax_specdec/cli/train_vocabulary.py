"""`train vocabulary`."""

import argparse
from pathlib import Path
from typing import Any

from jax_specdec.cli import common


def register(kinds: Any) -> None:
    parser = kinds.add_parser(
        "vocabulary",
        help="the tokens that a drafter may propose, for a smaller head",
        description="Counts the tokens of a text, preferably one that the target wrote, and writes the most frequent "
        "ones into a drafter's folder as draft_vocabulary.json. The drafter's head then has these rows only, which "
        "changes no text: whatever it cannot propose, the target says itself. Delete the file to go back.",
        examples=(
            "DRAFTER --target DIR --data WRITTEN",
            "DRAFTER --target DIR --data WRITTEN --size 4096",
        ),
    )
    parser.add_argument(
        "drafter", metavar="DRAFTER", help="folder of a drafter: lm, glide or medusa"
    )
    parser.add_argument(
        "--target", metavar="DIR", required=True, help="its target's checkpoint folder or hub id"
    )
    parser.add_argument(
        "--data",
        metavar="FILE",
        action="append",
        required=True,
        help='JSONL of {"text"} or {"token_ids"}',
    )
    parser.add_argument(
        "--size",
        type=int,
        metavar="N",
        help="tokens that it keeps (default: 8192, or half of a small vocabulary)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from jax_specdec.training.api import train_vocabulary

    path, covered = train_vocabulary(
        args.target, [Path(file) for file in args.data], drafter=args.drafter, size=args.size
    )
    common.say(f"Wrote {path}: it covers {covered:.1%} of the text.")
    return 0
