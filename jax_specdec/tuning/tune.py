"""`tune`: measures costs and acceptance, and chooses draft lengths, nodes and the default drafter.

What takes long is compiling passes of the target, so there are few: a verification of each of a few widths, for
all drafters, one decoding of the prompts, and one reading of them with their answers. Chains are drafted again
along these texts; only trees that grow are decoded with.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_specdec.checkpoints.target_bound import target_fingerprint
from jax_specdec.checkpoints.targets import Target
from jax_specdec.core.budget import RoundCosts, Told, usual_widths
from jax_specdec.core.context import TargetView
from jax_specdec.core.drafter import Drafter
from jax_specdec.core.loop import DecodeLoop
from jax_specdec.drafters import registry
from jax_specdec.errors import UserError
from jax_specdec.expansions.siblings import LeafSiblings
from jax_specdec.generation import Generation
from jax_specdec.pipeline import SpeculativeDecoder
from jax_specdec.specs.build import LoadedDrafter
from jax_specdec.specs.language import CASCADE, COMBINATIONS, FIRST, Spec
from jax_specdec.specs.sizes import depth_of
from jax_specdec.specs.whole import RULES, parse_drafter
from jax_specdec.tuning.budgeted import budgeted_speedup
from jax_specdec.tuning.cascades import BEHIND, PROPOSED, STATISTICAL, Played, candidates, play
from jax_specdec.tuning.costs import Costs, interpolate
from jax_specdec.tuning.measure import acceptance_by_position, draft_arm, medians, verify_arm
from jax_specdec.tuning.replay import Record, acceptance, read_whole, record, rounds_of

# Tokens that must match for a copy to be tried before a model.
MATCHES = (1, 2, 3)
# What the prediction of a cascade, in which every round is alike, counts beside one that was played with a budget.
ALIKE = 0.95
# Below this predicted speed a drafter is not worth its memory and its reading of prompts, which no prediction contains.
PAYS = 1.01


class _Choice(NamedTuple):
    """What a specification is completed to, and why.

    Attributes:
      speedup: predicted, where every round is alike. budgeted: with a budget, None where that is not known.
    """

    speedup: float
    spec: Spec
    accepted: list[float]
    costs: Costs
    budgeted: float | None = None

    @property
    def best(self) -> float:
        return self.speedup if self.budgeted is None else self.budgeted


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


def check_names(names: Sequence[str]) -> tuple[list[Spec], set[str]]:
    """The drafters to tune, and which combinations of them are to be chosen.

    Raises:
      UserError: a name that says what is to be chosen, or more than one drafter.
    """
    specs = list(dict.fromkeys(map(parse_drafter, names)))
    for spec in specs:
        if spec.inner:
            raise UserError(
                f"{spec} has no single draft length to tune: name its drafters alone, and `{CASCADE}` or `{FIRST}` "
                "for the best combination of them."
            )
        if str(spec) != spec.key or (spec.name in COMBINATIONS and spec.rule is not None):
            name = spec.name if spec.name in COMBINATIONS else spec.key
            raise UserError(
                f"What is tuned is the draft length and the nodes, without a threshold: name {name} for {spec}."
            )
    drafters = [spec for spec in specs if spec.name not in COMBINATIONS and spec.kind.usual_length]
    return drafters, {spec.name for spec in specs} & set(COMBINATIONS)


def tune(
    target: Target,
    make_drafter: Callable[[Spec], LoadedDrafter],
    names: Sequence[str],
    prompts: Sequence[Any],
    *,
    longest: int = 15,
    max_new_tokens: int = 64,
    batch_size: int = 1,
    repeats: int = 5,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measures v, d and acceptance, and chooses lengths, budgets and the default drafter.

    Args:
      make_drafter: specification -> drafter; `specs.build.Drafters` keeps one copy of each one's weights.
      names: what to tune, drafters (`lm`) and drafters with an expansion (`lm+cape`), `cascade` and `first`.
        Siblings of a chain are predicted for every length and budget; trees that grow are decoded with at
        a few.
      prompts: real ones, texts or chats; the first `batch_size` of them are the text that costs are measured on. With fewer
        prompts the batch is as small as that, and recorded so.
      longest: lengths 1..longest are considered, as far as a drafter goes.

    Returns:
      A JSON-ready record: `lengths` by name (0: drafting does not pay), `nodes` by name of an
      expansion, `cascade` and `first` where they were among the names, `default`, `model` and what else it belongs to, and
      under `measured` the figures that decided.

    Raises:
      UserError: a name with a length, nodes or a threshold, which would not be kept; a cascade without a
        drafter that can verify; or `first` without a model.
    """
    specs, combinations = check_names(names)
    cascades = CASCADE in combinations
    ones = {spec.name: make_drafter(Spec(spec.name, 1)) for spec in specs}
    models = [
        spec.name for spec in specs if spec.rule is None and ones[spec.name].drafter.info.models
    ]
    if FIRST in combinations and not models:
        able = registry.listed(registry.names("needs_checkpoint"), "or")
        raise UserError(f"What comes behind a copy is a model, {able}: name one to be tuned too.")
    neural = [spec.name for spec in specs if spec.rule is None and spec.kind.verifies]
    if cascades and not neural:
        able = registry.listed(registry.names("verifies"), "or")
        raise UserError(f"A cascade needs a drafter that can verify, {able}, to be tuned too.")
    rows = min(batch_size, len(prompts))
    trained = {name: one.longest for name, one in ones.items()}
    limits = {spec.key: min(longest, trained[spec.name]) for spec in specs}
    limits_of = {spec.name: limits[spec.key] for spec in specs}
    if FIRST not in combinations:  # else copies may be so long
        longest = max(limits.values(), default=1)
    ids = [SpeculativeDecoder(target).encode(prompt) for prompt in prompts[:rows]]
    widths = {1, 2, 3, 5, 8, 1 + longest} & set(range(1, longest + 2))
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
            if proposed < trained[name]:
                spec = Spec(name, 1, inner=(Spec(STATISTICAL, proposed),))
                arms[spec] = draft_arm(target, make_drafter(spec), ids)
        report(f"compiled verifications by {name}")
    if combinations:
        spec = Spec(STATISTICAL, max(BEHIND))
        arms[spec] = draft_arm(target, make_drafter(spec), ids)
    seconds = {key: statistics.median(v) for key, v in medians(arms, repeats).items()}
    verify = {t: seconds[t] for t in sorted(widths)}

    def decode(drafter: LoadedDrafter | None = None) -> list[Generation]:
        decoder = SpeculativeDecoder(target, drafter, budget=False)
        return list(decoder.generate(prompts, max_new_tokens=max_new_tokens, batch_size=rows))

    def told_by(drafter: Drafter) -> tuple[Told, ...]:
        return DecodeLoop(target.decoder, drafter).told

    encode = SpeculativeDecoder(target).encode
    answers: list[Generation] = []
    views: dict[tuple[int, ...], TargetView] = {}
    records: dict[str, Record] = {}

    def drafted(name: str, match: int = 1) -> Record | None:
        """Chains of a drafter from everywhere in the answers; None of one that drafts trees."""
        spec = Spec(name, limits_of.get(name, longest), match=match)
        loaded, name = make_drafter(spec), str(spec)
        info = loaded.drafter.info
        if not info.is_chain:
            return None
        if name not in records:
            if not answers:
                answers.extend(decode())
            texts = [encode(answer.prompt) + answer.token_ids for answer in answers]
            starts = [len(t) - len(a.token_ids) for t, a in zip(texts, answers, strict=True)]
            if info.taps not in views:
                views[info.taps] = read_whole(target, info.taps, texts, longest + 1)
            view = views[info.taps]
            records[name] = record(target, loaded, texts, starts, everywhere=True, view=view)
        return records[name]

    def chosen_chain(spec: Spec, costs: Costs) -> _Choice:
        """The length that is fastest with a budget, which is what decodes by default."""
        most, found = limits[spec.key], drafted(spec.name)
        if found is None:
            accepted = acceptance_by_position(decode(make_drafter(Spec(spec.name, most))))
            length = costs.best_length(accepted)
            return _Choice(
                costs.speedup(accepted, length), spec._replace(length=length), accepted, costs
            )
        accepted = acceptance(rounds_of(found, most), most)
        c = [costs.round(length) - interpolate(verify, 1 + length) for length in range(most + 1)]
        lengths = sorted(
            {costs.best_length(accepted), *(p.length or 0 for p in plans[spec.key])} - {0}
        )
        best, told = (1.0, 0), told_by(ones[spec.name].drafter)
        for length in lengths:
            nodes = usual_widths(1 + length)
            v = jnp.asarray([interpolate(verify, width) for width in nodes], jnp.float32)
            table = RoundCosts(v, jnp.asarray([c[: length + 1]], jnp.float32))
            speed = budgeted_speedup([found], table, nodes, rows, told)
            best = max(best, (speed, length), key=lambda one: one[0])
        budgeted, length = best if best[0] >= PAYS else (1.0, 0)
        speedup = costs.speedup(accepted, length)
        return _Choice(speedup, spec._replace(length=length), accepted, costs, budgeted)

    def choose(spec: Spec) -> _Choice:
        if _grows(spec):
            choices = []
            for plan in plans[spec.key]:
                assert plan.length is not None
                costs = Costs(verify, {plan.length: seconds[plan]})
                accepted = acceptance_by_position(decode(make_drafter(plan)))
                speedup = costs.speedup(accepted, plan.length, plan.nodes)
                choices.append(_Choice(speedup, plan, accepted, costs))
            return max(choices, key=lambda choice: choice.speedup)
        costs = Costs(verify, {p.length or 0: seconds[p] for p in plans[spec.key]})
        if spec.rule is None:
            return chosen_chain(spec, costs)
        found, rule = drafted(spec.name), RULES[spec.rule]
        if found is None:
            raise UserError(f"The drafter {spec.name!r} has no chains to expand.")
        found = rounds_of(found, limits[spec.key])
        leaves: Any = rule
        speedup, length, nodes = costs.best_expansion(found, leaves)
        accepted = acceptance(found, length, leaves(nodes))
        return _Choice(speedup, spec._replace(length=length, nodes=nodes), accepted, costs)

    def best_cascade() -> tuple[float, Spec, Played] | None:
        """The cascade with the highest predicted speed of those that gain on their drafter alone.

        Where none gains, the one that loses least; None where all are too long for a drafter.
        """
        deepest = min(limits[name] for name in neural)
        chains = {name: found for name in neural if (found := drafted(name)) is not None}
        texts = [encode(answer.prompt) + answer.token_ids for answer in answers]
        choices = []
        for spec in candidates(neural, deepest, longest=trained):
            played, (first, *_) = play(spec, texts, chains, rows), spec.inner
            drafts = {p.length or 0: seconds[p] for p in plans[first.name]}
            took = interpolate(verify, 1 + depth_of(spec))
            if first.inner:
                # The first verification reads weights that the target's have pushed out of the caches.
                first_one = seconds[first._replace(length=1)]
                step = (interpolate(drafts, deepest) - drafts[1]) / max(1, deepest - 1)
                again = max(first_one - drafts[1] + step, 0.0)
                took += first_one + (played.calls[0] - 1) * again
            else:
                took += interpolate(drafts, first.length or 1)
            took += sum(played.calls[1:]) * seconds[Spec(STATISTICAL, max(BEHIND))]
            choices.append((played.tau * verify[1] / took, spec, played))

        def alone(name: str) -> float:
            """A drafter played in the same way, in rounds that are all alike."""
            length = chosen[name].spec.length
            if not length:
                return 1.0
            tau = play(Spec(CASCADE, inner=(Spec(name, length),)), texts, chains, rows).tau
            return tau * verify[1] / chosen[name].costs.round(length)

        own = {name: alone(name) for name in chains}

        def gain(choice: tuple[float, Spec, Played]) -> float:
            return choice[0] / own[choice[1].inner[0].name]

        if not choices:
            return None
        gaining = [choice for choice in choices if gain(choice) >= 1]
        return max(gaining, key=lambda choice: choice[0]) if gaining else max(choices, key=gain)

    def best_first() -> tuple[float, Spec] | None:
        """The fastest combination of copying and a model, with a budget; None where no model drafts chains."""
        copying = limits_of.get(STATISTICAL, longest)
        copying_spec = Spec(STATISTICAL, max(BEHIND))
        again, copier = seconds[copying_spec], make_drafter(copying_spec).drafter
        choices = []
        for name in models:
            found, most = drafted(name), limits_of[name]
            if found is None:
                continue
            nodes, costs = usual_widths(1 + max(copying, most)), chosen[name].costs
            v = jnp.asarray([interpolate(verify, width) for width in nodes], jnp.float32)
            told = (*told_by(copier), *told_by(ones[name].drafter))
            drafts = np.full((2, nodes[-1]), np.inf)
            drafts[0, : copying + 1] = again
            drafts[:, 0] = 0
            for length in sorted({plan.length or 1 for plan in plans[name]}):
                c = [costs.round(n) - interpolate(verify, 1 + n) for n in range(1, length + 1)]
                drafts[1, 1:] = np.inf
                drafts[1, 1 : length + 1] = c
                table = RoundCosts(v, jnp.asarray(drafts, jnp.float32))
                for match in MATCHES:
                    copies = drafted(STATISTICAL, match)
                    assert copies is not None
                    inner = (Spec(STATISTICAL, copying, match=match), Spec(name, length))
                    speed = budgeted_speedup([copies, found], table, nodes, rows, told)
                    choices.append((speed, Spec(FIRST, inner=inner)))
        return max(choices, key=lambda choice: choice[0], default=None)

    chosen: dict[str, _Choice] = {}
    for spec in specs:
        choice = chosen[spec.key] = choose(spec)
        how = "" if choice.budgeted is None else ", with its budget"
        report(f"{choice.spec}: predicted {choice.best:.2f} times plain{how}")
    ranking = {str(choice.spec): choice.best for choice in chosen.values()}
    cascade: dict[str, Any] = {}
    found_cascade = best_cascade() if cascades else None
    if cascades and found_cascade is None:
        report("cascade: none is short enough for its drafters")
    if found_cascade is not None:
        speedup, spec, played = found_cascade
        cascade = {"spec": str(spec), "tau": played.tau, "predicted_speedup": speedup}
        ranking[str(spec)] = ALIKE * speedup
        report(f"{spec}: predicted {speedup:.2f} times plain")
    first: dict[str, Any] = {}
    found_first = best_first() if combinations and models else None
    if FIRST in combinations and found_first is None:
        report(f"{FIRST}: no model here drafts chains")
    if found_first is not None:
        speedup, spec = found_first
        played_first = {"spec": str(spec), "budgeted_speedup": speedup}
        ranking[str(spec)] = speedup
        if FIRST in combinations:
            first = played_first
            report(f"{spec}: predicted {speedup:.2f} times plain, with its budget")
        # A cascade whose turns want one token: so the cascade is never slower than what it copies with.
        if cascades and speedup > ALIKE * cascade.get("predicted_speedup", 0.0):
            cascade = played_first
            report(f"{CASCADE}: {spec}, predicted {speedup:.2f} times plain and so taken for one")
    best = max(ranking, key=lambda spec: ranking[spec])
    combined = {name: one for name, one in ((CASCADE, cascade), (FIRST, first)) if one}
    return {
        **{name: one["spec"] for name, one in combined.items()},
        "lengths": {key: c.spec.length for key, c in chosen.items()},
        "nodes": {key: c.spec.nodes for key, c in chosen.items() if c.spec.nodes is not None},
        "default": best if ranking[best] >= PAYS else "none",
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
                    **({} if c.budgeted is None else {"budgeted_speedup": c.budgeted}),
                }
                for key, c in chosen.items()
            },
            **combined,
        },
    }
