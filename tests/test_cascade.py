"""Cascades: the contract, what each level drafts, and a plain transcription of the algorithm."""

import dataclasses
import functools
import time

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from k_matrix import from_matrix
from test_drafters import best_match, copied
from test_glide import pair

from jax_specdec import DecodeLoop, SpeculativeDecoder, UserError, load_drafter, load_target
from jax_specdec.core.context import make_context
from jax_specdec.core.drafter import Drafter
from jax_specdec.core.prng import shared_noise
from jax_specdec.drafters.bigram import Bigram
from jax_specdec.drafters.cascade import Cascade, Horizontal, turns
from jax_specdec.drafters.early_exit import Stop
from jax_specdec.drafters.glide import GliDeDrafter
from jax_specdec.drafters.lm import LmDrafter
from jax_specdec.drafters.max_gram import MaxGram
from jax_specdec.drafters.prompt_lookup import PromptLookup
from jax_specdec.expansions.cape import Cape
from jax_specdec.expansions.expand import Expand
from jax_specdec.expansions.siblings import Fixed
from jax_specdec.specs.build import parse_drafter
from jax_specdec.specs.language import split
from jax_specdec.specs.presets import PRESETS
from jax_specdec.specs.sizes import depth_of
from jax_specdec.testing import check_drafter

LM, LM2 = LmDrafter(h.TARGET, 1), LmDrafter(h.TARGET, 1, name="lm2")
MIXED = {"temperature": (0.0, 1.0, 0.7, 0.0, 1.0), "top_k": (0, 2, 0, 0, 0)}


@functools.cache
def params():
    """Of a drafter that agrees with the target now and then, and of one that agrees with it."""
    first = h.close_params()
    return {"lm": first, "lm2": h.perturbed(first, 0.2), "bigram": jnp.arange(h.VOCAB)[::-1]}


def reviewed(length=4, budgets=None, **fields):
    return Cascade(LM, (MaxGram(length),), budgets or (length,), **fields)


def three_levels(**fields):
    """K = [[2, 2, 3], [0, 1, 2], [0, 0, 3]]."""
    inner = Cascade(LM2, (MaxGram(3),), (3,), **fields)
    outer = Cascade(LM, (inner, MaxGram(2)), (1, 2), **fields)
    return Horizontal((outer, inner, MaxGram(3)), (2, 2, 3))


# The contract


CASCADES = {
    "vicuna": Horizontal((reviewed(3), MaxGram(3)), (2, 3)),
    "cut": Horizontal((reviewed(3), PromptLookup(4)), (2, 3), cut=True),
    "three levels": three_levels(),
    "lenient": three_levels(lenience=4.0, copies=True),
    "horizontal": Horizontal((LmDrafter(h.TARGET, 2), Bigram(1), MaxGram(2)), (2, 2, 2)),
    "unsure": Horizontal(
        (dataclasses.replace(LM, length=3, stop=Stop("confidence", 0.3)), MaxGram(2)), (3, 2)
    ),
    "generating": Cascade(LM, (LmDrafter(h.TARGET, 2, name="lm2"),), (3,), lenience=2.0),
}


# Not those whose shape another has.
@pytest.mark.parametrize("name", sorted(CASCADES.keys() - {"vicuna", "three levels"}))
def test_contract(name):
    drafter = CASCADES[name]
    assert isinstance(drafter, Drafter)
    given = {k: v for k, v in params().items() if k in str(drafter)}
    check_drafter(drafter, given, h.TARGET, h.target_params())


# What each level drafts


def rounds(loop, params, prompts, sampling, capacity=64):
    """The states before each round, as long as any row runs."""
    tokens, lengths = h.pad(prompts)
    ids = jnp.arange(len(prompts), dtype=jnp.int32)
    state = h.start(loop, params, tokens, lengths, sampling, ids, capacity=capacity)
    while True:
        running = np.asarray(state.stats.finish == 0)
        if not running.any():
            return
        yield state, running
        state = h.run(loop, params, jax.tree.map(jnp.copy, state), 1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def drafted(drafter, alone, params, state, running):
    """A round's draft, and that of a reviewer alone which has just read the text."""
    text, steps = state.text, drafter.info.depth + 1
    gumbel = shared_noise(state.keys, state.sampling, text.length, steps, h.VOCAB)
    budget = jnp.full_like(text.length, steps)
    ctx = make_context(text, state.view, state.sampling, gumbel, active=running, budget=budget)
    draft, _ = drafter.draft(params, state.drafts, ctx)
    fresh = alone.init(text.length.shape[0], text.tokens.shape[1])
    fresh = alone.extend(params, fresh, ctx)
    return draft, alone.draft(params, fresh, ctx)[0]


def assert_drafts_as_alone(level, alone, outer, target, target_params, given, prompts):
    """Round by round, with the states that the whole cascade left behind."""
    sampling = h.sampling_of(len(prompts), max_new_tokens=24, **MIXED)
    loop = DecodeLoop(target, outer)
    tokens = 0
    for state, running in rounds(
        loop, {"target": target_params, "drafters": given}, prompts, sampling
    ):
        got, want = jax.device_get(drafted(level, alone, given, state, jnp.asarray(running)))
        valid = got.valid[:, 1:] & running[:, None]
        assert valid[running, 0].all()
        width = valid.shape[1]
        np.testing.assert_array_equal(
            np.where(valid, got.tokens[:, 1:], 0), np.where(valid, want.tokens[:, 1 : width + 1], 0)
        )
        tokens += valid.sum()
    return tokens


PROMPTS = h.prompts_of((1, 2, 5, 9, 3))


@pytest.mark.parametrize("level", ["outer", "inner"])
def test_a_cascade_drafts_what_its_reviewer_would(level):
    """Greedy and sampled rows of one ragged batch, at both reviewing levels of three."""
    whole = three_levels()
    outer, inner, _ = whole.drafters
    assert isinstance(outer, Cascade) and isinstance(inner, Cascade)
    level = {"outer": outer, "inner": inner}[level]
    alone = dataclasses.replace(level.verifier, length=level.info.depth)
    args = (h.TARGET, h.target_params(), params(), PROMPTS)
    assert assert_drafts_as_alone(level, alone, whole, *args) > 50


@pytest.mark.parametrize("layers", [1, 2])
def test_glide_as_a_reviewer(layers):
    """With one layer drafted keys are kept, with two they are read again."""
    target, target_params, model, weights = pair(layers)
    level = Cascade(GliDeDrafter(model, 1), (MaxGram(2),), (2,))
    alone = GliDeDrafter(model, level.info.depth)
    given = {"glide": weights}
    whole = Horizontal((level, MaxGram(2)), (2, 2))
    args = (target, target_params, given, PROMPTS)
    assert assert_drafts_as_alone(level, alone, whole, *args) > 50
    if layers == 2:
        check_drafter(whole, given, target, target_params)


@pytest.mark.parametrize("stop", [Stop("confidence", 0.2), Stop("entropy", 0.3)], ids=str)
def test_an_unsure_drafter_ends_its_draft(stop):
    """It drafts the same tokens as without, as far as its own law says."""
    alone = dataclasses.replace(LM, length=5)
    wary = dataclasses.replace(alone, stop=stop)
    sampling = h.sampling_of(len(PROMPTS), max_new_tokens=16, **MIXED)
    all_params = {"target": h.target_params(), "drafters": params()}
    ends = []
    for state, running in rounds(DecodeLoop(h.TARGET, wary), all_params, PROMPTS, sampling):
        got, want = jax.device_get(drafted(wary, alone, params(), state, jnp.asarray(running)))
        for row in np.flatnonzero(running):
            count = got.valid[row, 1:].sum()
            assert got.valid[row, 1 : count + 1].all()
            np.testing.assert_array_equal(
                got.tokens[row, 1 : count + 1], want.tokens[row, 1 : count + 1]
            )
            ends.append(count)
            if MIXED["temperature"][row]:
                continue
            text = np.asarray(state.text.tokens[row, : state.text.length[row]])
            place = [*text, *want.tokens[row, 1:]]
            padded = jnp.asarray(np.pad(place, (0, 96 - len(place))))[None].astype(jnp.int32)
            logits = all_logits(h.TARGET, params()["lm"], padded)[len(text) - 1 :][:5]
            p = np.asarray(jax.nn.softmax(logits), np.float64)
            figure = p.max(-1)
            if stop.rule == "entropy":
                figure = 1 - np.sqrt(-0.2 * (p * np.log(p)).sum(-1))
            unsure = np.flatnonzero(figure < stop.threshold)
            assert count == (unsure[0] + 1 if len(unsure) else 5)
    assert {1, 5} <= set(ends) or len(set(ends)) > 1


# A plain transcription of Algorithm 1


@functools.partial(jax.jit, static_argnums=0)
def all_logits(decoder, params, tokens):
    cache = decoder.init_cache(1, tokens.shape[1])
    place = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    return decoder.apply(params, tokens, place, cache).logits[0]


@dataclasses.dataclass(frozen=True)
class Counted(LmDrafter):
    """Counts its verifications of each row."""

    def init(self, batch, capacity):
        return {**super().init(batch, capacity), f"{self.name}#": jnp.zeros((batch,), jnp.int32)}

    def verify(self, params, states, ctx, drafted, count):
        logits, states = super().verify(params, states, ctx, drafted, count)
        done = states[f"{self.name}#"] + ctx.active.astype(jnp.int32)
        return logits, {**states, f"{self.name}#": done}


def counted(drafter):
    """The same with every verifier counting."""
    if isinstance(drafter, Horizontal | Cascade):
        drafter = dataclasses.replace(drafter, drafters=tuple(map(counted, drafter.drafters)))
    if isinstance(drafter, Cascade):
        lm = drafter.verifier
        drafter = dataclasses.replace(drafter, verifier=Counted(lm.decoder, lm.length, lm.name))
    return drafter


class Plain:
    """One row, greedy, no caches; counts the forwards of every model."""

    def __init__(self, weights):
        self.weights, self.forwards = weights, dict.fromkeys(weights, 0)

    def laws(self, name, text):
        """The model's law after each token of the text; one forward."""
        self.forwards[name] += 1
        tokens = np.zeros((1, 96), np.int32)
        tokens[0, : len(text)] = text
        logits = np.asarray(all_logits(h.TARGET, self.weights[name], jnp.asarray(tokens)))
        chance = np.exp(logits - logits.max(-1, keepdims=True))
        return chance[: len(text)] / chance[: len(text)].sum(-1, keepdims=True)

    def propose(self, drafter, text, room):
        """The tokens behind the text, and the proposer's probability of each, None for none."""
        if isinstance(drafter, MaxGram):
            end = best_match(text, 1, None, "latest")
            tokens = [] if end is None else copied(text, end, drafter.length)
            return tokens, [None] * len(tokens)
        if isinstance(drafter, Horizontal):
            return self.horizontal(drafter, text, room)
        draft, q = self.horizontal(drafter.inner, text, room - 1)
        copies = drafter.copies
        if copies is None:
            copies = all(isinstance(d, MaxGram) for d in drafter.drafters)
        return self.review(drafter.verifier.info.name, text, draft, q, drafter.lenience, copies)

    def horizontal(self, drafter, text, room):
        draft, q, budget = [], [], 0
        for part, more in zip(drafter.drafters, drafter.budgets, strict=True):
            budget += more
            while len(draft) < min(budget, room):
                new, chance = self.propose(part, text + draft, room - len(draft))
                draft, q = draft + new, q + chance
                if drafter.cut:
                    draft, q = draft[:budget], q[:budget]
                if not new:
                    break
        return draft, q

    def review(self, name, text, draft, q, lenience, copies):
        laws = self.laws(name, text + draft)[len(text) - 1 :]
        out, chance = [], []
        for law, token, other in zip(laws, draft, q, strict=False):
            bound = 1.0 if other is None else other
            near = lenience > 1 and (copies or other is not None) and law[token] * lenience > bound
            if token != law.argmax() and not near:
                break
            out.append(token)
            chance.append(law[token])
        law = laws[len(out)]
        return [*out, int(law.argmax())], [*chance, law.max()]

    def decode(self, drafter, prompt, new):
        text, end = list(prompt), len(prompt) + new
        while len(text) < end:
            room = end - len(text)
            draft, q = self.propose(drafter, text, room)
            text += self.review("target", text, draft[:room], q, 1.0, False)[0]
            text = text[:end]
        return text[len(prompt) :]


TRANSCRIBED = {
    "vicuna": CASCADES["vicuna"],
    "three levels": CASCADES["three levels"],
    "cut": dataclasses.replace(three_levels(), cut=True),
    "lenient": three_levels(lenience=3.0),
    "lenient to copies": CASCADES["lenient"],
}


@pytest.mark.parametrize("name", TRANSCRIBED)
def test_against_a_transcription(name):
    """The same tokens and as many forwards at every level, one row at a time."""
    drafter = TRANSCRIBED[name]
    given = {k: v for k, v in params().items() if k != "bigram"}
    total = 0
    for seed in range(3):
        prompt = h.prompts_of((9,), seed)[0]
        plain = Plain({"target": h.target_params(), **given})
        want = plain.decode(drafter, prompt, 24)
        loop = DecodeLoop(h.TARGET, counted(drafter))
        got = h.decode(loop, h.all_params(**given), [prompt], h.sampling_of(1))
        assert got.tokens[0] == want
        forwards = {"target": int(got.stats.rounds[0]), "lm": 0, "lm2": 0}
        for key, state in got.state.drafts.items():
            if key.endswith("#"):
                forwards[key[:-1]] += int(state[0])
        assert forwards == plain.forwards
        total += forwards["lm"]
    assert total > 10


# Lenience


def test_the_ratio_form_is_not_exact():
    """Algorithm 1 as printed hands the target the reviewer's law for tokens that lenience let pass.

    The law of the first token, enumerated: q proposes, the reviewer p accepts with chance
    min(1, l p/q) and else draws from the residual, the target does the same with l = 1.
    """

    def step(p, q, lenience):
        accept = np.minimum(1, lenience * p / q)
        left = np.maximum(p - q, 0)
        return q * accept + (1 - (q * accept).sum()) * left / left.sum()

    q, p, target = np.array([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25], [0.2, 0.3, 0.5]])

    def output(lenience, exact):
        effective = step(p, q, lenience)
        said = effective if exact else p  # what the target is told that the token was drawn from
        accept = np.minimum(1, target / said)
        left = np.maximum(target - said, 0)
        return effective * accept + (1 - (effective * accept).sum()) * left / left.sum()

    np.testing.assert_allclose(output(1, False), target, atol=1e-12)
    np.testing.assert_allclose(output(2, False), [0.350, 0.171, 0.479], atol=5e-4)
    np.testing.assert_allclose(output(2, True), target, atol=1e-12)


def test_lenience_changes_drafts_and_not_the_text():
    sampling = h.sampling_of(5, **MIXED)
    want = h.decode(h.plain_loop(), h.all_params(), PROMPTS, sampling)
    accepted = []
    for lenience in (1.0, 20.0):
        drafter = Horizontal((reviewed(3, lenience=lenience), MaxGram(3)), (2, 3))
        loop = DecodeLoop(h.TARGET, drafter)
        got = h.decode(loop, h.all_params(lm=params()["lm"]), PROMPTS, sampling)
        h.assert_identical(got, want)
        accepted.append(got.stats.drafted[:, drafter.info.sources.index("lm[max-gram]") + 1].sum())
    assert accepted[1] > accepted[0]


def test_lenience_is_for_drafters():
    """A token that no distribution is behind is reviewed strictly, unless that is asked for."""
    strict, asked = three_levels(lenience=20.0), three_levels(lenience=20.0, copies=True)
    prompts, sampling = h.prompts_of((9, 7, 5)), h.sampling_of(3)
    given = h.all_params(lm=params()["lm"], lm2=params()["lm2"])
    drafted = [
        h.decode(DecodeLoop(h.TARGET, d), given, prompts, sampling).stats.drafted
        for d in (strict, asked)
    ]
    place = strict.info.sources.index("lm[max-gram]") + 1
    assert drafted[1][:, place].sum() > drafted[0][:, place].sum()


# Origins and expansion


def test_origins():
    drafter = three_levels()
    assert drafter.info.sources == (
        *("lm", "lm[lm2]", "lm[lm2[max-gram]]", "lm[max-gram]"),
        *("lm2", "lm2[max-gram]", "max-gram"),
    )
    given = h.all_params(lm=params()["lm"], lm2=params()["lm2"])
    got = h.decode(DecodeLoop(h.TARGET, drafter), given, PROMPTS, h.sampling_of(5, **MIXED))
    stats = got.stats
    emitted = sum(map(len, got.tokens))
    # Each round ends with a token of the target's, which the length limit may cut off.
    assert 0 <= stats.accepted.sum() + stats.rounds.sum() - emitted <= 5
    assert (stats.accepted <= stats.drafted).all() and (stats.drafted.sum(0)[1:] > 0).all()
    for row, start in enumerate(got.state.prompt_length):
        origin = stats.source[row, start : start + len(got.tokens[row])]
        assert np.bincount(origin, minlength=8)[1:].tolist() == stats.accepted[row, 1:].tolist()


@pytest.mark.parametrize("rule", [Fixed(20), Cape(23)])
def test_expansion(rule):
    """The paper's tree: K = [[1, 3], [0, 1]], 8 children of each node that a distribution is behind."""
    cascade = Horizontal((Cascade(LM, (MaxGram(1),), (1,)), MaxGram(3)), (1, 3))
    assert cascade.info.depth == 5
    drafter = Expand(cascade, rule)
    given = {"lm": params()["lm"]}
    check_drafter(drafter, given, h.TARGET, h.target_params())
    sampling = h.sampling_of(5, **MIXED)
    got = h.decode(DecodeLoop(h.TARGET, drafter), h.all_params(**given), PROMPTS, sampling)
    h.assert_identical(got, h.decode(h.plain_loop(), h.all_params(), PROMPTS, sampling))
    sibling = len(drafter.info.sources)
    assert got.stats.accepted[:, sibling].sum() > 0
    if isinstance(rule, Fixed):
        # Siblings of the reviewer's own token and of each it accepted, none of what it did not see.
        reviewed = got.stats.drafted[:, 1:3].sum(1)
        many = np.asarray(MIXED["top_k"]) == 0  # the others leave 2 tokens
        assert (got.stats.drafted[:, sibling] == reviewed * np.where(many, 7, 1)).all()


# Sizes and mistakes


def test_sizes_against_enumeration():
    rng = np.random.default_rng(0)
    for _ in range(200):
        some = [sorted(set(rng.integers(0, 5, 3).tolist()) | {4}) for _ in range(2)]
        budgets, cut = rng.integers(1, 5, 2).tolist(), bool(rng.integers(2))
        stops = rng.integers(0, 2, 2).astype(bool).tolist()
        ends, latest = set(), [-1, -1]

        def walk(
            turn, count, some=some, budgets=budgets, cut=cut, stops=stops, ends=ends, latest=latest
        ):
            if turn == 2:
                ends.add(count)
                return
            budget = sum(budgets[: turn + 1])
            if count >= budget:
                return walk(turn + 1, count)
            latest[turn] = max(latest[turn], count)
            for size in some[turn]:
                last = size == 0 or (stops[turn] and size < 4)
                walk(turn + last, min(count + size, budget) if cut else count + size)

        walk(0, 0)
        assert turns(some, budgets, stops, cut=cut) == (tuple(latest), tuple(sorted(ends)))


def test_depths():
    """K = [[2, 10], [0, 10]]: the paper's drafts have 12 to 21 tokens."""
    vicuna = Horizontal((reviewed(10), MaxGram(10)), (2, 10))
    assert (vicuna.drafters[0].info.depth, vicuna.info.depth) == (11, 21)
    assert dataclasses.replace(vicuna, cut=True).info.depth == 12


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: reviewed(budgets=(0,)), "A budget must be at least 1, got 0"),
        (lambda: Horizontal((MaxGram(2),), (-3,)), "A budget must be at least 1, got -3"),
        (lambda: Horizontal((MaxGram(2),), ()), "one budget for each"),
        (lambda: Horizontal((), ()), "at least one, got 0 for 0"),
        (lambda: reviewed(lenience=0.5), "at least 1, got 0.5"),
        (lambda: reviewed(lenience=float("inf")), "finite"),
        (lambda: reviewed(63), "may draft 64 tokens at once"),
        (
            lambda: Horizontal((LM, LmDrafter(h.SMALL, 1)), (1, 1)),
            "Two drafters of this cascade are named 'lm'",
        ),
        (
            lambda: Horizontal((Expand(LmDrafter(h.TARGET, 2), Cape(6)),), (2,)),
            "'lm\\+' cannot propose in a cascade: it drafts no chain",
        ),
        (lambda: Expand(Horizontal((MaxGram(2),), (2,)), Cape(6)), "it has no distribution"),
        (lambda: glide_cascade(5, 6), "verifies tokens up to 6 places.*at most 5"),
        (lambda: glide_cascade(4, 5, 2), "verifies tokens up to 6 places.*at most 5"),
    ],
)
def test_mistakes(make, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        make()
    assert "\n" not in str(error.value)


def glide_cascade(length, depth, budget=1):
    model = pair(1)[2]
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, trained_delay=5))
    cascade = Cascade(GliDeDrafter(model, 1), (MaxGram(length),), (length,))
    assert cascade.info.depth == depth
    return Horizontal((cascade,), (budget,))


def test_a_delay_that_was_trained_for():
    assert glide_cascade(4, 5).info.depth == 5
    inner = glide_cascade(4, 5).drafters
    assert Horizontal((*inner, MaxGram(8)), (1, 8)).info.depth == 13
    assert Horizontal(inner, (5,), cut=True).info.depth == 5


# The language of --drafter


@pytest.mark.parametrize(
    ("text", "again"),
    [
        ("cascade(lm[max-gram:10]:2,max-gram:10)", "cascade(lm[max-gram:10]:2, max-gram:10)"),
        (" cascade ( lm : 2 , max-gram ; cut ) ", "cascade(lm:2, max-gram; cut)"),
        ("lm[max-gram:10; lenience=3]", "lm[max-gram:10; lenience=3]"),
        ("glide[max-gram:4]:3+cape:20", "glide[max-gram:4]:3+cape:20"),
        (
            "lm[lm2[max-gram:3]:1, max-gram:3; copies; lenience=2.5]:4",
            "lm[lm2[max-gram:3]:1, max-gram:3; lenience=2.5; copies]:4",
        ),
        ("cascade(lm[lm2[lm3[max-gram]]:3])", "cascade(lm[lm2[lm3[max-gram]]:3])"),
        ("csd-vicuna", PRESETS["csd-vicuna"]),
        ("csd-vicuna+fixed:40", PRESETS["csd-vicuna"] + "+fixed:40"),
    ],
)
def test_specifications(text, again):
    spec = parse_drafter(text)
    assert str(spec) == again and parse_drafter(str(spec)) == spec


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    spec = parse_drafter(name)
    assert str(spec) == PRESETS[name] and depth_of(spec) < 64


def test_a_list_of_specifications_is_split_outside_of_brackets():
    some = ["lm:4", "cascade(lm[max-gram:10]:2, max-gram:10)", "lm[max-gram:3, bigram:2]"]
    assert split(", ".join(some)) == some


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("cascade(lm[max-gran:10]:2)", "Unknown drafter 'max-gran': did you mean max-gram"),
        ("cascde(lm:2)", "Unknown combination 'cascde': did you mean cascade"),
        ("lm[max-gram:10; lenince=3]", "Unknown option 'lenince': did you mean lenience"),
        ("lm[max-gram:10; lenience]", "A lenience is a number"),
        ("lm[max-gram:10; cut=3]", "'cut' takes no value"),
        ("lm[max-gram:10; lenience=0.5]", "at least 1, got 0.5"),
        ("cascade(lm[max-gram:10]:2; lenience=3)", "The target takes no lenience"),
        ("max-gram[lm:2]", "'max-gram' cannot verify: lm and glide can"),
        ("cascade(lm[max-gram:10]:0)", "A budget must be at least 1, got 0"),
        ("cascade(lm[max-gram:10]:-2)", "A budget must be at least 1, got -2"),
        ("cascade(lm:2, none)", "'none' drafts nothing"),
        ("cascade(lm:2, csd-vicuna)", "The preset 'csd-vicuna' .*stands alone"),
        ("csd-vicuna:4", "The preset 'csd-vicuna' takes no length"),
        ("csd-vicuna-tree+cape:30", "'csd-vicuna-tree' is expanded already"),
        ("csd-vicuna-teee", "did you mean csd-vicuna-tree"),
        ("cascade(lm[max-gram:10]:2", "ends too early"),
        ("cascade(lm[max-gram:10]:2))", "unexpected '\\)' at character 27"),
        ("lm[confidence=2]:4", "confidence threshold between 0 and 1, got 2"),
        ("max-gram[entropy=0.2]", "no probabilities to stop"),
        ("lm[entrpy=0.2]", "did you mean entropy"),
        ("cascade()", "unexpected '\\)' at character 9"),
        ("cascade(lm[max-gram:40]:40)", "may draft 80 tokens at once"),
        ("cascade(max-gram:4)+cape:9", "has no distribution to expand"),
        ("lm[max-gram:2]+cape:4", "takes 5 to 25 nodes.*got 4"),
    ],
)
def test_specifications_that_are_wrong(text, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        parse_drafter(text)
    assert "\n" not in str(error.value)


def test_matrices():
    names = ("lm", "max-gram")
    assert str(from_matrix([[2, 10], [0, 10]], names)) == PRESETS["csd-vicuna"]
    flan = from_matrix([[8, 5, 10], [0, 1, 10], [0, 0, 10]], ("lm", "lm2", "max-gram"), lenience=3)
    assert str(flan) == PRESETS["csd-flan-3level"]
    assert str(from_matrix([[0, 4], [0, 4]], names)) == "cascade(max-gram:4)"
    lenient = from_matrix([[2, 0], [0, 10]], names, lenience=2, copies=True, cut=True)
    assert str(lenient) == "cascade(lm[max-gram:10; lenience=2; copies; cut]:2; cut)"
    for wrong in ([[1, 2]], [[1, 2], [1, 2]], [[1, 2], [0, -1]], [[1, 2], [0, 0]]):
        with pytest.raises(UserError, match="K matrix"):
            from_matrix(wrong, names)


def test_loading(tiny_checkpoints):
    """Every name is loaded once; a list of one stands for itself."""
    target = load_target(tiny_checkpoints / "target", dtype="float32")
    folders = {"lm2": tiny_checkpoints / "lm"}
    spec = "cascade(lm[lm2[max-gram:3]:1, max-gram:2]:2, lm2[max-gram:3]:2, max-gram:3)+fixed:30"
    loaded = load_drafter(spec, target, drafts=folders)
    assert loaded.spec == spec and set(loaded.params) == {"lm", "lm2"}
    assert loaded.drafter.info.depth == depth_of(loaded_spec := parse_drafter(spec))
    assert loaded_spec.inner[0].name == "lm"
    alone = load_drafter("lm[max-gram]", target)
    assert isinstance(alone.drafter, Cascade) and alone.spec == "lm[max-gram:6]:1"
    several = load_drafter("lm[max-gram:3]:4+cape", target)
    assert several.drafter.drafter.budgets == (4,) and several.spec == "lm[max-gram:3]:4+cape:29"
    text = [g.token_ids for g in SpeculativeDecoder(target).generate(["ab"], max_new_tokens=12)]
    decoder = SpeculativeDecoder(target, loaded)
    assert [g.token_ids for g in decoder.generate(["ab"], max_new_tokens=12)] == text


def test_a_larger_drafter_is_warned_of(tiny_checkpoints):
    target = load_target(tiny_checkpoints / "target", dtype="float32")
    with pytest.warns(UserWarning, match="'lm2' has [0-9,]+ parameters, and 'lm'"):
        load_drafter("lm[lm2:2]", target, drafts={"lm2": tiny_checkpoints / "target"})


def test_compilation_is_quick():
    """A loop with a cascade of three levels, in seconds of this process."""
    given = h.all_params(lm=params()["lm"], lm2=params()["lm2"])
    tokens, lengths = h.pad(PROMPTS)
    loop = DecodeLoop(h.TARGET, dataclasses.replace(three_levels(), cut=True))
    args = (given, tokens, lengths, h.sampling_of(5), jnp.arange(5, dtype=jnp.int32))
    state = h.start(loop, *args, capacity=48)
    before = time.process_time()
    jax.jit(loop.run).lower(given, state, 4).compile()
    assert time.process_time() - before < 60
