"""The exceptions that users meet: a message is a sentence they can act on; and what such sentences share."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Wrong input or wrong use. The command line prints the message alone and exits with 2."""


class RunError(RuntimeError):
    """Something failed at run time. The command line prints the message alone and exits with 1."""


def shown(text: object, most: int = 80) -> str:
    """What a user gave, quoted for a message and cut where it is long."""
    text = str(text)
    return repr(text if len(text) <= most else f"{text[: most - 3]}...")


def shown_value(value: object, most: int = 60) -> str:
    """A value as Python writes it, cut where that is long."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def a_kind(value: object) -> str:
    """What this is, for a message.

    >>> a_kind(None), a_kind(b""), a_kind(1.5)
    ('None', 'bytes', 'a float')
    """
    if value is None:
        return "None"
    name = type(value).__name__
    if isinstance(value, bytes):
        return "bytes"
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name:.60}"


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """The nearest of the known names, to be put behind a message; nothing where none is near.

    >>> did_you_mean("temprature", ["temperature", "top_k"]), did_you_mean("x", ["top_k"])
    ('; did you mean temperature?', '')
    """
    close = difflib.get_close_matches(str(name)[:80], list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""
