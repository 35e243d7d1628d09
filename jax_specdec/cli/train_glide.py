"""`train glide`."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from jax_specdec.cli import arguments, beside, common
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
    wanted = {**sections["train"], **arguments.given(args, "train")}
    if "steps" not in wanted:
        raise UserError("Say how long to train, with --steps N.")
    if args.paper:
        # Warm-up as in the authors' code; learning rate and weight decay are the paper's.
        warmup = round(0.025 * wanted["steps"])
        wanted = {"learning_rate": 5e-4, "weight_decay": 0.0, "warmup_steps": warmup, **wanted}
    config = TrainConfig(**wanted)
    recipe_fields = {**sections["recipe"], **arguments.given(args, "recipe")}
    if args.paper:
        recipe_fields = {"visibility": "block", "loss": "cross_entropy", **recipe_fields}
    recipe = GliDeRecipe(**recipe_fields)

    import jax

    from jax_specdec.checkpoints import glide as glide_checkpoint
    from jax_specdec.checkpoints.targets import load_config, load_target
    from jax_specdec.checkpoints.tensor_files import read_json
    from jax_specdec.training import glide
    from jax_specdec.training.losses import parse_mixture

    parse_mixture(recipe.loss)
    about = beside.open_target(args, config)
    target = about.target
    fields = {**sections["model"], **arguments.given(args, "model")}
    initial = None
    if args.init is None:
        shape = choose_shape(args, fields, recipe, load_config(target.path))
        model = glide_checkpoint.make_glide(shape, target.config, "float32", target.sharding)
    elif (
        read_json(Path(args.init) / "config.json").get("model_type")
        == glide_checkpoint.KIND.model_type
    ):
        shape, trained_for = glide_checkpoint.read_glide_config(Path(args.init))
        beside.check_init(args, fields or args.paper or args.vanilla, trained_for, about)
        model = glide_checkpoint.make_glide(shape, target.config, "float32", target.sharding)
        initial = glide_checkpoint.load_own_params(Path(args.init), model)
    else:
        if args.paper:
            raise UserError(f"{args.init} fixes the drafter's shape: leave out --paper.")
        small = load_target(args.init, dtype="float32")
        fields |= {"cross_attention": False} if args.vanilla else {}
        key = jax.random.key(config.seed)
        model, initial = glide_checkpoint.from_decoder(small, target, key, **fields)
    documents, heldout = beside.load_documents(args, about, config)
    beside.announce(model, config)

    def save(params: Any) -> None:
        beside.save(
            about,
            lambda folder: glide_checkpoint.save_glide(
                folder, model, params, about.fingerprint, dtype=args.save_dtype
            ),
        )

    glide.train(
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


def choose_shape(
    args: argparse.Namespace, fields: dict[str, Any], recipe: GliDeRecipe, target: Any
) -> Any:
    """The drafter's description: what was given, the rest from the paper or the target."""
    from jax_specdec.checkpoints.glide import make_glide_config
    from jax_specdec.models.glide_config import GliDeConfig

    shape = GliDeConfig.paper() if args.paper else GliDeConfig.like(target)
    base = dataclasses.asdict(shape)
    if recipe.visibility == "none":
        base["trained_delay"] = 1
        if fields.get("trained_delay", 1) != 1:
            raise UserError("With --visibility none the delay is 1: leave out --trained-delay.")
    if args.vanilla:
        base["cross_attention"] = False
    return make_glide_config({**base, **fields}, "What was given")
