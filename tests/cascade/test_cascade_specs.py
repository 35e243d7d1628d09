"""Cascades: sizes, the language of --drafter, loading, and mistakes."""

import dataclasses

import helpers as h
import numpy as np
import pytest
from cascades import LM, reviewed
from k_matrix import from_matrix
from test_glide import pair

from jax_specdec import SpeculativeDecoder, UserError, load_drafter, load_target
from jax_specdec.core.drafter import ways_of
from jax_specdec.drafters.cascade import Cascade, Horizontal, turns
from jax_specdec.drafters.first import First
from jax_specdec.drafters.glide import GliDeDrafter
from jax_specdec.drafters.lm import LmDrafter
from jax_specdec.drafters.max_gram import MaxGram
from jax_specdec.drafters.none import NoDrafter
from jax_specdec.expansions.cape import Cape
from jax_specdec.expansions.expand import Expand
from jax_specdec.specs.language import split
from jax_specdec.specs.presets import PRESETS
from jax_specdec.specs.sizes import depth_of
from jax_specdec.specs.whole import parse_drafter

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
            "'lm\\+' cannot propose beside others: it drafts no chain",
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
        ("first(max-gram[match=2]:12,glide:4)", "first(max-gram[match=2]:12, glide:4)"),
        ("first(max-gram[match=1], lm[max-gram:3]:2)", "first(max-gram, lm[max-gram:3]:2)"),
        (" first ", "first"),
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
        ("first(max-gram:4, lm:2; cut)", "`first` takes no option, got 'cut'"),
        ("first(max-gram:4, lm:64)", "must be in 1..63, got 64"),
        ("first(max-gram:4, lm:2)+cape:9", "'first' has no distribution to expand"),
        ("max-gram[match=0]:4", "A match is of 1 to 16 tokens, got 0"),
        ("max-gram[match=1.5]:4", "A match is of 1 to 16 tokens, got 1.5"),
        ("lm[match=2]:4", "'lm' takes no `match`: max-gram does"),
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


def test_the_first_that_finds_something(tiny_checkpoints):
    target = load_target(tiny_checkpoints / "target", dtype="float32")
    loaded = load_drafter("first(max-gram[match=2]:5, lm[max-gram:3]:2, lm)", target)
    assert loaded.spec == "first(max-gram[match=2]:5, lm[max-gram:3]:2, lm:4)"
    assert set(loaded.params) == {"lm"} and loaded.drafter.info.depth == 5
    assert loaded.drafter.info.depth == depth_of(parse_drafter(loaded.spec))
    assert [way.info.depth for way in ways_of(loaded.drafter)] == [5, 5, 4]
    text = [g.token_ids for g in SpeculativeDecoder(target).generate(["ab"], max_new_tokens=12)]
    for budget in (True, False):
        decoder = SpeculativeDecoder(target, loaded, budget=budget)
        assert [g.token_ids for g in decoder.generate(["ab"], max_new_tokens=12)] == text
    with pytest.raises(UserError, match=r"Two drafters .* are named 'lm'"):
        First((LM, LmDrafter(h.SMALL, 1)))
    with pytest.raises(UserError, match="drafts no chain"):
        First((MaxGram(2), NoDrafter()))
    with pytest.raises(UserError, match="a drafter to ask"):
        First(())


def test_a_larger_drafter_is_warned_of(tiny_checkpoints):
    target = load_target(tiny_checkpoints / "target", dtype="float32")
    with pytest.warns(UserWarning, match="'lm2' has [0-9,]+ parameters, and 'lm'"):
        load_drafter("lm[lm2:2]", target, drafts={"lm2": tiny_checkpoints / "target"})
