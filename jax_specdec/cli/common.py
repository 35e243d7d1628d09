"""Arguments and steps that several commands share."""

import argparse
import contextlib
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_specdec.checkpoints.dtypes import DTYPES
from jax_specdec.checkpoints.int8 import PARTS
from jax_specdec.errors import UserError, shown

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from jax_specdec.checkpoints.targets import Target
    from jax_specdec.specs.build import LoadedDrafter
    from jax_specdec.specs.language import Spec


def model_group(parser: argparse.ArgumentParser) -> Any:
    """The group of help in which `--model` and what belongs to it stand."""
    return parser.add_argument_group("the model and its drafter")


def add_model(parser: Any) -> None:
    """`--model` and `--dtype`, to a parser or a group."""
    parser.add_argument(
        "--model",
        metavar="DIR",
        help="checkpoint folder, GGUF file, or a model id of the Hugging Face hub; or smollm2, where `make smollm2` "
        "ran (default: the embedded demo)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of parameters and computation (default: the checkpoint's; float32 on CPU)",
    )


def add_int8(parser: Any, draft: bool = True) -> None:
    """`--int8` and `--draft-int8`."""
    flags = {"--int8": "the model's"} | ({"--draft-int8": "the drafter's"} if draft else {})
    for flag, whose in flags.items():
        parser.add_argument(
            flag,
            type=_parts,
            default=(),
            metavar="PARTS",
            help=f"{whose} `weights`, `cache` or `weights,cache` in 8 bits",
        )


def _parts(text: str) -> tuple[str, ...]:
    parts = tuple(part.strip() for part in text.split(","))
    if not set(parts) <= set(PARTS) or len(set(parts)) < len(parts):
        either = ", ".join(PARTS)
        raise argparse.ArgumentTypeError(f"{either} or {','.join(PARTS)}, not {shown(text)}")
    return parts


def int8_note(parts: Sequence[str]) -> str:
    """What to say of them behind a dtype."""
    return f" ({' and '.join(parts)} in int8)" if parts else ""


def add_drafter(parser: Any) -> None:
    """`--drafter` and `--draft`."""
    parser.add_argument(
        "--drafter",
        metavar="SPEC",
        default="auto",
        help="a kind of drafter (`jax-specdec info --drafters` lists them) with a draft length after a colon, as "
        "in lm:4, and maybe an expansion with its nodes, as in lm:4+cape:16; or a cascade of drafters; or the "
        "first(...) of some that finds something; or none (default: auto, which is the first --draft NAME; else the fastest measured "
        "for the model; else one that needs no checkpoint)",
    )
    parser.add_argument(
        "--draft",
        metavar="NAME=DIR",
        action="append",
        default=[],
        help="where a drafter's checkpoint is, a folder or a model id of the Hugging Face hub (default: the "
        "folder NAME beside the model)",
    )


def add_budget(parser: Any) -> None:
    """`--budget` and `--costs`."""
    parser.add_argument(
        "--budget",
        choices=("on", "off"),
        default="on",
        help="on: each round drafts as deep and verifies as wide as pays, not at all where nothing does; off: "
        "all that the drafter can. The text is the same (default: on)",
    )
    parser.add_argument(
        "--costs",
        metavar="FILE",
        help="what rounds cost, as it was measured and kept before, or `computed`, from the device's data sheet "
        "(default: what is kept in the user's cache, else measured on first use, in a few seconds)",
    )


def add_keep_programs(parser: Any) -> None:
    """`--keep-programs`."""
    parser.add_argument(
        "--keep-programs",
        choices=("on", "off"),
        default="on",
        help="keep compiled programs in the user's cache for later runs, or in the folder that "
        "JAX_COMPILATION_CACHE_DIR names (default: on)",
    )


def keeps_programs(args: argparse.Namespace) -> bool:
    return getattr(args, "keep_programs", "on") == "on"


def budget(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_budget` says, for a decoder."""
    return {"budget": args.budget == "on", "costs": args.costs}


def model_source(args: argparse.Namespace) -> str | Path:
    """What `--model` names, or the embedded checkpoint.

    Raises:
      UserError: it is not installed.
    """
    from jax_specdec.checkpoints.embedded import demo_folder

    return demo_folder() / "target" if args.model is None else args.model


def draft_folders(items: Sequence[str]) -> dict[str, str]:
    """`NAME=DIR` arguments as a dictionary; DIR may be a hub id."""
    from jax_specdec.specs.language import folders_by_name

    folders = {}
    for item in items:
        name, equals, folder = item.partition("=")
        if not (name and equals and folder):
            raise UserError(
                f"--draft takes NAME=DIR, as in lm=checkpoints/demo/lm, not {shown(item)}."
            )
        folders[name] = folder
    return folders_by_name(folders)


def given_drafter(args: argparse.Namespace) -> "Spec | None":
    """What `--drafter` says, checked as far as it goes; None for `auto`."""
    from jax_specdec.specs.whole import parse_drafter

    return None if args.drafter == "auto" else parse_drafter(args.drafter)


def load(args: argparse.Namespace, mesh: "Mesh | None" = None) -> "tuple[Target, LoadedDrafter]":
    """The target and the drafter that the arguments name; cheap mistakes fail first."""
    from jax_specdec import loading

    folders, spec = draft_folders(args.draft), given_drafter(args)
    target, drafter = loading.load_pair(
        model_source(args),
        loading.AUTO if spec is None else spec,
        draft=folders,
        dtype=args.dtype,
        mesh=mesh,
        int8=getattr(args, "int8", ()),
        draft_int8=getattr(args, "draft_int8", ()),
        context=getattr(args, "context", None),
        batch_size=getattr(args, "batch_size", 1),
        first="the first --draft",
        keep_programs=keeps_programs(args),
    )
    if drafter.reason:
        say(loading.chosen(drafter))
    return target, drafter


@contextlib.contextmanager
def warnings_said() -> Iterator[None]:
    """Warnings to users come as one line, without the place in the code."""
    with warnings.catch_warnings():
        shown_as = warnings.showwarning

        def show(message, category, *place, **more):
            if issubclass(category, UserWarning):
                say(f"warning: {message}")
            else:
                shown_as(message, category, *place, **more)

        warnings.showwarning = show
        yield


class _Saying:
    quiet = False


def hush() -> None:
    """Of several processes one speaks, and this is another."""
    _Saying.quiet = True


def say(message: str) -> None:
    """A message to standard error: standard output is for results."""
    if not _Saying.quiet:
        print(message, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """One JSON object as one line."""
    print(json.dumps(value), flush=True)


def at_least_one(args: argparse.Namespace, *names: str) -> None:
    """Raises a UserError if one of these counts is given and below 1."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")
