"""Which parts of a model may be asked for in 8 bits; without jax, for flags."""

from collections.abc import Collection

from jax_specdec.errors import UserError, shown_value

PARTS = ("weights", "cache")


def check_parts(parts: Collection[str]) -> None:
    """Raises a UserError for other parts than these."""
    listed = isinstance(parts, Collection) and not isinstance(parts, str)
    wrong = [x for x in parts if x not in PARTS] if listed else [parts]
    if wrong:
        raise UserError(
            f"int8 is of {' and '.join(PARTS)}, as a tuple, not of {shown_value(wrong[0])}."
        )
