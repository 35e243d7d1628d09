"""A decoder with a budget: texts, what was decided, conversations, and what it refuses."""

import jax.numpy as jnp
import numpy as np
import pytest

import jax_specdec as sd
from jax_specdec.generation import make_requests
from jax_specdec.tuning import forced_rounds
from jax_specdec.tuning.round_costs import CostTables

pytestmark = pytest.mark.usefixtures("budgets")

PROMPTS = ["Once upon a time, there was", "the cat ran", "One day, the girl"]
OPTIONS = {"max_new_tokens": 40, "temperature": [0.0, 0.8, 0.0], "ignore_eos": True}
# Rounds that cost nothing more, that pay now and then, and that never do.
TABLES = ((0.0, 0.0), (0.2, 0.05), (3.0, 0.3))


@pytest.fixture(scope="module")
def target(tiny_checkpoints):
    return sd.load_target(tiny_checkpoints / "target", dtype="float32")


def costs_of(loop, verify, draft):
    v = 1 + verify * np.log2(loop.widths)
    return sd.RoundCosts(
        jnp.asarray(v, jnp.float32), jnp.asarray([draft * np.arange(loop.window)], jnp.float32)
    )


@pytest.fixture(scope="module")
def decoder(target):
    """One whose costs tests may change: they are no part of its programs."""
    decoder = sd.SpeculativeDecoder(target, sd.load_drafter("lm:3", target))
    assert decoder.loop.widths == (1, 2, 3, 4)
    return decoder


@pytest.fixture
def with_costs(decoder, target, monkeypatch):
    def given(verify, draft):
        tables = CostTables(
            target, decoder.loop, decoder.loaded, costs_of(decoder.loop, verify, draft)
        )
        monkeypatch.setattr(decoder.programs, "_costs", tables)
        return decoder

    return given


def test_what_was_decided(decoder, with_costs):
    seen, texts = [], []
    for table in TABLES:
        got = list(with_costs(*table).generate(PROMPTS, batch_size=3, **OPTIONS))
        texts.append([a.token_ids for a in got])
        for stats in (a.stats for a in got):
            assert sum(stats.steps_per_width.values()) == stats.num_spec_steps
            assert sum(stats.steps_per_depth) == stats.num_spec_steps
            assert len(stats.steps_per_depth) == 4
        seen.append(sum(a.stats.steps_per_depth[0] for a in got))
    assert texts[0] == texts[1] == texts[2]
    assert seen[0] == 0 and seen[2] > 0 and seen[1] < seen[2]
    assert decoder.compilations == 2, "costs are no part of a program"
    (html,) = [a._repr_html_() for a in got[:1]]
    assert "passes without a draft" in html


def test_real_rounds_are_measured_as_they_are_forced(decoder, monkeypatch):
    """Through the programs that decode: each round is of its kind, and emits one token a row."""
    monkeypatch.setattr(forced_rounds, "USUAL", 4)
    monkeypatch.setattr(forced_rounds, "MOST", 4)
    arrays, capacity = decoder.encoder.arrays(
        decoder.prepare(make_requests(PROMPTS, None, OPTIONS), 3, 1)
    )
    start, run = decoder.programs.get(arrays, capacity)
    kinds = set()

    def begin(arrays, costs):
        return start(decoder.params, *arrays, costs=costs)

    def watched(state, rounds):
        _, depth, width = np.asarray(state.budget.forced)
        before = [
            np.asarray(x) for x in (state.text.length, state.stats.depths, state.stats.widths)
        ]
        state, count = run(decoder.params, state, rounds), int(rounds)
        after = (state.text.length, state.stats.depths, state.stats.widths)
        length, depths, widths = (np.asarray(x) - y for x, y in zip(after, before, strict=True))
        assert (
            (length == count).all()
            and (depths[:, depth] == count).all()
            and (widths[:, width] == count).all()
        )
        kinds.add((int(depth), int(width)))
        return state

    compiled = decoder.compilations
    found, _ = forced_rounds.measure(decoder.loop, arrays, begin, watched)
    decoder.loop.check_costs(found)
    assert (
        kinds == {*((0, i) for i in range(4)), (1, 0), (2, 0), (3, 0)}
        and decoder.compilations == compiled
    )
    verify, draft = np.asarray(found.verify), np.asarray(found.draft[0])
    assert 0 < verify[0] <= verify[1] <= verify[-1] < 1 and 0 < draft[1] <= draft[3] < 1


def test_without_a_budget(target, decoder, with_costs):
    off = sd.SpeculativeDecoder(target, decoder.loaded, budget=False)
    want = list(off.generate(PROMPTS, batch_size=3, **OPTIONS))
    assert [a.stats.steps_per_width for a in want] == [{4: a.stats.num_spec_steps} for a in want]
    got = list(with_costs(*TABLES[1]).generate(PROMPTS, batch_size=3, **OPTIONS))
    assert [a.token_ids for a in got] == [a.token_ids for a in want]


def test_each_turn_begins_without_memory(with_costs):
    """So a turn that is taken back and said again takes the same rounds."""
    decoder = with_costs(0.2, 0.05)
    template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    options = {"max_new_tokens": 24, "ignore_eos": True, "template": template}
    chat = decoder.chat(**options)
    first, second = chat("the cat"), chat("One day")
    chat.undo()
    again = chat("One day")
    assert again.token_ids == second.token_ids
    for name in ("steps_per_width", "steps_per_depth", "num_spec_steps"):
        assert getattr(again.stats, name) == getattr(second.stats, name)
    assert second.stats.num_cached_tokens > 0 == first.stats.num_cached_tokens


def test_what_is_refused(target, decoder):
    drafter, good = decoder.loaded, costs_of(decoder.loop, 0.2, 0.05)
    with pytest.raises(sd.UserError, match="Costs are for a drafter whose budget is on"):
        sd.SpeculativeDecoder(target, drafter, budget=False, costs=good)
    with pytest.raises(sd.UserError, match="Costs are for a drafter"):
        sd.SpeculativeDecoder(target, costs=good)
    other = sd.load_drafter("lm:6", target)
    with pytest.raises(sd.UserError, match=r"shapes \(5,\) .* got \(4,\)"):
        sd.SpeculativeDecoder(target, other, costs=good)
    for wrong in ("yes", 1, None):
        with pytest.raises(sd.UserError, match="budget is True or False"):
            sd.SpeculativeDecoder(target, drafter, budget=wrong)  # type: ignore[arg-type]
