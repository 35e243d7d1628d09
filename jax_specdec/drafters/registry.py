"""Kinds of drafters by name: what `--drafter` can ask for, and how each kind is built.

A drafter is one file: its class, and a `Kind` that the file registers. Built-in files are imported when a
kind is first asked for; a package adds its own by an entry point of the group `jax_specdec.drafters`, or by
being imported. Nothing here imports jax.
"""

import dataclasses
import functools
import importlib
import importlib.metadata
import re
import warnings
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_specdec.errors import UserError

if TYPE_CHECKING:
    from jax_specdec.core.drafter import Drafter

ENTRY_POINTS = "jax_specdec.drafters"
# In the order in which messages name them.
_BUILT_IN = ("none", "lm", "glide", "medusa", "max_gram", "prompt_lookup", "bigram")
# Words of `--drafter` that no kind may take.
_RESERVED = ("auto", "cascade", "first")
_NAME = re.compile(r"[a-z][a-z0-9-]*")
LONGEST = 63  # tokens of a draft, `core.draft.MAX_NODES` without the root

Make = Callable[[int], "Drafter"]


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """A drafter that is asked for.

    Attributes:
      name: of its parameters, its state and its statistics: the kind's, or a numbered one.
      source: a folder or hub id of its checkpoint, None where the kind needs none.
      target: without parameters where nothing is loaded; None where nothing but the checkpoint matters.
      dtype: of parameters and computation. int8: of which parts, as in `load_target`.
      rules: what is divided over the target's mesh, None for nothing; only for kinds that are `like_target`.
    """

    kind: "Kind"
    name: str
    source: str | Path | None = None
    target: Any = None
    dtype: Any = None
    int8: Collection[str] = ()
    rules: Any = None

    @property
    def sharding(self) -> Any:
        """The drafter's `Sharding`, None on one device: without rules, rows as the target's, parameters everywhere."""
        target = None if self.target is None else self.target.sharding
        if target is None or self.rules is None:
            return None if target is None else target.replicated
        return dataclasses.replace(target, rules=self.rules)

    @functools.cached_property
    def folder(self) -> Path:
        """The checkpoint's, fetched where it is on the hub.

        Raises:
          UserError: there is none.
        """
        from jax_specdec.checkpoints.hub import HUB_GGUF, HUB_ID, find_checkpoint, local_path

        source = "" if self.source is None else self.source
        local = local_path(source) if source else Path()

        hub = isinstance(source, str) and (HUB_ID.fullmatch(source) or HUB_GGUF.fullmatch(source))
        if source and (local.exists() or hub):
            try:
                return find_checkpoint(source)
            except UserError as error:
                raise UserError(f"The drafter {self.name!r}: {error}") from None
        raise UserError(
            f"The drafter {self.name!r} has no checkpoint at {local}: say where it is with --draft "
            f"{self.name}=DIR."
        )

    @functools.cached_property
    def config(self) -> Any:
        """What `Kind.read` says of the checkpoint, read once.

        Raises:
          UserError: there is no checkpoint, or it is not one of this kind.
        """
        return self.kind.read(self.folder)

    @functools.cached_property
    def longest(self) -> int:
        """The longest draft, at most 63 tokens."""
        return min(self.kind.longest(self), LONGEST)

    def load(self) -> tuple[Make, dict[str, Any]]:
        """`Kind.load`, and its matrices in int8 where they are wanted so."""
        if self.kind.load is None:
            return self.kind.make(self), {}
        make, params = self.kind.load(self)
        if "weights" in self.int8:
            from jax_specdec.models.quantized import quantize

            params = {name: quantize(own) for name, own in params.items()}
        return make, params


def _read_nothing(folder: Path) -> None:
    del folder


def _no_limit(request: Request) -> int:
    del request
    return LONGEST


def _all(length: int) -> tuple[int, ...]:
    return (length,)


def _nothing(request: Request, batch: int, slots: int) -> dict[str, Any]:
    """What `info` says of a drafter that takes no memory to speak of."""
    del batch, slots
    return {"path": str(request.folder)} if request.kind.needs_checkpoint else {}


@dataclasses.dataclass(frozen=True, eq=False)
class Foreign:
    """A drafter of another project that is to be written as our own.

    Attributes:
      source: its folder. target: loaded, without a tokenizer. out: the folder to write.
      dtype, max_shard_bytes: of the files.
    """

    source: Path
    target: Any
    out: str | Path
    dtype: Any
    max_shard_bytes: int

    def write(self, save: Callable[..., None], model: Any, params: Any) -> None:
        """Has `save` of the kind's checkpoints write a model that was imported for the target."""
        from jax_specdec.checkpoints.target_bound import target_fingerprint

        fingerprint = target_fingerprint(self.target.path)
        options = {"dtype": self.dtype, "max_shard_bytes": self.max_shard_bytes}
        save(self.out, model, params, fingerprint, **options)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of drafter.

    Attributes:
      name: in a specification: lower-case letters, digits and hyphens.
      make: gives a function from a draft length to the drafter. It reads configurations at most, so that
        `info` can refuse what loading would: another target's drafter, or one that is too long.
      load: the same function, and the parameters by name, `{request.name: ...}`, `request.target` having
        its own; None where there are none.
      usual_length: of a draft where none was given or measured; 0 for a drafter that takes no length.
      needs_checkpoint: the folder named like the drafter beside the target's, or what `--draft` names.
      numbered: whether there may be several, as `lm2`.
      verifies: whether it can verify other drafters' tokens, see `core.drafter.Verifier`.
      distribution: whether its drafts have probabilities, which expansions go by.
      grows: whether it can read branches, see `expansions.grown.Grower`.
      independent: whether its candidates do not depend on each other, see `expansions.static_tree`.
      ends_early: whether `make(length)` has a field `stop`, see `drafters.early_exit.Stop`.
      matches: whether it has a field `min_match`, tokens of the text's end that must stand somewhere before, too.
      like_target: whether it is a whole model, which takes sharding rules and an int8 cache as the target does.
      sizes: `Info.sizes` of a draft length.
      read: of a checkpoint, what `longest`, `make` and `describe` need, without the weights.
      longest: the longest draft that a checkpoint allows.
      describe: what `info` prints of it, given rows and cache slots: JSON, with bytes under
        `memory`, their sum as `total`, where it takes any.
      adopt: writes a checkpoint from one of another project, or says False where it knows none there.
    """

    name: str
    make: Callable[[Request], Make]
    load: Callable[[Request], tuple[Make, dict[str, Any]]] | None = None
    usual_length: int = 4
    needs_checkpoint: bool = False
    numbered: bool = False
    verifies: bool = False
    distribution: bool = False
    grows: bool = False
    independent: bool = False
    ends_early: bool = False
    matches: bool = False
    like_target: bool = False
    sizes: Callable[[int], tuple[int, ...]] = _all
    read: Callable[[Path], Any] = _read_nothing
    longest: Callable[[Request], int] = _no_limit
    describe: Callable[[Request, int, int], dict[str, Any]] = _nothing
    adopt: Callable[[Foreign], bool] | None = None

    def has(self, name: str) -> bool:
        """Whether a drafter of this name is of this kind."""
        number = name.removeprefix(self.name)
        return name == self.name or (
            self.numbered and name.startswith(self.name) and number.isdecimal()
        )


_KINDS: dict[str, Kind] = {}


def register(kind: Kind) -> Kind:
    """Makes a kind known by its name; the file that is loaded again replaces its own.

    Raises:
      UserError: a name that cannot stand in a specification, or that is taken.
    """
    if not _NAME.fullmatch(kind.name) or kind.name in _RESERVED:
        raise UserError(
            f"A kind of drafter cannot be named {kind.name[:80]!r}: lower-case letters, digits and hyphens, "
            f"and none of {', '.join(_RESERVED)}."
        )
    known = _KINDS.get(kind.name)
    if known is not None and _home(known) != _home(kind):
        raise UserError(
            f"Two kinds of drafter are named {kind.name!r}, of {_home(known)} and of {_home(kind)}."
        )
    _KINDS[kind.name] = kind
    return kind


def _home(kind: Kind) -> str:
    return getattr(kind.make, "__module__", "")


@functools.cache
def _import_all() -> None:
    for module in _BUILT_IN:
        importlib.import_module(f"jax_specdec.drafters.{module}")
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            found = point.load()
        except Exception as error:  # whatever another package's import may raise
            reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
            warnings.warn(
                f"The drafter {point.name!r} of {point.value} cannot be imported: {reason}",
                stacklevel=2,
            )
            continue
        if isinstance(found, Kind):
            register(found)


def kinds() -> tuple[Kind, ...]:
    """All kinds, the built-in ones first."""
    _import_all()
    built_in = [name.replace("_", "-") for name in _BUILT_IN]
    more = [name for name in _KINDS if name not in built_in]
    return tuple(_KINDS[name] for name in (*built_in, *more))


def find(name: str) -> Kind | None:
    """The kind of a drafter's name, a number behind it included."""
    fitting = [kind for kind in kinds() if kind.has(name)]
    return max(fitting, key=lambda kind: len(kind.name), default=None)


def of(name: str) -> Kind:
    """`find`, for a name that is known to be one."""
    kind = find(name)
    if kind is None:
        raise UserError(f"Unknown drafter {name[:80]!r}: known are {', '.join(names())}.")
    return kind


def names(flag: str | None = None) -> tuple[str, ...]:
    """Names of all kinds, or of those with a flag, `verifies` for instance."""
    return tuple(kind.name for kind in kinds() if flag is None or getattr(kind, flag))


def longest(name: str, folder: Path) -> int:
    """The longest draft of a drafter whose checkpoint, if it has one, is `folder`; 63 where nothing limits it."""
    kind = of(name)
    if not kind.needs_checkpoint or not folder.is_dir():
        return LONGEST
    return Request(kind, name, folder).longest


def listed(words: Sequence[str], conjunction: str = "and") -> str:
    """`a, b and c`."""
    *some, last = words
    return f"{', '.join(some)} {conjunction} {last}" if some else last
