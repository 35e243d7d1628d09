"""Parsers whose help has examples and whose errors are one sentence."""

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from jax_specdec.errors import UserError, did_you_mean


class Formatter(argparse.HelpFormatter):
    """Fills paragraphs, and leaves examples as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n  " in text:
            return text
        return super()._fill_text(text, width, indent)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence; sub-commands inherit it.

    Args:
      examples: what may stand behind the command's name, shown at the end of its help.
    """

    def __init__(self, *args: Any, examples: Sequence[str] = (), **kwargs: Any):
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", Formatter)
        super().__init__(*args, **kwargs)
        self.examples = [f"{self.prog} {example}".strip() for example in examples]
        if examples:
            self.epilog = "\n  ".join(["examples:", *map(_continued, self.examples)])
        # Without a default here, so that `--debug` before the command is not overwritten after it.
        self.add_argument(
            "--debug",
            action="store_true",
            default=argparse.SUPPRESS,
            help="show the traceback of an error",
        )

    def format_help(self) -> str:
        """With a usage of what has to be given; the options have their own place below."""
        if self.usage is None:
            words = [self.prog]
            for action in self._actions:
                name = str(action.metavar).partition("[")[0]
                if isinstance(action, argparse._SubParsersAction):
                    name += " ..."
                if action.required or not action.option_strings:
                    words.append(" ".join([*action.option_strings[:1], name]))
            self.usage = _continued(" ".join([*words, "[options]"]), 70)
        return super().format_help()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Refuses what is not known here, where the flags that are known can be named."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].partition("=")[0]
            known = self._option_string_actions if flag.startswith("-") else ()
            hint = did_you_mean(flag, known)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found, unknown

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """With the nearest of the choices."""
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += did_you_mean(value, map(str, action.choices or ()))
            raise

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.rstrip('.')} (see `{self.prog} --help`).")


class Commands:
    """Where commands of a parser register; `lines` lists them with their one-line helps."""

    def __init__(self, parser: Parser, dest: str, metavar: str, *, required: bool = False):
        self.subparsers = parser.add_subparsers(
            dest=dest, metavar=metavar, required=required, help=argparse.SUPPRESS
        )
        self.lines: list[str] = []

    def add_parser(self, name: str, *, help: str, **kwargs: Any) -> Parser:
        self.lines.append(f"  {name:11} {help}")
        return self.subparsers.add_parser(name, **kwargs)


def _continued(command: str, width: int = 75) -> str:
    """A command over as many lines as an 80 column terminal needs, broken between options."""
    first, *rest = re.split(r" (?=--|\[)", command)
    lines = [first]
    for option in rest:
        if len(lines[-1]) + len(option) < width:
            lines[-1] += f" {option}"
        else:
            lines.append(option)
    return " \\\n      ".join(lines)
