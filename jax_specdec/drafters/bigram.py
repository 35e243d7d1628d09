"""`bigram`: the most frequent successor of each token, counted from a corpus."""

import dataclasses
from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_specdec._types import Array, Int
from jax_specdec.core.draft import chain
from jax_specdec.core.drafter import ChainDrafter, StatelessDrafter


def successors(table: Int[Array, " V"], root: Int[Array, " B"], length: int) -> Int[Array, "B P"]:
    """The chain that follows `root` in a successor table."""

    def step(token, _):
        token = jnp.take(table, token)
        return token, token

    _, tokens = lax.scan(step, root, None, length=length)
    return jnp.swapaxes(tokens, 0, 1)


def count_bigrams(documents: Iterable[np.ndarray], vocab_size: int) -> np.ndarray:
    """The argmax-successor table of token documents, `int32[V]`.

    Ties go to the smaller id. A token that never occurs is followed by the most frequent token.
    """
    pairs: dict[int, int] = {}
    total = np.zeros((vocab_size,), np.int64)
    for document in documents:
        ids = np.asarray(document, np.int64)
        np.add.at(total, ids, 1)
        keys, counts = np.unique(ids[:-1] * vocab_size + ids[1:], return_counts=True)
        for key, count in zip(keys.tolist(), counts.tolist(), strict=True):
            pairs[key] = pairs.get(key, 0) + count
    table = np.full((vocab_size,), int(np.argmax(total)), np.int32)
    best = np.zeros((vocab_size,), np.int64)
    for key in sorted(pairs):
        left, right = divmod(key, vocab_size)
        if pairs[key] > best[left]:
            best[left], table[left] = pairs[key], right
    return table


@dataclasses.dataclass(frozen=True)
class Bigram(ChainDrafter, StatelessDrafter):
    """A chain of most frequent successors; its parameter is a table `int32[V]`."""

    length: int
    name: str = "bigram"

    def draft(self, params, states, text, view, sampling, noise, active, room):
        del view, sampling, noise, active, room
        tokens = successors(params[self.name], text.root(), self.length)
        return chain(text, tokens), states
