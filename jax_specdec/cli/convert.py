"""`convert`: a checkpoint in another dtype or other shards."""

import argparse
from typing import Any

from jax_specdec.cli import common
from jax_specdec.errors import UserError


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "convert",
        help="write a checkpoint in another dtype or other shards",
        description="Writes a checkpoint again, in another dtype or other shards.",
    )
    parser.add_argument("source", metavar="SRC", help="checkpoint folder or hub id")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument("--dtype", choices=common.DTYPES, help="default: as it is")
    parser.add_argument(
        "--max-shard-mb", type=float, default=2000.0, metavar="MB", help="default: 2000"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if not 0 < args.max_shard_mb < 10**9:
        raise UserError(f"--max-shard-mb must be above 0, got {args.max_shard_mb}.")
    from jax_specdec.checkpoints import convert

    convert(args.source, args.out, dtype=args.dtype, max_shard_bytes=int(args.max_shard_mb * 10**6))
    common.say(f"Wrote {args.out}.")
    return 0
