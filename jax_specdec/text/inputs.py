"""The forms that prompts come in, told apart by their type and never by their size."""

import numbers
import os
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

import numpy as np

from jax_specdec.errors import UserError, a_kind, shown_value
from jax_specdec.text.chat import check_messages, check_text, is_message

# What a prompt is once it is understood.
Prompt = str | list[int] | list[dict[str, Any]]

_HINTS: dict[type, str] = {
    bytes: ": decode it first, as with .decode()",
    bytearray: ": decode it first, as with .decode()",
    os.PathLike: ": read it first, as with .read_text()",
}


def split(given: Any) -> tuple[list[Any], bool]:
    """The prompts of what was given, and whether that was one prompt alone.

    One prompt is a text, a chat, token ids, an array of one dimension, or what a tokenizer returns for
    one text. A list of them, an iterator, an array of two dimensions, and what a tokenizer returns for a list
    are several.

    >>> split("Hi"), split(["Hi"]), split([5, 6])
    ((['Hi'], True), (['Hi'], False), ([[5, 6]], True))
    >>> split({"input_ids": [[0, 5], [6, 7]], "attention_mask": [[0, 1], [1, 1]]})
    ([[5], [6, 7]], False)

    Raises:
      UserError: nothing of these.
    """
    if is_encoding(given):
        return _rows(given)
    if hasattr(given, "__array__"):
        return (list(np.asarray(given)), False) if np.ndim(given) == 2 else ([given], True)
    if isinstance(given, (list, tuple, range)):
        if given and (all(map(_is_number, given)) or all(map(is_message, given))):
            return [given], True
        return list(given), False
    if isinstance(given, Iterator):
        return list(given), False
    return [given], True


def as_prompt(given: Any) -> Prompt:
    """One prompt: its text, its messages, or its token ids, which are not compared to a vocabulary.

    Raises:
      UserError: something else, named by its type.
    """
    if isinstance(given, str):
        check_text(given, "The prompt")
        return given
    if is_encoding(given):
        rows, alone = _rows(given)
        if not alone:
            raise UserError(
                f"What the tokenizer returned has {len(rows)} rows: give it by itself, and not within a list."
            )
        return rows[0]
    if isinstance(given, (list, tuple)) and given and all(map(is_message, given)):
        return check_messages(given)
    if is_message(given):
        raise UserError("A chat is a list of messages: got a message alone.")
    if hasattr(given, "__array__") or isinstance(given, (list, tuple, range)):
        return _ids(given)
    hint = next((hint for kind, hint in _HINTS.items() if isinstance(given, kind)), "")
    raise UserError(f"A prompt is text, a chat or token ids, and not {a_kind(given)}{hint}.")


def is_chat(prompt: Prompt) -> TypeGuard[list[dict[str, Any]]]:
    """Whether a prompt of `as_prompt` is messages."""
    return not isinstance(prompt, str) and bool(prompt) and is_message(prompt[0])


def is_encoding(value: Any) -> bool:
    """Whether a tokenizer returns such: of transformers, or of tokenizers."""
    if isinstance(value, Mapping):
        return "input_ids" in value
    return hasattr(value, "ids") and hasattr(value, "attention_mask")


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Number) or (
        hasattr(value, "__array__") and np.ndim(value) == 0
    )


def _ids(given: Any) -> list[int]:
    """Token ids of a sequence or an array."""
    try:
        array = np.asarray(given)
    except ValueError:  # lists of different lengths
        array = np.asarray(None)
    if array.size == 0 and array.ndim == 1:
        return []
    if array.ndim == 1 and array.dtype.kind in "iu":
        if not hasattr(given, "__array__") and any(isinstance(x, (bool, np.bool)) for x in given):
            raise UserError("Token ids are whole numbers, and a bool is among them.")
        return array.tolist()
    if array.ndim == 1 and not hasattr(given, "__array__"):
        wrong = next(x for x in given if not is_whole(x))
        if not _is_number(wrong):
            raise UserError(
                f"A prompt is text, a chat or token ids, and not a {type(given).__name__} with "
                f"{a_kind(wrong)} in it."
            )
        raise UserError(f"Token ids are whole numbers, and {shown_value(wrong)} is among them.")
    if array.ndim == 1:
        raise UserError(f"Token ids are whole numbers, and not of the dtype {array.dtype}.")
    if hasattr(given, "__array__"):
        raise UserError(f"Token ids of a prompt have one dimension, and not {array.ndim}.")
    raise UserError("Token ids are nested too deeply: a prompt is one list of them.")


def is_whole(value: Any) -> bool:
    """Whether this is a whole number that fits 64 bits, of Python or an array's, and no bool."""
    whole = isinstance(value, numbers.Integral) or getattr(value, "dtype", None) in _WHOLE
    return whole and not isinstance(value, bool) and abs(int(value)) < 2**63


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raises a `UserError` for anything but a whole number of at least `least`."""
    if not is_whole(value) or value < least:
        raise UserError(
            f"{name} must be at least {least}, a whole number, got {shown_value(value)}."
        )


_WHOLE = [np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)]


def _rows(encoding: Any) -> tuple[list[list[int]], bool]:
    """The token ids of what a tokenizer returned, without its padding, and whether that is one row."""
    if isinstance(encoding, Mapping):
        ids, mask = encoding["input_ids"], encoding.get("attention_mask")
    else:
        ids, mask = encoding.ids, encoding.attention_mask
    if not (hasattr(ids, "__array__") or isinstance(ids, (list, tuple, range))):
        raise UserError(f"What the tokenizer returned has no token ids: they are {a_kind(ids)}.")
    rows, alone = split(ids)
    if alone:
        return [_masked(ids, mask)], True
    if not rows:
        raise UserError("What the tokenizer returned has no token ids.")
    if mask is not None and not (isinstance(mask, (list, tuple)) or np.ndim(mask)):
        raise UserError("The attention mask has another shape than the token ids.")
    masks = [None] * len(rows) if mask is None else list(mask)
    if len(masks) != len(rows):
        raise UserError(
            f"What the tokenizer returned has {len(rows)} rows and {len(masks)} attention masks."
        )
    return [_masked(*pair) for pair in zip(rows, masks, strict=True)], False


def _masked(ids: Any, mask: Any) -> list[int]:
    tokens = _ids(ids)
    if mask is None:
        return tokens
    try:
        kept = np.asarray(mask)
    except ValueError:  # lists of different lengths
        kept = np.asarray(None)
    if kept.shape != (len(tokens),):
        raise UserError("The attention mask has another shape than the token ids.")
    (places,) = np.nonzero(kept)
    if len(places) and places[-1] - places[0] >= len(places):
        raise UserError("The attention mask leaves out tokens within a prompt.")
    return [tokens[place] for place in places]
