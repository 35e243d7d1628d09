"""`train medusa`."""

import argparse
from pathlib import Path
from typing import Any

from jax_specdec.cli import arguments, beside, common
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
    from jax_specdec.checkpoints import medusa as medusa_checkpoint
    from jax_specdec.checkpoints import target_bound as own_files
    from jax_specdec.models.medusa import Medusa, MedusaConfig
    from jax_specdec.training import medusa
    from jax_specdec.training.losses import parse_mixture

    kinds = {"train": TrainConfig, "recipe": MedusaRecipe, "model": MedusaConfig}
    sections = arguments.read_config(args.config, kinds)
    wanted = {**sections["train"], **arguments.given(args, "train")}
    if args.calibrate:
        if args.init is None:
            raise UserError("Name the checkpoint whose accuracies to measure, with --init DIR.")
        wanted.setdefault("steps", 1)
    if "steps" not in wanted:
        raise UserError("Say how long to train, with --steps N.")
    config = TrainConfig(**wanted)
    recipe = MedusaRecipe(**{**sections["recipe"], **arguments.given(args, "recipe")})
    parse_mixture(recipe.loss)
    about = beside.open_target(args, config)
    target, fields = about.target, {**sections["model"], **arguments.given(args, "model")}
    if args.init is None:
        shape = own_files.make_config(
            medusa_checkpoint.KIND, MedusaConfig, fields, "What was given"
        )
    else:
        shape, _, trained_for = medusa_checkpoint.read_medusa_config(Path(args.init))
        beside.check_init(args, fields, trained_for, about)
    model, initial = Medusa(shape, target.config, "float32"), None
    if args.init is not None:
        initial = own_files.read_own(Path(args.init), model.shapes())
    medusa.check_window(model, config.sequence_length)
    documents, heldout = beside.load_documents(args, about, config)

    def save(params: Any) -> None:
        accuracies = medusa.calibrate(
            model,
            target.decoder,
            params,
            target.params,
            heldout,
            config.sequence_length,
            config.batch_size // config.accumulate,
        )
        beside.save(
            about,
            lambda folder: medusa_checkpoint.save_medusa(
                folder, model, params, about.fingerprint, accuracies, dtype=args.save_dtype
            ),
        )

    if args.calibrate:
        save(initial)
    else:
        beside.announce(model, config)
        medusa.train(
            model,
            target.decoder,
            target.params,
            recipe,
            config,
            documents,
            heldout,
            about.out,
            fingerprint=about.fingerprint,
            sharding=target.sharding,
            initial=initial,
            resume=args.resume,
            on_save=save,
        )
    common.say(f"Wrote {about.out / 'checkpoint'}.")
    return 0
