"""A language model without keys and values: a gated linear recurrence over embeddings."""

import dataclasses
import functools
from typing import Any

import flax.struct
import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_specdec.core.model import Output
from pallas_kernels import masks, write_rows


class StateCache(flax.struct.PyTreeNode):
    """`state [B, S+1, H]`, that after each number of tokens; `length int32[B]`."""

    state: Any
    length: Any


@dataclasses.dataclass(frozen=True)
class Recurrence:
    """state = gate * state + (1 - gate) * value; a tree node goes on from its parent's state.

    `Output.new` is the state after each node, `[B, T, H]`.
    """

    vocab_size: int
    size: int

    def init(self, seed: int) -> Any:
        rng = np.random.default_rng(seed)

        def matrix(rows, columns, scale):
            return jnp.asarray(rng.normal(size=(rows, columns)) * scale, jnp.float32)

        wide = self.size**-0.5
        return {
            "embed": matrix(self.vocab_size, self.size, 1.0),
            "gate": matrix(self.size, self.size, 2 * wide),
            "value": matrix(self.size, self.size, 2 * wide),
            "head": matrix(self.size, self.vocab_size, 10 * wide),
        }

    def init_cache(self, batch, slots):
        state = jnp.zeros((batch, slots + 1, self.size), jnp.float32)
        return StateCache(state, jnp.zeros((batch,), jnp.int32))

    def parents(self, batch, nodes, ancestors):
        """The node whose state each node goes on from, -1 for the cache's."""
        line = jnp.arange(nodes, dtype=jnp.int32)
        if ancestors is None:
            return jnp.broadcast_to(line - 1, (batch, nodes))
        above = masks.unpack(ancestors, nodes) & (line[None] < line[:, None])[None]
        return jnp.max(jnp.where(above, line[None, None], -1), axis=-1)

    def apply(self, params, tokens, positions, cache, ancestors=None, *, taps=(), logits=True):
        del positions  # there are none in a recurrence
        batch, nodes = tokens.shape
        x = jnp.take(params["embed"], tokens, axis=0)
        gate, value = jax.nn.sigmoid(x @ params["gate"]), jnp.tanh(x @ params["value"])
        row = jnp.arange(batch, dtype=jnp.int32)
        before = cache.state[row, cache.length]
        parent = self.parents(batch, nodes, ancestors)

        def step(states, node):
            above = states[row, jnp.maximum(parent[:, node], 0)]
            above = jnp.where((parent[:, node] < 0)[:, None], before, above)
            new = gate[:, node] * above + (1 - gate[:, node]) * value[:, node]
            return states.at[:, node].set(new), None

        states, _ = lax.scan(step, jnp.zeros_like(x), jnp.arange(nodes, dtype=jnp.int32))
        tapped = {tap: x if tap < 0 else states for tap in taps}
        return Output(self.head(params, states) if logits else None, states, states, tapped)

    def commit(self, cache, output, count, path=None):
        new = output.new
        if path is not None:
            new = jnp.take_along_axis(new, path[..., None], axis=1)
        state = write_rows(cache.state[:, None], new[:, None], cache.length + 1)[:, 0]
        return StateCache(state, cache.length + count)

    def rollback(self, cache, length):
        return cache.replace(length=length)

    def head(self, params, hidden):
        return hidden @ params["head"]

    def axes(self):
        matrix = ("embed", None)
        params = {"embed": ("vocab", "embed"), "gate": matrix, "value": matrix}
        cache = StateCache(("batch", "slots", "embed"), ("batch",))
        return {**params, "head": ("embed", "vocab")}, cache


@dataclasses.dataclass(frozen=True)
class OneLine(Recurrence):
    """Breaks the contract: a tree is read as if it were a chain."""

    def parents(self, batch, nodes, ancestors):
        return super().parents(batch, nodes, None)


@dataclasses.dataclass(frozen=True)
class NoWayBack(Recurrence):
    """Breaks the contract: what is rolled back stays in the state."""

    def rollback(self, cache, length):
        row = jnp.arange(length.shape[0], dtype=jnp.int32)
        newest = cache.state[row, cache.length]
        return StateCache(cache.state.at[row, length].set(newest), length)


MODEL = Recurrence(h.VOCAB, 24)


@functools.cache
def weights() -> Any:
    with jax.ensure_compile_time_eval():
        return MODEL.init(0)


@functools.cache
def close_weights() -> Any:
    """Of a model that agrees with `weights()` now and then."""
    return h.perturbed(weights(), 0.25)


def greedy(params: Any, prompt: list[int], count: int) -> list[int]:
    """An independent decoding at temperature 0, in float64."""
    w = {name: np.asarray(value, np.float64) for name, value in params.items()}
    state, out = np.zeros(w["gate"].shape[0]), []
    for token in prompt:
        state = _read(w, state, token)
    while len(out) < count:
        out.append(int((state @ w["head"]).argmax()))
        state = _read(w, state, out[-1])
    return out


def _read(w, state, token):
    x = w["embed"][token]
    gate = 1 / (1 + np.exp(-(x @ w["gate"])))
    return gate * state + (1 - gate) * np.tanh(x @ w["value"])
