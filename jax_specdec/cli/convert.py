"""`convert`: a checkpoint in another dtype or other shards, or a drafter of another project."""

import argparse
from typing import Any

from jax_specdec.cli import common
from jax_specdec.errors import UserError


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "convert",
        help="write a checkpoint in another dtype or other shards, or import a drafter",
        description="Writes a checkpoint again, in another dtype or other shards. With --target it reads a "
        "drafter of the GliDe or LongSpec projects, and writes it for --drafter glide, or Medusa heads, and "
        "writes them for --drafter medusa.",
    )
    parser.add_argument("source", metavar="SRC", help="checkpoint folder or hub id")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument("--dtype", choices=common.DTYPES, help="default: as it is")
    parser.add_argument(
        "--max-shard-mb", type=float, default=2000.0, metavar="MB", help="default: 2000"
    )
    parser.add_argument("--target", metavar="DIR", help="import a drafter for this target")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if not 0 < args.max_shard_mb < 10**9:
        raise UserError(f"--max-shard-mb must be above 0, got {args.max_shard_mb}.")
    shard = int(args.max_shard_mb * 10**6)
    if args.target is None:
        from jax_specdec.checkpoints.targets import convert

        convert(args.source, args.out, dtype=args.dtype, max_shard_bytes=shard)
    else:
        import_drafter(args, shard)
    common.say(f"Wrote {args.out}.")
    return 0


def import_drafter(args: argparse.Namespace, max_shard_bytes: int) -> None:
    from jax_specdec.checkpoints.glide import save_glide
    from jax_specdec.checkpoints.import_glide import import_glide
    from jax_specdec.checkpoints.import_medusa import import_medusa, is_medusa
    from jax_specdec.checkpoints.medusa import save_medusa
    from jax_specdec.checkpoints.target_bound import target_fingerprint
    from jax_specdec.checkpoints.targets import find_checkpoint, load_target

    source, target = find_checkpoint(args.source), load_target(args.target, tokenizer=False)
    fingerprint = target_fingerprint(target.path)
    dtype, shard = args.dtype or "bfloat16", max_shard_bytes
    if is_medusa(source):
        heads, params = import_medusa(source, target)
        save_medusa(args.out, heads, params, fingerprint, dtype=dtype, max_shard_bytes=shard)
    else:
        model, params = import_glide(source, target)
        save_glide(args.out, model, params, fingerprint, dtype=dtype, max_shard_bytes=shard)
