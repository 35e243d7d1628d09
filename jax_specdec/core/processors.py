"""Penalties, bias, forbidden words: logits processors with a history of their own at every node of a tree.

`Processing` has the usual ones, one setting per row; a `Processor` is a user's own. They run on the raw
logits, before temperature and filters, at target and drafters alike (`core.law`).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_specdec._types import Array, Bool, Float, Int
from jax_specdec.core.numerics import NEG_INF
from jax_specdec.core.rows import PerRow, per_row
from jax_specdec.errors import UserError, shown_value


class History(flax.struct.PyTreeNode):
    """What a processor may read: the committed text and the drafted path down to each node.

    Attributes:
      tokens: `int32[B, C]`. length: `int32[B]`. prompt_length: `int32[B]`.
      drafted: `int32[B, M]`, drafted tokens behind the text.
      on_path: `bool[B, T, M]`, entry (i, j) iff drafted token j leads to node i or is it. The tokens of a
        path are in the order of their depths.
    """

    tokens: Int[Array, "B C"]
    length: Int[Array, " B"]
    prompt_length: Int[Array, " B"]
    drafted: Int[Array, "B M"]
    on_path: Bool[Array, "B T M"]

    def depth(self) -> Int[Array, "B T"]:
        """Drafted tokens on the way to each node, itself included."""
        return jnp.sum(self.on_path, axis=-1, dtype=jnp.int32)

    def last(self, count: int) -> Int[Array, "B T n"]:
        """The last `count` tokens up to each node, the node's own last; -1 before the text's start."""
        depth = self.depth()[..., None]
        back = (
            count - 1 - jnp.arange(count, dtype=jnp.int32)[None, None]
        )  # tokens between it and the node
        place = self.length[:, None, None] - 1 - (back - depth)
        safe = jnp.clip(place, 0, self.tokens.shape[1] - 1)
        batch, nodes = depth.shape[:2]
        old = jnp.take_along_axis(self.tokens, safe.reshape(batch, -1), axis=1)
        old = jnp.where(place >= 0, old.reshape(batch, nodes, count), -1)
        # How many of the path's tokens come behind drafted token j, on the way to node i.
        behind = jnp.sum(self.on_path, axis=-1, keepdims=True, dtype=jnp.int32)
        behind = behind - jnp.cumsum(self.on_path, axis=-1, dtype=jnp.int32)
        hit = self.on_path[:, :, None] & (behind[:, :, None] == back[..., None])  # [B, T, n, M]
        new = jnp.sum(jnp.where(hit, self.drafted[:, None, None], 0), axis=-1, dtype=jnp.int32)
        return jnp.where(back < depth, new, old)


@runtime_checkable
class Processor(Protocol):
    """A logits processor; a frozen dataclass (static under jit)."""

    def __call__(
        self, logits: Float[Array, "B T V"], history: History
    ) -> Float[Array, "B T V"]: ...


def counts(history: History, vocab: int, *, output: bool) -> Int[Array, "B T V"]:
    """How often each token occurs in the text and on the path to each node.

    Args:
      output: the prompt does not count.
    """
    batch, nodes, _ = history.on_path.shape
    place = jnp.arange(history.tokens.shape[1], dtype=jnp.int32)[None]
    inside = place < history.length[:, None]
    if output:
        inside = inside & (place >= history.prompt_length[:, None])
    row = jnp.arange(batch, dtype=jnp.int32)[:, None]
    base = jnp.zeros((batch, vocab), jnp.int32)
    base = base.at[row, jnp.where(inside, history.tokens, vocab)].add(1, mode="drop")
    token = jnp.where(history.on_path, history.drafted[:, None], vocab)  # [B, T, M]
    node = jnp.arange(nodes, dtype=jnp.int32)[None, :, None]
    return (
        jnp.broadcast_to(base[:, None], (batch, nodes, vocab))
        .at[row[..., None], node, token]
        .add(1, mode="drop")
    )


def _repetition(logits: Array, history: History, penalty: Array) -> Array:
    seen = counts(history, logits.shape[-1], output=False) > 0
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


class Processing(flax.struct.PyTreeNode):
    """The usual processors, one entry per row, in the order in which transformers applies them.

    Attributes:
      bias_ids: `int32[B, n]`, -1 for none. bias: `float32[B, n]`, added to the logits of these tokens.
      repetition: `float32[B]`, divides the logits above 0 of tokens in prompt or output, and multiplies
        those below (Keskar et al., arXiv 1909.05858, section 4.1); 1 is off.
      presence, frequency: `float32[B]`, taken off the logits of tokens in the output, once or as often as
        they occur there (as in OpenAI's API and vLLM); 0 is off.
      bad_words: `int32[B, W, n]`, token sequences that must not occur, right-aligned, -1 in front.
      min_new_tokens: `int32[B]`, how many tokens must come before a stop token.
    """

    bias_ids: Int[Array, "B n"]
    bias: Float[Array, "B n"]
    repetition: Float[Array, " B"]
    presence: Float[Array, " B"]
    frequency: Float[Array, " B"]
    bad_words: Int[Array, "B W m"]
    min_new_tokens: Int[Array, " B"]

    def __call__(
        self, logits: Float[Array, "B T V"], history: History, stop_ids: Int[Array, "B k"]
    ) -> Float[Array, "B T V"]:
        """The processed logits; what no row asks for is skipped at run time."""
        vocab = logits.shape[-1]
        row = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]

        def place(ids: Array) -> Array:  # a negative index would count from the end
            return jnp.where(ids >= 0, ids, vocab)

        if self.bias_ids.shape[1]:
            bias = jnp.zeros((logits.shape[0], vocab), jnp.float32)
            bias = bias.at[row, place(self.bias_ids)].add(self.bias, mode="drop")
            logits = logits + bias[:, None]

        def repeated(x: Array) -> Array:
            return _repetition(x, history, self.repetition[:, None, None])

        def counted(x: Array) -> Array:
            often = counts(history, vocab, output=True)
            once = (often > 0).astype(jnp.float32) * self.presence[:, None, None]
            return x - once - often.astype(jnp.float32) * self.frequency[:, None, None]

        logits = lax.cond(jnp.any(self.repetition != 1), repeated, lambda x: x, logits)
        some = jnp.any((self.presence != 0) | (self.frequency != 0))
        logits = lax.cond(some, counted, lambda x: x, logits)
        if self.bad_words.shape[1]:
            words = self.bad_words
            if words.shape[2] > 1:
                before = history.last(words.shape[2] - 1)[:, :, None]  # [B, T, 1, n-1]
                start = words[:, None, :, :-1]
                complete = jnp.all((start == before) | (start < 0), axis=-1)  # [B, T, W]
            else:
                complete = jnp.ones((*logits.shape[:2], words.shape[1]), bool)
            last = jnp.where(complete, place(words[..., -1])[:, None], vocab)
            node = jnp.arange(logits.shape[1], dtype=jnp.int32)[None, :, None]
            logits = logits.at[row[..., None], node, last].set(NEG_INF, mode="drop")
        stops = jnp.zeros((logits.shape[0], vocab), bool)
        stops = stops.at[row, place(stop_ids)].set(True, mode="drop")
        written = (history.length - history.prompt_length)[:, None] + history.depth()
        early = written < self.min_new_tokens[:, None]
        return jnp.where(early[..., None] & stops[:, None], NEG_INF, logits)


def make_processing(
    batch: int,
    *,
    repetition_penalty: PerRow = 1.0,
    presence_penalty: PerRow = 0.0,
    frequency_penalty: PerRow = 0.0,
    logit_bias: Mapping[int, float] | Sequence[Mapping[int, float]] = (),
    min_new_tokens: PerRow = 0,
    bad_words: Sequence[Any] = (),
) -> Processing | None:
    """Host values, one for all rows or one per row, to checked arrays; None where all is off.

    Args:
      logit_bias: token id -> addend. bad_words: token sequences, or one list of them per row.

    Raises:
      UserError: a value outside its range, with the value.
    """
    biases, words = _biases(logit_bias, batch), _word_lists(bad_words, batch)

    def finite(value: Any) -> bool:
        return bool(-np.inf < value < np.inf)

    made = Processing(
        bias_ids=_table([list(bias) for bias in biases], np.int32, -1),
        bias=_table([list(bias.values()) for bias in biases], np.float32, 0),
        repetition=per_row(
            "repetition_penalty",
            repetition_penalty,
            batch,
            np.float32,
            lambda x: 0 < x < np.inf,
            "finite and above 0",
        ),
        presence=per_row("presence_penalty", presence_penalty, batch, np.float32, finite, "finite"),
        frequency=per_row(
            "frequency_penalty", frequency_penalty, batch, np.float32, finite, "finite"
        ),
        bad_words=_words(words),
        min_new_tokens=per_row(
            "min_new_tokens",
            min_new_tokens,
            batch,
            np.int32,
            lambda n: 0 <= n < 2**30,
            "at least 0 and below 2^30",
        ),
    )
    # By the host's values: inside of somebody's jit the arrays are traced.
    on = made.bias_ids.shape[1] or made.bad_words.shape[1]
    on = on or np.any(np.asarray(repetition_penalty) != 1)
    others = (presence_penalty, frequency_penalty, min_new_tokens)
    return made if on or any(np.any(np.asarray(x) != 0) for x in others) else None


def _is_token(value: Any) -> bool:
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    return whole and bool(0 <= value < 2**31)


def _biases(given: Any, batch: int) -> list[Mapping[int, float]]:
    """`logit_bias` of each row, checked."""
    expected = "logit_bias must give token ids numbers below infinity"
    rows: list[Any] = [given] * batch if isinstance(given, Mapping) else _items(given, expected)
    rows = rows or [{}] * batch
    if len(rows) != batch:
        raise UserError(f"Got {len(rows)} values of logit_bias for {batch} rows.")
    for bias in rows:
        if not isinstance(bias, Mapping):
            raise UserError(f"{expected}, got {shown_value(bias, 40)}.")
        for token, value in bias.items():
            number = isinstance(value, (int, float, np.integer, np.floating))
            if not _is_token(token) or not number or not np.float32(value) < np.inf:
                raise UserError(
                    f"{expected}, got {shown_value(token, 40)}: {shown_value(value, 40)}."
                )
    return rows


def _word_lists(given: Any, batch: int) -> list[list[list[int]]]:
    """`bad_words` of each row, checked."""
    expected = "bad_words must be sequences of one token id or more, or a list of them for each row"
    items: list[Any] = [_items(item, expected) for item in _items(given, expected)]
    if not any(items) and len(items) == batch:  # no row has any
        return [[] for _ in items]
    if any(isinstance(token, (int, float, np.number)) for item in items for token in item):
        rows = [items] * batch
    elif items and not any(items):
        raise UserError(f"{expected}, got {shown_value(given, 40)}.")
    else:
        rows = items or [[] for _ in range(batch)]
    if len(rows) != batch:
        raise UserError(f"Got {len(rows)} values of bad_words for {batch} rows.")
    rows = [[_items(word, expected) for word in row] for row in rows]
    for word in (word for row in rows for word in row):
        if not word or not all(map(_is_token, word)):
            raise UserError(f"{expected}, got {shown_value(word, 40)}.")
    return rows


def _items(given: Any, expected: str) -> list[Any]:
    """A sequence that is no text as a list."""
    if isinstance(given, (str, bytes, Mapping)) or not hasattr(given, "__iter__"):
        raise UserError(f"{expected}, got {shown_value(given, 40)}.")
    return list(given)


def _padded(size: int) -> int:
    """The next power of two, or 0: every size is another program."""
    return 1 << (size - 1).bit_length() if size else 0


def _table(rows: Sequence[Sequence[float]], dtype: Any, empty: float) -> Array:
    """Lists of different lengths as one array, filled up with `empty`."""
    table = np.full((len(rows), _padded(max(map(len, rows)))), empty, dtype)
    for row, values in enumerate(rows):
        table[row, : len(values)] = values
    return jax.device_put(table)


def _words(rows: Sequence[Sequence[Sequence[int]]]) -> Array:
    """Token sequences of each row, right-aligned, -1 in front and for those that are not there."""
    longest = _padded(max((len(word) for row in rows for word in row), default=0))
    table = np.full((len(rows), _padded(max(map(len, rows))), longest), -1, np.int32)
    for row, words in enumerate(rows):
        for place, word in enumerate(words):
            table[row, place, longest - len(word) :] = word
    return jax.device_put(table)


@dataclasses.dataclass(frozen=True)
class RepetitionPenalty:
    """A static repetition penalty, the same for all rows; see `Processing.repetition`."""

    penalty: float

    def __post_init__(self):
        if not 0 < self.penalty < np.inf:
            raise UserError(f"A repetition penalty must be finite and above 0, got {self.penalty}.")

    def __call__(self, logits: Float[Array, "B T V"], history: History) -> Float[Array, "B T V"]:
        return _repetition(logits, history, jnp.float32(self.penalty))
