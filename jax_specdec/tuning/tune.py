"""`tune`: measures costs and acceptance, and chooses draft lengths, budgets and the default drafter."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from jax_specdec.checkpoints.targets import Target
from jax_specdec.errors import UserError
from jax_specdec.expansions.siblings import LeafSiblings
from jax_specdec.generation import Generation
from jax_specdec.pipeline import SpeculativeDecoder
from jax_specdec.specs.build import RULES, LoadedDrafter, parse_drafter
from jax_specdec.specs.language import CASCADE, REVIEWERS, Spec
from jax_specdec.specs.sizes import depth_of
from jax_specdec.tuning.cascades import BEHIND, PROPOSED, STATISTICAL, Played, candidates, play
from jax_specdec.tuning.costs import Costs, _interpolate
from jax_specdec.tuning.measure import acceptance_by_position, draft_arm, medians, verify_arm
from jax_specdec.tuning.replay import acceptance, record


class _Choice(NamedTuple):
    """What a specification is completed to, and why."""

    speedup: float
    spec: Spec
    accepted: list[float]
    costs: Costs


def _grows(spec: Spec) -> bool:
    return spec.rule is not None and not issubclass(RULES[spec.rule], LeafSiblings)


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
