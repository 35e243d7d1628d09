"""A decoder from a model's name, with the best drafter that is there."""

import dataclasses
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jax_specdec import progress, user_cache
from jax_specdec.checkpoints.dtypes import check_dtype
from jax_specdec.checkpoints.embedded import demo_folder
from jax_specdec.checkpoints.hub import find_checkpoint
from jax_specdec.checkpoints.int8 import check_parts
from jax_specdec.checkpoints.targets import Target, default_dtype, load_target
from jax_specdec.core.acceptance import MATCH, Acceptance
from jax_specdec.core.processors import Processor
from jax_specdec.core.sharding import ShardingRules
from jax_specdec.errors import UserError, a_kind
from jax_specdec.pipeline import SpeculativeDecoder
from jax_specdec.specs.build import LoadedDrafter, load_drafter
from jax_specdec.specs.defaults import USUAL, Setting, measured, measured_on
from jax_specdec.specs.language import Spec, folders_by_name
from jax_specdec.specs.whole import parse_drafter
from jax_specdec.text.inputs import check_count
from jax_specdec.tuning.round_costs import Given

AUTO = "auto"


def load(
    model: str | os.PathLike[str] | None = None,
    drafter: str | None = AUTO,
    *,
    draft: Mapping[str, str | Path] | None = None,
    dtype: Any = None,
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
    int8: Collection[str] = (),
    draft_int8: Collection[str] = (),
    context: int | None = None,
    batch_size: int = 1,
    rule: Acceptance = MATCH,
    processors: Sequence[Processor] = (),
    logprobs: bool = False,
    margins: bool = False,
    budget: bool = True,
    costs: Given = None,
    keep_programs: bool = True,
) -> SpeculativeDecoder:
    """A decoder for a model.

    Args:
      model: a folder, or a model id of the Hugging Face hub; None is the demo's.
      drafter: a specification (`load_drafter`), or None for plain decoding. `auto` is the first of `draft`;
        else the fastest measured for the model by `jax-specdec tune`; else one that needs no checkpoint. Which it is,
        and why, is said once where people look, and stands in the decoder's `repr`.
      draft: checkpoint folders or hub ids of drafters by name; default: folders of their names beside the
        model's.
      dtype, mesh, rules, int8, context: as in `load_target`. draft_int8: `int8` of the drafter.
      batch_size: that of the measurements which count.
      rule, processors, logprobs, margins, budget, costs: as in `SpeculativeDecoder`.
      keep_programs: whether JAX keeps compiled programs in the user's cache, where it was not told otherwise
        (`jax_compilation_cache_dir`, `jax_enable_compilation_cache`). That holds for the whole process.

    Raises:
      UserError: no such model or drafter, or they do not fit together.
    """
    target, found = load_pair(
        demo_folder() / "target" if model is None else model,
        AUTO if drafter == AUTO else parse_drafter("none" if drafter is None else drafter),
        draft=draft,
        dtype=dtype,
        mesh=mesh,
        rules=rules,
        int8=int8,
        draft_int8=draft_int8,
        context=context,
        batch_size=batch_size,
        keep_programs=keep_programs,
    )
    if found.reason:
        progress.say_once(chosen(found))
    return SpeculativeDecoder(
        target,
        found,
        rule=rule,
        processors=processors,
        logprobs=logprobs,
        margins=margins,
        budget=budget,
        costs=costs,
    )


def load_pair(
    model: str | os.PathLike[str],
    drafter: str | Spec,
    *,
    draft: Mapping[str, str | Path] | None = None,
    dtype: Any = None,
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
    int8: Collection[str] = (),
    draft_int8: Collection[str] = (),
    context: int | None = None,
    batch_size: int = 1,
    first: str = "the first of draft",
    keep_programs: bool = True,
) -> tuple[Target, LoadedDrafter]:
    """The target and the drafter of `load`; cheap mistakes fail first."""
    check_count("batch_size", batch_size)
    draft = folders_by_name(draft)
    check_parts(int8)
    check_parts(draft_int8)
    dtype = None if dtype is None else check_dtype(dtype)
    if not isinstance(keep_programs, bool):
        raise UserError(f"keep_programs must be True or False, not {a_kind(keep_programs)}.")
    if keep_programs:
        keep_compiled()
    folder, reason = find_checkpoint(model), ""
    if drafter == AUTO:
        setting = Setting(folder, dtype or default_dtype(folder), batch_size, int8, draft_int8)
        drafter, reason = choose_drafter(setting, draft, first)
    target = load_target(folder, dtype=dtype, mesh=mesh, rules=rules, int8=int8, context=context)
    found = load_drafter(drafter, target, drafts=draft, batch_size=batch_size, int8=draft_int8)
    return target, dataclasses.replace(found, reason=reason)


def keep_compiled() -> None:
    """`user_cache.keep_programs`, and says where it cannot be."""
    reason = user_cache.keep_programs()
    if reason:
        progress.say_once(reason, always=True)


def choose_drafter(
    setting: Setting, draft: Mapping[str, Any], first: str = "the first --draft"
) -> tuple[Spec, str]:
    """What `auto` stands for, and why."""
    if draft:
        return parse_drafter(next(iter(draft))), first
    record = measured(setting.folder, setting)
    default = record.get("default")
    if default is None:
        return parse_drafter(USUAL), "nothing was measured for this model, see `jax-specdec tune`"
    return parse_drafter(default), f"{measured_on(record)} to be the fastest"


def chosen(drafter: LoadedDrafter) -> str:
    """Which drafter was chosen, and why."""
    return f"drafter {drafter.spec} ({drafter.reason})"
