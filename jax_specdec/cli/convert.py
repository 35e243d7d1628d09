"""`convert`: a checkpoint in another dtype, other shards or no longer quantized, or another project's drafter."""

import argparse
from pathlib import Path
from typing import Any

from jax_specdec.cli import common
from jax_specdec.errors import UserError


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "convert",
        help="a checkpoint in another dtype or other shards; imports drafters",
        description="Writes a checkpoint again as safetensors, in another dtype or other shards; GGUF files, FP8, GPTQ "
        "and AWQ as the numbers that they stand for. With --target it reads a "
        "drafter of another project, whichever kind of drafter it is for, and writes it for --drafter.",
        examples=("DIR OUT --dtype bfloat16", "HEADS OUT --target DIR"),
    )
    parser.add_argument("source", metavar="SRC", help="checkpoint folder, GGUF file or hub id")
    parser.add_argument(
        "out",
        metavar="OUT",
        help="folder to write, without a checkpoint in it; SRC itself is replaced once all is written",
    )
    parser.add_argument(
        "--dtype", choices=common.DTYPES, help="of what is written (default: as it is)"
    )
    parser.add_argument(
        "--max-shard-mb",
        type=float,
        default=2000.0,
        metavar="MB",
        help="the largest file (default: 2000)",
    )
    parser.add_argument("--target", metavar="DIR", help="import a drafter for this target")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if not 0 < args.max_shard_mb < 10**9:
        raise UserError(f"--max-shard-mb must be above 0, got {args.max_shard_mb}.")
    shard = int(args.max_shard_mb * 10**6)
    out = Path(args.out)
    if _holds_checkpoint(out) and not _same(Path(args.source), out):
        raise UserError(
            f"{out} holds a checkpoint already: name another folder, or remove it first."
        )
    if args.target is None:
        from jax_specdec.checkpoints.targets import convert

        convert(args.source, args.out, dtype=args.dtype, max_shard_bytes=shard)
    else:
        import_drafter(args, shard)
    common.say(f"Wrote {args.out}.")
    return 0


def _holds_checkpoint(folder: Path) -> bool:
    names = ("config.json", "*.safetensors", "*.gguf")
    return any(next(folder.glob(name), None) is not None for name in names)


def _same(source: Path, out: Path) -> bool:
    folder = source.parent if source.is_file() else source
    return folder.exists() and folder.samefile(out)


def import_drafter(args: argparse.Namespace, max_shard_bytes: int) -> None:
    from jax_specdec.checkpoints.hub import find_checkpoint
    from jax_specdec.checkpoints.targets import load_target
    from jax_specdec.drafters import registry

    source, target = find_checkpoint(args.source), load_target(args.target, tokenizer=False)
    given = registry.Foreign(source, target, args.out, args.dtype or "bfloat16", max_shard_bytes)
    able = [kind for kind in registry.kinds() if kind.adopt is not None]
    if not any(kind.adopt is not None and kind.adopt(given) for kind in able):
        known = registry.listed([f"--drafter {kind.name}" for kind in able], "or")
        raise UserError(f"{source} holds no drafter that can be imported for {known}.")
