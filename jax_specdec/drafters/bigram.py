"""`bigram`: the most frequent successor of each token, counted from a corpus."""

import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from safetensors import SafetensorError, safe_open

from jax_specdec._types import Array, Int
from jax_specdec.core.draft import chain
from jax_specdec.core.drafter import StatelessDrafter, chain_info
from jax_specdec.drafters import registry
from jax_specdec.errors import UserError


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
class Bigram(StatelessDrafter):
    """A chain of most frequent successors; its parameter is a table `int32[V]`."""

    length: int
    name: str = "bigram"

    @property
    def info(self):
        return chain_info(self.name, self.length)

    def draft(self, params, states, ctx):
        tokens = successors(params[self.name], ctx.text.root(), self.length)
        return chain(ctx.text, tokens), states


BIGRAM_FILE = "bigram.safetensors"


def save_bigram(folder: str | Path, table: np.ndarray) -> None:
    """Writes a successor table `int32[V]` as `bigram.safetensors`."""
    from safetensors.numpy import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"successor": np.ascontiguousarray(table, np.int32)}, folder / BIGRAM_FILE)


def load_bigram(folder: str | Path, vocab_size: int) -> np.ndarray:
    """Reads a successor table and checks it against the vocabulary.

    Raises:
      UserError: no such file, not a table, or ids outside the vocabulary.
    """
    path = Path(folder) / BIGRAM_FILE
    if not path.is_file():
        raise UserError(f"There is no {BIGRAM_FILE} in {folder}.")
    try:
        with safe_open(path, framework="np") as file:
            table = file.get_tensor("successor")
    except SafetensorError as error:
        raise UserError(f"{path} is not a readable bigram table: {error}.") from None
    if table.shape != (vocab_size,):
        raise UserError(
            f"The bigram table has {table.shape[0]} entries and the target's vocabulary {vocab_size}."
        )
    if table.min() < 0 or table.max() >= vocab_size:
        raise UserError(f"The bigram table names tokens outside the vocabulary of {vocab_size}.")
    return table


def _make(request: registry.Request) -> registry.Make:
    return functools.partial(Bigram, name=request.name)


def _load(request: registry.Request) -> tuple[registry.Make, dict[str, Any]]:
    table = load_bigram(request.folder, request.target.vocab_size)
    return _make(request), {request.name: jnp.asarray(table)}


def _describe(request: registry.Request, batch: int, slots: int) -> dict[str, Any]:
    del batch, slots
    size = load_bigram(request.folder, request.target.vocab_size).nbytes
    return {"path": str(request.folder), "memory": {"parameters": size, "total": size}}


KIND = registry.register(
    registry.Kind("bigram", _make, _load, usual_length=2, needs_checkpoint=True, describe=_describe)
)
