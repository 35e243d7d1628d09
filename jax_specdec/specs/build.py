"""From a `--drafter` specification and a checkpoint folder to a drafter with its parameters."""

import dataclasses
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from jax_specdec.checkpoints.glide import load_glide, read_glide_config
from jax_specdec.checkpoints.medusa import load_medusa, read_medusa_config
from jax_specdec.checkpoints.targets import Target, load_target
from jax_specdec.core.draft import MAX_NODES
from jax_specdec.core.drafter import Drafter
from jax_specdec.drafters.bigram import Bigram
from jax_specdec.drafters.cascade import Cascade, Horizontal, turns
from jax_specdec.drafters.glide import GliDeDrafter
from jax_specdec.drafters.lm import LmDrafter
from jax_specdec.drafters.max_gram import MaxGram
from jax_specdec.drafters.medusa import MedusaDrafter
from jax_specdec.drafters.neural import Stop
from jax_specdec.drafters.none import NoDrafter
from jax_specdec.drafters.prompt_lookup import PromptLookup
from jax_specdec.errors import UserError
from jax_specdec.expansions.grown import BeamSearch, DynamicTree, Growth
from jax_specdec.expansions.siblings import Cape, Expand, Fixed, PathProbability, Rule
from jax_specdec.expansions.static_tree import StaticTree
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

RULES: dict[str, type[Rule]] = {
    "cape": Cape,
    "fixed": Fixed,
    "path": PathProbability,
    "tree": DynamicTree,
    "beam": BeamSearch,
    "static": StaticTree,
}
# Where nothing was measured for a checkpoint: see `jax-specdec tune`.
FALLBACK_LENGTHS = {
    "lm": 4,
    "glide": 4,
    "medusa": 3,
    "max-gram": 6,
    "prompt-lookup": 6,
    "bigram": 2,
}
LENGTHS_FILE = "draft_lengths.json"
BIGRAM_FILE = "bigram.safetensors"


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
            "lower its quotas and lengths, or cut."
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
        if issubclass(rule, Growth):
            return kind in REVIEWERS
        return rule is not StaticTree or kind == "medusa"

    return tuple(name for name, rule in RULES.items() if fits(rule))


def _check_lengths(spec: Spec) -> None:
    length = spec.length
    if spec.name == "none" and length is not None:
        raise UserError("The drafter 'none' drafts nothing and takes no length.")
    if spec.inner and length is not None and length < 1:
        raise UserError(f"A quota must be at least 1, got {length}.")
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


def depth_of(spec: Spec) -> int:
    """The most tokens of a draft, without what an expansion adds; nothing may be left out."""
    return max(_sizes_of(spec), default=0)


def _sizes_of(spec: Spec) -> tuple[int, ...]:
    if spec.name == CASCADE:
        return _turns_of(spec)
    if spec.inner:
        return turns([_reviewed(spec)], [spec.length or 1], [False], cut=False)[1]
    if spec.stop is not None:
        return tuple(range(1, (spec.length or 0) + 1))
    return _statistical(spec).sizes if spec.length else ()


def _reviewed(spec: Spec) -> tuple[int, ...]:
    """The sizes of one review."""
    return tuple(range(1, max(_turns_of(spec)) + 2))


def _turns_of(spec: Spec) -> tuple[int, ...]:
    sizes = [_reviewed(inner) if inner.inner else _sizes_of(inner) for inner in spec.inner]
    quotas = [inner.length or 1 for inner in spec.inner]
    return turns(sizes, quotas, [inner.stop is not None for inner in spec.inner], cut=spec.cut)[1]


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


def default_spec(target: Target | str | Path) -> str:
    """The drafter that was measured to be the fastest for a target, or one that needs no checkpoint.

    Args:
      target: a loaded one, or its folder; the measurements lie beside it.
    """
    folder = target.path if isinstance(target, Target) else Path(target)
    return _measured(folder.parent).get("default") or "prompt-lookup"


def _measured(folder: Path) -> dict[str, Any]:
    """What `jax-specdec tune` found for the checkpoints in a folder: `{}` where it never ran.

    Raises:
      UserError: the file is not what `tune` writes.
    """
    path = folder / LENGTHS_FILE
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        counts = [*found.get("lengths", {}).values(), *found.get("nodes", {}).values()]
        good = all(n is None or 0 <= n <= MAX_NODES for n in counts)
        good = good and all(isinstance(found.get(k, ""), str) for k in ("default", CASCADE))
    except (OSError, ValueError, TypeError, AttributeError):
        good = False
    if not good:
        raise UserError(f"{path} is damaged: write it again with `jax-specdec tune`, or delete it.")
    return found


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
        drafter = Expand(drafter, expand(whole.rule, drafter.depth, whole.nodes))
    longest = longest_draft(whole.name, Path((drafts or {}).get(whole.name, home / whole.name)))
    return LoadedDrafter(drafter, params, str(whole), longest)


def _warn_of_larger(reviewer: Drafter, inner: tuple[Drafter, ...], params: dict[str, Any]) -> None:
    """Warns of drafters that cost more than the one that reviews what they draft."""

    def size(name: str) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(params.get(name, ())))

    for drafter in inner:
        name = drafter.reviewer.name if isinstance(drafter, Cascade) else drafter.name
        if size(name) > size(reviewer.name):
            warnings.warn(
                f"The drafter {name!r} has {size(name):,} parameters, and {reviewer.name!r}, which reviews "
                f"it, {size(reviewer.name):,}: such a cascade can hardly pay.",
                stacklevel=3,
            )


def _statistical(spec: Spec) -> Any:
    """The drafter of a specification, of which the sizes of its drafts are asked alone."""
    kinds = {"max-gram": MaxGram, "prompt-lookup": PromptLookup}
    return kinds.get(spec.name, Bigram)(spec.length)


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


def check_vocabulary(target: Target, drafter: Target) -> None:
    """Refuses a drafter whose token ids do not mean what the target's mean.

    Raises:
      UserError: another vocabulary size, or tokenizers that disagree, with the share that agrees.
    """
    if target.vocab_size != drafter.vocab_size:
        raise UserError(
            f"The drafter's vocabulary has {drafter.vocab_size} entries and the target's "
            f"{target.vocab_size}: a drafter must share the target's tokenizer."
        )
    if target.tokenizer is None or drafter.tokenizer is None:
        return
    ours, theirs = target.tokenizer.get_vocab(), drafter.tokenizer.get_vocab()
    same = sum(theirs.get(token) == index for token, index in ours.items())
    if same < len(ours) or len(theirs) != len(ours):
        raise UserError(
            f"The drafter's tokenizer agrees with the target's on {same} of {len(ours)} tokens: a drafter "
            "must share the target's tokenizer."
        )


def save_bigram(folder: str | Path, table: np.ndarray) -> None:
    """Writes a successor table `int32[V]` as `bigram.safetensors`."""
    from safetensors.numpy import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"successor": np.ascontiguousarray(table, np.int32)}, folder / BIGRAM_FILE)


def load_bigram(folder: str | Path, vocab_size: int) -> np.ndarray:
    """Reads a successor table and checks it against the vocabulary.

    Raises:
      UserError: no such file, not a table, or ids outside the vocabulary.
    """
    path = Path(folder) / BIGRAM_FILE
    if not path.is_file():
        raise UserError(f"There is no {BIGRAM_FILE} in {folder}.")
    try:
        with safe_open(path, framework="np") as file:
            table = file.get_tensor("successor")
    except SafetensorError as error:
        raise UserError(f"{path} is not a readable bigram table: {error}.") from None
    if table.shape != (vocab_size,):
        raise UserError(
            f"The bigram table has {table.shape[0]} entries and the target's vocabulary {vocab_size}."
        )
    if table.min() < 0 or table.max() >= vocab_size:
        raise UserError(f"The bigram table names tokens outside the vocabulary of {vocab_size}.")
    return table
