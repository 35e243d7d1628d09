"""A training run from its data to the checkpoint it writes, for the commands and for Python.

Each writes its checkpoint to `OUT/checkpoint` whenever the state is saved; the state to resume from, `metrics.jsonl`
and `loss.png` go to OUT.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_specdec.checkpoints import glide as glide_checkpoint
from jax_specdec.checkpoints import medusa as medusa_checkpoint
from jax_specdec.checkpoints import target_bound
from jax_specdec.checkpoints.generation_config import read_generation
from jax_specdec.checkpoints.hub import find_checkpoint
from jax_specdec.checkpoints.targets import (
    Target,
    load_config,
    load_params,
    load_target,
    load_tokenizer,
    save_pretrained,
)
from jax_specdec.checkpoints.tensor_files import read_json
from jax_specdec.core.sharding import Sharding, to_host
from jax_specdec.errors import UserError
from jax_specdec.models.config import ModelConfig, RopeConfig
from jax_specdec.models.decoder import Decoder
from jax_specdec.models.glide_config import GliDeConfig
from jax_specdec.models.medusa import Medusa, MedusaConfig
from jax_specdec.text.token_bytes import id_bound
from jax_specdec.training import glide, lm, medusa
from jax_specdec.training.config import GliDeRecipe, MedusaRecipe, TrainConfig
from jax_specdec.training.corpus import Source, load_documents
from jax_specdec.training.data import Documents
from jax_specdec.training.losses import parse_mixture


@dataclasses.dataclass(frozen=True)
class Run:
    """What every run is told beside what it trains.

    Attributes:
      out: the folder to write.
      data, heldout, heldout_share: see `corpus.load_documents`.
      init: a checkpoint to start from.
      resume: go on from the newest state in `out`.
      save_dtype: of the checkpoint.
      report: told what happens, a line each. callback, progress: as in `trainer.train`.
    """

    out: Path
    data: Sequence[Source]
    heldout: Sequence[Source] = ()
    heldout_share: float = 0.02
    init: str | Path | None = None
    resume: bool = False
    save_dtype: str = "bfloat16"
    report: Callable[[str], None] = lambda line: None
    callback: Callable[[int, dict[str, Any]], None] | None = None
    progress: bool | None = True

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoint"

    def documents(self, tokenizer: Any, config: TrainConfig) -> tuple[Documents, list[np.ndarray]]:
        return load_documents(
            self.data,
            tokenizer,
            config.sequence_length,
            heldout=self.heldout,
            heldout_share=self.heldout_share,
            report=self.report,
        )

    def announce(self, parameters: str, config: TrainConfig) -> None:
        tokens = config.steps * config.batch_size * config.sequence_length
        self.report(f"{parameters}, {tokens:,} tokens of training")

    def options(self) -> dict[str, Any]:
        """For `trainer.train`."""
        return {"resume": self.resume, "callback": self.callback, "progress": self.progress}


def _first() -> bool:
    """Of several processes one writes."""
    return jax.process_index() == 0


# A language model


def train_lm(
    run: Run,
    config: TrainConfig,
    shape: Mapping[str, Any],
    tokenizer_folder: str | Path,
    sharding: Sharding | None = None,
) -> None:
    """Trains a language model with the tokenizer of a folder.

    Args:
      shape: fields of `ModelConfig`; none with `run.init`.

    Raises:
      UserError: a shape, windows, data or an initial checkpoint that do not go together.
    """
    tokenizer = load_tokenizer(tokenizer_folder)
    if run.init is None:
        model = make_model_config(shape, tokenizer)
    else:
        model = _initial_config(run.init, shape, id_bound(tokenizer))
    _check_windows(config, model.context, "model")
    decoder = Decoder(model, "float32")
    documents, heldout = run.documents(tokenizer, config)
    initial = None if run.init is None else load_params(run.init, model, "float32")
    run.announce(f"{model.parameter_count():,} parameters", config)
    options = {"sharding": sharding, "initial": initial, **run.options()}
    params = to_host(lm.train(decoder, config, documents, heldout, run.out, **options))
    if _first():
        save_pretrained(
            run.checkpoint,
            model,
            params,
            dtype=run.save_dtype,
            tokenizer=Path(tokenizer_folder),
            generation=None if run.init is None else read_generation(Path(run.init)),
        )


def _check_windows(config: TrainConfig, context: int, whose: str) -> None:
    if config.sequence_length > context:
        raise UserError(
            f"Windows of {config.sequence_length} tokens do not fit the {whose}'s context of {context}: make them "
            "shorter (sequence_length)."
        )


def make_model_config(given: Mapping[str, Any], tokenizer: Any) -> ModelConfig:
    """A model's description from the fields that were given, the rest by proportion."""
    shape = dict(given)
    for key, value in shape.items():
        if (
            isinstance(value, int)
            and not isinstance(value, bool)
            and "_id" not in key
            and value < 1
        ):
            raise UserError(f"{key} must be at least 1, got {value}.")
    hidden = shape.setdefault("hidden_size", 256)
    heads = shape.setdefault("num_heads", max(1, hidden // 64))
    shape.setdefault("num_kv_heads", heads)
    shape.setdefault("head_dim", hidden // heads)
    shape.setdefault("mlp_size", max(64, round(hidden * 8 / 3 / 64) * 64))
    shape.setdefault("num_layers", 4)
    shape.setdefault("context", 1024)
    bound = id_bound(tokenizer)
    shape.setdefault("vocab_size", bound)
    shape.setdefault("bos_id", tokenizer.bos_token_id)
    shape.setdefault("eos_ids", () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,))
    shape.setdefault("pad_id", tokenizer.pad_token_id)
    if shape["vocab_size"] < bound:
        raise UserError(
            f"vocab_size {shape['vocab_size']} is below the {bound} that the tokenizer's ids need."
        )
    if shape["head_dim"] < 2 or shape["head_dim"] % 2:
        raise UserError(f"head_dim must be even, for rotary embeddings, got {shape['head_dim']}.")
    try:
        for key in ("eos_ids", "windows"):
            if key in shape:
                shape[key] = tuple(shape[key])
        if isinstance(shape.get("rope"), Mapping):
            shape["rope"] = RopeConfig(**shape["rope"])
        return ModelConfig(**shape)
    except (TypeError, ValueError) as error:
        raise UserError(f"The model's shape is wrong: {error}.") from None


def _initial_config(folder: str | Path, shape: Mapping[str, Any], vocabulary: int) -> ModelConfig:
    if shape:
        raise UserError(f"{folder} fixes the model's shape: leave out {', '.join(sorted(shape))}.")
    model = load_config(folder)
    if model.vocab_size < vocabulary:
        raise UserError(
            f"The tokenizer's ids need {vocabulary} entries and {folder} a vocabulary of {model.vocab_size}."
        )
    return model


# Drafters beside a frozen target


def open_target(target: Target | str | Path, config: TrainConfig, mesh: Any = None) -> Target:
    """A target to train beside, loaded in the run's dtype where it is named.

    Raises:
      UserError: no such target, one in 8 bits, or windows that do not fit its context.
    """
    if not isinstance(target, Target):
        target = load_target(find_checkpoint(target), dtype=config.dtype, mesh=mesh)
    if target.decoder.quantized:
        raise UserError("A drafter is trained beside a target as it is: load it without int8.")
    _check_windows(config, target.config.context, "target")
    return target


def _check_init(init: str | Path, shaped: Any, trained_for: str, target: Target) -> None:
    """Raises `UserError` where a checkpoint to start from does not go with a given shape or with the target."""
    if shaped:
        raise UserError(f"{init} fixes the drafter's shape: leave out what says it.")
    if trained_for != target_bound.target_fingerprint(target.path):
        raise UserError(f"{init} was trained for another target than {target.path}.")


def glide_settings(
    train: Mapping[str, Any], recipe: Mapping[str, Any], paper: bool
) -> tuple[TrainConfig, GliDeRecipe]:
    """What was given, the rest as usual or, with `paper`, as published.

    The learning rate and weight decay are the paper's, the warm-up its code's.
    """
    if paper:
        warmup = round(0.025 * train["steps"])
        train = {"learning_rate": 5e-4, "weight_decay": 0.0, "warmup_steps": warmup, **train}
        recipe = {"visibility": "block", "loss": "cross_entropy", **recipe}
    made = TrainConfig(**train), GliDeRecipe(**recipe)
    parse_mixture(made[1].loss)
    return made


def train_glide(
    run: Run,
    target: Target,
    config: TrainConfig,
    recipe: GliDeRecipe,
    given: Mapping[str, Any],
    *,
    paper: bool = False,
    vanilla: bool = False,
) -> None:
    """Trains a GliDe drafter.

    Args:
      given: fields of `GliDeConfig`; the rest is like the target or, with `paper`, as published.
      vanilla: without cross-attention, the control.

    Raises:
      UserError: a shape, data or an initial checkpoint that do not go together.
    """
    fingerprint, initial, fields = target_bound.target_fingerprint(target.path), None, dict(given)
    if run.init is None:
        shape = _glide_shape(fields, recipe, load_config(target.path), paper, vanilla)
        model = glide_checkpoint.make_glide(shape, target.config, "float32", target.sharding)
    elif _is_glide(run.init):
        shape, trained_for = glide_checkpoint.read_glide_config(Path(run.init))
        _check_init(run.init, fields or paper or vanilla, trained_for, target)
        model = glide_checkpoint.make_glide(shape, target.config, "float32", target.sharding)
        initial = glide_checkpoint.load_own_params(Path(run.init), model)
    else:
        if paper:
            raise UserError(f"{run.init} fixes the drafter's shape: leave out what says it, paper.")
        small = load_target(run.init, dtype="float32")
        fields |= {"cross_attention": False} if vanilla else {}
        key = jax.random.key(config.seed)
        model, initial = glide_checkpoint.from_decoder(small, target, key, **fields)
    documents, heldout = run.documents(target.tokenizer, config)
    run.announce(f"{model.parameter_count():,} parameters of its own", config)

    def save(params: Any) -> None:
        if _first():
            glide_checkpoint.save_glide(
                run.checkpoint, model, params, fingerprint, dtype=run.save_dtype
            )

    glide.train(
        model,
        target.decoder,
        target.params,
        recipe,
        config,
        documents,
        heldout,
        run.out,
        fingerprint=fingerprint,
        sharding=target.sharding,
        initial=initial,
        on_save=save,
        **run.options(),
    )


def _is_glide(folder: str | Path) -> bool:
    kind = read_json(Path(folder) / "config.json").get("model_type")
    return kind == glide_checkpoint.KIND.model_type


def _glide_shape(
    fields: Mapping[str, Any], recipe: GliDeRecipe, target: ModelConfig, paper: bool, vanilla: bool
) -> GliDeConfig:
    """The drafter's description: what was given, the rest from the paper or the target."""
    base = dataclasses.asdict(GliDeConfig.paper() if paper else GliDeConfig.like(target))
    if recipe.visibility == "none":
        base["trained_delay"] = 1
        if fields.get("trained_delay", 1) != 1:
            raise UserError(
                "With --visibility none the delay is 1: leave out --trained-delay (trained_delay)."
            )
    if vanilla:
        base["cross_attention"] = False
    return glide_checkpoint.make_glide_config({**base, **fields}, "What was given")


def train_medusa(
    run: Run,
    target: Target,
    config: TrainConfig,
    recipe: MedusaRecipe,
    fields: Mapping[str, Any],
    *,
    calibrate: bool = False,
) -> None:
    """Trains Medusa heads, and measures the accuracies that a static tree is chosen by.

    Args:
      fields: of `MedusaConfig`; none with `run.init`.
      calibrate: train nothing, measure those of `run.init` again.

    Raises:
      UserError: a shape, data or an initial checkpoint that do not go together.
    """
    fingerprint, initial = target_bound.target_fingerprint(target.path), None
    if run.init is None:
        kind, where = medusa_checkpoint.KIND, "What was given"
        shape = target_bound.make_config(kind, MedusaConfig, dict(fields), where)
    else:
        shape, _, trained_for = medusa_checkpoint.read_medusa_config(Path(run.init))
        _check_init(run.init, fields, trained_for, target)
    model = Medusa(shape, target.config, "float32")
    if run.init is not None:
        initial = target_bound.read_own(Path(run.init), model.shapes())
    medusa.check_window(model, config.sequence_length)
    documents, heldout = run.documents(target.tokenizer, config)

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
        if _first():
            medusa_checkpoint.save_medusa(
                run.checkpoint, model, params, fingerprint, accuracies, dtype=run.save_dtype
            )

    if calibrate:
        return save(initial)
    run.announce(f"{model.parameter_count():,} parameters of its own", config)
    medusa.train(
        model,
        target.decoder,
        target.params,
        recipe,
        config,
        documents,
        heldout,
        run.out,
        fingerprint=fingerprint,
        sharding=target.sharding,
        initial=initial,
        on_save=save,
        **run.options(),
    )
