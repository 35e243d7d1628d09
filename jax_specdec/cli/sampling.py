"""Flags for sampling and stops, and what a checkpoint asks for where they are not given."""

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jax_specdec.cli import common

if TYPE_CHECKING:
    from jax_specdec.checkpoints.targets import Target

# What counts where nobody says anything; fields of `generation.Request`.
USUAL: dict[str, Any] = {
    "max_new_tokens": 128,
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "seed": 0,
    "min_new_tokens": 0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


def add_sampling(parser: argparse.ArgumentParser, source: str, **usual: Any) -> Any:
    """The group `sampling`, which it returns.

    Args:
      source: the default of `--generation-config`.
      usual: values in place of `USUAL`.
    """
    usual = {**USUAL, **usual}
    parser.set_defaults(usual=usual)
    group = parser.add_argument_group("sampling")
    for name, kind, text in (
        ("max-new-tokens", int, "the longest answer"),
        ("temperature", float, "0 is greedy"),
        ("top-k", int, "of the N likeliest tokens alone; 0 is off"),
        ("top-p", float, "of the likeliest that make up P; 1 is off"),
        ("min-p", float, "of those above P times the likeliest; 0 is off"),
        ("seed", int, "of the sampled text"),
    ):
        _number(group, name, kind, text, usual)
    group.add_argument(
        "--stop",
        metavar="TEXT",
        action="append",
        default=[],
        help="end before this text, or at this special token; may be given several times",
    )
    group.add_argument(
        "--stop-token-id",
        dest="stop_token_ids",
        type=int,
        metavar="ID",
        action="append",
        default=[],
        help="end at this token, too; may be given several times",
    )
    group.add_argument("--ignore-eos", action="store_true", help="decode past end-of-text tokens")
    for name, kind, text in (
        ("min-new-tokens", int, "no stop token before so many"),
        (
            "repetition-penalty",
            float,
            "for tokens in prompt or answer, as in transformers; 1 is off",
        ),
        ("presence-penalty", float, "taken off the scores of tokens in the answer; 0 is off"),
        ("frequency-penalty", float, "the same, as often as they occur there"),
    ):
        _number(group, name, kind, text, usual)
    group.add_argument(
        "--logit-bias",
        type=_bias,
        metavar="ID=X",
        action="append",
        default=[],
        help="added to a token's score; may be given several times",
    )
    group.add_argument(
        "--bad-words",
        metavar="TEXT",
        action="append",
        default=[],
        help="text that must not occur; may be given several times",
    )
    group.add_argument(
        "--generation-config",
        choices=("model", "none"),
        default=source,
        help="whether settings that are not given here come from the model's generation_config.json "
        f"(default: {source})",
    )
    return group


def settle(args: argparse.Namespace) -> None:
    """Puts the usual values where none was given; `heed` may change these."""
    args.open = [name for name in args.usual if getattr(args, name) is None]
    for name in args.open:
        setattr(args, name, args.usual[name])
    args.logit_bias = dict(args.logit_bias)


def heed(args: argparse.Namespace, target: "Target") -> None:
    """Takes what was not given from the checkpoint, if asked to, and says by name what is left out."""
    defaults, left = target.generation, list(target.generation.unheeded(target.config.context))
    asked = defaults.options()
    if args.generation_config == "none":
        named = [name for name in args.open if getattr(defaults, name, None) is not None]
        named = [f"{name} {getattr(defaults, name):g}" for name in named if name in asked]
        lists = ("suppress_tokens", "bad_words_ids", "stop_strings")
        left = [*named, *(name for name in lists if getattr(defaults, name)), *left]
        asked = {}
    if left:
        hint = (
            " (--generation-config model heeds what it can)"
            if args.generation_config == "none"
            else ""
        )
        common.say(f"generation_config.json: left out {', '.join(left)}{hint}")
    for name in args.open:
        setattr(args, name, asked.get(name, getattr(args, name)))
    for name in ("stop", "bad_words"):
        setattr(args, name, [*getattr(args, name), *asked.get(name, ())])


def _number(group: Any, name: str, kind: type, text: str, usual: Mapping[str, Any]) -> None:
    letter = "P" if name.endswith("-p") else "N" if kind is int else "X"
    default = usual[name.replace("-", "_")]
    group.add_argument(
        f"--{name}", type=kind, metavar=letter, help=f"{text} (default: {default:g})"
    )


def _bias(text: str) -> tuple[int, float]:
    """`ID=X` of `--logit-bias`."""
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a token id and a number, as in 42=-5, got {text[:40]!r}"
        ) from None
