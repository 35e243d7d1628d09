"""How requests are asked for as keyword arguments, for one prompt or for many."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, TypeVar

from jax_specdec.errors import UserError, shown_value
from jax_specdec.text.inputs import is_whole

T = TypeVar("T")
_Each = T | Sequence[T]  # one value for all prompts, or a list with one for each
_Words = Sequence[str | Sequence[int]]


class Options(TypedDict, total=False):
    """The fields of `Request` as keyword arguments, each one value or a list with one per prompt.

    For one prompt alone, a list of stops or bad words is that prompt's, as a tuple is.
    """

    key: _Each[int | None]
    max_new_tokens: _Each[int]
    min_new_tokens: _Each[int]
    temperature: _Each[float]
    top_k: _Each[int | None]
    top_p: _Each[float | None]
    min_p: _Each[float | None]
    seed: _Each[int]
    own_seed: _Each[bool]
    stop: str | Sequence[str] | Sequence[Sequence[str] | None] | None
    stop_token_ids: Sequence[int] | Sequence[Sequence[int] | None] | None
    ignore_eos: _Each[bool]
    repetition_penalty: _Each[float | None]
    presence_penalty: _Each[float | None]
    frequency_penalty: _Each[float | None]
    logit_bias: _Each[Mapping[int, float] | None]
    bad_words: _Words | Sequence[_Words | None] | None


# Options whose value is itself a tuple: a list of them has one for each prompt.
TUPLES = {
    "stop": ("stop strings", r'stop=("\n",)'),
    "stop_token_ids": ("stop tokens", "stop_token_ids=(2,)"),
    "bad_words": ("bad words", 'bad_words=("the",)'),
}


def no_tuple(name: str, value: Any) -> UserError:
    """What is said of `stop`, `stop_token_ids` or `bad_words` in another form."""
    what, example = TUPLES[name]
    return UserError(
        f"Give {what} as a tuple, as in {example}, or as a list with one tuple per prompt, "
        f"got {shown_value(value)}."
    )


def are_items(name: str, listed: Sequence[Any]) -> bool:
    """Whether a list holds what a tuple would for one prompt, and not one such tuple per prompt.

    >>> are_items("stop", ["a", "b"]), are_items("stop", [("a", "b")])
    (True, False)
    >>> are_items("bad_words", [[5, 6]]), are_items("bad_words", [["a", "b"]])
    (True, False)
    """

    def is_item(value: Any) -> bool:
        if isinstance(value, (list, tuple)):  # a word of token ids, or one prompt's
            return name == "bad_words" and bool(value) and all(map(is_whole, value))
        return value is not None

    return all(map(is_item, listed))
