"""The cost model: what a round costs, what it yields, and the draft length that follows.

A round of draft length g costs `v(1 + g) + d(g)` seconds, verification of 1 + g nodes and drafting, and
yields `tau(g) = 1 + sum of A_1..A_g` tokens, A_i being how often the i-th drafted token is accepted.
The speed against plain decoding is `tau(g) v(1) / (v(1 + g) + d(g))` (arXiv 2211.17192, section 3.3, with
measured costs in place of constants).
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_specdec.checkpoints import Target
from jax_specdec.drafters.base import ChainDrafter, Outcome, StatelessDrafter, TargetView
from jax_specdec.drafters.loading import LoadedDrafter
from jax_specdec.drafters.none import NoDrafter
from jax_specdec.errors import UserError
from jax_specdec.loop import DecodeLoop
from jax_specdec.pipeline import Generation, SpeculativeDecoder
from jax_specdec.sampling import Noise, make_sampling, shared_noise
from jax_specdec.tree import Text, chain


@dataclasses.dataclass(frozen=True)
class _Repeat(ChainDrafter, StatelessDrafter):
    """Proposes the root again and again: costs nothing, so that a round is its verification."""

    length: int
    name: str = "repeat"

    def draft(self, params, states, text, view, sampling, noise, active, room):
        del params, view, sampling, noise, active, room
        tokens = jnp.broadcast_to(text.root()[:, None], (text.length.shape[0], self.length))
        return chain(text, tokens), states


@dataclasses.dataclass(frozen=True)
class Costs:
    """Measured seconds per round at one batch size, medians.

    Attributes:
      verify: by number of nodes T, root included: one round without drafting. `verify[1]` is a token
        of plain decoding.
      draft: by draft length: one call of the drafter and its commit. length 0 costs nothing.
    """

    verify: dict[int, float]
    draft: dict[int, float]

    def round(self, length: int) -> float:
        """Seconds of a round of this draft length, interpolated between measured ones."""
        return _interpolate(self.verify, 1 + length) + _interpolate({0: 0.0, **self.draft}, length)

    def speedup(self, acceptance: Sequence[float], length: int) -> float:
        """Predicted speed against plain decoding; `acceptance[i]` is A_{i+1}."""
        tau = 1.0 + sum(acceptance[:length])
        return tau * self.verify[1] / self.round(length)

    def best_length(self, acceptance: Sequence[float]) -> int:
        """The draft length with the highest predicted speed; 0 where drafting does not pay."""
        return max(range(len(acceptance) + 1), key=lambda g: self.speedup(acceptance, g))


def _interpolate(points: Mapping[int, float], at: int) -> float:
    xs = sorted(points)
    if not xs[0] <= at <= xs[-1]:
        raise ValueError(f"{at} lies outside the measured {xs[0]}..{xs[-1]}")
    return float(np.interp(at, xs, [points[x] for x in xs]))


def medians(arms: Mapping[Any, Callable[[], float]], repeats: int) -> dict[Any, list[float]]:
    """Runs all arms in turn, `repeats` times; each returns its seconds. Interleaved against drift."""
    seconds: dict[Any, list[float]] = {key: [] for key in arms}
    for _ in range(repeats):
        for key, arm in arms.items():
            seconds[key].append(arm())
    return seconds


def _started(loop: DecodeLoop, params: Any, ids: Sequence[Sequence[int]], steps: int, room: int):
    """A state that has read a prompt and has room for `steps` rounds of `room` tokens."""
    longest = max(map(len, ids))
    tokens = np.zeros((len(ids), longest), np.int32)
    for row, prompt in enumerate(ids):
        tokens[row, : len(prompt)] = prompt
    capacity = 1 << (longest + steps * room - 1).bit_length()
    sampling = make_sampling(len(ids), max_new_tokens=capacity, stop_ids=(-1,))
    lengths = jnp.asarray([len(prompt) for prompt in ids], jnp.int32)
    start = jax.jit(loop.start, static_argnames=("capacity",))
    state = start(
        params, jnp.asarray(tokens), lengths, sampling, jnp.arange(len(ids)), capacity=capacity
    )
    return jax.block_until_ready(state)


def verify_arm(
    target: Target, nodes: int, ids: Sequence[Sequence[int]], rounds: int = 32
) -> Callable[[], float]:
    """Seconds of one round that verifies `nodes` nodes, nothing drafted; compiled and warm."""
    drafter = NoDrafter() if nodes == 1 else _Repeat(nodes - 1)
    loop = DecodeLoop(target.decoder, drafter)
    params = {"target": target.params, "drafters": {}}
    state = _started(loop, params, ids, rounds, 2)
    run = jax.jit(loop.run).lower(params, state, jnp.int32(0)).compile()

    def once() -> float:
        began = time.perf_counter()
        out = jax.block_until_ready(run(params, state, jnp.int32(rounds)))
        took = time.perf_counter() - began
        return took / max(1, int(out.stats.rounds.max()))

    once()
    return once


def _after_reading(x: jax.Array, arrays: Any, zero: jax.Array) -> jax.Array:
    """`x`, but not before all of `arrays` went through the processor's caches. `zero` is an int32 0."""
    line = 16  # numbers: at least one of every cache line
    parts = [
        jnp.sum(lax.dynamic_slice(leaf.reshape(-1), (zero,), (leaf.size,))[::line])
        for leaf in jax.tree.leaves(arrays)
    ]
    total = functools.reduce(jnp.add, parts).astype(jnp.float32)
    bits = lax.bitcast_convert_type(total, jnp.int32)
    return x + jnp.minimum(lax.shift_right_logical(bits, 1), 0)


def draft_arm(
    target: Target, drafter: LoadedDrafter, ids: Sequence[Sequence[int]], rounds: int = 32
) -> Callable[[], float]:
    """Seconds of one draft and its commit, without verification, advancing two tokens a round.

    A verification reads the whole target between two drafts and leaves nothing of the drafter in the
    processor's caches. So before each draft the target's parameters are read, and the time of a loop
    that does only this is taken off.
    """
    loop = DecodeLoop(target.decoder, drafter.drafter)
    params = {"target": target.params, "drafters": drafter.params}
    state = _started(loop, params, ids, rounds, 2)
    vocab = target.vocab_size

    def rounds_only(params, state, drafting):
        view = TargetView(state.cache)

        def step(_, carry):
            drafts, text, total = carry
            length = _after_reading(text.length, params["target"], jnp.minimum(total, 0))
            if not drafting:
                return drafts, Text(text.tokens, length + 2), total + jnp.max(length)
            text = Text(text.tokens, length)
            noise = shared_noise(state.keys, state.sampling, text.length, loop.window, vocab)
            draft, drafts = drafter.drafter.draft(
                params["drafters"],
                drafts,
                text,
                view,
                state.sampling,
                Noise(noise),
                jnp.ones(text.length.shape, bool),
                jnp.full(text.length.shape, 1 << 20, jnp.int32),
            )
            one = jnp.ones_like(text.length)
            path = jnp.zeros((one.shape[0], loop.window), jnp.int32)
            outcome = Outcome(text.length + 2, text.length + 1, path, one)
            drafts = drafter.drafter.commit(drafts, outcome, view)
            total = total + jnp.sum(draft.tokens, dtype=jnp.int32)
            return drafts, Text(text.tokens, text.length + 2), total

        return lax.fori_loop(0, rounds, step, (state.drafts, state.text, jnp.int32(0)))

    both, reading = (
        jax.jit(functools.partial(rounds_only, drafting=drafting)).lower(params, state).compile()
        for drafting in (True, False)
    )

    def seconds(program: Callable) -> float:
        began = time.perf_counter()
        jax.block_until_ready(program(params, state))
        return (time.perf_counter() - began) / rounds

    def once() -> float:
        return max(seconds(both) - seconds(reading), 0.0)

    once()
    return once


def measure_costs(
    target: Target,
    make_drafter: Callable[[int], LoadedDrafter],
    ids: Sequence[Sequence[int]],
    *,
    widths: Sequence[int] = (1, 2, 3, 4, 5, 6, 7, 9, 11, 13, 17),
    lengths: Sequence[int] = (1, 4, 8, 16),
    repeats: int = 5,
) -> Costs:
    """Measures a target's widths and a drafter's lengths, interleaved, at the batch of `ids`."""
    arms: dict[Any, Callable[[], float]] = {
        ("verify", t): verify_arm(target, t, ids) for t in widths
    }
    arms |= {("draft", g): draft_arm(target, make_drafter(g), ids) for g in lengths}
    seconds = {key: statistics.median(v) for key, v in medians(arms, repeats).items()}
    return Costs(
        verify={t: seconds["verify", t] for t in widths},
        draft={g: seconds["draft", g] for g in lengths},
    )


def acceptance_by_position(generations: Sequence[Generation]) -> list[float]:
    """A_1, A_2, ...: accepted tokens at each draft position over all rounds."""
    rounds = sum(g.stats.num_spec_steps for g in generations)
    if rounds == 0:
        raise UserError("There is nothing to measure acceptance on.")
    return [
        sum(counts) / rounds
        for counts in zip(*(g.stats.accepted_per_pos for g in generations), strict=True)
    ]


def measure_acceptance(
    target: Target,
    drafter: LoadedDrafter,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    temperature: float = 0.0,
) -> list[float]:
    """Acceptance by position of a drafter of any length on real prompts."""
    decoder = SpeculativeDecoder(target, drafter)
    out = decoder.generate(
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=min(batch_size, len(prompts)),
        temperature=temperature,
    )
    return acceptance_by_position(list(out))


def tune(
    target: Target,
    make_drafter: Callable[[str, int], LoadedDrafter],
    names: Sequence[str],
    prompts: Sequence[str],
    *,
    longest: int = 12,
    max_new_tokens: int = 64,
    batch_size: int = 1,
    repeats: int = 5,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measures v, d and acceptance, and chooses each drafter's length and the default drafter.

    Args:
      make_drafter: `(name, length) -> drafter`. names: the drafters to tune.
      prompts: real ones; the first `batch_size` of them are the text that costs are measured on.
      longest: lengths 1..longest are considered.

    Returns:
      A JSON-ready record: `lengths` by drafter (0: drafting does not pay), `default`, and under
      `measured` the figures that decided.
    """
    names = [name for name in names if name != "none"]
    ids = [SpeculativeDecoder(target).encode(prompt) for prompt in prompts[:batch_size]]
    widths = sorted({1, 2, 3, 4, 5, 6, 7, 9, 11, 1 + longest} & set(range(1, longest + 2)))
    lengths = sorted({1, max(1, longest // 2), longest})
    arms: dict[Any, Callable[[], float]] = {}
    for nodes in widths:
        arms["verify", nodes] = verify_arm(target, nodes, ids)
        report(f"compiled a verification of {nodes} nodes")
    for name in names:
        for length in lengths:
            arms[name, length] = draft_arm(target, make_drafter(name, length), ids)
        report(f"compiled {name}")
    seconds = {key: statistics.median(v) for key, v in medians(arms, repeats).items()}
    verify = {t: seconds["verify", t] for t in widths}
    chosen: dict[str, int] = {}
    measured: dict[str, Any] = {}
    for name in names:
        costs = Costs(verify, {g: seconds[name, g] for g in lengths})
        accepted = measure_acceptance(
            target,
            make_drafter(name, longest),
            prompts,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )
        best = costs.best_length(accepted)
        chosen[name] = best
        measured[name] = {
            "draft_s": costs.draft,
            "accepted_per_pos": accepted,
            "predicted_speedup": costs.speedup(accepted, best),
        }
        report(f"{name}: length {best}, predicted {costs.speedup(accepted, best):.2f} times plain")
    best_name = max(names, key=lambda name: measured[name]["predicted_speedup"])
    pays = chosen[best_name] > 0
    return {
        "lengths": chosen,
        "default": f"{best_name}:{chosen[best_name]}" if pays else "none",
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "dtype": str(target.decoder.dtype),
        "batch_size": batch_size,
        "prompts": len(prompts),
        "measured": {"verify_s": verify, "drafters": measured},
    }
