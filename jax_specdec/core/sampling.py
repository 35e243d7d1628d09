"""Sampling laws: temperature, top-k, top-p, min-p per row, processors per node, and the shared noise.

The law of a node is `softmax(warp(logits))`; at temperature 0 it is the argmax. Warping is applied to
the target and to proposals alike. Thresholds are found by bisection over the 32-bit patterns of the
floats, which is exact and needs no sort.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_specdec._types import Array, Bool, Float, Int, UInt
from jax_specdec.errors import UserError

NEG_INF = float("-inf")
PerRow = float | Sequence[float] | np.ndarray  # one value for all rows, or one for each

# Roles of random bits (rejection rule). Each draws from a key of its own: a uniform shared by drafting
# and accepting is biased.
ROLE_MATCH, ROLE_DRAFT, ROLE_ACCEPT, ROLE_RESIDUAL, ROLE_BONUS = range(5)


class Sampling(flax.struct.PyTreeNode):
    """Sampling parameters, one entry per row.

    Attributes:
      temperature: `float32[B]`, 0 is greedy. top_k: `int32[B]`, 0 is off. top_p: `float32[B]`, 1 is
        off. min_p: `float32[B]`, relative to the best token's probability, 0 is off.
      seed: `uint32[B]`. own_seed: `bool[B]`, the seed is the row's own and is not folded with its
        request id.
      max_new_tokens: `int32[B]`.
      stop_ids: `int32[B, n]`, token ids that end a row, -1 for none.
      stop_state: `int32[B]`, the row's start state in the stop-string automaton, -1 for none.
      stop_table: `int32[A, V]`, the automaton's next state, -2 where a stop string is complete; A is 0
        where no row has stop strings.
    """

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    seed: UInt[Array, " B"]
    own_seed: Bool[Array, " B"]
    max_new_tokens: Int[Array, " B"]
    stop_ids: Int[Array, "B n"]
    stop_state: Int[Array, " B"]
    stop_table: Int[Array, "A V"]


def make_sampling(
    batch: int,
    *,
    max_new_tokens: PerRow,
    temperature: PerRow = 0.0,
    top_k: PerRow = 0,
    top_p: PerRow = 1.0,
    min_p: PerRow = 0.0,
    seed: PerRow = 0,
    own_seed: PerRow = False,
    stop_ids: Sequence[int] | np.ndarray = (),
    stop_state: PerRow = -1,
    stop_table: np.ndarray | None = None,
) -> Sampling:
    """Host values, scalars or one per row, to checked arrays.

    Raises:
      UserError: a value outside its range, NaN included, with the value.
    """

    def rows(name: str, value, dtype, legal: Callable, expected: str) -> Array:
        array = np.broadcast_to(np.asarray(value), (batch,))
        for item in array.tolist():
            # In the array's dtype, too: 1e39 is infinite in float32, and 1e-50 is 0.
            with np.errstate(over="ignore"):
                if not (legal(item) and legal(dtype(item))):
                    raise UserError(f"{name} must be {expected}, got {item}.")
        return jax.device_put(array.astype(dtype))  # jnp.asarray compiles a copy for each shape

    stops = np.asarray(stop_ids, np.int32)
    stops = np.broadcast_to(stops, (batch, stops.shape[-1]))
    return Sampling(
        temperature=rows(
            "temperature",
            temperature,
            np.float32,
            lambda t: 0 <= t < np.inf,
            "finite and at least 0",
        ),
        top_k=rows(
            "top_k", top_k, np.int32, lambda k: 0 <= k < 2**31, "0 (off) or a positive count"
        ),
        top_p=rows("top_p", top_p, np.float32, lambda p: 0 < p <= 1, "in (0, 1]"),
        min_p=rows("min_p", min_p, np.float32, lambda p: 0 <= p <= 1, "in [0, 1]"),
        seed=rows("seed", seed, np.uint32, lambda s: 0 <= s < 2**32, "in [0, 2^32)"),
        own_seed=jax.device_put(np.broadcast_to(np.asarray(own_seed, bool), (batch,))),
        max_new_tokens=rows(
            "max_new_tokens",
            max_new_tokens,
            np.int32,
            # The prompt's length is added to it in int32.
            lambda n: 1 <= n < 2**30,
            "at least 1 and below 2^30",
        ),
        stop_ids=jax.device_put(stops),
        stop_state=jax.device_put(np.broadcast_to(np.asarray(stop_state, np.int32), (batch,))),
        stop_table=jax.device_put(
            np.zeros((0, 1), np.int32) if stop_table is None else np.asarray(stop_table, np.int32)
        ),
    )


def row_keys(sampling: Sampling, request_ids: Int[Array, " B"]) -> UInt[Array, "B 2"]:
    """Key data of each row: its seed folded with its request id, or its own seed alone."""

    def one(seed, own, request):
        key = jax.random.key(seed)
        folded = jax.random.fold_in(key, request)
        return jnp.where(own, jax.random.key_data(key), jax.random.key_data(folded))

    return jax.vmap(one)(sampling.seed, sampling.own_seed, request_ids)


def position_noise(
    keys: UInt[Array, "B 2"],
    start: Int[Array, " B"],
    depth: int,
    vocab: int,
    role: int = ROLE_MATCH,
) -> Float[Array, "B P V"]:
    """Gumbel noise of the `depth` positions from `start[b]` on; a function of (key, role, position)."""

    def one(key_data, position):
        key = jax.random.fold_in(jax.random.wrap_key_data(key_data), role)
        return jax.random.gumbel(jax.random.fold_in(key, position), (vocab,), jnp.float32)

    positions = start[:, None] + jnp.arange(depth, dtype=jnp.int32)[None]
    return jax.vmap(jax.vmap(one, in_axes=(None, 0)))(keys, positions)


def position_uniform(
    keys: UInt[Array, "B 2"], start: Int[Array, " B"], depth: int, role: int
) -> Float[Array, "B P"]:
    """Uniforms in [0, 1) of the `depth` positions from `start[b]` on."""

    def one(key_data, position):
        key = jax.random.fold_in(jax.random.wrap_key_data(key_data), role)
        return jax.random.uniform(jax.random.fold_in(key, position), (), jnp.float32)

    positions = start[:, None] + jnp.arange(depth, dtype=jnp.int32)[None]
    return jax.vmap(jax.vmap(one, in_axes=(None, 0)))(keys, positions)


class Noise(flax.struct.PyTreeNode):
    """The noise that drafting and verification share in one round.

    Attributes:
      gumbel: `float32[B, P+1, V]`; entry d is added to the scores at depth d, that is for the token at
        position `length + d`. Zero in rows at temperature 0.
      return_q: static; the proposer must hand over the law it drew from (rejection rule).
      return_top: static; a proposer with a distribution must report its probability of every node and
        the best children. They cost passes over the vocabulary, so only who reads them asks.
    """

    gumbel: Float[Array, "B Q V"]
    return_q: bool = flax.struct.field(pytree_node=False, default=False)
    return_top: bool = flax.struct.field(pytree_node=False, default=False)


def shared_noise(
    keys: UInt[Array, "B 2"],
    sampling: Sampling,
    start: Int[Array, " B"],
    depth: int,
    vocab: int,
    role: int = ROLE_MATCH,
) -> Float[Array, "B P V"]:
    """`position_noise`, zero at temperature 0, and not computed where no row samples."""
    hot = sampling.temperature > 0

    def draw() -> Array:
        noise = position_noise(keys, start, depth, vocab, role)
        return jnp.where(hot[:, None, None], noise, jnp.float32(0))

    def zero() -> Array:
        return jnp.zeros((keys.shape[0], depth, vocab), jnp.float32)

    return lax.cond(jnp.any(hot), draw, zero)


def _order_key(x: Float[Array, "*s"]) -> UInt[Array, "*s"]:
    """float32 to uint32 with the same order, so that a bisection over bits is one over values."""
    # -0.0 and 0.0 are equal, and so must their keys be.
    bits = lax.bitcast_convert_type(jnp.where(x == 0, jnp.float32(0), x), jnp.uint32)
    sign = jnp.uint32(0x80000000)
    return jnp.where((bits & sign) != 0, ~bits, bits | sign)


def _largest_threshold(
    holds: Callable[[UInt[Array, "B T"]], Bool[Array, "B T"]], shape: tuple[int, ...]
) -> UInt[Array, "B T"]:
    """The largest uint32 for which `holds` is true; `holds` must be true at 0 and falling."""

    def step(i, low):
        trial = low | (jnp.uint32(1) << (jnp.uint32(31) - i.astype(jnp.uint32)))
        return jnp.where(holds(trial), trial, low)

    return lax.fori_loop(0, 32, step, jnp.zeros(shape, jnp.uint32))


def _top_k(scores: Float[Array, "B T V"], top_k: Int[Array, " B"]) -> Float[Array, "B T V"]:
    order = _order_key(scores)
    wanted = jnp.where(top_k > 0, jnp.minimum(top_k, scores.shape[-1]), scores.shape[-1])[:, None]

    def holds(threshold):
        return jnp.sum(order >= threshold[..., None], axis=-1, dtype=jnp.int32) >= wanted

    keep = order >= _largest_threshold(holds, scores.shape[:2])[..., None]
    return jnp.where(keep | (top_k <= 0)[:, None, None], scores, NEG_INF)


def _top_p(scores: Float[Array, "B T V"], top_p: Float[Array, " B"]) -> Float[Array, "B T V"]:
    weight = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    order = _order_key(weight)
    wanted = top_p[:, None] * jnp.sum(weight, axis=-1)

    def holds(threshold):
        kept = jnp.sum(jnp.where(order >= threshold[..., None], weight, 0.0), axis=-1)
        return kept >= wanted

    keep = order >= _largest_threshold(holds, scores.shape[:2])[..., None]
    return jnp.where(keep | (top_p >= 1)[:, None, None], scores, NEG_INF)


def _min_p(scores: Float[Array, "B T V"], min_p: Float[Array, " B"]) -> Float[Array, "B T V"]:
    weight = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    keep = weight >= min_p[:, None, None]
    return jnp.where(keep, scores, NEG_INF)


def warp(logits: Float[Array, "B T V"], sampling: Sampling) -> Float[Array, "B T V"]:
    """Log-weights of the sampling law: temperature, then top-k, top-p, min-p.

    Tokens outside the law are -inf. Ties at a threshold are all kept. Rows at temperature 0 keep their
    logits: only their argmax matters. Work that no row asks for is skipped at run time.
    """
    hot = sampling.temperature > 0
    # The best score is taken off first: 0 / T stays 0 where x / T would overflow.
    floor = jnp.finfo(jnp.float32).tiny
    scale = jnp.where(hot, jnp.maximum(sampling.temperature, floor), jnp.float32(1))[:, None, None]

    def sampled(x: Array) -> Array:
        x = (x - jnp.max(x, axis=-1, keepdims=True)) / scale
        for active, apply in (
            (sampling.top_k > 0, lambda s: _top_k(s, sampling.top_k)),
            (sampling.top_p < 1, lambda s: _top_p(s, sampling.top_p)),
            (sampling.min_p > 0, lambda s: _min_p(s, sampling.min_p)),
        ):
            x = lax.cond(jnp.any(active & hot), apply, lambda s: s, x)
        return x

    warped = lax.cond(jnp.any(hot), sampled, lambda x: x, logits)
    return jnp.where(hot[:, None, None], warped, logits)


def argmax(scores: Float[Array, "*s V"]) -> Int[Array, "*s"]:
    """The first index of the maximum of the last axis.

    Two plain reductions vectorise; XLA's reduction over (value, index) pairs does not.
    """
    best = jnp.max(scores, axis=-1, keepdims=True)
    index = lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
    found = jnp.min(jnp.where(scores == best, index, scores.shape[-1]), axis=-1)
    return jnp.minimum(found, scores.shape[-1] - 1)  # scores that are NaN equal nothing


def largest(
    scores: Float[Array, "*s V"], count: int
) -> tuple[Float[Array, "*s K"], Int[Array, "*s K"]]:
    """The `count` largest of the last axis, falling, and their indices; -inf at any index where fewer
    are finite.

    Passes of a maximum over the maxima of groups, then over the groups that hold the answer. For 4 rows
    of 4,096 and count 8 on CPU that takes 23 microseconds, one `lax.top_k` 2,200.
    """
    vocab = scores.shape[-1]
    count = min(count, vocab)
    size = 1 << max(3, vocab.bit_length() // 2)  # about the root: both stages are then short
    groups = -(-vocab // size)
    if groups <= count:
        return _passes(scores, count)
    widths = [(0, 0)] * (scores.ndim - 1) + [(0, groups * size - vocab)]
    table = jnp.pad(scores, widths, constant_values=NEG_INF)
    table = table.reshape(*scores.shape[:-1], groups, size)
    best, group = _passes(jnp.max(table, axis=-1), count)
    held = jnp.take_along_axis(table, group[..., None], axis=-2)
    # Past the last finite maximum the same group comes again and again.
    held = jnp.where(best[..., None] > NEG_INF, held, NEG_INF)
    best, place = _passes(held.reshape(*scores.shape[:-1], count * size), count)
    index = jnp.take_along_axis(group, place // size, axis=-1) * size + place % size
    return best, jnp.minimum(index, vocab - 1)


def _passes(scores: Float[Array, "*s V"], count: int) -> tuple[Array, Array]:
    line = lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
    best, index = [], []
    for _ in range(count):
        place = argmax(scores)
        best.append(jnp.max(scores, axis=-1))
        index.append(place)
        scores = jnp.where(line == place[..., None], NEG_INF, scores)
    return jnp.stack(best, axis=-1), jnp.stack(index, axis=-1)


def law(logits: Float[Array, "B T V"], sampling: Sampling) -> Float[Array, "B T V"]:
    """Probabilities of the sampling law; one-hot at temperature 0."""
    return law_of(warp(logits, sampling), sampling)


def law_of(warped: Float[Array, "B T V"], sampling: Sampling) -> Float[Array, "B T V"]:
    """`law`, from logits that are warped already."""
    soft = jax.nn.softmax(warped, axis=-1)
    best = jax.nn.one_hot(argmax(warped), warped.shape[-1], dtype=soft.dtype)
    return jnp.where((sampling.temperature > 0)[:, None, None], soft, best)


class History(flax.struct.PyTreeNode):
    """What a processor may read: the committed text and the drafted path down to each node.

    Attributes:
      tokens: `int32[B, C]`. length: `int32[B]`. prompt_length: `int32[B]`.
      draft_tokens: `int32[B, T]`. on_path: `bool[B, T, T]`, entry (i, j) iff node j is node i or above
        it. The root (node 0) is the last committed token and is also in `tokens`.
    """

    tokens: Int[Array, "B C"]
    length: Int[Array, " B"]
    prompt_length: Int[Array, " B"]
    draft_tokens: Int[Array, "B T"]
    on_path: Bool[Array, "B T T"]


class Processor(Protocol):
    """A logits processor with a history of its own at every node of the tree.

    Processors are frozen dataclasses (static under jit); they run on the raw logits, before warping.
    """

    def __call__(
        self, logits: Float[Array, "B T V"], history: History
    ) -> Float[Array, "B T V"]: ...


def seen_tokens(history: History, vocab: int) -> Bool[Array, "B T V"]:
    """Which tokens occur in the text (prompt included) or on the path to each node."""
    batch, nodes = history.draft_tokens.shape
    place = jnp.arange(history.tokens.shape[1], dtype=jnp.int32)[None]
    text = jnp.where(place < history.length[:, None], history.tokens, vocab)
    row = jnp.arange(batch, dtype=jnp.int32)[:, None]
    base = jnp.zeros((batch, vocab), bool).at[row, text].set(True, mode="drop")
    token = jnp.where(history.on_path, history.draft_tokens[:, None], vocab)  # [B, T, T]
    node = jnp.arange(nodes, dtype=jnp.int32)[None, :, None]
    path = jnp.zeros((batch, nodes, vocab), bool)
    path = path.at[row[..., None], node, token].set(True, mode="drop")
    return path | base[:, None]


@dataclasses.dataclass(frozen=True)
class RepetitionPenalty:
    """Makes tokens that are in the text less likely (Keskar et al., arXiv 1909.05858, section 4.1).

    As in transformers: the logit of every token seen in the prompt, the output or on the way to the node
    is divided by `penalty` where it is positive and multiplied by it where it is not. 1 is off.
    """

    penalty: float

    def __post_init__(self):
        if not 0 < self.penalty < np.inf:
            raise UserError(f"A repetition penalty must be finite and above 0, got {self.penalty}.")

    def __call__(self, logits: Float[Array, "B T V"], history: History) -> Float[Array, "B T V"]:
        penalty = jnp.float32(self.penalty)
        lower = jnp.where(logits > 0, logits / penalty, logits * penalty)
        return jnp.where(seen_tokens(history, logits.shape[-1]), lower, logits)
