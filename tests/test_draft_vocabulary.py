"""Draft vocabularies: which tokens, a smaller head, the same texts, and what is refused."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_specdec as sd
from jax_specdec.__main__ import main
from jax_specdec.checkpoints.draft_vocabulary import FILE, most_frequent, write_draft_vocabulary
from jax_specdec.checkpoints.glide import save_glide, target_fingerprint
from jax_specdec.checkpoints.medusa import save_medusa
from jax_specdec.core.context import Context
from jax_specdec.core.draft import TOP
from jax_specdec.core.numerics import NEG_INF
from jax_specdec.errors import RunError, UserError
from jax_specdec.models.draft_vocabulary import PLACE, narrow, widen
from jax_specdec.models.glide import GliDe
from jax_specdec.models.glide_config import GliDeConfig
from jax_specdec.models.medusa import Medusa, MedusaConfig
from jax_specdec.models.products import unembed
from jax_specdec.models.quantized import quantize

PROMPTS = ["Once upon a time, there was", "the cat ran", "One day, the girl"]
OPTIONS = {"max_new_tokens": 24, "temperature": [0.0, 0.8, 0.0], "seed": 3, "batch_size": 3}
# The kinds, one whose matrices are its own, and what grows a tree.
SPECS = ("lm:3", "glide:3", "glide+cape:8", "medusa:3", "medusa2:3")


@pytest.fixture(scope="module")
def target(tiny_checkpoints):
    return sd.load_target(tiny_checkpoints / "target", dtype="float32")


@pytest.fixture(scope="module")
def folders(tiny_checkpoints, target, tmp_path_factory):
    """Drafters of all kinds beside the target."""
    home = tmp_path_factory.mktemp("drafters")
    shutil.copytree(tiny_checkpoints / "lm", home / "lm")
    mark = target_fingerprint(target.path)
    glide = GliDe(GliDeConfig.like(target.config), target.config)
    save_glide(home / "glide", glide, glide.init(jax.random.key(0)), mark)
    for name, share in (("medusa", True), ("own", False)):
        heads = Medusa(MedusaConfig(share=share), target.config)
        save_medusa(home / name, heads, heads.init(target.params), mark)
    return home


@pytest.fixture(scope="module")
def plain(target):
    return [a.token_ids for a in sd.SpeculativeDecoder(target).generate(PROMPTS, **OPTIONS)]


@pytest.fixture
def narrow_folders(folders, target, plain, tmp_path):
    """The same with half of the vocabulary, much of what the target says outside of it, and those tokens."""
    ends = set(target.config.eos_ids)
    said = sorted({token for text in plain for token in text})[::2]
    ids = sorted({*range(0, target.vocab_size, 2), *ends} - (set(said) - ends))
    home = tmp_path / "drafters"
    shutil.copytree(folders, home)
    for folder in home.iterdir():
        write_draft_vocabulary(folder, ids, target.vocab_size)
    return home, ids


@pytest.mark.parametrize("spec", SPECS)
def test_texts_stay_as_they_are(spec, narrow_folders, target, plain):
    home, ids = narrow_folders
    name = spec.partition(":")[0].partition("+")[0]
    folder = home / {"medusa2": "own"}.get(name, name)
    spec, name = spec.replace("medusa2", "medusa"), name.removesuffix("2")
    loaded = sd.load_drafter(spec, target, drafts={name: folder})
    own = loaded.params[name]
    head = own["out"][0] if "out" in own else own["head"]
    assert head.shape == (target.config.hidden_size, len(ids))
    got = list(sd.SpeculativeDecoder(target, loaded, budget=False).generate(PROMPTS, **OPTIONS))
    assert [a.token_ids for a in got] == plain
    drafted = {
        token
        for a in got
        for token, source in zip(a.token_ids, a.sources, strict=True)
        if source is not None
    }
    assert drafted <= set(ids)
    if name == "lm":  # the others are hardly ever right here
        assert drafted


# Chains, one that ends early, what reads the drafter's distribution, and a model with more rows than the target.
@pytest.mark.parametrize(
    "spec", ["lm:3", "lm[confidence=0.1]:3", "lm:3+cape:6", "medusa:3+cape:6", "padded:3"]
)
def test_drafts_are_those_over_the_whole_vocabulary(spec, narrow_folders, target, monkeypatch):
    """Where all that follows the head is over the draft vocabulary alone, the same tokens and siblings."""
    home, ids = narrow_folders
    name = "medusa" if spec.startswith("medusa") else "lm"
    if spec.startswith("padded"):
        small = sd.load_target(home / "lm", dtype="float32")
        config = dataclasses.replace(small.config, vocab_size=small.vocab_size + 20)
        head = jnp.pad(small.params["head"], ((0, 0), (0, 20)))
        embed = jnp.pad(small.params["embed"], ((0, 20), (0, 0)))
        params = {**small.params, "embed": embed, "head": head}
        sd.save_pretrained(
            home / "more", config, params, dtype="float32", tokenizer=small.tokenizer
        )
        write_draft_vocabulary(home / "more", ids, target.vocab_size)
        loaded = sd.load_drafter("lm:3", target, drafts={name: home / "more"})
    else:
        loaded = sd.load_drafter(spec, target, drafts={name: home / name})
    found, widened = [], []

    def widen_and_tell(params, logits):
        widened[-1] += PLACE in params
        return widen(params, logits)

    monkeypatch.setattr("jax_specdec.models.layers.widen", widen_and_tell)
    for some in (True, False):
        monkeypatch.setattr(Context, "may_score_some", some)
        widened.append(0)
        decoder = sd.SpeculativeDecoder(target, loaded, budget=False)
        answers = list(decoder.generate(PROMPTS, **OPTIONS))
        found.append([(a.token_ids, a.sources, a.stats.per_drafter) for a in answers])
    assert found[0] == found[1]
    assert widened[0] == 0 < widened[1]


@pytest.mark.parametrize("spec", ["lm:3+cape:6", "cascade(lm:3, max-gram:2)+cape:8"])
def test_a_vocabulary_of_fewer_tokens_than_a_node_has_children(
    spec, folders, target, plain, tmp_path
):
    shutil.copytree(folders / "lm", tmp_path / "lm")
    ids = sorted({5, 7, 11, *target.config.eos_ids})
    assert len(ids) < TOP
    write_draft_vocabulary(tmp_path / "lm", ids, target.vocab_size)
    loaded = sd.load_drafter(spec, target, drafts={"lm": tmp_path / "lm"})
    got = list(sd.SpeculativeDecoder(target, loaded, budget=False).generate(PROMPTS, **OPTIONS))
    assert [a.token_ids for a in got] == plain


def test_logits_are_those_of_the_whole_head():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 3, 8)), jnp.float32)
    ids = np.array([1, 4, 5, 19], np.int32)
    tied = {"embed": jnp.asarray(rng.normal(size=(20, 8)), jnp.float32)}
    for params in (tied, {"head": tied["embed"].T}, quantize({"head": tied["embed"].T})):
        whole, cut = unembed(params, x), narrow(params, ids)
        got = widen(cut, unembed(cut, x))
        np.testing.assert_allclose(got[..., ids], whole[..., ids], rtol=1e-5, atol=1e-6)
        others = np.delete(np.asarray(got), ids, axis=-1)
        assert (others == NEG_INF).all()
    assert widen({}, x) is x


def test_the_most_frequent_tokens():
    texts = [[5, 5, 5, 2, 2, 9], np.array([7, 2, 2], np.int32)]
    assert most_frequent(texts, 3, 12, ends=[11]).tolist() == [2, 5, 11]
    assert most_frequent(texts, 4, 12, ends=[11]).tolist() == [2, 5, 7, 11]  # 7 before 9
    assert most_frequent([], 3, 12, ends=[4]).tolist() == [0, 1, 4]
    for size in (1, 13):
        with pytest.raises(UserError, match="at most 12 tokens, not"):
            most_frequent(texts, size, 12, ends=[11])
    with pytest.raises(UserError, match="A text has token 12"):
        most_frequent([[12]], 3, 12, ends=[])


def test_the_command(folders, target, tmp_path, capsys):
    home = tmp_path / "lm"
    shutil.copytree(folders / "lm", home)
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "the cat ran, and the cat ran"}\n')
    words = ["train", "vocabulary", str(home), "--target", str(target.path), "--data", str(data)]
    assert main([*words, "--size", "40"]) == 0
    said = capsys.readouterr().err
    assert "it covers 100.0% of the text" in said
    assert "are none of them, but the first ones" in said and "Traceback" not in said
    found = json.loads((home / FILE).read_text())
    assert len(found["ids"]) == 40 and set(target.config.eos_ids) <= set(found["ids"])
    options = ["--drafter", "lm", "--draft", f"lm={home}"]
    assert main(["info", "--model", str(target.path), *options]) == 0
    assert "up to 4 tokens a draft of 40" in capsys.readouterr().out
    assert main([*words, "--size", "1"]) == 2
    assert "not 1" in capsys.readouterr().err
    assert main(words) == 0  # half of a small vocabulary
    assert len(json.loads((home / FILE).read_text())["ids"]) == target.vocab_size // 2
    data.write_text('{"text": ""}\n')
    assert main(words) == 2
    assert "no token to count" in capsys.readouterr().err
    words[2] = str(target.path)
    assert main(words) == 2
    assert "is the target itself" in capsys.readouterr().err
    words[2] = str(tmp_path / "nothing")
    assert main(words) == 2
    assert "no config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ids": "all"}, "must have a vocab_size and ids"),
        ({"ids": []}, "must have a vocab_size and ids"),
        ({"ids": [0, True]}, "must have a vocab_size and ids"),
        ({"vocab_size": 7}, "is of a vocabulary of 7 tokens"),
        ({"ids": [0, 1, 10**6]}, "token 1000000, which is out of range"),
        ({"ids": [-1, 0, 1]}, "token -1, which is out of range"),
        ({"ids": [1, 0]}, "increasing order"),
        ({"ids": [299]}, "which ends a text"),
        ({"ids": "ends"}, "no token beside those that end a text"),
    ],
)
def test_what_is_refused(change, said, folders, target, tmp_path):
    shutil.copytree(folders / "lm", tmp_path / "lm")
    ids = list(range(target.vocab_size))
    good = {"vocab_size": target.vocab_size, "ids": ids}
    if change == {"ids": "ends"}:
        change = {"ids": sorted(target.config.eos_ids)}
    (tmp_path / "lm" / FILE).write_text(json.dumps(good | change))
    with pytest.raises(UserError, match=said):
        sd.load_drafter("lm:2", target, drafts={"lm": tmp_path / "lm"})


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        write_draft_vocabulary(tmp_path / "file", [0], 2)
