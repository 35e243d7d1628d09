"""From a `--drafter` specification and a checkpoint folder to a drafter with its parameters."""

import dataclasses
import difflib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from jax_specdec.checkpoints import Target, load_target
from jax_specdec.drafters.base import Drafter
from jax_specdec.drafters.bigram import Bigram
from jax_specdec.drafters.expand import Cape, Expand, Fixed, PathProbability, Rule
from jax_specdec.drafters.glide import GliDeDrafter
from jax_specdec.drafters.glide_checkpoint import load_glide, read_glide_config
from jax_specdec.drafters.growth import BeamSearch, DynamicTree
from jax_specdec.drafters.lm import LmDrafter
from jax_specdec.drafters.max_gram import MaxGram
from jax_specdec.drafters.none import NoDrafter
from jax_specdec.drafters.prompt_lookup import PromptLookup
from jax_specdec.errors import UserError
from jax_specdec.tree import MAX_NODES

NAMES = ("none", "lm", "glide", "max-gram", "prompt-lookup", "bigram")
WITH_CHECKPOINT = ("lm", "glide", "bigram")
WITHOUT_DISTRIBUTION = ("none", "max-gram", "prompt-lookup", "bigram")
RULES: dict[str, type[Rule]] = {
    "cape": Cape,
    "fixed": Fixed,
    "path": PathProbability,
    "tree": DynamicTree,
    "beam": BeamSearch,
}
# Where nothing was measured for a checkpoint: see `jax-specdec tune`.
FALLBACK_LENGTHS = {"lm": 4, "glide": 4, "max-gram": 6, "prompt-lookup": 6, "bigram": 2}
LENGTHS_FILE = "draft_lengths.json"
BIGRAM_FILE = "bigram.safetensors"


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedDrafter:
    """A drafter and its parameters, `{name: ...}`; `longest` is the longest draft it can be loaded for."""

    drafter: Drafter
    params: dict[str, Any]
    spec: str
    longest: int = MAX_NODES - 1


class Spec(NamedTuple):
    """A parsed specification; `str` gives it back. None stands for the default."""

    name: str
    length: int | None = None
    rule: str | None = None
    nodes: int | None = None

    @property
    def key(self) -> str:
        """What measured defaults are filed under."""
        return self.name if self.rule is None else f"{self.name}+{self.rule}"

    def __str__(self) -> str:
        def item(name: str, count: int | None) -> str:
            return name if count is None else f"{name}:{count}"

        drafter = item(self.name, self.length)
        return drafter if self.rule is None else f"{drafter}+{item(self.rule, self.nodes)}"


def parse_drafter(spec: str) -> Spec:
    """`name[:length][+rule[:nodes]]`, where `rule` expands the drafter's chain to `nodes` nodes.

    Raises:
      UserError: an unknown name (the nearest ones are named), a length outside 1..63, a drafter that has
        nothing to expand, a budget that does not fit the length, or any length.
    """
    chain, plus, expansion = spec.partition("+")
    name, length = _item(chain, "drafter", NAMES)
    if name == "none" and length is not None:
        raise UserError("The drafter 'none' drafts nothing and takes no length.")
    if length is not None and not 1 <= length < MAX_NODES:
        raise UserError(f"A draft length must be in 1..{MAX_NODES - 1}, got {length}.")
    if not plus:
        return Spec(name, length)
    rule, nodes = _item(expansion, "expansion", tuple(RULES))
    if name in WITHOUT_DISTRIBUTION:
        raise UserError(f"The drafter {name!r} has no distribution to expand: leave out +{rule}.")
    if length is not None:
        expand(rule, length, nodes)
    elif nodes is not None and not 3 <= nodes <= MAX_NODES:
        raise UserError(
            f"An expansion takes 3 to {MAX_NODES} nodes, the root and the chain included, got {nodes}."
        )
    return Spec(name, length, rule, nodes)


def _item(text: str, kind: str, known: tuple[str, ...]) -> tuple[str, int | None]:
    """`name` or `name:count`, the name one of the known."""
    found = re.fullmatch(r"\s*([a-z-]+)\s*(?::\s*(-?\d+)\s*)?", text)
    if not found or found[1] not in known:
        name = found[1] if found else text.strip()
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(known)}."
        raise UserError(f"Unknown {kind} {name!r}: {hint}")
    return found[1], None if found[2] is None else int(found[2])


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
    return Spec(spec.name, length, spec.rule, nodes)


def longest_draft(name: str, folder: Path) -> int:
    """The longest draft of a drafter whose checkpoint, if it has one, is `folder`."""
    if name == "glide" and folder.is_dir():
        config, _ = read_glide_config(folder)
        if config.cross_attention:
            return min(config.trained_delay, MAX_NODES - 1)
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
        good = good and isinstance(found.get("default", ""), str)
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
      spec: `none`, `lm`, `glide`, `max-gram`, `prompt-lookup` or `bigram`, with a draft length after a
        colon; and for drafters with a distribution an expansion, `+cape`, `+fixed`, `+path`, `+tree` or
        `+beam`, with the nodes of a verification after a colon, as in `lm:4+cape:16`.
      folder: where drafters' checkpoints lie by name; default: the folder that the target's is in.
      drafts: checkpoint folders by name, in place of `folder/name`.
      dtype: of the drafter's parameters; default: the target's.

    Raises:
      UserError: an unknown drafter, a missing checkpoint, another vocabulary or tokenizer; for `glide`
        another target than it was trained for, or a longer draft.
    """
    home = Path(folder) if folder is not None else target.path.parent
    parsed = parse_drafter(spec)
    where = Path((drafts or {}).get(parsed.name, home / parsed.name))
    whole = complete(parsed, home, drafts)
    drafter, params = _load_chain(whole.name, whole.length or 0, target, where, dtype)
    if whole.rule is not None:
        drafter = Expand(drafter, expand(whole.rule, drafter.depth, whole.nodes))
    return LoadedDrafter(drafter, params, str(whole), longest_draft(whole.name, where))


def _load_chain(
    name: str, length: int, target: Target, where: Path, dtype: Any
) -> tuple[Drafter, dict[str, Any]]:
    """The drafter without its expansion, and its parameters."""
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
    if name == "glide":
        model, params = load_glide(where, target, dtype)
        return GliDeDrafter(model, length), {name: params}
    small = load_target(where, dtype=dtype or target.decoder.dtype)
    check_vocabulary(target, small)
    return LmDrafter(small.decoder, length), {name: small.params}


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
