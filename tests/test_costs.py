"""The cost model and what it predicts of expansions."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import compiled

import jax_specdec as sd
from jax_specdec.checkpoints.glide import save_glide, target_fingerprint
from jax_specdec.core.budget import RoundCosts
from jax_specdec.expansions.cape import Cape
from jax_specdec.expansions.select import select
from jax_specdec.expansions.siblings import Fixed, PathProbability
from jax_specdec.models.glide import GliDe
from jax_specdec.models.glide_config import GliDeConfig
from jax_specdec.specs.sizes import depth_of
from jax_specdec.specs.whole import parse_drafter
from jax_specdec.tuning import measure, replay
from jax_specdec.tuning import tune as tuning
from jax_specdec.tuning.budgeted import budgeted_speedup
from jax_specdec.tuning.cascades import candidates, max_gram, play
from jax_specdec.tuning.costs import Costs
from jax_specdec.tuning.measure import acceptance_by_position
from jax_specdec.tuning.theory import siblings_tau
from jax_specdec.tuning.tune import tune

PROMPTS = ["Once upon a time, there was", "Question: Tom has 3 apples and buys", "the cat ran"]
TOKENS = 40


@pytest.fixture(scope="module")
def target(tiny_checkpoints):
    return sd.load_target(tiny_checkpoints / "target", dtype="float32")


def decode(target, spec):
    decoder = sd.SpeculativeDecoder(target, sd.load_drafter(spec, target))
    settings = {"max_new_tokens": TOKENS, "ignore_eos": True, "batch_size": 3}
    return decoder, list(decoder.generate(PROMPTS, **settings))


@pytest.fixture(scope="module")
def found(target):
    decoder, answers = decode(target, "lm:5")
    texts = [decoder.encode(a.prompt) + a.token_ids for a in answers]
    starts = [len(decoder.encode(a.prompt)) for a in answers]
    return replay.record(target, decoder.loaded, texts, starts), answers


def test_a_replay_is_the_decoding(found):
    """Of the drafter that was recorded the replay has every round, one by one."""
    record, answers = found
    assert len(record.matched) == sum(a.stats.num_spec_steps for a in answers)
    want = acceptance_by_position(answers)
    np.testing.assert_allclose(replay.acceptance(record, 5), want, atol=1e-12)
    assert replay.acceptance(record, 2) == replay.acceptance(record, 5)[:2]
    rows = np.arange(len(record.matched))
    below = record.matched < 5
    assert (record.rank[rows[below], record.matched[below]] != 0).all()


@pytest.mark.parametrize(
    "text",
    [
        "cascade(lm:3, max-gram:4; cut)",
        "cascade(lm[max-gram:4]:5, max-gram:2; cut)",
    ],
)
def test_a_cascade_that_is_played_is_the_decoding(target, text):
    """Round by round: the host knows what each drafter would do, Max-Gram's search included."""
    decoder, plain = decode(target, "none")
    texts = [decoder.encode(a.prompt) + a.token_ids for a in plain]
    starts = [len(decoder.encode(a.prompt)) for a in plain]
    chains = replay.record(target, sd.load_drafter("lm:7", target), texts, starts, everywhere=True)
    played = play(parse_drafter(text), texts, {"lm": chains})
    _, answers = decode(target, text)
    assert [a.token_ids for a in answers] == [a.token_ids for a in plain]
    steps = sum(a.stats.num_spec_steps for a in answers)
    assert played.tau == sum(len(a.token_ids) for a in answers) / steps
    assert played.calls[0] >= 1 and all(0 <= n <= 1 for n in played.calls[1:])
    tokens, rounds = (
        sum(max(counts[i : i + 2]) for i in range(0, len(counts), 2))
        for counts in (
            [len(a.token_ids) for a in answers],
            [a.stats.num_spec_steps for a in answers],
        )
    )
    together = play(parse_drafter(text), texts, {"lm": chains}, batch=2)
    assert together.calls[0] >= played.calls[0] and together.calls[1:] == played.calls[1:]
    assert together.tau == tokens / rounds < played.tau


def test_the_replay_of_a_drafter_without_a_distribution(target, found):
    """From everywhere it has what the host would copy, and the rounds of fixed lengths are among them."""
    _, answers = found
    texts = [target.tokenizer(a.prompt)["input_ids"] + a.token_ids for a in answers]
    starts = [len(t) - len(a.token_ids) for t, a in zip(texts, answers, strict=True)]
    drafter = sd.load_drafter("max-gram:3", target)
    record = replay.record(target, drafter, texts, starts, everywhere=True)
    assert len(record.row) == sum(len(a.token_ids) for a in answers)
    for row, at, chain, matched, count in zip(
        record.row, record.length, record.tokens, record.matched, record.proposed, strict=True
    ):
        copied = max_gram(texts[row][:at], 3)
        assert chain[:count].tolist() == copied
        known = [a == b for a, b in zip(copied, texts[row][at:], strict=False)]
        assert matched == ([*known, False]).index(False)
    rounds = replay.rounds_of(record, 2)
    want = []
    for row, text in enumerate(texts):
        at = starts[row]
        while at < len(text):
            (place,) = np.flatnonzero((record.row == row) & (record.length == at))
            want.append((row, at))
            at += min(int(record.matched[place]), 2) + 1
    assert list(zip(rounds.row.tolist(), rounds.length.tolist(), strict=True)) == want


@pytest.mark.parametrize(
    ("right", "verify", "draft", "least", "most"),
    [
        (7, 0.0, 0.0, 6.5, 8.0),
        (7, 1.0, 0.1, 2.0, 3.6),
        (0, 1.0, 0.3, 0.9, 1.0),
        (0, 0.5, 0.01, 0.9, 1.0),
    ],
)
def test_speeds_with_a_budget(right, verify, draft, least, most):
    """What is right is drafted whole, what is wrong is given up; a fixed length would lose by it."""
    rows, tokens, depth = 2, 300, 7
    row, length = np.divmod(np.arange(rows * tokens), tokens)
    nothing = np.zeros((len(row), depth))
    count = np.full(len(row), depth)
    matched = np.minimum(right, tokens - length)
    found = replay.Record(row, 5 + length, nothing, matched, nothing, nothing, count, nothing)
    costs = RoundCosts(
        jnp.asarray([1.0, 1 + verify / 2, 1 + verify], jnp.float32),
        jnp.asarray([draft * np.arange(depth + 1)], jnp.float32),
    )
    assert least < budgeted_speedup([found], costs, (1, 4, 8)) <= most


@pytest.mark.parametrize("known", (2, 1))
def test_speeds_of_batches(known):
    """Of two rows whose drafts are all right both are fast; where one row's are wrong, the batch waits for it."""
    tokens, depth = 200, 7
    row, place = np.divmod(np.arange(2 * tokens), tokens)
    nothing = np.zeros((len(row), depth))
    matched = np.where(row < known, np.minimum(depth, tokens - place), 0)
    found = replay.Record(
        row, 5 + place, nothing, matched, nothing, nothing, matched * 0 + depth, nothing
    )
    costs = RoundCosts(
        jnp.asarray([1.0, 1.5, 2.0], jnp.float32),
        jnp.asarray([0.01 * np.arange(depth + 1)], jnp.float32),
    )
    alone, both = (budgeted_speedup([found], costs, (1, 4, 8), batch) for batch in (1, 2))
    assert 1.5 < alone < 4
    assert 3 < both < 4 if known == 2 else 0.95 < both <= 1


def test_speeds_of_alternatives():
    """Two drafters that are right in turns: together they are faster than the better one alone."""
    tokens, depth = 400, 7
    place = np.arange(tokens)
    nothing, copied = np.zeros((tokens, depth)), place // 100 % 2 == 0

    def of(right, proposed):
        right = np.where(right, np.minimum(depth, 99 - place % 100), 0)
        chance = np.repeat(np.where(proposed > 0, 1.0, 0.0)[:, None], depth, axis=1)
        some = (nothing, right, nothing, nothing, proposed, chance)
        return replay.Record(0 * place, 5 + place, *some)

    copy = of(copied, np.where(copied, depth, 0))
    model = of(~copied, np.full(tokens, depth))
    verify = jnp.asarray([1.0, 1.2, 1.4], jnp.float32)
    ways = [c * np.arange(depth + 1) for c in (0.002, 0.05)]

    def speed(*some):
        table = jnp.asarray([ways[i] for i in some], jnp.float32)
        found = [(copy, model)[i] for i in some]
        told = tuple(("before", None)[i] for i in some)
        return budgeted_speedup(found, RoundCosts(verify, table), (1, 4, 8), told=told)

    assert speed(0, 1) > 1.4 * max(speed(0), speed(1))


@pytest.mark.parametrize("told", ("before", "after"))
def test_speeds_of_drafters_that_know_when_they_are_right(told):
    """Half of the drafts are right, which no record of the past tells; what a drafter says counts as far as it holds."""
    tokens, depth = 400, 7
    place, rng = np.arange(tokens), np.random.default_rng(0)
    right, nothing = rng.uniform(size=tokens) < 0.5, np.zeros((tokens, depth))
    matched = np.where(right, np.minimum(2, tokens - place), 0)
    costs = RoundCosts(
        jnp.asarray([1.0, 1.3, 1.6, 2.0], jnp.float32),
        jnp.asarray([0.05 * np.arange(depth + 1)], jnp.float32),
    )

    def speed(chance, told):
        there = np.full(tokens, depth)
        record = replay.Record(
            0 * place, 5 + place, nothing, matched, nothing, nothing, there, chance
        )
        return budgeted_speedup([record], costs, (1, 2, 4, 8), told=(told,))

    true = np.where(right[:, None] & (np.arange(depth) < 2)[None], 0.9, 0.1).astype(np.float32)
    known, unknown = speed(true, told), speed(true, None)
    assert known > 1.1 * unknown
    # Nor does it help to say more than is so.
    assert 0.95 < speed(np.full_like(true, 0.99), told) < 1.03 * unknown


def test_candidates():
    some = list(candidates(["lm"], 6))
    least = list(candidates(["lm"], 6, longest={"lm": 3}))
    assert least and len(least) < len(some)
    for spec in least:  # with itself, it verifies no more than three tokens
        inner = spec.inner[0].inner
        assert 1 + sum(part.length for part in inner) <= 3 or not inner
    assert len(set(some)) == len(some) > 20
    assert all(depth_of(spec) <= 6 and parse_drafter(str(spec)) == spec for spec in some)


@pytest.mark.parametrize("rule", [Cape(20), Fixed(12), PathProbability(9)], ids=str)
def test_replayed_expansions(found, rule):
    """The prediction is of the siblings that the rule takes, and is tau of a comb."""
    record, _ = found
    got = replay.acceptance(record, 4, rule)
    agreed = np.minimum(record.matched, 4)
    chosen, some = (
        np.asarray(x) for x in select(rule.rank(jnp.asarray(record.probs[:, :4])), rule.nodes - 5)
    )
    tau = 0
    reached, kept, covered = np.zeros(4), np.zeros(4), np.zeros(4)
    for r, n in enumerate(agreed):
        taken = {divmod(int(c), 7) for c, good in zip(chosen[r], some[r], strict=True) if good}
        sibling = n < 4 and (n, record.rank[r, n] - 1) in taken
        tau += 1 + n + sibling
        reached[: n + 1] += 1
        kept[:n] += 1
        covered[: n + sibling] += 1
    assert abs(1 + sum(got) - tau / len(agreed)) < 1e-9
    assert sum(got) > sum(replay.acceptance(record, 4)), "no sibling helps"
    assert abs(siblings_tau(kept / reached, covered / reached) - (1 + sum(got))) < 1e-9


def test_predicted_tau_is_near_the_decoded_one(target, found):
    """Rounds begin elsewhere, so that they differ; by how much says how far to trust a choice."""
    _, answers = decode(target, "lm:4+path:12")
    want = 1 + sum(acceptance_by_position(answers))
    got = 1 + sum(replay.acceptance(found[0], 4, PathProbability(12)))
    assert abs(got - want) < 0.15 * want


def test_the_best_expansion(found):
    """Free verification takes the widest draft, expensive verification none that is wide."""
    record, _ = found
    widths = (1, 2, 4, 8, 16, 32)
    flat = Costs(dict.fromkeys(widths, 1.0), {1: 0.0, 5: 0.0})
    _, length, nodes = flat.best_expansion(record, PathProbability)
    assert length == 5 and nodes == 32
    steep = Costs({t: float(t) for t in widths}, {1: 0.0, 5: 0.0})
    assert steep.best_expansion(record, PathProbability)[2] == 4
    accepted = replay.acceptance(record, 5, PathProbability(32))
    assert flat.best_expansion(record, PathProbability)[0] == flat.speedup(accepted, 5, 32)
    assert steep.round(3, 12) == 12.0 and steep.round(3) == 4.0


def costing(monkeypatch, draft):
    """Known costs: of a verification by its nodes, and of a draft."""
    monkeypatch.setattr(tuning, "verify_arm", lambda target, nodes, ids: lambda: 1 + nodes / 50)
    monkeypatch.setattr(tuning, "draft_arm", lambda target, drafter, ids: lambda: draft)


def tuned_quickly(target, *names):
    settings = {"longest": 4, "max_new_tokens": 8, "repeats": 1}
    return tune(target, lambda spec: sd.load_drafter(spec, target), names, PROMPTS, **settings)


def test_tune_chooses_lengths_and_budgets(target, monkeypatch):
    costing(monkeypatch, draft=0.1)
    out = tune(
        target,
        lambda spec: sd.load_drafter(spec, target),
        ["lm+path"],
        PROMPTS,
        longest=2,
        max_new_tokens=8,
        repeats=1,
    )
    json.dumps(out)
    length, nodes = out["lengths"]["lm+path"], out["nodes"]["lm+path"]
    assert out["default"] == f"lm:{length}+path:{nodes}"
    assert PathProbability(nodes).fits(length)
    found = out["measured"]["drafters"]["lm+path"]
    tau = 1 + sum(found["accepted_per_pos"])
    assert abs(found["predicted_speedup"] - tau * 1.02 / (1.1 + nodes / 50)) < 1e-9


def test_tune_chooses_a_cascade(target, tmp_path, monkeypatch):
    """The best of those that it played; it is what the name stands for beside this checkpoint."""
    costing(monkeypatch, draft=0.01)
    monkeypatch.setattr(tuning, "budgeted_speedup", lambda *args: 0.1)
    out = tuned_quickly(target, "lm", "cascade")
    spec = parse_drafter(out["cascade"])
    assert spec in list(candidates(["lm"], 4))
    (tmp_path / "draft_lengths.json").write_text(json.dumps(out))
    drafts = {"lm": target.path.parent / "lm"}
    assert sd.load_drafter("cascade", target, tmp_path, drafts=drafts).spec == str(spec)
    monkeypatch.setattr(tuning, "budgeted_speedup", lambda *args: 9.0)
    fast = tuned_quickly(target, "lm", "cascade")
    assert parse_drafter(fast["cascade"]).name == "first" and "first" not in fast
    (tmp_path / "draft_lengths.json").write_text(json.dumps(fast))
    assert sd.load_drafter("cascade", target, tmp_path, drafts=drafts).spec == fast["cascade"]
    with pytest.raises(sd.UserError, match="which cape cannot expand: it has no distribution"):
        sd.load_drafter("cascade+cape", target, tmp_path, drafts=drafts)
    with pytest.raises(sd.UserError, match="No cascade was chosen"):
        sd.load_drafter("cascade", target, tmp_path / "elsewhere")
    with pytest.raises(sd.UserError, match="needs a drafter that can verify"):
        tune(target, lambda s: sd.load_drafter(s, target), ["max-gram", "cascade"], PROMPTS)


@pytest.mark.parametrize(("gain", "pays"), [(1.005, False), (1.02, True)])
def test_tune_wants_a_gain(target, monkeypatch, gain, pays):
    """What is predicted to gain less than one percent is no default, and has no length."""
    costing(monkeypatch, draft=0.01)
    monkeypatch.setattr(tuning, "budgeted_speedup", lambda *args: gain)
    out = tuned_quickly(target, "lm")
    assert (out["lengths"]["lm"] > 0) == pays and (out["default"] != "none") == pays


def test_tune_chooses_a_copy_before_a_model(target, tmp_path, monkeypatch):
    costing(monkeypatch, draft=0.01)
    out = tuned_quickly(target, "lm", "first")
    spec = parse_drafter(out["first"])
    copy, model = spec.inner
    assert (copy.name, copy.length, model.name) == ("max-gram", 4, "lm") and copy.match in (1, 2, 3)
    assert out["measured"]["first"]["budgeted_speedup"] > 0.9
    (tmp_path / "draft_lengths.json").write_text(json.dumps(out))
    drafts = {"lm": target.path.parent / "lm"}
    assert sd.load_drafter("first", target, tmp_path, drafts=drafts).spec == str(spec)
    with pytest.raises(sd.UserError, match="No combination `first` was chosen"):
        sd.load_drafter("first", target, tmp_path / "elsewhere")
    with pytest.raises(sd.UserError, match="behind a copy is a model"):
        tune(target, lambda s: sd.load_drafter(s, target), ["max-gram", "first"], PROMPTS)


def test_tune_stops_at_the_trained_delay_and_decodes_with_trees(target, tmp_path, monkeypatch):
    """Of a drafter that was trained for one token, although up to twelve are asked for."""
    names = ("hidden_size", "mlp_size", "num_heads", "num_kv_heads", "head_dim")
    fields = {name: getattr(target.config, name) for name in names}
    model = GliDe(GliDeConfig(**fields, trained_delay=1), target.config)
    own = model.init(jax.random.key(0))
    save_glide(tmp_path / "glide", model, own, target_fingerprint(target.path))
    drafted = []

    def arm(target, drafter, ids):
        drafted.append(drafter.spec)
        return lambda: 0.1

    monkeypatch.setattr(tuning, "verify_arm", lambda target, nodes, ids: lambda: 1 + nodes / 50)
    monkeypatch.setattr(tuning, "draft_arm", arm)
    out = tune(
        target,
        lambda spec: sd.load_drafter(spec, target, tmp_path),
        ["glide", "glide+beam"],
        PROMPTS,
        max_new_tokens=2,
        repeats=1,
    )
    assert drafted == ["glide:1", "glide:1+beam:3", "glide:1+beam:5", "glide:1+beam:9"]
    assert out["lengths"]["glide"] <= 1
    chosen = f"glide:{out['lengths']['glide+beam']}+beam:{out['nodes']['glide+beam']}"
    assert chosen in drafted
    found = out["measured"]["drafters"]["glide+beam"]
    tau, nodes = 1 + sum(found["accepted_per_pos"]), out["nodes"]["glide+beam"]
    assert abs(found["predicted_speedup"] - tau * 1.02 / (1.1 + nodes / 50)) < 1e-9


def test_the_reading_before_a_draft_stays_in_the_loop():
    """It depends on nothing that changes but an offset that is always 0, which the compiler must not see."""

    def run(x, weights):
        def step(_, x):
            return measure._after_reading(x, weights, jnp.minimum(x[0], 0))

        return jax.lax.fori_loop(0, 3, step, x)

    x, weights = jnp.zeros((2,), jnp.int32), {"w": jnp.ones((64, 32))}
    body = compiled(jax.jit(run).lower(x, weights)).as_text()
    assert "dynamic-slice(" in body
    assert run(x, weights).tolist() == [0, 0]
