"""Kinds of drafters: a third party's in one file, and what is said of the built-in ones."""

import dataclasses
import importlib.metadata
import json

import jax
import jax.numpy as jnp
import pytest

import jax_specdec as sd
from jax_specdec.cli import main
from jax_specdec.core.draft import MAX_NODES, chain
from jax_specdec.core.drafter import Info, StatelessDrafter, Verifier
from jax_specdec.drafters import registry
from jax_specdec.errors import UserError
from jax_specdec.expansions.grown import Grower
from jax_specdec.expansions.static_tree import Independent
from jax_specdec.specs.build import Drafters
from jax_specdec.specs.sizes import depth_of
from jax_specdec.specs.whole import expansions_of, parse_drafter
from jax_specdec.tuning import tune as tuning

PROMPT = "Once upon a time, there was"
TOKENS = 16


# A third party's file


@dataclasses.dataclass(frozen=True)
class Again(StatelessDrafter):
    """Drafts the last token again and again."""

    length: int

    @property
    def info(self):
        return Info("theirs", self.length, self.length, (self.length,), ("theirs",))

    def draft(self, params, states, ctx):
        tokens = jnp.broadcast_to(ctx.text.root()[:, None], (len(ctx.text.length), self.length))
        return chain(ctx.text, tokens), states


THEIRS = registry.Kind("theirs", make=lambda request: Again, usual_length=3)


@pytest.fixture(scope="module", autouse=True)
def registered():
    registry.register(THEIRS)
    yield
    del registry._KINDS["theirs"]


@pytest.fixture(scope="module")
def target(tiny_checkpoints):
    return sd.load_target(tiny_checkpoints / "target", dtype="float32")


@pytest.fixture(scope="module")
def plain(target):
    return answer(target, "none").token_ids


def answer(target, spec):
    decoder = sd.SpeculativeDecoder(target, sd.load_drafter(spec, target))
    (found,) = decoder.generate([PROMPT], max_new_tokens=TOKENS)
    return found


@pytest.mark.parametrize(
    ("spec", "whole"),
    [
        ("theirs", "theirs:3"),
        ("lm[theirs:3]", "lm[theirs:3]:1"),
        ("cascade(theirs:2, max-gram:3)", "cascade(theirs:2, max-gram:3)"),
    ],
)
def test_a_third_party_drafter_decodes_by_name(target, plain, spec, whole):
    loaded = sd.load_drafter(spec, target)
    assert loaded.spec == whole
    assert loaded.drafter.info.depth == depth_of(parse_drafter(whole))
    got = answer(target, spec)
    assert got.token_ids == plain
    assert any("theirs" in name for name in got.stats.per_drafter)


def test_it_has_the_refusals_of_the_language():
    for text, sentence in (
        ("theirz", "did you mean theirs"),
        ("theirs2", "Unknown drafter 'theirs2'"),
        ("theirs[lm:2]", "'theirs' cannot verify: lm and glide can"),
        ("theirs+cape", "'theirs' has no distribution to expand"),
        ("theirs[confidence=0.4]", "no probabilities to stop"),
    ):
        with pytest.raises(UserError, match=sentence):
            parse_drafter(text)


def test_info_of_it(tiny_checkpoints, capsys):
    args = ["info", "--model", str(tiny_checkpoints / "target"), "--drafter"]
    assert main([*args, "theirs:5", "--json"]) == 0
    about = json.loads(capsys.readouterr().out)["drafter"]
    assert about == {"name": "theirs", "length": 5}
    assert main([*args, "lm[theirs:3]"]) == 0
    assert "up to 4 tokens a draft" in capsys.readouterr().out
    assert main(["info", "--drafters"]) == 0
    assert "theirs         no checkpoint; 3 tokens" in capsys.readouterr().out


def test_tune_takes_it(target, monkeypatch):
    monkeypatch.setattr(tuning, "verify_arm", lambda target, nodes, ids: lambda: 1.0)
    monkeypatch.setattr(tuning, "draft_arm", lambda target, drafter, ids: lambda: 0.0)
    settings = {"longest": 2, "max_new_tokens": 8, "repeats": 1, "batch_size": 32}
    out = tuning.tune(target, Drafters(target), ["theirs"], [PROMPT], **settings)
    assert 0 <= out["lengths"]["theirs"] <= 2
    assert list(out["measured"]["drafters"]) == ["theirs"]
    assert out["batch_size"] == 1, "that of the one prompt there was, which is what was measured"


def test_plug_ins_by_entry_point(monkeypatch):
    """Both forms, a kind and a module that registers itself; one that fails is named and does no harm."""

    @dataclasses.dataclass
    class Point:
        name: str
        found: object
        value: str = "their.module"

        def load(self):
            if isinstance(self.found, Exception):
                raise self.found
            return self.found

    kind = dataclasses.replace(THEIRS, name="plugged")
    points = [Point("broken", ImportError("no such thing")), Point("plugged", kind)]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points)
    registry._import_all.cache_clear()
    try:
        with pytest.warns(
            UserWarning, match="'broken' of their.module cannot be imported: no such"
        ):
            assert "plugged" in registry.names()
        assert parse_drafter("plugged:2").kind == kind
    finally:
        registry._KINDS.pop("plugged", None)


def test_names_that_cannot_be():
    for name in ("Theirs", "a b", "cascade", "auto", ""):
        with pytest.raises(UserError, match="cannot be named"):
            registry.register(dataclasses.replace(THEIRS, name=name))
    with pytest.raises(UserError, match="Two kinds of drafter are named 'lm'"):
        registry.register(dataclasses.replace(THEIRS, name="lm"))
    three = dataclasses.replace(THEIRS, name="eagle3", numbered=True)
    assert three.has("eagle3") and three.has("eagle32") and not three.has("eagle")


# The built-in kinds


def test_what_a_kind_says_is_what_its_drafters_are(target, tiny_checkpoints):
    """Flags are asked of the kind before anything is loaded, and of the drafter afterwards."""
    drafters = Drafters(target)
    for name in drafters.available():
        kind = registry.of(name)
        drafter = drafters(name).drafter
        info = drafter.info
        assert info.sizes == kind.sizes(info.depth) and info.depth == kind.usual_length
        assert info.distribution == kind.distribution
        assert isinstance(drafter, Verifier) == kind.verifies
        assert isinstance(drafter, Grower) == kind.grows
        assert isinstance(drafter, Independent) == kind.independent
        assert hasattr(drafter, "stop") == kind.ends_early
    assert registry.LONGEST == MAX_NODES - 1


def test_expansions_of_each_kind():
    few = ("cape", "fixed", "path")
    want = {
        "lm": (*few, "tree", "beam"),
        "glide": (*few, "tree", "beam"),
        "medusa": (*few, "static"),
    }
    assert {k.name: expansions_of(k) for k in registry.kinds() if k.distribution} == want


def test_every_name_is_loaded_and_read_once(target, monkeypatch):
    """Several specifications beside one target share one copy of a drafter's weights."""
    drafters = Drafters(target)
    first, second = drafters("lm:2"), drafters("lm[max-gram:3]")
    assert first.params["lm"] is second.params["lm"]
    leaf = jax.tree.leaves(first.params)[0]
    assert leaf is jax.tree.leaves(drafters("lm:4+cape").params)[0]
