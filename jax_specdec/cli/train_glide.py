"""`train glide`."""

import argparse
from typing import Any

from jax_specdec.cli import arguments, beside, common, mesh
from jax_specdec.errors import UserError
from jax_specdec.training.config import GliDeRecipe, TrainConfig

# Flag, field of GliDeConfig, help.
SHAPE = (
    ("layers", "num_layers", "default: 1"),
    ("hidden-size", "hidden_size", "default: the target's"),
    ("mlp-size", "mlp_size", "default: the target's"),
    ("heads", "num_heads", "of the self-attention; default: the target's"),
    ("kv-heads", "num_kv_heads", "default: the target's"),
    ("head-dim", "head_dim", "default: the target's"),
    ("window", "window", "sliding window of the self-attention (default: none)"),
    ("trained-delay", "trained_delay", "the longest draft (default: 16)"),
    (
        "hidden-delays",
        "hidden_delays",
        "with --hidden-input, projections of that state, one for each place in a draft, the last for all behind "
        "(default: 1)",
    ),
)
SWITCHES = (
    ("cross-norm", "cross_norm", "norm before the cross-attention (default: yes)"),
    ("final-norm", "final_norm", "norm before the head (default: yes)"),
    ("share", "share", "use the target's embedding and head, frozen (default: yes)"),
    ("hidden-input", "hidden_input", "the target's last hidden state as an input (default: no)"),
)


def register(kinds: Any) -> None:
    parser = kinds.add_parser(
        "glide",
        help="a GliDe drafter for a target",
        description="Trains a GliDe drafter beside its frozen target and writes it to OUT/checkpoint "
        "whenever the state is saved; the state to resume from, metrics.jsonl and loss.png go to OUT.",
        examples=(
            "--target DIR --data FILE --out OUT --steps 1000",
            "--target DIR --data FILE=1 --data WRITTEN=4 --out OUT --steps 1000",
        ),
    )
    beside.add_arguments(
        parser,
        "start from this GliDe checkpoint, or from a decoder with the target's vocabulary, whose layers, "
        "embedding and head are taken over",
    )
    shape = parser.add_argument_group("the drafter")
    shape.add_argument(
        "--paper",
        action="store_true",
        help="the published form: width 4096, embedding and head of its own, no norm before the "
        "cross-attention, trained in blocks of 5 with the cross-entropy, at a learning rate of 5e-4 "
        "without weight decay, warmed up over 2.5 %% of the steps",
    )
    shape.add_argument(
        "--vanilla",
        action="store_true",
        help="without cross-attention: the control, which sees nothing of the target",
    )
    for flag, field, text in SHAPE:
        shape.add_argument(f"--{flag}", dest=f"model.{field}", type=int, metavar="N", help=text)
    shape.add_argument(
        "--target-layers",
        dest="model.target_layers",
        type=_layers,
        metavar="I,J",
        help="the target layer that each layer reads, from 0, or from the end as in --target-layers=-2,-1 "
        "(default: evenly spread)",
    )
    for flag, field, text in SWITCHES:
        shape.add_argument(
            f"--{flag}", dest=f"model.{field}", action=argparse.BooleanOptionalAction, help=text
        )
    beside.add_recipe(parser, GliDeRecipe)
    parser.set_defaults(run=run)


def _layers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def run(args: argparse.Namespace) -> int:
    from jax_specdec.models.glide_config import GliDeConfig

    kinds = {"train": TrainConfig, "recipe": GliDeRecipe, "model": GliDeConfig}
    sections = arguments.read_config(args.config, kinds)
    given = {name: {**sections[name], **arguments.given(args, name)} for name in kinds}
    if "steps" not in given["train"]:
        raise UserError("Say how long to train, with --steps N.")
    TrainConfig(**given["train"])  # before jax is imported

    from jax_specdec.training import runs

    config, recipe = runs.glide_settings(given["train"], given["recipe"], args.paper)
    target = runs.open_target(args.target, config, mesh.start(args))
    run = arguments.training_run(args)
    form = {"paper": args.paper, "vanilla": args.vanilla}
    runs.train_glide(run, target, config, recipe, given["model"], **form)
    common.say(f"Wrote {run.checkpoint}.")
    return 0
