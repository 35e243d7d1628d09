"""Arguments and steps of training a drafter beside its frozen target."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jax_specdec.cli import arguments, common, mesh
from jax_specdec.errors import UserError
from jax_specdec.training.config import TrainConfig

if TYPE_CHECKING:
    from jax_specdec.checkpoints.targets import Target
    from jax_specdec.training.data import Documents


def add_arguments(parser: argparse.ArgumentParser, init: str) -> None:
    """What every such command takes; `init` says what --init does."""
    arguments.add_data(parser)
    parser.add_argument(
        "--target", metavar="DIR", required=True, help="checkpoint folder or hub id"
    )
    parser.add_argument("--out", metavar="DIR", required=True)
    parser.add_argument("--resume", action="store_true", help="go on from the newest state in OUT")
    parser.add_argument("--init", metavar="DIR", help=init)
    parser.add_argument(
        "--config", metavar="FILE", help='JSON {"train": {...}, "recipe": {...}, "model": {...}}'
    )
    parser.add_argument("--save-dtype", choices=common.DTYPES, default="bfloat16")
    mesh.add_mesh(parser, "rows over all devices")


def add_recipe(parser: argparse.ArgumentParser, recipe: type) -> None:
    """The flags of a recipe and of the training, behind those of the drafter's shape."""
    arguments.add_dataclass(parser.add_argument_group("what is trained"), recipe, "recipe")
    arguments.add_dataclass(parser.add_argument_group("training"), TrainConfig, "train")


class Run(NamedTuple):
    """What a run needs beside its drafter.

    Attributes:
      fingerprint: of the target.
    """

    target: "Target"
    fingerprint: str
    out: Path


def open_target(args: argparse.Namespace, config: TrainConfig) -> Run:
    """The target that the arguments name.

    Raises:
      UserError: no such target, or windows that do not fit its context.
    """
    from jax_specdec.checkpoints.hub import find_checkpoint
    from jax_specdec.checkpoints.target_bound import target_fingerprint
    from jax_specdec.checkpoints.targets import load_target

    devices = mesh.start(args)
    folder = find_checkpoint(args.target)
    fingerprint = target_fingerprint(folder)
    target = load_target(folder, dtype=config.dtype, mesh=devices)
    if config.sequence_length > target.config.context:
        raise UserError(
            f"Windows of {config.sequence_length} tokens do not fit the target's context of "
            f"{target.config.context}: lower --sequence-length."
        )
    return Run(target, fingerprint, Path(args.out))


def check_init(args: argparse.Namespace, shaped: Any, trained_for: str, run: Run) -> None:
    """Raises `UserError` where `--init` does not go with the shape's flags or with the target."""
    if shaped:
        raise UserError(f"{args.init} fixes the drafter's shape: leave out the flags that say it.")
    if trained_for != run.fingerprint:
        raise UserError(f"{args.init} was trained for another target than {args.target}.")


def load_documents(
    args: argparse.Namespace, run: Run, config: TrainConfig
) -> tuple["Documents", list]:
    return arguments.load_documents(args, run.target.tokenizer, config.sequence_length)


def announce(model: Any, config: TrainConfig) -> None:
    common.say(
        f"{model.parameter_count():,} parameters of its own, "
        f"{config.steps * config.batch_size * config.sequence_length:,} tokens of training"
    )


def save(about: Run, write: Callable[[Path], Any]) -> None:
    """The checkpoint of a run, written by the first of its processes."""
    if mesh.first():
        write(about.out / "checkpoint")
