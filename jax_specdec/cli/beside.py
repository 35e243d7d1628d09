"""Arguments of training a drafter beside its frozen target."""

import argparse

from jax_specdec.cli import arguments, common, mesh
from jax_specdec.training.config import TrainConfig


def add_arguments(parser: argparse.ArgumentParser, init: str) -> None:
    """What every such command takes; `init` says what --init does."""
    arguments.add_data(parser)
    parser.add_argument(
        "--target", metavar="DIR", required=True, help="checkpoint folder or hub id"
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="folder to write")
    parser.add_argument("--resume", action="store_true", help="go on from the newest state in OUT")
    parser.add_argument("--init", metavar="DIR", help=init)
    parser.add_argument(
        "--config", metavar="FILE", help='JSON {"train": {...}, "recipe": {...}, "model": {...}}'
    )
    parser.add_argument(
        "--save-dtype",
        choices=common.DTYPES,
        default="bfloat16",
        help="of what is written (default: bfloat16)",
    )
    mesh.add_mesh(parser, "rows over all devices")


def add_recipe(parser: argparse.ArgumentParser, recipe: type) -> None:
    """The flags of a recipe and of the training, behind those of the drafter's shape."""
    arguments.add_dataclass(parser.add_argument_group("what is trained"), recipe, "recipe")
    arguments.add_dataclass(parser.add_argument_group("training"), TrainConfig, "train")
