"""Specifications that are checked, and completed with what was measured or is usual."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax_specdec.core.draft import MAX_NODES
from jax_specdec.drafters import registry
from jax_specdec.drafters.cascade_sizes import check_budget, check_depth, check_lenience
from jax_specdec.drafters.early_exit import Stop
from jax_specdec.errors import UserError
from jax_specdec.expansions.beam_search import BeamSearch
from jax_specdec.expansions.cape import Cape
from jax_specdec.expansions.dynamic_tree import DynamicTree
from jax_specdec.expansions.expand import Rule
from jax_specdec.expansions.siblings import Fixed, PathProbability
from jax_specdec.expansions.static_tree import StaticTree
from jax_specdec.specs.defaults import Setting, measured, measured_on
from jax_specdec.specs.language import (
    CASCADE,
    COMBINATIONS,
    EXAMPLES,
    FIRST,
    Spec,
    known_name,
    parse,
)
from jax_specdec.specs.sizes import depth_of

RULES: dict[str, type[Rule]] = {
    "cape": Cape,
    "fixed": Fixed,
    "path": PathProbability,
    "tree": DynamicTree,
    "beam": BeamSearch,
    "static": StaticTree,
}


def parse_drafter(text: str) -> Spec:
    """A specification in the language of `specs.language`, checked as far as it goes without checkpoints.

    Raises:
      UserError: an unknown name (the nearest ones are named), a length outside 1..63, a drafter that has
        nothing to expand, a cascade whose drafts could be too long, a budget that does not fit the
        length, or any length.
    """
    spec = parse(text)
    _check_numbers(spec)
    length = None if _has_unset_length(spec) else depth_of(spec)
    if length is not None:
        check_depth(length)
    if spec.rule is None:
        return spec
    known_name(spec.rule, "expansion", tuple(RULES))
    if not spec.has_distribution:
        raise UserError(
            f"The drafter {spec.name!r} has no distribution to expand: leave out +{spec.rule}."
        )
    if (
        not spec.inner
        and spec.name not in COMBINATIONS
        and spec.rule not in expansions_of(spec.kind)
    ):
        able = registry.listed([f"+{name}" for name in expansions_of(spec.kind)], "or")
        raise UserError(f"The drafter {spec.name!r} takes no +{spec.rule}: {able} expand it.")
    if length is not None:
        expand(spec.rule, length, spec.nodes)
    elif spec.nodes is not None and not 3 <= spec.nodes <= MAX_NODES:
        raise UserError(
            f"An expansion takes 3 to {MAX_NODES} nodes, the root and the chain included, got "
            f"{spec.nodes}."
        )
    return spec


def expansions_of(kind: registry.Kind) -> tuple[str, ...]:
    """The expansions that drafters of a kind take, none where they have no distribution."""
    if not kind.distribution:
        return ()
    return tuple(name for name, rule in RULES.items() if getattr(kind, rule.needs))


def _check_numbers(spec: Spec) -> None:
    length = spec.length
    if spec.inner:
        check_lenience(spec.lenience)
        if length is not None:
            check_budget(length)
    elif length is not None and not spec.kind.usual_length:
        raise UserError(f"The drafter {spec.name!r} drafts nothing and takes no length.")
    if length is not None and not 1 <= length < MAX_NODES:
        raise UserError(f"A draft length must be in 1..{MAX_NODES - 1}, got {length}.")
    if spec.stop is not None:
        Stop(*spec.stop)
    for inner in spec.inner:
        _check_numbers(inner)


def _has_unset_length(spec: Spec) -> bool:
    """Whether a length was left out that decides how long drafts are."""
    if spec.inner:
        return any(map(_has_unset_length, spec.inner))
    return spec.length is None


def expand(rule: str, length: int, nodes: int | None) -> Rule:
    """The expansion of a chain of `length`; by default to three more nodes a chain token.

    Raises:
      UserError: the budget does not fit the chain.
    """
    made = RULES[rule](min(1 + 4 * length, MAX_NODES) if nodes is None else nodes)
    made.fit(length)
    return made


def complete(
    spec: Spec,
    folder: Path,
    longest: Callable[[str], int] | None = None,
    setting: Setting | None = None,
) -> Spec:
    """The specification with nothing left out: as measured for a checkpoint folder, or as usual.

    A length that was measured not to pay is warned of, and the usual one taken.

    Args:
      folder: as in `load_drafter`. longest: the longest draft of a drafter by its name, by default as its
        checkpoint in the folder says; a length that was left out is at most that.
      setting: which measurements count, see `defaults.measured`.
    """
    if spec.name in COMBINATIONS and not spec.inner:
        record = measured(folder, setting)
        chosen = record.get(spec.name)
        if chosen is None:
            what = "cascade" if spec.name == CASCADE else f"combination `{spec.name}`"
            raise UserError(
                f"No {what} was chosen for the checkpoints in {folder}: name one, as in {EXAMPLES[spec.name]}, or "
                f"run `jax-specdec tune --drafters lm,max-gram,{spec.name}`."
            )
        if record.get("default") == "none":
            _warn(spec.name, record, f"It is {chosen} all the same, since it was named.", level=3)
        preset = parse_drafter(chosen)
        if preset.name == FIRST and spec.rule is not None:
            raise UserError(
                f"{spec.name} is {preset} here, which {spec.rule} cannot expand: it has no distribution. Name a cascade, as "
                f"in {EXAMPLES[CASCADE]}+{spec.rule}."
            )
        spec = preset._replace(rule=spec.rule, nodes=spec.nodes)
    longest = longest or (lambda name: registry.longest(name, folder / name))
    if spec.inner:
        spec = _filled(spec, longest)
        if spec.rule is not None:
            spec = spec._replace(nodes=expand(spec.rule, depth_of(spec), spec.nodes).nodes)
        return spec
    if not spec.kind.usual_length:
        return spec
    length, nodes = spec.length, spec.nodes
    if length is None:
        found = measured(folder, setting)
        best = _usual_length(spec, found)
        length = min(best, longest(spec.name))
        if nodes is None and length == best:
            nodes = found.get("nodes", {}).get(spec.key)
    if spec.rule is not None:
        nodes = expand(spec.rule, length, nodes).nodes
    return spec._replace(length=length, nodes=nodes)


def _usual_length(spec: Spec, found: dict[str, Any]) -> int:
    """The measured length, where it pays, or what is usual for the kind."""
    lengths = found.get("lengths", {})
    own, plain = lengths.get(spec.key), lengths.get(spec.name)
    best = int(own or plain or spec.kind.usual_length)
    if own == 0 or (own is None and plain == 0):
        _warn(
            spec.key, found, f"It drafts {best} tokens all the same, since it was named.", level=4
        )
    return best


def _warn(key: str, found: dict[str, Any], then: str, level: int) -> None:
    """Of a drafter that was measured not to pay."""
    warnings.warn(
        f"The drafter {key} was {measured_on(found)} not to pay: plain decoding is faster. {then}",
        stacklevel=level + 1,
    )


def _filled(spec: Spec, longest: Callable[[str], int], most: int = MAX_NODES) -> Spec:
    """With a budget of 1 for what verifies, and for what does not the usual length, or its share of what is left of `most`.

    What stands before a drafter of a horizontal cascade is not taken off: where that is too much, building it says so.
    """
    if spec.name in COMBINATIONS:
        return spec._replace(inner=tuple(_filled(part, longest, most) for part in spec.inner))
    most = min(most, longest(spec.name))
    usual = 1 if spec.inner else min(spec.kind.usual_length, most)
    length = usual if spec.length is None else spec.length
    # Each inner draft is verified on its own, which adds a token.
    left = most - length * len(spec.inner) - sum(part.length or 0 for part in spec.inner)
    share = max(1, left // max(1, sum(part.length is None for part in spec.inner)))
    return spec._replace(
        length=length, inner=tuple(_filled(part, longest, share) for part in spec.inner)
    )
