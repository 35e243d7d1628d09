"""From a `--drafter` specification and checkpoint folders to a drafter with its parameters."""

import dataclasses
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax

from jax_specdec.checkpoints.dtypes import check_dtype
from jax_specdec.checkpoints.int8 import check_parts
from jax_specdec.checkpoints.targets import Target
from jax_specdec.core.draft import MAX_NODES
from jax_specdec.core.drafter import Drafter
from jax_specdec.core.sharding import ShardingRules
from jax_specdec.display import short
from jax_specdec.drafters import registry
from jax_specdec.drafters.cascade import Cascade, Horizontal
from jax_specdec.drafters.early_exit import Stop
from jax_specdec.drafters.first import First
from jax_specdec.drafters.registry import Make, Request
from jax_specdec.errors import UserError, a_kind
from jax_specdec.expansions.expand import Expand
from jax_specdec.models.config import ModelConfig
from jax_specdec.specs.defaults import setting_of
from jax_specdec.specs.language import COMBINATIONS, FIRST, Spec, folders_by_name
from jax_specdec.specs.whole import complete, expand, parse_drafter


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LoadedDrafter:
    """A drafter and its parameters.

    Attributes:
      params: by name, `{name: ...}`.
      longest: the longest draft it can be loaded for.
      made_for: folder and configuration of the target it was loaded for; None where that is not known.
      reason: why it was chosen, where nobody named it.
      folder: of its checkpoint, where it was trained in this process; None otherwise.
    """

    drafter: Drafter
    params: dict[str, Any]
    spec: str
    longest: int = MAX_NODES - 1
    made_for: tuple[Path, ModelConfig] | None = None
    reason: str = ""
    folder: Path | None = None

    def check_target(self, target: Target) -> None:
        """Raises a UserError for another target than the one that it was loaded for."""
        if self.made_for is not None and self.made_for != (target.path, target.config):
            raise UserError(
                f"The drafter {self.spec} was loaded for the target in {self.made_for[0]}, and this one is in "
                f"{target.path}: load it for this one."
            )

    def __repr__(self) -> str:
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        held = f", {short(count)} parameters" if count else ""
        return f"LoadedDrafter({self.spec}{held}{', ' if self.reason else ''}{self.reason})"


class Drafters:
    """The drafters beside one target, by specification; a name that comes again is loaded once.

    Args:
      folder, drafts, dtype, int8, rules: as in `load_drafter`. batch_size: which measured lengths count.

    Raises:
      UserError: rules without a mesh, or that do not fit it.
    """

    def __init__(
        self,
        target: Target,
        folder: str | Path | None = None,
        *,
        drafts: Mapping[str, str | Path] | None = None,
        dtype: Any = None,
        batch_size: int = 1,
        int8: Collection[str] = (),
        rules: ShardingRules | None = None,
    ):
        if not isinstance(target, Target):
            raise UserError(
                f"A drafter is loaded for a target of `load_target`, not {a_kind(target)}."
            )
        self.target = target
        self.drafts = folders_by_name(drafts)
        self.dtype = target.decoder.dtype if dtype is None else check_dtype(dtype)
        check_parts(int8)
        self.setting = setting_of(target, batch_size, int8)
        self.home = Path(folder) if folder is not None else self.setting.folder
        self.int8, self.rules = int8, rules
        if rules is not None:
            if target.sharding is None:
                raise UserError("Sharding rules need a mesh, which the target has not.")
            if rules.batch != target.sharding.rules.batch:
                raise UserError(
                    f"A drafter's rows lie where the target's do: batch must be "
                    f"{target.sharding.rules.batch!r}, not {rules.batch!r}."
                )
        self._requests: dict[str, Request] = {}
        self._loaded: dict[str, tuple[Make, dict[str, Any]]] = {}

    def request(self, name: str) -> Request:
        """A name with its checkpoint, whose configuration is read once."""
        if name not in self._requests:
            kind = registry.of(name)
            source = self.drafts.get(name, self.home / name) if kind.needs_checkpoint else None
            given = (self.target, self.dtype, self.int8, self.rules)
            self._requests[name] = Request(kind, name, source, *given)
        return self._requests[name]

    def available(self) -> list[str]:
        """Names of the drafters that need no checkpoint or have one."""
        names = dict.fromkeys((*registry.names("usual_length"), *self.drafts))

        def there(name: str) -> bool:
            if name in self.drafts or not registry.of(name).needs_checkpoint:
                return True
            return (self.home / name).is_dir()

        return [name for name in names if there(name)]

    def complete(self, spec: Spec | str) -> Spec:
        """`complete`, for this target."""
        parsed = spec if isinstance(spec, Spec) else parse_drafter(spec)
        return complete(parsed, self.home, lambda name: self.request(name).longest, self.setting)

    def outline(self, spec: Spec | str) -> tuple[Spec, Drafter]:
        """The whole specification and its drafter, without parameters: refuses what loading would."""
        whole = self.complete(spec)
        return whole, _assemble(
            whole, lambda name: self.request(name).kind.make(self.request(name))
        )

    def assemble(self, spec: Spec | str, makes: Mapping[str, Make]) -> Drafter:
        """The drafter of a specification from models that need not be loaded.

        Args:
          makes: by name, in place of what a checkpoint would give.
        """
        parsed = parse_drafter(spec) if isinstance(spec, str) else spec
        if not parsed.inner and parsed.length is None and parsed.kind.usual_length:
            parsed = parsed._replace(length=parsed.kind.usual_length)
        whole = complete(parsed, self.home, lambda name: registry.LONGEST, self.setting)

        def make(name: str) -> Make:
            return (
                makes[name] if name in makes else self.request(name).kind.make(self.request(name))
            )

        return _assemble(whole, make)

    def __call__(self, spec: Spec | str) -> LoadedDrafter:
        """See `load_drafter`."""
        whole = self.complete(spec)
        names = whole.names
        for name in names:
            if name not in self._loaded:
                self._loaded[name] = self.request(name).load()
        params = {key: p for name in names for key, p in self._loaded[name][1].items()}
        drafter = _assemble(whole, lambda name: self._loaded[name][0])
        _warn_of_larger(whole, params)
        longest = MAX_NODES - 1 if whole.name in COMBINATIONS else self.request(whole.name).longest
        made_for = (self.target.path, self.target.config)
        return LoadedDrafter(drafter, params, str(whole), longest, made_for)


def load_drafter(
    spec: str | Spec,
    target: Target,
    folder: str | Path | None = None,
    *,
    drafts: Mapping[str, str | Path] | None = None,
    dtype: Any = None,
    batch_size: int = 1,
    int8: Collection[str] = (),
    rules: ShardingRules | None = None,
) -> LoadedDrafter:
    """Builds the drafter of a specification for a target.

    Args:
      spec: the name of a kind (`registry.names()`), with a draft length after a colon, or a cascade of
        them (`specs.language`) or a preset's name; and for drafters with a distribution an expansion
        (`expansions_of`), with the nodes of a verification after a colon, as in `lm:4+cape:16`.
      folder: where drafters' checkpoints lie by name; default: the folder that the target's is in.
      drafts: checkpoint folders or hub ids by name, in place of `folder/name`.
      dtype: of the drafter's parameters; default: the target's.
      batch_size: which measured lengths count where the specification has none.
      int8: `weights` of the drafter, `cache` of an `lm`, as in `load_target`.
      rules: what of an `lm` is divided over the target's mesh, as in `load_target`; by default every device has
        all of a drafter. Others lie as their reading of the target asks.

    Raises:
      UserError: an unknown drafter, a missing checkpoint, or another tokenizer; for a drafter that reads
        the target another one than it was trained for, or a longer draft.
    """
    options = {"drafts": drafts, "dtype": dtype, "batch_size": batch_size, "int8": int8}
    drafters = Drafters(target, folder, **options, rules=rules)
    whole = drafters.complete(spec)
    check_taken(whole.names, int8, rules)
    return drafters(whole)


def check_taken(
    names: Collection[str], int8: Collection[str], rules: ShardingRules | None = None
) -> None:
    """Raises a UserError where none of these drafters has a cache for int8, or takes rules."""
    if any(registry.of(name).like_target for name in names):
        return
    able, given = registry.listed(registry.names("like_target"), "or"), ", ".join(names)
    if "cache" in int8:
        raise UserError(f"int8 is of the cache of {able}, and {given} has none that is its own.")
    if rules is not None:
        raise UserError(f"Sharding rules are for {able}: {given} lies as its target asks.")


def _assemble(whole: Spec, make: Callable[[str], Make]) -> Drafter:
    """The drafter of a complete specification, from those of its names."""

    def single(item: Spec, length: int) -> Any:
        drafter: Any = make(item.name)(length)
        if item.match > 1:
            drafter = dataclasses.replace(drafter, min_match=item.match)
        return drafter if item.stop is None else dataclasses.replace(drafter, stop=Stop(*item.stop))

    def build(item: Spec) -> Any:
        if not item.inner:
            return single(item, item.length or 0)
        if item.name == FIRST:
            return First(tuple(map(several, item.inner)))
        inner = tuple(map(build, item.inner))
        budgets = tuple(part.length or 1 for part in item.inner)
        if not item.verifies:
            return Horizontal(inner, budgets, item.cut)
        copies = True if item.copies else None
        return Cascade(single(item, 1), inner, budgets, item.lenience, copies, item.cut)

    def several(item: Spec) -> Any:
        """With as many verifications for one draft as it has a budget for."""
        drafter, budget = build(item), item.length or 1
        return Horizontal((drafter,), (budget,)) if item.verifies and budget > 1 else drafter

    drafter = several(whole)
    if whole.rule is not None:
        drafter = Expand(drafter, expand(whole.rule, drafter.info.depth, whole.nodes))
    return drafter


def _warn_of_larger(spec: Spec, params: dict[str, Any]) -> None:
    """Warns of drafters that cost more than the one that verifies what they draft."""

    def size(name: str) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(params.get(name, ())))

    for part in spec.inner:
        if spec.verifies:
            for name in part.names:
                if size(name) > size(spec.name):
                    warnings.warn(
                        f"The drafter {name!r} has {size(name):,} parameters, and {spec.name!r}, which "
                        f"verifies it, {size(spec.name):,}: such a cascade can hardly pay.",
                        stacklevel=4,
                    )
        _warn_of_larger(part, params)
