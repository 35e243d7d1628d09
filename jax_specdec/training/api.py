"""Training a drafter in one call: `train_lm`, `train_glide` and `train_medusa`."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_specdec.checkpoints import draft_vocabulary
from jax_specdec.checkpoints.dtypes import check_dtype
from jax_specdec.checkpoints.hub import find_checkpoint
from jax_specdec.checkpoints.targets import Target, load_target, load_tokenizer, stored_config
from jax_specdec.drafters import registry
from jax_specdec.errors import UserError, a_kind
from jax_specdec.generation import Generation
from jax_specdec.models.config import ModelConfig
from jax_specdec.models.glide_config import GliDeConfig
from jax_specdec.models.medusa import MedusaConfig
from jax_specdec.pipeline import SpeculativeDecoder
from jax_specdec.progress import check_progress, say, told
from jax_specdec.specs.build import LoadedDrafter, load_drafter
from jax_specdec.specs.language import Spec
from jax_specdec.training import runs
from jax_specdec.training.config import GliDeRecipe, MedusaRecipe, TrainConfig, divide
from jax_specdec.training.corpus import as_sources, documents_of
from jax_specdec.training.losses import parse_mixture

Folder = str | os.PathLike[str]
Data = (
    str
    | Path
    | Generation
    | Mapping[str | Path, float]
    | Sequence[str | Path | Sequence[int] | Generation]
)
Callback = Callable[[int, dict[str, Any]], None]


def train_glide(
    target: Target | SpeculativeDecoder | Folder,
    data: Data,
    *,
    out: Folder,
    steps: int,
    callback: Callback | None = None,
    heldout: Data | None = None,
    heldout_share: float = 0.02,
    init: Folder | None = None,
    paper: bool = False,
    vanilla: bool = False,
    resume: bool = False,
    save_dtype: str = "bfloat16",
    progress: bool | None = None,
    **settings: Any,
) -> LoadedDrafter:
    """Trains a GliDe drafter beside its frozen target, and returns it ready for use.

    It takes the shape of one of the target's layers, and reads the target's keys and values
    (Du et al., arXiv 2402.02082). `jax-specdec train glide` is the same from a shell.

    Args:
      target: a loaded one, a decoder that has it, a folder, or a model id of the Hugging Face hub.
      data: a list of texts, of token ids, of answers of a decoder, or of JSONL files; one JSONL file; or
        `{file: weight}`. What the target itself writes teaches most.
      out: a folder: `checkpoint/` is the drafter, beside it the state to resume from, `metrics.jsonl` and
        `loss.png`.
      steps: optimiser steps.
      callback: called after each step with its number and its metrics, see `trainer.train`; `plots.live()` is one
        that draws them.
      heldout: like `data`, to measure on; without, a share of the data.
      init: a GliDe checkpoint, or a decoder with the target's vocabulary, to start from.
      paper, vanilla: the published form; without cross-attention, the control.
      resume: go on from the newest state in `out`.
      progress: whether to show a bar; default: on a terminal and in a notebook.
      settings: fields of `TrainConfig` (`batch_size`, `sequence_length`, `learning_rate`, ...), `GliDeRecipe`
        (`loss`, `visibility`, ...) and `GliDeConfig` (`num_layers`, `target_layers`, ...).

    Returns:
      A drafter for `SpeculativeDecoder(target, ...)`; its `folder` is `out/checkpoint`.

    Raises:
      UserError: any of these wrong, in a sentence, before training begins.
      RunError: as `trainer.train`.
    """
    kinds = (TrainConfig, GliDeRecipe, GliDeConfig)
    train, recipe, shape = divide("train_glide", {"steps": steps, **settings}, *kinds)
    config, made = runs.glide_settings(train, recipe, paper)
    loaded = runs.open_target(_named(target), config)
    run = _run(data, out, heldout, heldout_share, init, resume, save_dtype, callback, progress)
    runs.train_glide(run, loaded, config, made, shape, paper=paper, vanilla=vanilla)
    return _drafter("glide", loaded, run)


def train_medusa(
    target: Target | SpeculativeDecoder | Folder,
    data: Data,
    *,
    out: Folder,
    steps: int,
    callback: Callback | None = None,
    heldout: Data | None = None,
    heldout_share: float = 0.02,
    init: Folder | None = None,
    resume: bool = False,
    save_dtype: str = "bfloat16",
    progress: bool | None = None,
    **settings: Any,
) -> LoadedDrafter:
    """Trains Medusa heads on their frozen target (Cai et al., arXiv 2401.10774), and returns them ready for use.

    Args:
      init: Medusa heads to start from. settings: fields of `TrainConfig`, `MedusaRecipe` (`loss`, `decay`) and
        `MedusaConfig` (`num_heads`, `num_layers`, `share`).
      The others, what is returned and raised: as in `train_glide`.
    """
    kinds = (TrainConfig, MedusaRecipe, MedusaConfig)
    train, recipe, shape = divide("train_medusa", {"steps": steps, **settings}, *kinds)
    config, made = TrainConfig(**train), MedusaRecipe(**recipe)
    parse_mixture(made.loss)
    loaded = runs.open_target(_named(target), config)
    run = _run(data, out, heldout, heldout_share, init, resume, save_dtype, callback, progress)
    runs.train_medusa(run, loaded, config, made, shape)
    return _drafter("medusa", loaded, run)


def train_lm(
    target: Target | SpeculativeDecoder | Folder,
    data: Data,
    *,
    out: Folder,
    steps: int,
    callback: Callback | None = None,
    heldout: Data | None = None,
    heldout_share: float = 0.02,
    init: Folder | None = None,
    resume: bool = False,
    save_dtype: str = "bfloat16",
    progress: bool | None = None,
    **settings: Any,
) -> LoadedDrafter:
    """Trains a small language model with the target's tokenizer, and returns it as a drafter ready for use.

    It learns from the text alone, so the data should be what the target writes.

    Args:
      init: a checkpoint to start from. settings: fields of `TrainConfig` and `ModelConfig` (`num_layers`,
        `hidden_size`, ...; four layers of 256 without any).
      The others, what is returned and raised: as in `train_glide`.
    """
    train, shape = divide("train_lm", {"steps": steps, **settings}, TrainConfig, ModelConfig)
    config = TrainConfig(**train)
    loaded = _named(target)
    if not isinstance(loaded, Target):
        loaded = load_target(find_checkpoint(loaded))
    if init is None:
        shape.setdefault("context", loaded.config.context)
    run = _run(data, out, heldout, heldout_share, init, resume, save_dtype, callback, progress)
    runs.train_lm(run, config, shape, loaded.path, loaded.sharding)
    return _drafter("lm", loaded, run)


def train_vocabulary(
    target: Target | SpeculativeDecoder | Folder,
    data: Data,
    *,
    drafter: Folder,
    size: int | None = None,
) -> tuple[Path, float]:
    """Gives a model drafter a draft vocabulary: the tokens that a text has most often, and those that end one.

    Its head then has as many rows, which is what most of a small drafter's time goes into where the vocabulary is
    large (FR-Spec, arXiv 2502.14856). No text changes. `jax-specdec train vocabulary` is the same from a shell.

    Args:
      target: of the drafter; data: as in `train_glide`, best what the target writes.
      drafter: a folder of kind lm, glide or medusa, which gets the file `draft_vocabulary.json`.
      size: default: 8192 tokens, or half of a vocabulary that has fewer than twice as many.

    Returns:
      The file, and the share of the data's tokens that may be drafted.

    Raises:
      UserError: any of these wrong, or a size that is out of range. RunError: the folder cannot be written.
    """
    folder = Path(os.fspath(drafter))
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not the folder of a drafter: it has no config.json.")
    if size is not None and (isinstance(size, bool) or not isinstance(size, int)):
        raise UserError(f"size must be a number of tokens, not {a_kind(size)}.")
    loaded = _named(target)
    if isinstance(loaded, Target):
        home, tokenizer, config = loaded.path, loaded.tokenizer, loaded.config
    else:
        home = find_checkpoint(loaded)
        tokenizer, config = load_tokenizer(home), stored_config(home)
    if folder.resolve() == Path(home).resolve():
        raise UserError(f"{folder} is the target itself: name the folder of its drafter.")
    if size is None:
        size = min(8192, config.vocab_size // 2)
    if tokenizer is None:
        raise UserError("Counting tokens needs a tokenizer: load the target with one.")
    documents = documents_of(as_sources(data), tokenizer)
    ends, total = set(config.eos_ids), sum(map(len, documents))
    empty = {*ends, config.bos_id}
    if all(int(token) in empty for text in documents for token in text):
        raise UserError("The data has no token to count.")
    ids = draft_vocabulary.most_frequent(documents, size, config.vocab_size, ends)
    seen = {int(token) for text in documents for token in np.unique(np.asarray(text))}
    missing = size - len(seen | ends)
    if missing > 0 and told():
        say(
            f"The data has {len(seen)} different tokens: {missing} of the draft vocabulary are none of them, but the "
            "first ones of the tokenizer."
        )
    known = np.zeros(config.vocab_size, bool)
    known[ids] = True
    covered = sum(int(known[np.asarray(text)].sum()) for text in documents)
    return draft_vocabulary.write_draft_vocabulary(folder, ids, config.vocab_size), covered / total


def _named(target: Any) -> Target | str | Path:
    if isinstance(target, SpeculativeDecoder):
        return target.target
    if isinstance(target, (Target, str, Path)):
        return target
    if isinstance(target, os.PathLike):
        return Path(target)
    raise UserError(f"The target must be a loaded one, a folder or a hub id, not {a_kind(target)}.")


def _run(
    data: Data,
    out: Folder,
    heldout: Data | None,
    heldout_share: float,
    init: Folder | None,
    resume: bool,
    save_dtype: str,
    callback: Callback | None,
    progress: bool | None,
) -> runs.Run:
    if not isinstance(out, (str, os.PathLike)) or not os.fspath(out):
        raise UserError("Say where the run goes, with out: a folder.")
    check_progress(progress)
    if init is not None and not isinstance(init, (str, os.PathLike)):
        raise UserError(f"init must be the folder of a checkpoint, not {a_kind(init)}.")
    if not isinstance(resume, bool):
        raise UserError(f"resume must be True or False, not {a_kind(resume)}.")
    share = heldout_share
    if not isinstance(share, (int, float)) or isinstance(share, bool):
        raise UserError(f"heldout_share must be a number, not {a_kind(share)}.")
    save_dtype = check_dtype(save_dtype, "save_dtype", of_files=True)
    if callback is not None and not callable(callback):
        raise UserError("callback must be a function of a step's number and its metrics.")
    return runs.Run(
        Path(os.fspath(out)),
        data=as_sources(data),
        heldout=() if heldout is None else as_sources(heldout, "held-out data"),
        heldout_share=share,
        init=None if init is None else os.fspath(init),
        resume=resume,
        save_dtype=save_dtype,
        callback=callback,  # pyright: ignore[reportArgumentType]
        progress=progress,
    )


def _drafter(name: str, target: Target, run: runs.Run) -> LoadedDrafter:
    """What was written, loaded as it will be next time; lengths measured for another checkpoint say nothing of it."""
    folder = run.checkpoint
    length = min(registry.of(name).usual_length or 1, registry.longest(name, folder))
    loaded = load_drafter(Spec(name, length), target, drafts={name: folder})
    return dataclasses.replace(loaded, folder=folder, reason=f"trained, in {folder}")
