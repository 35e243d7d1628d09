"""Arguments and data that the training commands share."""

import argparse
import dataclasses
import difflib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from jax_specdec.cli import common
from jax_specdec.errors import UserError

if TYPE_CHECKING:
    from jax_specdec.training.data import Documents


def add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        metavar="FILE[=WEIGHT]",
        action="append",
        required=True,
        help='JSONL of {"text"} or {"token_ids"}; may be given several times, with weights in proportion '
        "to which windows are taken from each file (default: from all text alike)",
    )
    parser.add_argument("--heldout", metavar="FILE", help="JSONL to measure the loss on")
    parser.add_argument(
        "--heldout-share",
        type=float,
        default=0.02,
        metavar="SHARE",
        help="without --heldout: this share of the documents (default: 0.02)",
    )


def add_dataclass(group: Any, kind: type, prefix: str) -> None:
    """A flag for each field; what is not given is None and leaves the field as it is."""
    for field in dataclasses.fields(kind):
        flag, dest = f"--{field.name.replace('_', '-')}", f"{prefix}.{field.name}"
        default = "" if field.default is dataclasses.MISSING else f"default: {field.default}"
        if field.type is bool:
            group.add_argument(flag, dest=dest, action=argparse.BooleanOptionalAction, help=default)
        elif get_origin(field.type) is Literal:
            group.add_argument(flag, dest=dest, choices=get_args(field.type), help=default)
        else:
            group.add_argument(flag, dest=dest, type=field.type, metavar="N", help=default)


def given(args: argparse.Namespace, prefix: str) -> dict[str, Any]:
    """The fields that flags of `add_dataclass` set."""
    found = {
        key.removeprefix(f"{prefix}."): value
        for key, value in vars(args).items()
        if key.startswith(f"{prefix}.")
    }
    return {key: value for key, value in found.items() if value is not None}


def read_config(path: str | None, kinds: dict[str, type]) -> dict[str, dict[str, Any]]:
    """The sections of a configuration file, their keys checked against dataclasses."""
    if path is None:
        return {name: {} for name in kinds}
    if not Path(path).exists():
        raise UserError(f"There is no file {path}.")
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}).") from None
    if not isinstance(found, dict) or not all(isinstance(v, dict) for v in found.values()):
        raise UserError(f"{path} must hold a JSON object of {' and '.join(kinds)}, each an object.")
    _known(path, found, list(kinds))
    for name, section in found.items():
        fields = {field.name: field.type for field in dataclasses.fields(kinds[name])}
        _known(f"{path}, {name!r}", section, list(fields))
        for key, value in section.items():
            want: Any = fields[key]
            fits = {
                int: isinstance(value, int) and not isinstance(value, bool),
                float: isinstance(value, (int, float)) and not isinstance(value, bool),
                bool: isinstance(value, bool),
                str: isinstance(value, str),
            }.get(want, True)
            if not fits:
                raise UserError(f"{path}: {key!r} must be of type {want.__name__}, got {value!r}.")
    return {name: found.get(name, {}) for name in kinds}


def _known(where: str, section: dict[str, Any], names: list[str]) -> None:
    for key in section:
        if key not in names:
            close = difflib.get_close_matches(key, names, n=1) or names
            raise UserError(f"{where}: unknown key {key!r}; did you mean {' or '.join(close)}?")


def weighted(item: str) -> tuple[str, float | None]:
    """`FILE` or `FILE=WEIGHT`; the name of a file that exists is never split.

    Raises:
      UserError: a weight that is not above 0.
    """
    path, equals, weight = item.rpartition("=")
    if not equals or Path(item).is_file():
        return item, None
    try:
        value = float(weight)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise UserError(f"--data {item}: the weight must be a number above 0.")
    return path, value


def load_documents(
    args: argparse.Namespace, tokenizer: Any, length: int
) -> tuple["Documents", list]:
    """Token ids of the training documents and of the held-out ones.

    Where a file has a weight, one without has the weight 1; the held-out share is taken from each file.
    """
    from jax_specdec.training.data import Mixed, read_documents

    if tokenizer.eos_token_id is None:
        raise UserError("The tokenizer has no end-of-text token, which separates documents.")
    files = [weighted(item) for item in args.data]
    mixed = any(weight is not None for _, weight in files)
    groups = [[path] for path, _ in files] if mixed else [[path for path, _ in files]]
    sources = [read_documents(group, tokenizer) for group in groups]
    if args.heldout is not None:
        heldout = read_documents([args.heldout], tokenizer)
    else:
        if not 0 < args.heldout_share <= 0.5:
            raise UserError(f"--heldout-share must be in (0, 0.5], got {args.heldout_share}.")
        every = round(1 / args.heldout_share)
        heldout = [ids for source in sources for ids in source[::every]]
        sources = [[ids for i, ids in enumerate(source) if i % every] for source in sources]
        if not all(sources):
            raise UserError("One document cannot be both data and held out: give --heldout.")
    tokens = sum(len(ids) for source in sources for ids in source)
    common.say(f"{tokens:,} tokens of data")
    weights = tuple(1.0 if weight is None else weight for _, weight in files)
    documents = Mixed(tuple(sources), weights) if mixed else sources[0]
    if sum(map(len, heldout)) <= length:
        raise UserError(
            f"The held-out documents have {sum(map(len, heldout))} tokens, fewer than one window of "
            f"{length + 1}: give more, or lower --sequence-length."
        )
    return documents, heldout
