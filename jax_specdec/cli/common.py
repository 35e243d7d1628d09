"""Arguments and steps that several commands share."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_specdec.errors import UserError

if TYPE_CHECKING:
    from jax_specdec.checkpoints.targets import Target
    from jax_specdec.specs.build import LoadedDrafter

DTYPES = ("float32", "bfloat16", "float16")
DEMO_TARGET = Path(__file__).parents[2] / "checkpoints/demo/target"


def add_model(parser: argparse.ArgumentParser) -> None:
    """`--model` and `--dtype`."""
    parser.add_argument(
        "--model",
        metavar="DIR",
        help="checkpoint folder, or a model id of the Hugging Face hub (default: the embedded demo)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of parameters and computation (default: the checkpoint's; float32 on CPU)",
    )


def add_drafter(parser: argparse.ArgumentParser) -> None:
    """`--drafter` and `--draft`."""
    parser.add_argument(
        "--drafter",
        metavar="SPEC",
        default="auto",
        help="none, lm, glide, medusa, max-gram, prompt-lookup or bigram, with a draft length after a colon, "
        "as in lm:4; lm and glide also with an expansion, cape, fixed, path, tree or beam, and its nodes, as "
        "in lm:4+cape:16, medusa with cape, fixed, path or its own, static (default: the fastest measured for "
        "the model, else prompt-lookup)",
    )
    parser.add_argument(
        "--draft",
        metavar="NAME=DIR",
        action="append",
        default=[],
        help="where a drafter's checkpoint is (default: the folder NAME beside the model)",
    )


def model_source(args: argparse.Namespace) -> str | Path:
    """What `--model` names, or the embedded checkpoint.

    Raises:
      UserError: the package came without it.
    """
    if args.model is not None:
        return args.model
    if not (DEMO_TARGET / "config.json").is_file():
        raise UserError(
            f"There is no embedded checkpoint at {DEMO_TARGET}: name a model with --model."
        )
    return DEMO_TARGET


def draft_folders(items: Sequence[str]) -> dict[str, Path]:
    """`NAME=DIR` arguments as a dictionary."""
    from jax_specdec.specs.build import parse_drafter
    from jax_specdec.specs.language import WITH_CHECKPOINT

    folders = {}
    for item in items:
        name, equals, folder = item.partition("=")
        if not (name and equals and folder):
            raise UserError(f"--draft takes NAME=DIR, as in lm=checkpoints/demo/lm, not {item!r}.")
        spec = parse_drafter(name)
        if str(spec) != spec.name or spec.kind not in WITH_CHECKPOINT:
            *some, last = WITH_CHECKPOINT
            raise UserError(
                f"--draft {item}: {name!r} has no checkpoint; {', '.join(some)} and {last} have one."
            )
        folders[name] = Path(folder).expanduser()
    return folders


def choose_drafter(args: argparse.Namespace, model: Path, folders: dict[str, Path]) -> str:
    """The specification that `--drafter auto` stands for, or the given one, checked."""
    from jax_specdec.specs.build import parse_drafter
    from jax_specdec.specs.defaults import default_spec

    if args.drafter != "auto":
        parse_drafter(args.drafter)
        return args.drafter
    return next(iter(folders), None) or default_spec(model)


def load(args: argparse.Namespace) -> "tuple[Target, LoadedDrafter]":
    """The target and the drafter that the arguments name; cheap mistakes fail first."""
    from jax_specdec.checkpoints.targets import find_checkpoint, load_target
    from jax_specdec.specs.build import load_drafter

    folders = draft_folders(args.draft)
    if args.drafter != "auto":
        choose_drafter(args, Path(), folders)
    folder = find_checkpoint(model_source(args))
    spec = choose_drafter(args, folder, folders)
    target = load_target(folder, dtype=args.dtype)
    return target, load_drafter(spec, target, drafts=folders)


def say(message: str) -> None:
    """A message to standard error: standard output is for results."""
    print(message, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """One JSON object as one line."""
    print(json.dumps(value), flush=True)


def gib(size: int) -> str:
    """Bytes for reading."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"
