"""Timing what a round is made of: verifications and drafts, compiled, warm and interleaved."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_specdec.checkpoints.targets import Target
from jax_specdec.core.draft import Text, chain
from jax_specdec.core.drafter import StatelessDrafter, accepted_prefix, chain_info
from jax_specdec.core.loop import DecodeLoop
from jax_specdec.core.plain import NoDrafter
from jax_specdec.core.sampling import make_sampling
from jax_specdec.errors import UserError
from jax_specdec.generation import Generation
from jax_specdec.specs.build import LoadedDrafter

# Seconds of one timing, as far as so many rounds take so long.
SLICE, MOST_ROUNDS = 0.25, 32


@dataclasses.dataclass(frozen=True)
class _Repeat(StatelessDrafter):
    """Proposes the root again and again: costs nothing, so that a round is its verification."""

    length: int

    @property
    def info(self):
        return chain_info("repeat", self.length)

    def draft(self, params, states, ctx):
        del params
        text = ctx.text
        tokens = jnp.broadcast_to(text.root()[:, None], (text.length.shape[0], self.length))
        return chain(text, tokens), states


def medians(arms: Mapping[Any, Callable[[], float]], repeats: int) -> dict[Any, list[float]]:
    """Runs all arms in turn, `repeats` times; each returns its seconds. Interleaved against drift."""
    seconds: dict[Any, list[float]] = {key: [] for key in arms}
    for _ in range(repeats):
        for key, arm in arms.items():
            seconds[key].append(arm())
    return seconds


def _begun(loop: DecodeLoop, params: Any, ids: Sequence[Sequence[int]], steps: int, room: int):
    """A state with room for `steps` rounds of `room` tokens, as if the target had read the prompts.

    How long a round takes depends on how much is in the target's cache, and not on what.
    """
    rows, longest = len(ids), max(map(len, ids))
    capacity = 1 << (longest + steps * room - 1).bit_length()
    lengths = jnp.asarray([len(prompt) for prompt in ids], jnp.int32)
    tokens = np.zeros((rows, capacity), np.int32)
    for row, prompt in enumerate(ids):
        tokens[row, : len(prompt)] = prompt
    sampling = make_sampling(rows, max_new_tokens=capacity, stop_ids=(-1,))
    args = (params, jnp.asarray(tokens), lengths, sampling, jnp.arange(rows))
    shapes = jax.eval_shape(functools.partial(loop.start, capacity=capacity), *args)
    view, drafts = loop.empty(params, rows, capacity)
    state = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes.replace(view=None, drafts=None)
    )
    text = jax.lax.dynamic_update_slice(state.text.tokens, args[1], (0, 0))
    state = state.replace(
        text=Text(text, lengths),
        prompt_length=lengths,
        limit=jnp.full_like(lengths, capacity),
        view=view.replace(cache=loop.target.rollback(view.cache, lengths - 1)),
        drafts=drafts,
        sampling=sampling,
        stop_state=sampling.stop_state,
    )
    if params["drafters"]:
        state = state.replace(drafts=_read(loop, params, state))
    return jax.block_until_ready(state)


@functools.partial(jax.jit, static_argnums=0)
def _read(loop: DecodeLoop, params: Any, state: Any) -> Any:
    """The drafter's states with the text read."""
    return loop.drafter.extend(params["drafters"], state.drafts, loop.context(state))


def _rounds_for(seconds: float) -> int:
    """How many rounds of so many seconds to time at once."""
    return max(2, min(MOST_ROUNDS, round(SLICE / max(seconds, 1e-6))))


def verify_arm(
    target: Target, nodes: int, ids: Sequence[Sequence[int]], rounds: int | None = None
) -> Callable[[], float]:
    """Seconds of one round that verifies `nodes` nodes, nothing drafted; compiled and warm.

    Args:
      rounds: timed at once; default: for `SLICE` seconds.
    """
    drafter = NoDrafter() if nodes == 1 else _Repeat(nodes - 1)
    loop = DecodeLoop(target.decoder, drafter)
    params = {"target": target.params, "drafters": {}}
    state = _begun(loop, params, ids, rounds or MOST_ROUNDS, 2)

    def once(count: int) -> float:
        began = time.perf_counter()
        out = jax.block_until_ready(_run(loop, params, state, jnp.int32(count)))
        took = time.perf_counter() - began
        return took / max(1, int(out.stats.rounds.max()))

    once(1)
    return functools.partial(once, rounds or _rounds_for(once(1)))


def _after_reading(x: jax.Array, arrays: Any, zero: jax.Array) -> jax.Array:
    """`x`, but not before all of `arrays` went through the processor's caches. `zero` is an int32 0."""
    if not jax.tree.leaves(arrays):
        return x
    line = 16  # numbers: at least one of every cache line
    # One number less than there are: a slice of everything would be no slice, and leave the loop.
    parts = [
        jnp.sum(lax.dynamic_slice(leaf.reshape(-1), (zero,), (leaf.size - 1,))[::line])
        for leaf in jax.tree.leaves(arrays)
    ]
    total = functools.reduce(jnp.add, parts).astype(jnp.float32)
    bits = lax.bitcast_convert_type(total, jnp.int32)
    return x + jnp.minimum(lax.shift_right_logical(bits, 1), 0)


def draft_arm(
    target: Target,
    drafter: LoadedDrafter,
    ids: Sequence[Sequence[int]],
    rounds: int | None = None,
    answers: Sequence[Sequence[int]] | None = None,
) -> Callable[[], float]:
    """Seconds of one draft and its commit, without verification, advancing two tokens a round.

    Args:
      rounds: timed at once; default: for `SLICE` seconds.
      answers: what follows each of `ids`, at least two tokens a round: how long a cascade takes depends
        on the text. None for zeros, where it does not.

    A verification reads the whole target between two drafts and leaves nothing of the drafter in the
    processor's caches. So before each draft the target's parameters are read, and the time of a loop
    that does only this is taken off.
    """
    loop = DecodeLoop(target.decoder, drafter.drafter)
    params = {"target": target.params, "drafters": drafter.params}
    state = _begun(loop, params, ids, rounds or MOST_ROUNDS, 2)
    if answers is not None:
        tokens = np.array(state.text.tokens)
        for row, (prompt, answer) in enumerate(zip(ids, answers, strict=True)):
            tokens[row, len(prompt) : len(prompt) + len(answer)] = answer
        state = state.replace(text=Text(jnp.asarray(tokens), state.text.length))
    # A drafter without parameters has nothing that the target's could push out.
    between = target.params if drafter.params else {}

    def seconds(count: int, drafting: bool) -> float:
        began = time.perf_counter()
        if drafting:
            out = _drafts_only(loop, params["drafters"], between, state, jnp.int32(count))
        else:
            out = _reading_only(between, state.text.length, jnp.int32(count))
        jax.block_until_ready(out)
        return (time.perf_counter() - began) / count

    def once(count: int) -> float:
        both = seconds(count, True)
        return max(both - seconds(count, False), 0.0) if between else both

    once(1)
    return functools.partial(once, rounds or _rounds_for(seconds(1, True)))


@functools.partial(jax.jit, static_argnums=0)
def _run(loop: DecodeLoop, params: Any, state: Any, rounds: jax.Array) -> Any:
    return loop.run(params, state, rounds)


@functools.partial(jax.jit, static_argnums=0)
def _drafts_only(loop: DecodeLoop, params: Any, between: Any, state: Any, rounds: jax.Array) -> Any:
    """Rounds without verification that advance by two tokens; `between` is read before each draft."""
    target, drafter = loop.target, loop.drafter

    def step(_, carry):
        drafts, text, total = carry
        length = _after_reading(text.length, between, jnp.minimum(total, 0))
        # As if the target had read the text: a drafter may ask how far behind it is.
        cache = target.rollback(state.view.cache, length - 1)
        now = state.replace(text=Text(text.tokens, length), view=state.view.replace(cache=cache))
        ctx = loop.context(now)
        draft, drafts = drafter.draft(params, drafts, ctx)
        one = jnp.ones_like(length)
        drafts = drafter.commit(drafts, accepted_prefix(length, one, drafter.info.depth))
        total = total + jnp.sum(draft.tokens, dtype=jnp.int32)
        return drafts, Text(text.tokens, length + 2), total

    return lax.fori_loop(0, rounds, step, (state.drafts, state.text, jnp.int32(0)))


@jax.jit
def _reading_only(between: Any, length: jax.Array, rounds: jax.Array) -> Any:
    """The same rounds without the drafts."""

    def step(_, carry):
        length, total = carry
        length = _after_reading(length, between, jnp.minimum(total, 0))
        return length + 2, total + jnp.max(length)

    return lax.fori_loop(0, rounds, step, (length, jnp.int32(0)))


def acceptance_by_position(generations: Sequence[Generation]) -> list[float]:
    """A_1, A_2, ...: accepted tokens at each draft position over all rounds."""
    rounds = sum(g.stats.num_spec_steps for g in generations)
    if rounds == 0:
        raise UserError("There is nothing to measure acceptance on.")
    return [
        sum(counts) / rounds
        for counts in zip(*(g.stats.accepted_per_pos for g in generations), strict=True)
    ]
