"""The one exception that users meet: its message is a sentence they can act on."""


class UserError(ValueError):
    """Wrong input or wrong use. The command line prints the message alone and exits with 2."""


class RunError(RuntimeError):
    """Something failed at run time. The command line prints the message alone and exits with 1."""
