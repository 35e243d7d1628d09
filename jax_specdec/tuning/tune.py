"""`tune`: measures costs and acceptance, and chooses draft lengths, budgets and the default drafter."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from jax_specdec.checkpoints.target_bound import target_fingerprint
from jax_specdec.checkpoints.targets import Target
from jax_specdec.drafters import registry
from jax_specdec.errors import UserError
from jax_specdec.expansions.siblings import LeafSiblings
from jax_specdec.generation import Generation
from jax_specdec.pipeline import SpeculativeDecoder
from jax_specdec.specs.build import LoadedDrafter
from jax_specdec.specs.language import CASCADE, Spec
from jax_specdec.specs.sizes import depth_of
from jax_specdec.specs.whole import RULES, parse_drafter
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


def check_names(names: Sequence[str]) -> tuple[list[Spec], bool]:
    """The drafters to tune, and whether a cascade of them is to be chosen.

    Raises:
      UserError: a name that says what is to be chosen, or more than one drafter.
    """
    specs = list(dict.fromkeys(map(parse_drafter, names)))
    for spec in specs:
        if spec.inner:
            raise UserError(
                f"{spec} has no single draft length to tune: name its drafters alone, and `{CASCADE}` for the "
                "best one of them."
            )
        if str(spec) != spec.key or (spec.name == CASCADE and spec.rule is not None):
            name = spec.name if spec.name == CASCADE else spec.key
            raise UserError(
                f"What is tuned is the draft length and the nodes, without a threshold: name {name} for {spec}."
            )
    drafters = [spec for spec in specs if spec.name != CASCADE and spec.kind.usual_length]
    return drafters, any(spec.name == CASCADE for spec in specs)


def tune(
    target: Target,
    make_drafter: Callable[[Spec], LoadedDrafter],
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
      make_drafter: specification -> drafter; `specs.build.Drafters` keeps one copy of each one's weights.
      names: what to tune, drafters (`lm`) and drafters with an expansion (`lm+cape`), and `cascade`.
        Siblings of a chain are predicted for every length and budget; trees that grow are decoded with at
        a few.
      prompts: real ones; the first `batch_size` of them are the text that costs are measured on. With fewer
        prompts the batch is as small as that, and recorded so.
      longest: lengths 1..longest are considered, as far as a drafter goes.

    Returns:
      A JSON-ready record: `lengths` by name (0: drafting does not pay), `nodes` by name of an
      expansion, `cascade` where it was among the names, `default`, `model` and what else it belongs to, and
      under `measured` the figures that decided.

    Raises:
      UserError: a name with a length, nodes or a threshold, which would not be kept; or a cascade without a
        drafter that can verify.
    """
    specs, cascades = check_names(names)
    neural = [spec.name for spec in specs if spec.rule is None and spec.kind.verifies]
    if cascades and not neural:
        able = registry.listed(registry.names("verifies"), "or")
        raise UserError(f"A cascade needs a drafter that can verify, {able}, to be tuned too.")
    rows = min(batch_size, len(prompts))
    limits = {spec.key: min(longest, make_drafter(Spec(spec.name, 1)).longest) for spec in specs}
    longest = max(limits.values(), default=1)
    ids = [SpeculativeDecoder(target).encode(prompt) for prompt in prompts[:rows]]
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
            arms[plan] = draft_arm(target, make_drafter(plan), ids)
        report(f"compiled {key}")
    for name in neural if cascades else ():
        for proposed in PROPOSED:  # one verification
            spec = Spec(name, 1, inner=(Spec(STATISTICAL, proposed),))
            arms[spec] = draft_arm(target, make_drafter(spec), ids)
        report(f"compiled verifications by {name}")
    if cascades:
        spec = Spec(STATISTICAL, max(BEHIND))
        arms[spec] = draft_arm(target, make_drafter(spec), ids)
    seconds = {key: statistics.median(v) for key, v in medians(arms, repeats).items()}
    verify = {t: seconds[t] for t in sorted(widths)}

    def decode(spec: Spec) -> tuple[SpeculativeDecoder, list[Generation]]:
        decoder = SpeculativeDecoder(target, make_drafter(spec))
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
            name: record(target, make_drafter(Spec(name, deepest)), texts, starts, everywhere=True)
            for name in neural
        }
        choices = []
        for spec in candidates(neural, deepest):
            played, (first, *_) = play(spec, texts, chains), spec.inner
            drafts = {p.length or 0: seconds[p] for p in plans[first.name]}
            took = _interpolate(verify, 1 + depth_of(spec))
            if first.inner:
                # The first verification reads weights that the target's have pushed out of the caches.
                first_one = seconds[first._replace(length=1)]
                step = (_interpolate(drafts, deepest) - drafts[1]) / max(1, deepest - 1)
                again = max(first_one - drafts[1] + step, 0.0)
                took += first_one + (played.calls[0] - 1) * again
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
    if cascades:
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
        "model": target_fingerprint(target.path),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "dtype": str(target.decoder.dtype),
        "batch_size": rows,
        **({"int8": list(target.int8)} if target.int8 else {}),
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
