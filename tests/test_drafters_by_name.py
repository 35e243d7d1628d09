"""What a drafter's name finds: checkpoints here and on the hub, tokenizers, measured lengths, limits."""

import dataclasses
import json
import shutil
from pathlib import Path

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_specdec as sd
from jax_specdec.checkpoints.glide import save_glide, target_fingerprint
from jax_specdec.checkpoints.vocabulary import check_vocabulary
from jax_specdec.cli import common, main
from jax_specdec.drafters import registry
from jax_specdec.drafters.lm import LmDrafter
from jax_specdec.errors import UserError
from jax_specdec.loading import choose_drafter
from jax_specdec.models.fitted import Fitted, fit_vocabulary
from jax_specdec.models.glide import GliDe
from jax_specdec.models.glide_config import GliDeConfig
from jax_specdec.specs import defaults
from jax_specdec.specs.build import Drafters, load_drafter
from jax_specdec.specs.defaults import Setting, add_record, lengths_file, measured
from jax_specdec.specs.whole import complete, parse_drafter
from jax_specdec.tuning.tune import check_names

TARGET_ROWS = h.VOCAB


@pytest.fixture(scope="module")
def target(tiny_checkpoints):
    return sd.load_target(tiny_checkpoints / "target", dtype="float32")


@pytest.fixture
def home(tiny_checkpoints, tmp_path):
    return Path(shutil.copytree(tiny_checkpoints, tmp_path / "home"))


def glide(folder, target, **fields):
    """A GliDe checkpoint of random weights."""
    names = ("hidden_size", "mlp_size", "num_heads", "num_kv_heads", "head_dim")
    shape = {name: getattr(target.config, name) for name in names}
    model = GliDe(GliDeConfig(**shape, **fields), target.config)
    save_glide(folder, model, model.init(jax.random.key(0)), target_fingerprint(target.path))


# Vocabularies


class Words:
    """A tokenizer, as far as it is asked."""

    def __init__(self, vocab, added=()):
        self.vocab, self.added = vocab, added

    def get_vocab(self):
        return {**{token: i for i, token in enumerate(self.vocab)}, **dict(self.added)}

    def get_added_vocab(self):
        return dict(self.added)


def test_tokenizers_are_compared_and_not_rows():
    """Padding differs between sizes of a family; one more added token changes no other id."""
    base = Words("abcdef")
    for ours, theirs in (
        (base, base),
        (base, Words("abcdef", [("<pad>", 6)])),
        (Words("abcdef", [("<tool>", 6), ("<end>", 9)]), Words("abcdef", [("<tool>", 6)])),
    ):
        check_vocabulary(ours, 16, theirs, 8)
        check_vocabulary(ours, 8, theirs, 16)


@pytest.mark.parametrize(
    ("theirs", "sentence"),
    [
        (Words("abcdfe"), "agrees with the target's on 4 of 6 tokens"),
        (Words("abc"), "vocabulary has 8 entries and the target's 16.* 3 of 6"),
        (Words("abcdefg"), "6 of 7"),
        (Words("abcdef", [("<pad>", 0)]), "6 of 7"),
        (None, "has 8 entries and the target's 16, and without tokenizers"),
    ],
)
def test_other_tokenizers_are_refused(theirs, sentence):
    rows = 8 if "16" in sentence else 16
    with pytest.raises(UserError, match=sentence):
        check_vocabulary(Words("abcdef"), 16, theirs, rows)


@pytest.mark.parametrize("rows", [TARGET_ROWS - 4, TARGET_ROWS + 8])
def test_a_fitted_model_is_the_model_on_the_rows_that_both_have(rows):
    small = sd.Decoder(dataclasses.replace(h.SMALL_CONFIG, vocab_size=rows))
    params = h.weights(small, 3)
    fitted = fit_vocabulary(small, TARGET_ROWS)
    assert isinstance(fitted, Fitted) and isinstance(fitted, sd.Model)
    assert fit_vocabulary(small, rows) is small
    both = min(rows, TARGET_ROWS)
    tokens = jnp.asarray([[1, 5, both - 1]], jnp.int32)
    places = jnp.arange(3, dtype=jnp.int32)[None]
    got = fitted.apply(params, tokens, places, fitted.init_cache(1, 8))
    want = small.apply(params, tokens, places, small.init_cache(1, 8))
    np.testing.assert_array_equal(got.logits[..., :both], want.logits[..., :both])
    assert got.logits.shape[-1] == TARGET_ROWS
    assert (np.asarray(got.logits[..., both:]) == -np.inf).all()
    np.testing.assert_array_equal(fitted.head(params, want.hidden), got.logits)
    # A token that it has no row for is read as another one, and not as NaN.
    last = jnp.full((1, 3), TARGET_ROWS - 1, jnp.int32)
    assert not np.isnan(fitted.apply(params, last, places, fitted.init_cache(1, 8)).logits).any()


@pytest.mark.parametrize("rows", [TARGET_ROWS - 4, TARGET_ROWS + 8])
def test_decoding_with_other_rows_is_plain_decoding(rows):
    small = sd.Decoder(dataclasses.replace(h.SMALL_CONFIG, vocab_size=rows))
    drafter = LmDrafter(fit_vocabulary(small, TARGET_ROWS), 3)
    prompts, sampling = h.prompts_of((5, 9)), h.sampling_of(2, temperature=np.array([0.0, 0.9]))
    want = h.decode(h.plain_loop(), h.all_params(), prompts, sampling)
    params = h.all_params(lm=h.weights(small, 3))
    h.assert_identical(h.decode(sd.DecodeLoop(h.TARGET, drafter), params, prompts, sampling), want)


def test_a_draft_model_with_padded_rows_loads(home, target):
    """Qwen2.5's 7B has 152,064 rows and its 0.5B 151,936, for one tokenizer."""
    small = sd.load_target(home / "lm", dtype="float32")
    config = dataclasses.replace(small.config, vocab_size=small.vocab_size + 20)
    embed = jnp.pad(small.params["embed"], ((0, 20), (0, 0)))
    head = jnp.pad(small.params["head"], ((0, 0), (0, 20)))
    params = {**small.params, "embed": embed, "head": head}
    sd.save_pretrained(home / "lm", config, params, dtype="float32", tokenizer=small.tokenizer)
    loaded = load_drafter("lm:2+tree:9", target, home)
    assert loaded.drafter.drafter.body.vocab_size == target.vocab_size
    assert Drafters(target, home).outline("lm:2")[1].body.vocab_size == target.vocab_size


# Names and checkpoints


def test_a_draft_model_of_the_hub(target, tiny_checkpoints, monkeypatch):
    asked = []

    def fetched(source, allow_patterns):
        asked.append(source)
        return str(tiny_checkpoints / "lm")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    assert common.draft_folders(["lm=org/small"]) == {"lm": "org/small"}
    drafters = Drafters(target, drafts=common.draft_folders(["lm=org/small"]))
    assert drafters("lm:2").spec == "lm:2" and asked == ["org/small"]


def test_a_numbered_drafter_has_the_length_of_its_kind(target, tiny_checkpoints, tmp_path):
    """`lm2` without a length was a KeyError; a second GliDe ignored what it was trained for."""
    drafters = Drafters(target, drafts={"lm2": tiny_checkpoints / "lm"})
    assert str(drafters.complete("lm2")) == "lm2:4"
    glide(tmp_path / "g", target, trained_delay=2)
    drafters = Drafters(target, drafts={"glide2": tmp_path / "g"})
    assert str(drafters.complete("glide2")) == "glide2:2"
    assert drafters.request("glide2").longest == 2
    assert str(drafters.complete("glide2[max-gram]")) == "glide2[max-gram:1]:1"
    assert str(drafters.complete("glide2[max-gram:4; cut]")) == "glide2[max-gram:4; cut]:1"
    with pytest.raises(UserError, match="trained for at most 2"):
        drafters.outline("glide2:3")
    glide(tmp_path / "five", target, trained_delay=5)
    drafters = Drafters(target, drafts={"glide2": tmp_path / "five"})
    whole, _ = drafters.outline("glide2[prompt-lookup, max-gram]")
    assert str(whole) == "glide2[prompt-lookup:1, max-gram:1]:1"


def test_a_drafter_without_cross_attention_but_hidden_states_is_cut(target, tmp_path):
    """It was refused: 4 tokens for a trained delay of 3."""
    glide(tmp_path / "glide", target, trained_delay=3, cross_attention=False, hidden_input=True)
    whole, drafter = Drafters(target, tmp_path).outline("glide")
    assert str(whole) == "glide:3" and drafter.info.depth == 3
    assert registry.longest("glide", tmp_path / "glide") == 3


def test_a_glide_config_is_read_once(target, tmp_path, monkeypatch):
    glide(tmp_path / "glide", target, trained_delay=2)
    kind, read = registry.of("glide"), []

    def counted(folder):
        read.append(folder)
        return kind.read(folder)

    monkeypatch.setitem(registry._KINDS, "glide", dataclasses.replace(kind, read=counted))
    assert load_drafter("cascade(glide:1, max-gram:2)", target, tmp_path).longest == 63
    load_drafter("glide", target, tmp_path)
    assert len(read) == 2, "once a call"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("lm:x", "'lm:x' has an unexpected 'x' at character 4"),
        ("lm:4.5", "unexpected '\\.' at character 5"),
        ("LM:4", "Unknown drafter 'LM'"),
        ("lm" + "[" * 3000, "has 3,002 characters"),
        ("lm[" * 17, "nests deeper than 16 brackets at character 51"),
        ("lm:" + "9" * 400, "The number .* at character 4 .* too long"),
        ("lm[max-gram; lenience=" + "9" * 400 + "]", "The number .* at character 23 "),
        ("x" * 990, "Unknown drafter 'xxx.*\\.\\.\\.': known are"),
        ("lm4+" + "y" * 990, "Unknown expansion 'yyy"),
    ],
)
def test_syntax_errors_name_the_place_and_are_short(text, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        parse_drafter(text)
    assert len(str(error.value)) < 400


def test_info_refuses_what_loading_refuses(home, target, capsys):
    glide(home / "glide", target, trained_delay=3)
    args = ["info", "--model", str(home / "target"), "--drafter"]
    for spec, sentence in (
        ("csd-vicuna+tree", "cannot grow trees"),
        ("glide:9", "trained for at most 3"),
        ("lm[" * 3000, "has 9,000 characters"),
    ):
        assert main([*args, spec]) == 2
        assert sentence in capsys.readouterr().err
    assert main([*args, "glide"]) == 0
    written = json.loads((home / "lm/tokenizer.json").read_text())
    vocab = written["model"]["vocab"]
    a, b = sorted(vocab, key=vocab.get)[40:42]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (home / "lm/tokenizer.json").write_text(json.dumps(written))
    assert main([*args, "lm"]) == 2
    assert "on 298 of 300 tokens" in capsys.readouterr().err


# Measured lengths


@pytest.fixture
def record(target):
    return {
        "lengths": {"lm": 7, "max-gram": 0},
        "default": "lm:7",
        "model": target_fingerprint(target.path),
        "device": jax.devices()[0].device_kind,
        "dtype": "float32",
        "batch_size": 1,
    }


def test_a_length_that_does_not_pay_is_said(target, home, record):
    """Named all the same it drafted six tokens, and nothing told that this was measured to be slower."""
    add_record(home / "draft_lengths.json", record)
    with pytest.warns(
        UserWarning, match="max-gram was measured on .* batch 1 not to pay.* 6 tokens"
    ):
        assert str(Drafters(target, home).complete("max-gram")) == "max-gram:6"
    assert str(Drafters(target, home).complete("max-gram:4")) == "max-gram:4"
    chosen = "first(max-gram:3, lm:2)"
    add_record(home / "draft_lengths.json", {**record, "default": "none", "first": chosen})
    with pytest.warns(UserWarning, match="first was measured on .* not to pay.* all the same"):
        assert str(Drafters(target, home).complete("first")) == chosen


def test_what_was_measured_belongs_to_a_model(home, record):
    """The neighbour of a tuned model took its default, which is refused beside it."""
    add_record(home / "draft_lengths.json", record)
    assert sd.default_spec(home / "target") == "lm:7"
    assert sd.default_spec(home / "lm") == "prompt-lookup"
    neighbour = sd.load_target(home / "lm", dtype="float32")
    assert str(Drafters(neighbour).complete("lm")) == "lm:4"


def test_the_nearest_measurement_counts(home, record):
    """Of one model's records: the device's, the dtype's, then the nearest batch size; one of each key."""
    file, device = home / "draft_lengths.json", record["device"]
    add_record(file, {**record, "default": "lm:1", "device": "another"})
    add_record(file, {**record, "default": "lm:2", "dtype": "bfloat16"})
    add_record(file, {**record, "default": "lm:8", "batch_size": 8})
    add_record(file, {**record, "default": "lm:3"})
    add_record(file, {**record, "default": "lm:4"})

    def best(**fields):
        return measured(home, Setting(home / "target", **{"dtype": "float32", **fields}))["default"]

    assert len(defaults.read_records(file)) == 4
    assert (best(), best(batch_size=6), best(dtype="bfloat16")) == ("lm:4", "lm:8", "lm:2")
    assert sd.default_spec(home / "target", batch_size=6) == "lm:8"
    with pytest.raises(sd.UserError, match="batch_size must be at least 1"):
        sd.default_spec(home / "target", batch_size=0)
    for wrong in (None, str(home / "nowhere")):
        with pytest.raises(sd.UserError, match="A target is a loaded one or its folder"):
            sd.default_spec(wrong)
    elsewhere = [{**one, "device": "another"} for one in defaults.read_records(file)]
    file.write_text(json.dumps({"records": elsewhere}))
    assert best(batch_size=6) in ("lm:1", "lm:4"), "a batch of another device"
    assert device != "another"


def test_a_record_without_a_model_holds_for_all(home):
    (home / "draft_lengths.json").write_text('{"lengths": {"lm": 3}, "default": "lm"}')
    assert sd.default_spec(home / "target") == sd.default_spec(home / "lm") == "lm"
    assert str(complete(parse_drafter("lm"), home)) == "lm:3"


def test_nothing_is_written_into_the_hubs_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    snapshots = tmp_path / "hub/models--org--name/snapshots"
    assert lengths_file(snapshots) == tmp_path / "cache/jax_specdec/draft_lengths.json"
    assert lengths_file(tmp_path / "models") == tmp_path / "models/draft_lengths.json"
    add_record(lengths_file(snapshots), {"default": "none"})
    assert measured(snapshots) == {"default": "none"}
    assert not snapshots.exists()


@pytest.mark.parametrize(
    "text", ['{"records": 3}', '{"records": [3]}', '{"default": 4}', "[]", "{", '{"batch_size": 0}']
)
def test_damaged_measurements(tmp_path, text):
    (tmp_path / "draft_lengths.json").write_text(text)
    with pytest.raises(UserError, match="is damaged"):
        measured(tmp_path)


def test_auto_says_what_it_took(home, record):
    folders = {"lm": str(home / "lm")}
    setting = Setting(home / "target", "float32")
    assert choose_drafter(setting, folders)[1] == "the first --draft"
    spec, why = choose_drafter(setting, {})
    assert str(spec) == "prompt-lookup" and "nothing was measured" in why
    add_record(home / "draft_lengths.json", record)
    spec, why = choose_drafter(setting, {})
    assert str(spec) == "lm:7"
    assert why == f"measured on {record['device']} in float32 at batch 1 to be the fastest"


@pytest.mark.parametrize("name", ["lm:4", "lm[confidence=0.4]", "lm+cape:16", "cascade+fixed"])
def test_tune_refuses_what_it_would_not_keep(name):
    """It was tuned as another one, without a word."""
    with pytest.raises(UserError, match=r"without a threshold: name (lm|lm\+cape|cascade) for"):
        check_names([name])
    assert [str(spec) for spec in check_names(["lm", "lm", "none", "cascade"])[0]] == ["lm"]
