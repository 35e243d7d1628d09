"""Flags for chat templates, of `generate --chat` and `chat`."""

import argparse
import json
from pathlib import Path
from typing import Any

from jax_specdec.errors import UserError, shown


def add_template(group: Any) -> None:
    """`--system`, `--template` and `--template-arg`."""
    group.add_argument("--system", metavar="TEXT", help="system message of the chat")
    group.add_argument(
        "--template",
        metavar="FILE",
        help="chat template in Jinja, in place of the model's own",
    )
    group.add_argument(
        "--template-arg",
        dest="template_args",
        type=_argument,
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="argument of the chat template, as in enable_thinking=false; may be given several times",
    )


def given(args: argparse.Namespace) -> str | None:
    """A flag of these that was given."""
    flags = {
        "--system": args.system,
        "--template": args.template,
        "--template-arg": args.template_args,
    }
    return next((flag for flag, value in flags.items() if value not in (None, [])), None)


def template_options(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags say, as `text.chat.chat_text` takes it.

    Raises:
      UserError: a template file that cannot be read.
    """
    template = None
    if args.template is not None:
        try:
            template = Path(args.template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise UserError(
                f"The template {shown(args.template)} cannot be read: {reason}."
            ) from None
        if not template.strip():
            raise UserError(f"The template {shown(args.template)} is empty.")
    return {"template": template, "template_args": dict(args.template_args)}


def _argument(text: str) -> tuple[str, Any]:
    """`NAME=VALUE`, the value as JSON has it, else a string."""
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise argparse.ArgumentTypeError(
            f"NAME=VALUE, as in enable_thinking=false, not {shown(text)}"
        )
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
