"""Arguments and data that the training commands share."""

import argparse
import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from jax_specdec.cli import common
from jax_specdec.errors import UserError
from jax_specdec.training.config import check_names, check_types

if TYPE_CHECKING:
    from jax_specdec.training.runs import Run


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
    texts = documented(kind)
    for field in dataclasses.fields(kind):
        flag, dest = f"--{field.name.replace('_', '-')}", f"{prefix}.{field.name}"
        default = texts[field.name]
        if field.default is not dataclasses.MISSING:
            default += f" (default: {field.default})"
        if field.type is bool:
            group.add_argument(flag, dest=dest, action=argparse.BooleanOptionalAction, help=default)
        elif get_origin(field.type) is Literal:
            group.add_argument(flag, dest=dest, choices=get_args(field.type), help=default)
        else:
            group.add_argument(flag, dest=dest, type=field.type, metavar="N", help=default)


def documented(kind: type) -> dict[str, str]:
    """What the docstring of a dataclass says of each attribute.

    >>> from jax_specdec.training.config import TrainConfig
    >>> documented(TrainConfig)["sequence_length"]
    'tokens of a window'
    """
    _, _, attributes = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")
    found = re.split(r"^  (\w+): ", attributes, flags=re.MULTILINE)
    texts = (" ".join(text.split()).rstrip(".").replace("%", "%%") for text in found[2::2])
    return dict(zip(found[1::2], texts, strict=True))


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
    check_names(path, found, list(kinds))
    for name, section in found.items():
        fields = [field.name for field in dataclasses.fields(kinds[name])]
        check_names(f"{path}, {name!r}", section, fields)
        check_types(path, section, kinds[name])
    return {name: found.get(name, {}) for name in kinds}


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


def training_run(args: argparse.Namespace) -> "Run":
    """What `add_data` took, --out, --init, --resume and --save-dtype."""
    from jax_specdec.training.corpus import Source
    from jax_specdec.training.runs import Run

    return Run(
        Path(args.out),
        data=[Source(Path(path), weight) for path, weight in map(weighted, args.data)],
        heldout=() if args.heldout is None else (Source(Path(args.heldout)),),
        heldout_share=args.heldout_share,
        init=args.init,
        resume=args.resume,
        save_dtype=args.save_dtype,
        report=common.say,
    )
