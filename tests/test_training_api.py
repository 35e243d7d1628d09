"""Training from Python in one call: what data may be, what comes back, and every wrong use by its sentence."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import jax_specdec as sd
from jax_specdec.generation import Generation
from jax_specdec.training.corpus import Source, as_sources, documents_of, load_documents

pytestmark = pytest.mark.usefixtures("two_devices")

TEXTS = [f"The cat saw {i} dogs and Lily ran away with {i % 7} balls." for i in range(40)]
SMALL = {"batch_size": 2, "sequence_length": 16, "progress": False, "heldout_share": 0.2}


@pytest.fixture(autouse=True, scope="module")
def ordinary_promotion():
    """Optax schedules do not pass under strict promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def target(tiny_checkpoints):
    return sd.load_target(tiny_checkpoints / "target")


def answer(prompt, token_ids):
    rest = dict.fromkeys(("id", "text", "finish_reason", "stats", "logprobs", "margins"))
    return Generation(prompt=prompt, token_ids=token_ids, sources=[], **rest)


# Data


def test_documents_of_every_form(target, tmp_path):
    tokenizer, file = target.tokenizer, tmp_path / "data.jsonl"
    file.write_text(json.dumps({"text": "a cat"}) + "\n" + json.dumps({"token_ids": [7, 8]}) + "\n")
    cat = tokenizer("a cat")["input_ids"]
    ended = [*cat, tokenizer.eos_token_id]
    given = ["a cat", [5, 6], np.asarray([9]), str(file), answer("a cat", [3]), answer([4], [3])]
    found = documents_of(as_sources(given), tokenizer)
    want = [ended, [5, 6], [9], ended, [7, 8], [*cat, 3], [4, 3]]
    assert [ids.tolist() for ids in found] == want
    assert as_sources(file) == [Source(file)]
    assert as_sources({file: 2, "more.jsonl": 1}) == [Source(file, 2.0), Source("more.jsonl", 1.0)]
    documents, heldout = load_documents(as_sources({file: 2}), tokenizer, 1, heldout_share=0.5)
    assert documents.weights == (2.0,) and [len(heldout), len(documents.sources[0])] == [1, 1]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a text alone", "is one text alone, 'a text alone': give a JSONL file"),
        (None, "must be a JSONL file, .* not None"),
        (b"bytes", "not bytes"),
        ([], "is empty"),
        ({"a.jsonl": 0}, "weight of 'a.jsonl' must be a number above 0"),
        ({"a text": 1}, "'a text' is none"),
        ("absent.jsonl", "There is no file absent.jsonl"),
        (["a", 5], "Item 1 of the training data is an int"),
        ([[1, 2], [[3]]], "Item 1 of the training data is a list"),
        ([[1.5]], "Item 0 of the training data is a list"),
        ([[10**6]], "outside the vocabulary of 300"),
        ([b"a"], "Item 0 of the training data is bytes"),
        ([""], "Item 0 of the training data is an empty text: leave it out"),
        (["a", "\ud800"], "Item 1 of the training data is not valid Unicode text"),
    ],
)
def test_data_that_is_refused(data, message, target):
    with pytest.raises(sd.UserError, match=message):
        documents_of(as_sources(data), target.tokenizer)


def test_a_tokenizer_that_does_not_do():
    for tokenizer, message in (
        (None, "needs a tokenizer"),
        (SimpleNamespace(eos_token_id=None), "no end-of-text token"),
    ):
        with pytest.raises(sd.UserError, match=message):
            load_documents([], tokenizer, 4)


# Runs


def test_train_glide(target, tmp_path):
    """A drafter for this target, from texts; the callback has seen what the metrics file holds."""
    seen = []
    drafter = sd.train_glide(
        target,
        TEXTS,
        out=tmp_path,
        steps=2,
        callback=lambda step, metrics: seen.append((step, metrics)),
        hidden_size=32,
        num_heads=2,
        num_kv_heads=2,
        trained_delay=3,
        **SMALL,
    )
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert seen == [(row["step"], row) for row in rows] and len(rows) == 2
    assert drafter.folder == tmp_path / "checkpoint"
    assert str(drafter.folder) in repr(drafter) and "\n" not in repr(drafter)
    assert (drafter.spec, drafter.longest) == ("glide:3", 3)
    sd.SpeculativeDecoder(target, drafter)
    again = sd.load_drafter("glide:3", target, drafts={"glide": drafter.folder})
    assert again.drafter == drafter.drafter
    with pytest.raises(sd.UserError, match="already holds a run at step 2"):
        sd.train_glide(target, TEXTS, out=tmp_path, steps=2, **SMALL)


def test_train_lm(target, tiny_checkpoints, tmp_path):
    """A draft model with the target's tokenizer and context, beside a target that is named."""
    shape = {"hidden_size": 16, "num_layers": 1, "num_heads": 1}
    folder = str(tiny_checkpoints / "target")
    drafter = sd.train_lm(folder, TEXTS, out=str(tmp_path), steps=1, **shape, **SMALL)
    assert drafter.spec.startswith("lm:") and drafter.folder == tmp_path / "checkpoint"
    drafter.check_target(target)
    config = json.loads((drafter.folder / "config.json").read_text())
    assert config["max_position_embeddings"] == target.config.context


def test_train_medusa(target, tmp_path):
    drafter = sd.train_medusa(target, TEXTS, out=tmp_path, steps=1, num_heads=1, **SMALL)
    assert (drafter.spec, drafter.folder) == ("medusa:1", tmp_path / "checkpoint")


def test_the_target_of_a_decoder(target, tmp_path):
    """Is understood as far as the data, which is what is wrong here."""
    decoder = sd.SpeculativeDecoder(target)
    for train in (sd.train_glide, sd.train_medusa, sd.train_lm):
        with pytest.raises(sd.UserError, match="is an empty text"):
            train(decoder, [""], out=tmp_path, steps=1, **SMALL)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lerning_rate": 1.0}, "train_glide: unknown key 'lerning_rate'; did you mean learn"),
        ({"batch_size": "4"}, "'batch_size' must be of type int, got '4'"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"steps": True}, "'steps' must be of type int, got True"),
        ({"loss": "kl"}, "Unknown loss 'kl'"),
        ({"num_kv_heads": 3}, "cannot share"),
        ({"sequence_length": 999}, "do not fit the target's context of 256"),
        ({"target": None}, "must be a loaded one, a folder or a hub id, not None"),
        ({"target": "absent/"}, "absent"),
        ({"target": ""}, "The model's name is empty"),
        ({"data": [""]}, "is an empty text"),
        ({"init": 5}, "init must be the folder of a checkpoint, not an int"),
        ({"resume": "x"}, "resume must be True or False, not a str"),
        ({"progress": "x"}, "progress must be True, False or None"),
        ({"out": None}, "Say where the run goes"),
        ({"out": ""}, "Say where the run goes"),
        ({"heldout_share": "much"}, "heldout_share must be a number"),
        ({"heldout_share": 0.9}, r"must be in \(0, 0.5\]"),
        ({"heldout": "a text"}, "held-out data is one text alone"),
        ({"heldout": ["a"]}, "fewer than one window of 17"),
        ({"callback": 3}, "callback must be a function"),
        ({"save_dtype": "int8"}, "save_dtype must be"),
        ({"init": "absent"}, "absent"),
    ],
)
def test_wrong_use(given, message, target, tmp_path):
    usual = {"target": target, "data": TEXTS, "out": tmp_path, "steps": 1, **SMALL}
    with pytest.raises(sd.UserError, match=message) as error:
        sd.train_glide(**{**usual, **given})
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert not (tmp_path / "metrics.jsonl").exists()
