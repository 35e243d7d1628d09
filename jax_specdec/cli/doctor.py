"""`doctor`: what this machine has for decoding, and what would go wrong."""

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from jax_specdec.cli import common, info
from jax_specdec.errors import UserError

if TYPE_CHECKING:
    from jax_specdec.doctor import Finding

COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="what this machine has, and what would go wrong",
        description="Looks at versions, devices, kernels, cache folders, memory, the demo, and a model with its "
        "drafters, of which it reads headers alone. Ends with status 1 where something fails.",
        examples=("", "--model DIR --batch-size 8", "--json"),
    )
    common.add_model(parser)
    common.add_int8(parser)
    parser.add_argument(
        "--draft",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="where a drafter's checkpoint is (default: the folder NAME beside the model)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=1, metavar="N", help="rows at a time (default: 1)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run, drafter="auto", context=None, max_new_tokens=128)


def run(args: argparse.Namespace) -> int:
    common.at_least_one(args, "batch_size")
    from jax_specdec.doctor import examine

    found = []
    for finding in examine(args.model, lambda: _describe(args)):
        found.append(finding)
        if not args.json:
            _show(finding)
    failed = any(finding.state == "fail" for finding in found)
    if args.json:
        common.print_json({"ok": not failed, "findings": [dataclasses.asdict(f) for f in found]})
    return int(failed)


def _describe(args: argparse.Namespace) -> dict[str, Any]:
    """`info.describe` with every drafter that the model has, what is wrong with it, and why `auto` takes its own."""
    from jax_specdec.loading import choose_drafter

    target, stored, drafters = info.open_headers(args)
    found = info.describe(args, target, stored, drafters)
    found["drafters"] = {}
    for name in drafters.available():
        request = drafters.request(name)
        try:
            request.kind.make(request)
            wrong = ""
        except UserError as error:
            wrong = str(error)
        found["drafters"][name] = wrong
    found["reason"] = choose_drafter(drafters.setting, common.draft_folders(args.draft))[1]
    return found


def _show(finding: "Finding") -> None:
    """A line of a table that grows; a remedy gets a line of its own."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 1))
    for width in (4, 8):
        table.add_column(width=width, no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row(Text(finding.state, COLOURS[finding.state]), finding.part, Text(finding.text))
    if finding.remedy:
        table.add_row("", "", Text(f"-> {finding.remedy}", "bold"))
    Console(highlight=False).print(table)
