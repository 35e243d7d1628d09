"""What a training run needs to know; free of jax, so that the command line can offer it quickly."""

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jax_specdec.errors import UserError, shown, shown_value


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """What a run needs beside its model and data.

    The command line shows these lines as the help of its flags.

    Attributes:
      steps: optimiser steps.
      batch_size: windows per optimiser step, over all devices and accumulation steps.
      sequence_length: tokens of a window.
      learning_rate: peak; linear warm-up, then a cosine to the final fraction of it.
      warmup_steps: of the warm-up.
      final_fraction: of the peak learning rate, at the last step.
      weight_decay: of matrices.
      clip_norm: the largest norm of a gradient.
      optimizer: `adamw`, or `muon` for the matrices of the layers (Liu et al., arXiv 2502.16982;
        its update has AdamW's scale, so it takes the same learning rate) and AdamW for the rest.
      dtype: of the computation; parameters are float32.
      accumulate: micro-batches per step, whose gradients are averaged.
      remat: recompute each layer in the backward pass, for memory.
      seed: of the initial parameters and of the order of the data.
      eval_every: steps between measurements on the held-out text.
      save_every: steps between saved states.
    """

    steps: int
    batch_size: int = 16
    sequence_length: int = 512
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    final_fraction: float = 0.05
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    optimizer: Literal["adamw", "muon"] = "adamw"
    dtype: Literal["float32", "bfloat16"] = "float32"
    accumulate: int = 1
    remat: bool = False
    seed: int = 0
    eval_every: int = 200
    save_every: int = 200

    def __post_init__(self):
        for name in (
            "steps",
            "batch_size",
            "sequence_length",
            "accumulate",
            "eval_every",
            "save_every",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("learning_rate", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} must be finite and above 0, got {getattr(self, name)}.")
        for name in ("warmup_steps", "final_fraction", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} must be finite and at least 0, got {getattr(self, name)}.")
        for name, known in (
            ("optimizer", ("adamw", "muon")),
            ("dtype", ("float32", "bfloat16")),
        ):
            if getattr(self, name) not in known:
                raise UserError(
                    f"{name} must be {' or '.join(known)}, got {getattr(self, name)!r}."
                )
        if self.batch_size % self.accumulate:
            raise UserError(
                f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}."
            )


@dataclasses.dataclass(frozen=True)
class GliDeRecipe:
    """What a GliDe drafter is trained on, beside `TrainConfig`.

    Attributes:
      visibility: how keys of the target are hidden, see `jax_specdec.training.glide_mask`; draft is for drafters of
        several layers, or with the target's hidden state as an input.
      loss: a name of `jax_specdec.training.losses.LOSSES`, or a mixture such as
        forward_kl=0.9,cross_entropy=0.1.
      jensen_shannon_beta: weight of the target in the Jensen-Shannon divergence, in (0, 1).
    """

    visibility: Literal["draft", "shift", "block", "none"] = "shift"
    loss: str = "forward_kl"
    jensen_shannon_beta: float = 0.5

    def __post_init__(self):
        _check_beta(self.jensen_shannon_beta)
        if self.visibility not in ("draft", "shift", "block", "none"):
            raise UserError(
                f"visibility must be draft, shift, block or none, got {self.visibility!r}."
            )


@dataclasses.dataclass(frozen=True)
class MedusaRecipe:
    """What Medusa heads are trained on, beside `TrainConfig`.

    Attributes:
      loss: of each head, as in `train glide`.
      jensen_shannon_beta: weight of the target in the Jensen-Shannon divergence, in (0, 1).
      decay: the loss of head k counts decay^k, k from 1 (arXiv 2401.10774, section 2.2.1).
    """

    loss: str = "cross_entropy"
    jensen_shannon_beta: float = 0.5
    decay: float = 0.8

    def __post_init__(self):
        _check_beta(self.jensen_shannon_beta)
        if not 0 < self.decay <= 1:
            raise UserError(f"decay must be above 0 and at most 1, got {self.decay}.")


def _check_beta(beta: float) -> None:
    if not 0 < beta < 1:
        raise UserError(f"jensen_shannon_beta must be between 0 and 1, got {beta}.")


def check_names(where: str, found: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raises `UserError` for a key that is not among the names; the nearest one is named."""
    for key in found:
        if key not in names:
            close = difflib.get_close_matches(str(key), names, n=1) or names
            raise UserError(
                f"{where}: unknown key {shown(key)}; did you mean {' or '.join(close)}?"
            )


def check_types(where: str, section: Mapping[str, Any], kind: type) -> None:
    """Raises `UserError` for values that are of another type than the dataclass says."""
    fields = {field.name: field.type for field in dataclasses.fields(kind)}
    for key, value in section.items():
        want: Any = fields[key]
        fits = {
            int: isinstance(value, int) and not isinstance(value, bool),
            float: isinstance(value, (int, float)) and not isinstance(value, bool),
            bool: isinstance(value, bool),
            str: isinstance(value, str),
        }.get(want, True)
        if not fits:
            raise UserError(
                f"{where}: {key!r} must be of type {want.__name__}, got {shown_value(value)}."
            )


def divide(where: str, settings: Mapping[str, Any], *kinds: type) -> list[dict[str, Any]]:
    """Settings by the dataclass that has them, checked; no two dataclasses share a field.

    >>> divide("here", {"steps": 3, "loss": "forward_kl"}, TrainConfig, GliDeRecipe)
    [{'steps': 3}, {'loss': 'forward_kl'}]

    Raises:
      UserError: a setting that none of them has, or of another type.
    """
    names = [[field.name for field in dataclasses.fields(kind)] for kind in kinds]
    check_names(where, settings, [name for some in names for name in some])
    parts = [{k: v for k, v in settings.items() if k in some} for some in names]
    for part, kind in zip(parts, kinds, strict=True):
        check_types(where, part, kind)
    return parts
