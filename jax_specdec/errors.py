"""The one exception that users meet: its message is a sentence they can act on."""


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
