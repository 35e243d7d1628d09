"""The cost model: what a round costs, what it yields, and the draft length and budget that follow.

A round of draft length g costs `v(T) + d(g)` seconds, verification of T nodes (1 + g of a chain) and
drafting, and yields `tau = 1 + sum of A_1..A_g` tokens, A_i being how often a token is accepted at
position i. The speed against plain decoding is `tau v(1) / (v(T) + d(g))` (arXiv 2211.17192, section
3.3, with measured costs in place of constants).
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_specdec.checkpoints.targets import Target
from jax_specdec.core.draft import Text, chain
from jax_specdec.core.drafter import ChainDrafter, Outcome, StatelessDrafter, TargetView
from jax_specdec.core.loop import DecodeLoop
from jax_specdec.core.sampling import Noise, make_sampling, shared_noise
from jax_specdec.drafters.none import NoDrafter
from jax_specdec.errors import UserError
from jax_specdec.expansions.siblings import Comb
from jax_specdec.pipeline import Generation, SpeculativeDecoder
from jax_specdec.specs.build import RULES, LoadedDrafter, depth_of, parse_drafter
from jax_specdec.specs.language import CASCADE, REVIEWERS, Spec
from jax_specdec.tuning.cascades import BEHIND, PROPOSED, STATISTICAL, Played, candidates, play
from jax_specdec.tuning.replay import Record, acceptance, record


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

    def round(self, length: int, nodes: int | None = None) -> float:
        """Seconds of a round of this draft length, interpolated between measured ones.

        Args:
          nodes: T, where it is not a chain's.
        """
        verify = _interpolate(self.verify, 1 + length if nodes is None else nodes)
        return verify + _interpolate({0: 0.0, **self.draft}, length)

    def speedup(self, acceptance: Sequence[float], length: int, nodes: int | None = None) -> float:
        """Predicted speed against plain decoding; `acceptance[i]` is A_{i+1}."""
        tau = 1.0 + sum(acceptance[:length])
        return tau * self.verify[1] / self.round(length, nodes)

    def best_length(self, acceptance: Sequence[float]) -> int:
        """The draft length with the highest predicted speed; 0 where drafting does not pay."""
        return max(range(len(acceptance) + 1), key=lambda g: self.speedup(acceptance, g))

    def best_expansion(self, found: Record, rule: type[Comb]) -> tuple[float, int, int]:
        """`(predicted speed, draft length, nodes)` of the best comb over measured widths and lengths."""
        return max(
            (self.speedup(acceptance(found, g, rule(nodes)), g, nodes), g, nodes)
            for g in range(1, found.rank.shape[1] + 1)
            for nodes in self.verify
            if rule(nodes).fits(g)
        )


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
    args = (params, jnp.asarray(tokens), lengths, sampling, jnp.arange(len(ids)))
    start = jax.jit(loop.start, static_argnames=("capacity",))
    # Compiled ahead, and so not kept: a process has room for so many programs.
    return jax.block_until_ready(start.lower(*args, capacity=capacity).compile()(*args))


def verify_arm(
    target: Target, nodes: int, ids: Sequence[Sequence[int]], rounds: int = 32
) -> Callable[[], float]:
    """Seconds of one round that verifies `nodes` nodes, nothing drafted; compiled and warm."""
    drafter = NoDrafter() if nodes == 1 else _Repeat(nodes - 1)
    loop = DecodeLoop(target.decoder, drafter)
    params = {"target": target.params, "drafters": {}}
    state = _started(loop, params, ids, rounds, 2)

    def once() -> float:
        began = time.perf_counter()
        out = jax.block_until_ready(_run(loop, params, state, jnp.int32(rounds)))
        took = time.perf_counter() - began
        return took / max(1, int(out.stats.rounds.max()))

    once()
    return once


def _after_reading(x: jax.Array, arrays: Any, zero: jax.Array) -> jax.Array:
    """`x`, but not before all of `arrays` went through the processor's caches. `zero` is an int32 0."""
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
    rounds: int = 32,
    answers: Sequence[Sequence[int]] | None = None,
) -> Callable[[], float]:
    """Seconds of one draft and its commit, without verification, advancing two tokens a round.

    Args:
      answers: what follows each of `ids`, at least two tokens a round: how long a cascade takes depends
        on the text. None for zeros, where it does not.

    A verification reads the whole target between two drafts and leaves nothing of the drafter in the
    processor's caches. So before each draft the target's parameters are read, and the time of a loop
    that does only this is taken off.
    """
    loop = DecodeLoop(target.decoder, drafter.drafter)
    params = {"target": target.params, "drafters": drafter.params}
    state = _started(loop, params, ids, rounds, 2)
    if answers is not None:
        tokens = np.array(state.text.tokens)
        for row, (prompt, answer) in enumerate(zip(ids, answers, strict=True)):
            tokens[row, len(prompt) : len(prompt) + len(answer)] = answer
        state = state.replace(text=Text(jnp.asarray(tokens), state.text.length))

    def seconds(drafting: bool) -> float:
        began = time.perf_counter()
        jax.block_until_ready(_drafts_only(loop, rounds, drafting, params, state))
        return (time.perf_counter() - began) / rounds

    def once() -> float:
        return max(seconds(True) - seconds(False), 0.0)

    once()
    return once


# Loops are static arguments by their value: arms on several texts share a program.


@functools.partial(jax.jit, static_argnums=0)
def _run(loop: DecodeLoop, params: Any, state: Any, rounds: jax.Array) -> Any:
    return loop.run(params, state, rounds)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _drafts_only(loop: DecodeLoop, rounds: int, drafting: bool, params: Any, state: Any) -> Any:
    """Rounds without verification that advance by two tokens, or only the reading between them."""

    def step(_, carry):
        drafts, text, total = carry
        # As if the target had read the text: a drafter may ask how far behind it is.
        view = TargetView(state.cache.replace(length=text.length - 1))
        length = _after_reading(text.length, params["target"], jnp.minimum(total, 0))
        if not drafting:
            return drafts, Text(text.tokens, length + 2), total + jnp.max(length)
        text = Text(text.tokens, length)
        vocab = loop.target.config.vocab_size
        noise = shared_noise(state.keys, state.sampling, text.length, loop.window, vocab)
        draft, drafts = loop.drafter.draft(
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
        drafts = loop.drafter.commit(drafts, outcome, view)
        total = total + jnp.sum(draft.tokens, dtype=jnp.int32)
        return drafts, Text(text.tokens, text.length + 2), total

    return lax.fori_loop(0, rounds, step, (state.drafts, state.text, jnp.int32(0)))


def acceptance_by_position(generations: Sequence[Generation]) -> list[float]:
    """A_1, A_2, ...: accepted tokens at each draft position over all rounds."""
    rounds = sum(g.stats.num_spec_steps for g in generations)
    if rounds == 0:
        raise UserError("There is nothing to measure acceptance on.")
    return [
        sum(counts) / rounds
        for counts in zip(*(g.stats.accepted_per_pos for g in generations), strict=True)
    ]


class _Choice(NamedTuple):
    """What a specification is completed to, and why."""

    speedup: float
    spec: Spec
    accepted: list[float]
    costs: Costs


def _grows(spec: Spec) -> bool:
    return spec.rule is not None and not issubclass(RULES[spec.rule], Comb)


def _plans(spec: Spec, longest: int, widest: int) -> list[Spec]:
    """What to measure the drafting of: three lengths, and of a tree that grows up to three budgets each."""
    lengths = sorted({1, max(1, longest // 2), longest})
    if not _grows(spec):
        return [spec._replace(length=g, nodes=None) for g in lengths]
    rule: Any = RULES[spec.rule or ""]
    budgets = [(g, 1 + k * g) for g in lengths for k in (2, 4, 8)]
    return [spec._replace(length=g, nodes=n) for g, n in budgets if n <= widest and rule(n).fits(g)]


def tune(
    target: Target,
    make_drafter: Callable[[str], LoadedDrafter],
    names: Sequence[str],
    prompts: Sequence[str],
    *,
    longest: int = 12,
    max_new_tokens: int = 64,
    batch_size: int = 1,
    repeats: int = 5,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measures v, d and acceptance, and chooses lengths, budgets and the default drafter.

    Args:
      make_drafter: specification -> drafter. names: what to tune, drafters (`lm`) and drafters with an
        expansion (`lm+cape`). Siblings of a chain are predicted for every length and budget; trees that
        grow are decoded with at a few.
      prompts: real ones; the first `batch_size` of them are the text that costs are measured on.
      longest: lengths 1..longest are considered, as far as a drafter goes.

    Returns:
      A JSON-ready record: `lengths` by name (0: drafting does not pay), `nodes` by name of an
      expansion, `cascade` where it was among the names (`allocation`), `default`, and under `measured` the
      figures that decided.
    """
    specs = [parse_drafter(name) for name in names if name not in ("none", CASCADE)]
    if any(spec.inner for spec in specs):
        raise UserError(
            "A cascade has no single draft length to tune: name the drafters alone, and `cascade` for the "
            "best one of them."
        )
    neural = [s.name for s in specs if s.rule is None and s.kind in REVIEWERS]
    if CASCADE in names and not neural:
        raise UserError("A cascade needs a drafter that can review, lm or glide, to be tuned too.")
    limits = {spec.key: min(longest, make_drafter(spec.name).longest) for spec in specs}
    longest = max(limits.values(), default=1)
    ids = [SpeculativeDecoder(target).encode(prompt) for prompt in prompts[:batch_size]]
    widths = {1, 2, 3, 4, 5, 6, 7, 9, 11, 1 + longest} & set(range(1, longest + 2))
    if any(spec.rule for spec in specs):
        widths |= {8, 12, 16, 20, 24, 32}
    plans = {spec.key: _plans(spec, limits[spec.key], max(widths)) for spec in specs}
    arms: dict[Any, Callable[[], float]] = {}
    for nodes in sorted(widths):
        arms[nodes] = verify_arm(target, nodes, ids)
        report(f"compiled a verification of {nodes} nodes")
    for key, several in plans.items():
        for plan in several:
            arms[plan] = draft_arm(target, make_drafter(str(plan)), ids)
        report(f"compiled {key}")
    for name in neural if CASCADE in names else ():
        for proposed in PROPOSED:  # one review
            spec = Spec(name, 1, inner=(Spec(STATISTICAL, proposed),))
            arms[spec] = draft_arm(target, make_drafter(str(spec)), ids)
        report(f"compiled reviews by {name}")
    if CASCADE in names:
        spec = Spec(STATISTICAL, max(BEHIND))
        arms[spec] = draft_arm(target, make_drafter(str(spec)), ids)
    seconds = {key: statistics.median(v) for key, v in medians(arms, repeats).items()}
    verify = {t: seconds[t] for t in sorted(widths)}

    def decode(spec: Spec) -> tuple[SpeculativeDecoder, list[Generation]]:
        decoder = SpeculativeDecoder(target, make_drafter(str(spec)))
        rows = min(batch_size, len(prompts))
        return decoder, list(
            decoder.generate(prompts, max_new_tokens=max_new_tokens, batch_size=rows)
        )

    def choose(spec: Spec) -> _Choice:
        if _grows(spec):
            choices = []
            for plan in plans[spec.key]:
                assert plan.length is not None
                costs = Costs(verify, {plan.length: seconds[plan]})
                accepted = acceptance_by_position(decode(plan)[1])
                speedup = costs.speedup(accepted, plan.length, plan.nodes)
                choices.append(_Choice(speedup, plan, accepted, costs))
            return max(choices, key=lambda choice: choice.speedup)
        costs = Costs(verify, {p.length or 0: seconds[p] for p in plans[spec.key]})
        decoder, answers = decode(Spec(spec.name, limits[spec.key]))
        if spec.rule is None:
            accepted, nodes = acceptance_by_position(answers), None
            length = costs.best_length(accepted)
        else:
            texts = [decoder.encode(a.prompt) + a.token_ids for a in answers]
            starts = [len(t) - len(a.token_ids) for t, a in zip(texts, answers, strict=True)]
            found = record(target, decoder.loaded, texts, starts)
            rule: Any = RULES[spec.rule]
            _, length, nodes = costs.best_expansion(found, rule)
            accepted = acceptance(found, length, rule(nodes))
        speedup = costs.speedup(accepted, length, nodes)
        return _Choice(speedup, spec._replace(length=length, nodes=nodes), accepted, costs)

    def best_cascade() -> tuple[float, Spec, Played]:
        """The cascade with the highest predicted speed of those that gain on their drafter alone.

        Where none gains, the one that loses least.
        """
        deepest = min(limits[name] for name in neural)
        decoder, answers = decode(Spec(neural[0], deepest))
        texts = [decoder.encode(a.prompt) + a.token_ids for a in answers]
        starts = [len(t) - len(a.token_ids) for t, a in zip(texts, answers, strict=True)]
        chains = {
            name: record(target, make_drafter(f"{name}:{deepest}"), texts, starts, everywhere=True)
            for name in neural
        }
        choices = []
        for spec in candidates(neural, deepest):
            played, (first, *_) = play(spec, texts, chains), spec.inner
            drafts = {p.length or 0: seconds[p] for p in plans[first.name]}
            took = _interpolate(verify, 1 + depth_of(spec))
            if first.inner:
                # The first review reads weights that the target's have pushed out of the caches.
                review = seconds[first._replace(length=1)]
                step = (_interpolate(drafts, deepest) - drafts[1]) / max(1, deepest - 1)
                again = max(review - drafts[1] + step, 0.0)
                took += review + (played.calls[0] - 1) * again
            else:
                took += _interpolate(drafts, first.length or 1)
            took += sum(played.calls[1:]) * seconds[Spec(STATISTICAL, max(BEHIND))]
            choices.append((played.tau * verify[1] / took, spec, played))

        def gain(choice: tuple[float, Spec, Played]) -> float:
            return choice[0] / chosen[choice[1].inner[0].name].speedup

        gaining = [choice for choice in choices if gain(choice) >= 1]
        return max(gaining, key=lambda choice: choice[0]) if gaining else max(choices, key=gain)

    chosen: dict[str, _Choice] = {}
    for spec in specs:
        choice = chosen[spec.key] = choose(spec)
        report(f"{choice.spec}: predicted {choice.speedup:.2f} times plain")
    ranking = {str(choice.spec): choice.speedup for choice in chosen.values()}
    cascade: dict[str, Any] = {}
    if CASCADE in names:
        speedup, spec, played = best_cascade()
        cascade = {"spec": str(spec), "tau": played.tau, "predicted_speedup": speedup}
        ranking[str(spec)] = speedup
        report(f"{spec}: predicted {speedup:.2f} times plain")
    best = max(ranking, key=lambda spec: ranking[spec])
    return {
        **({CASCADE: cascade["spec"]} if cascade else {}),
        "lengths": {key: c.spec.length for key, c in chosen.items()},
        "nodes": {key: c.spec.nodes for key, c in chosen.items() if c.spec.nodes is not None},
        "default": best if ranking[best] > 1 else "none",
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "dtype": str(target.decoder.dtype),
        "batch_size": batch_size,
        "prompts": len(prompts),
        "measured": {
            "verify_s": verify,
            "drafters": {
                key: {
                    "draft_s": c.costs.draft,
                    "accepted_per_pos": c.accepted,
                    "predicted_speedup": c.speedup,
                }
                for key, c in chosen.items()
            },
            **({CASCADE: cascade} if cascade else {}),
        },
    }
