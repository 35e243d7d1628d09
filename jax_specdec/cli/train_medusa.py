"""`train medusa`."""

import argparse
from typing import Any

from jax_specdec.cli import arguments, beside, common, mesh
from jax_specdec.errors import UserError
from jax_specdec.training.config import MedusaRecipe, TrainConfig


def register(kinds: Any) -> None:
    parser = kinds.add_parser(
        "medusa",
        help="Medusa heads for a target",
        description="Trains Medusa heads on their frozen target and writes them to OUT/checkpoint whenever "
        "the state is saved, with the accuracies on the held-out text that a static tree is chosen by; the "
        "state to resume from, metrics.jsonl and loss.png go to OUT.",
        examples=("--target DIR --data FILE --out OUT --heads 4 --steps 1000",),
    )
    beside.add_arguments(parser, "start from this Medusa checkpoint")
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="train nothing: measure the accuracies of --init again, and write it to OUT/checkpoint",
    )
    shape = parser.add_argument_group("the drafter")
    shape.add_argument(
        "--heads",
        dest="model.num_heads",
        type=int,
        metavar="N",
        help="the longest draft (default: 4)",
    )
    shape.add_argument(
        "--layers",
        dest="model.num_layers",
        type=int,
        metavar="N",
        help="residual blocks of each head (default: 1)",
    )
    shape.add_argument(
        "--share",
        dest="model.share",
        action=argparse.BooleanOptionalAction,
        help="use the target's output matrix, frozen, instead of one for each head that starts as a copy of it "
        "(default: yes)",
    )
    beside.add_recipe(parser, MedusaRecipe)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from jax_specdec.models.medusa import MedusaConfig
    from jax_specdec.training import runs
    from jax_specdec.training.losses import parse_mixture

    kinds = {"train": TrainConfig, "recipe": MedusaRecipe, "model": MedusaConfig}
    sections = arguments.read_config(args.config, kinds)
    given = {name: {**sections[name], **arguments.given(args, name)} for name in kinds}
    if args.calibrate:
        if args.init is None:
            raise UserError("Name the checkpoint whose accuracies to measure, with --init DIR.")
        given["train"].setdefault("steps", 1)
    if "steps" not in given["train"]:
        raise UserError("Say how long to train, with --steps N.")
    config, recipe = TrainConfig(**given["train"]), MedusaRecipe(**given["recipe"])
    parse_mixture(recipe.loss)
    target = runs.open_target(args.target, config, mesh.start(args))
    run = arguments.training_run(args)
    runs.train_medusa(run, target, config, recipe, given["model"], calibrate=args.calibrate)
    common.say(f"Wrote {run.checkpoint}.")
    return 0
