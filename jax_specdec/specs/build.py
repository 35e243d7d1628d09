"""From a `--drafter` specification and a checkpoint folder to a drafter with its parameters."""

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jax_specdec.checkpoints.glide import load_glide, read_glide_config
from jax_specdec.checkpoints.medusa import load_medusa, read_medusa_config
from jax_specdec.checkpoints.targets import Target, load_target
from jax_specdec.checkpoints.vocabulary import check_vocabulary
from jax_specdec.core.draft import MAX_NODES
from jax_specdec.core.drafter import Drafter
from jax_specdec.core.plain import NoDrafter
from jax_specdec.drafters.bigram import Bigram, load_bigram
from jax_specdec.drafters.cascade import Cascade, Horizontal
from jax_specdec.drafters.early_exit import Stop
from jax_specdec.drafters.glide import GliDeDrafter
from jax_specdec.drafters.lm import LmDrafter
from jax_specdec.drafters.max_gram import MaxGram
from jax_specdec.drafters.medusa import MedusaDrafter
from jax_specdec.drafters.prompt_lookup import PromptLookup
from jax_specdec.errors import UserError
from jax_specdec.expansions.beam_search import BeamSearch
from jax_specdec.expansions.cape import Cape
from jax_specdec.expansions.dynamic_tree import DynamicTree
from jax_specdec.expansions.expand import Expand, Rule
from jax_specdec.expansions.grown import GrownTree
from jax_specdec.expansions.siblings import Fixed, PathProbability
from jax_specdec.expansions.static_tree import StaticTree
from jax_specdec.specs.defaults import FALLBACK_LENGTHS, _measured
from jax_specdec.specs.language import (
    CASCADE,
    EXAMPLE,
    NAMES,
    REVIEWERS,
    WITH_CHECKPOINT,
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


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedDrafter:
    """A drafter and its parameters, `{name: ...}`; `longest` is the longest draft it can be loaded for."""

    drafter: Drafter
    params: dict[str, Any]
    spec: str
    longest: int = MAX_NODES - 1


def parse_drafter(text: str) -> Spec:
    """A specification in the language of `drafters.specs`, checked as far as it goes without checkpoints.

    Raises:
      UserError: an unknown name (the nearest ones are named), a length outside 1..63, a drafter that has
        nothing to expand, a cascade whose drafts could be too long, a budget that does not fit the
        length, or any length.
    """
    spec = parse(text)
    _check_lengths(spec)
    length = None if _open(spec) else depth_of(spec)
    if length is not None and length >= MAX_NODES:
        raise UserError(
            f"This cascade may draft {length} tokens at once, and a draft has at most {MAX_NODES - 1}: "
            "lower its budgets and lengths, or cut."
        )
    if spec.rule is None:
        return spec
    known_name(spec.rule, "expansion", tuple(RULES))
    if not spec.has_distribution:
        raise UserError(
            f"The drafter {spec.name!r} has no distribution to expand: leave out +{spec.rule}."
        )
    fitting = rules_for(spec.kind)
    if not spec.inner and spec.rule not in fitting:
        *some, last = (f"+{name}" for name in fitting)
        raise UserError(
            f"The drafter {spec.name!r} takes no +{spec.rule}: {', '.join(some)} or {last} expand it."
        )
    if length is not None:
        expand(spec.rule, length, spec.nodes)
    elif spec.nodes is not None and not 3 <= spec.nodes <= MAX_NODES:
        raise UserError(
            f"An expansion takes 3 to {MAX_NODES} nodes, the root and the chain included, got "
            f"{spec.nodes}."
        )
    return spec


def rules_for(kind: str) -> tuple[str, ...]:
    """The expansions that a drafter of a kind takes, none where it has no distribution."""
    if not Spec(kind).has_distribution:
        return ()

    def fits(rule: type[Rule]) -> bool:
        if issubclass(rule, GrownTree):
            return kind in REVIEWERS
        return rule is not StaticTree or kind == "medusa"

    return tuple(name for name, rule in RULES.items() if fits(rule))


def _check_lengths(spec: Spec) -> None:
    length = spec.length
    if spec.name == "none" and length is not None:
        raise UserError("The drafter 'none' drafts nothing and takes no length.")
    if spec.inner and length is not None and length < 1:
        raise UserError(f"A budget must be at least 1, got {length}.")
    if length is not None and not 1 <= length < MAX_NODES:
        raise UserError(f"A draft length must be in 1..{MAX_NODES - 1}, got {length}.")
    if spec.lenience < 1:
        raise UserError(f"A lenience must be finite and at least 1, got {spec.lenience:g}.")
    if spec.stop is not None:
        Stop(*spec.stop)
    for inner in spec.inner:
        _check_lengths(inner)


def _open(spec: Spec) -> bool:
    """Whether a length was left out that decides how long drafts are."""
    return any(map(_open, spec.inner)) or (spec.length is None and not spec.inner)


def expand(rule: str, length: int, nodes: int | None) -> Rule:
    """The expansion of a chain of `length`; by default to three more nodes a chain token.

    Raises:
      UserError: the budget does not fit the chain.
    """
    made = RULES[rule](min(1 + 4 * length, MAX_NODES) if nodes is None else nodes)
    made.fit(length)
    return made


def complete(spec: Spec, folder: Path, drafts: Mapping[str, str | Path] | None = None) -> Spec:
    """The specification with nothing left out: as measured for a checkpoint folder, or a fallback.

    Args:
      folder, drafts: as in `load_drafter`. A length that was left out is at most the drafter's longest.
    """
    if spec.name == "none":
        return spec
    if spec.name == CASCADE and not spec.inner:
        chosen = _measured(folder).get(CASCADE)
        if chosen is None:
            raise UserError(
                f"No cascade was chosen for the checkpoints in {folder}: name one, as in {EXAMPLE}, or run "
                "`jax-specdec tune --drafters lm,max-gram,cascade`."
            )
        spec = parse_drafter(chosen)._replace(rule=spec.rule, nodes=spec.nodes)
    if spec.inner:
        spec = _filled(spec)
        if spec.rule is not None:
            spec = spec._replace(nodes=expand(spec.rule, depth_of(spec), spec.nodes).nodes)
        return spec
    found = _measured(folder)
    length, nodes = spec.length, spec.nodes
    if length is None:
        lengths = found.get("lengths", {})
        best = int(lengths.get(spec.key) or lengths.get(spec.name) or FALLBACK_LENGTHS[spec.name])
        length = min(
            best, longest_draft(spec.name, Path((drafts or {}).get(spec.name, folder / spec.name)))
        )
        if nodes is None and length == best:
            nodes = found.get("nodes", {}).get(spec.key)
    if spec.rule is not None:
        nodes = expand(spec.rule, length, nodes).nodes
    return spec._replace(length=length, nodes=nodes)


def _filled(spec: Spec) -> Spec:
    """With a quota of 1 for what reviews, and the usual length for what does not."""
    if spec.name == CASCADE:
        return spec._replace(inner=tuple(map(_filled, spec.inner)))
    usual = 1 if spec.inner else FALLBACK_LENGTHS[spec.kind]
    length = usual if spec.length is None else spec.length
    return spec._replace(length=length, inner=tuple(map(_filled, spec.inner)))


def longest_draft(name: str, folder: Path) -> int:
    """The longest draft of a drafter whose checkpoint, if it has one, is `folder`."""
    if name == "glide" and folder.is_dir():
        config, _ = read_glide_config(folder)
        if config.cross_attention:
            return min(config.trained_delay, MAX_NODES - 1)
    if name == "medusa" and folder.is_dir():
        return min(read_medusa_config(folder)[0].num_heads, MAX_NODES - 1)
    return MAX_NODES - 1


def load_drafter(
    spec: str,
    target: Target,
    folder: str | Path | None = None,
    *,
    drafts: Mapping[str, str | Path] | None = None,
    dtype: Any = None,
) -> LoadedDrafter:
    """Builds the drafter of a specification for a target.

    Args:
      spec: `none`, `lm`, `glide`, `medusa`, `max-gram`, `prompt-lookup` or `bigram`, with a draft length
        after a colon, or a cascade of them (`drafters.specs`) or a preset's name; and for drafters with a
        distribution an expansion, `+cape`, `+fixed`, `+path`, `+tree`, `+beam` or `+static`
        (`rules_for`), with the nodes of a verification after a colon, as in `lm:4+cape:16`.
      folder: where drafters' checkpoints lie by name; default: the folder that the target's is in.
      drafts: checkpoint folders by name, in place of `folder/name`.
      dtype: of the drafter's parameters; default: the target's.

    Raises:
      UserError: an unknown drafter, a missing checkpoint, another vocabulary or tokenizer; for `glide`
        another target than it was trained for, or a longer draft.
    """
    home = Path(folder) if folder is not None else target.path.parent
    parsed = parse_drafter(spec)
    whole = complete(parsed, home, drafts)
    params: dict[str, Any] = {}

    def single(item: Spec, length: int) -> Any:
        """The drafter of a name with its own length and stop; every name is loaded once."""
        where = Path((drafts or {}).get(item.name, home / item.name))
        known = loaded.get(item.name)
        if known is None:
            known = loaded[item.name] = _load_chain(item.name, length, target, where, dtype)
            params.update(known[1])
        drafter: Any = known[0]
        if item.stop is not None:
            drafter = dataclasses.replace(drafter, stop=Stop(*item.stop))
        return dataclasses.replace(drafter, length=length) if length else drafter

    def build(item: Spec) -> Any:
        if not item.inner:
            return single(item, item.length or 0)
        inner = tuple(map(build, item.inner))
        quotas = tuple(part.length or 1 for part in item.inner)
        if item.name == CASCADE:
            return Horizontal(inner, quotas, item.cut)
        _warn_of_larger(single(item, 1), inner, params)
        copies = True if item.copies else None
        return Cascade(single(item, 1), inner, quotas, item.lenience, copies, item.cut)

    loaded: dict[str, Any] = {}
    drafter = build(whole)
    quota = whole.length or 1
    if whole.inner and quota > 1:  # several reviews for one draft
        drafter = Horizontal((drafter,), (quota,))
    if whole.rule is not None:
        drafter = Expand(drafter, expand(whole.rule, drafter.info.depth, whole.nodes))
    longest = longest_draft(whole.name, Path((drafts or {}).get(whole.name, home / whole.name)))
    return LoadedDrafter(drafter, params, str(whole), longest)


def _warn_of_larger(verifier: Drafter, inner: tuple[Drafter, ...], params: dict[str, Any]) -> None:
    """Warns of drafters that cost more than the one that verifies what they draft."""

    def size(name: str) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(params.get(name, ())))

    own = verifier.info.name
    for name in dict.fromkeys(use.name for drafter in inner for use in drafter.info.models):
        if size(name) > size(own):
            warnings.warn(
                f"The drafter {name!r} has {size(name):,} parameters, and {own!r}, which verifies it, "
                f"{size(own):,}: such a cascade can hardly pay.",
                stacklevel=3,
            )


def _load_chain(
    name: str, length: int, target: Target, where: Path, dtype: Any
) -> tuple[Drafter, dict[str, Any]]:
    """The drafter of one name, and its parameters."""
    if name == "none":
        return NoDrafter(), {}
    if name == "max-gram":
        return MaxGram(length), {}
    if name == "prompt-lookup":
        return PromptLookup(length), {}
    if not where.is_dir():
        raise UserError(
            f"The drafter {name!r} has no checkpoint at {where}: say where it is with --draft {name}=DIR."
        )
    if name == "bigram":
        table = load_bigram(where, target.vocab_size)
        return Bigram(length), {name: jnp.asarray(table)}
    if name.startswith("glide"):
        model, params = load_glide(where, target, dtype)
        return GliDeDrafter(model, length, name), {name: params}
    if name == "medusa":
        heads, params, accuracies = load_medusa(where, target, dtype)
        return MedusaDrafter(heads, length, name, accuracies), {name: params}
    small = load_target(where, dtype=dtype or target.decoder.dtype)
    check_vocabulary(target, small)
    return LmDrafter(small.decoder, length, name), {name: small.params}


def available_drafters(target: Target, drafts: Mapping[str, str | Path]) -> list[str]:
    """Names of the drafters that need no checkpoint or have one, where `load_drafter` looks for it."""
    home = target.path.parent

    def there(name: str) -> bool:
        return name not in WITH_CHECKPOINT or Path(drafts.get(name, home / name)).is_dir()

    return [name for name in NAMES if name != "none" and there(name)]
