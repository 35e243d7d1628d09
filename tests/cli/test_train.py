"""`train` on tiny checkpoints: from data to a checkpoint that drafts, and every wrong use of it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import PROMPT, fails, lines, ok, records
from safetensors.numpy import save_file

from jax_specdec.checkpoints import targets as checkpoints
from jax_specdec.checkpoints.glide import read_glide_config
from jax_specdec.checkpoints.medusa import read_medusa_config
from jax_specdec.drafters.bigram import load_bigram
from jax_specdec.training.data import read_documents

pytestmark = pytest.mark.usefixtures("two_devices")


def test_train_tokenizer_and_bigram(data, capsys, tmp_path):
    ok(capsys, "train", "tokenizer", "--data", data, "--vocab-size", 280, "--out", tmp_path / "t")
    tokenizer = checkpoints.load_tokenizer(tmp_path / "t")
    assert 259 < len(tokenizer) <= 280
    args = ["--data", data, "--tokenizer", tmp_path / "t", "--out", tmp_path / "b"]
    ok(capsys, "train", "bigram", *args)
    assert load_bigram(tmp_path / "b", len(tokenizer)).dtype == np.int32


@pytest.mark.usefixtures("relaxed_promotion")
def test_train_lm(tiny_checkpoints, data, capsys, tmp_path):
    config = tmp_path / "config.json"
    train = {"batch_size": 2, "sequence_length": 16, "learning_rate": 1e-3, "steps": 5}
    model = {"hidden_size": 32, "num_heads": 2, "num_layers": 2, "rope": {"theta": 5000.0}}
    config.write_text(json.dumps({"train": train, "model": model}))
    out = tmp_path / "run"
    args = ["train", "lm", "--data", data, "--tokenizer", tiny_checkpoints / "tokenizer"]
    args += ["--heldout-share", 0.2, "--context", 64, "--config", config, "--out", out]
    args += ["--layers", 1, "--tied-head", "--steps", 2, "--save-every", 1]
    ok(capsys, *args)
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2
    assert (out / "loss.png").is_file()
    found, stored = checkpoints.inspect_checkpoint(out / "checkpoint")
    assert (found.num_layers, found.hidden_size, found.tied_head) == (1, 32, True)
    assert (found.rope.theta, found.context, stored) == (5000.0, 64, "bfloat16")
    assert found.eos_ids == (1,) and checkpoints.load_tokenizer(out / "checkpoint")

    assert "pass --resume" in fails(capsys, *args)
    ok(capsys, *args, "--resume")
    # What was trained is a checkpoint to train on from.
    args = ["train", "lm", "--data", data, "--heldout", data, "--init", out / "checkpoint"]
    args += ["--config", config, "--out", tmp_path / "next", "--save-dtype", "float32"]
    assert "leave out hidden_size" in fails(capsys, *args)
    config.write_text(json.dumps({"train": {**train, "steps": 1}}))
    ok(capsys, *args)
    assert checkpoints.inspect_checkpoint(tmp_path / "next/checkpoint") == (found, "float32")


@pytest.mark.usefixtures("relaxed_promotion")
def test_train_medusa(model, data, capsys, tmp_path):
    """Heads from data to text, their tree and their accuracies; the lossy rule by its name alone."""
    out = tmp_path / "run"
    args = ["train", "medusa", "--data", data, "--target", model, "--heldout-share", 0.2]
    args += ["--batch-size", 2, "--sequence-length", 16]
    ok(capsys, *args, "--steps", 2, "--save-every", 2, "--heads", 2, "--out", out)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and len(rows[-1]["acceptance"]) == 2
    found, accuracies, _ = read_medusa_config(out / "checkpoint")
    assert (found.num_heads, found.share) == (2, True)
    assert len(accuracies) == 2 and len(accuracies[0]) == 8

    again = ["--init", out / "checkpoint", "--out", tmp_path / "again"]
    ok(capsys, *args, *again, "--calibrate")
    measured = read_medusa_config(tmp_path / "again/checkpoint")[1]
    np.testing.assert_allclose(measured, accuracies, atol=0.1)  # the heads were rounded to bfloat16
    assert "with --init" in fails(capsys, *args, "--out", tmp_path / "new", "--calibrate")
    assert "fixes the drafter's shape" in fails(capsys, *args, *again, "--steps", 1, "--no-share")
    assert "--steps" in fails(capsys, *args, "--out", tmp_path / "new")
    few = ["--steps", 1, "--heads", 16, "--out", tmp_path / "new"]
    assert "leave nothing to the last of 16 heads" in fails(capsys, *args, *few)

    generate = ["generate", "--model", model, "--prompt", PROMPT, "--max-new-tokens", 8]
    draft = ["--draft", f"medusa={out / 'checkpoint'}"]
    (answer,) = records(capsys, *generate, "--drafter", "medusa:2+static:6", *draft)
    (plain,) = records(capsys, *generate, "--drafter", "none")
    assert answer["token_ids"] == plain["token_ids"]
    assert answer["stats"]["per_drafter"]["sibling"]["drafted"] > 0
    assert "draft 2 tokens or fewer" in fails(capsys, *generate, "--drafter", "medusa:3", *draft)
    (about,) = records(capsys, "info", "--model", model, "--drafter", "medusa", *draft)
    assert (about["drafter"]["length"], about["drafter"]["num_heads"]) == (2, 2)
    lossy = ["--rule", "lossy-typical", "--lossy-epsilon", 0.5]
    (answer,) = records(capsys, *generate, "--drafter", "medusa:2+static:6", *draft, *lossy)
    assert answer["token_ids"] == plain["token_ids"], "at temperature 0 nothing else is typical"
    assert "setting of --rule lossy" in fails(capsys, *generate, "--lossy-delta", 0.1)
    assert "must be in (0, 1]" in fails(capsys, *generate, *lossy[:2], "--lossy-epsilon", 2)

    heads = {"0.0.linear.weight": (64, 64), "0.0.linear.bias": (64,), "0.1.weight": (300, 64)}
    heads = {name: np.ones(shape, np.float32) for name, shape in heads.items()}
    (tmp_path / "heads").mkdir()
    save_file(heads, tmp_path / "heads/medusa_lm_head.safetensors")
    ok(capsys, "convert", tmp_path / "heads", tmp_path / "imported", "--target", model)
    found, accuracies, _ = read_medusa_config(tmp_path / "imported")
    assert (found.num_heads, found.share, accuracies) == (1, False, ())
    imported = ["--draft", f"medusa={tmp_path / 'imported'}", "--drafter", "medusa:1+static:3"]
    assert "this Medusa checkpoint lacks" in fails(capsys, *generate, *imported)


@pytest.mark.usefixtures("relaxed_promotion")
def test_train_glide(model, data, capsys, tmp_path):
    """A drafter of either kind, from data to text; what fits no target or draft is refused."""
    out = tmp_path / "run"
    args = ["train", "glide", "--data", data, "--target", model, "--heldout-share", 0.2]
    args += ["--batch-size", 2, "--sequence-length", 16, "--steps", 2, "--save-every", 1]
    shape = ["--hidden-size", 32, "--kv-heads", 4, "--trained-delay", 3]
    ok(capsys, *args, *shape, "--target-layers", "1", "--loss", "total_variation", "--out", out)
    # Killed before the checkpoint was written: resuming has no step left, and writes it.
    shutil.rmtree(out / "checkpoint")
    loss = ["--loss", "total_variation"]
    ok(capsys, *args, *shape, "--target-layers", "1", *loss, "--out", out, "--resume")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and len(rows[-1]["acceptance"]) == 8
    assert (out / "loss.png").is_file()
    found, _ = read_glide_config(out / "checkpoint")
    assert (found.hidden_size, found.head_dim, found.num_kv_heads) == (32, 16, 4)
    assert (found.target_layers, found.trained_delay, found.cross_attention) == ((1,), 3, True)

    generate = ["generate", "--model", model, "--prompt", PROMPT, "--max-new-tokens", 8]
    draft = ["--draft", f"glide={out / 'checkpoint'}"]
    (answer,) = records(capsys, *generate, "--drafter", "glide:3", *draft)
    assert answer["stats"]["per_drafter"]["glide"]["drafted"] > 0
    assert "draft 3 tokens or fewer" in fails(capsys, *generate, "--drafter", "glide:4", *draft)
    (about,) = records(capsys, "info", "--model", model, "--drafter", "glide:3", *draft)
    assert about["drafter"]["own_parameters"] > 10_000
    init = [*args, "--init", out / "checkpoint", "--out", tmp_path / "next"]
    assert "fixes the drafter's shape" in fails(capsys, *init, "--vanilla")
    init = [*args, "--init", Path(model).parent / "lm", "--out", tmp_path / "next"]
    assert "fixes the drafter's shape" in fails(capsys, *init, "--paper")
    assert "cannot have 4" in fails(capsys, *init, "--layers", 4)
    paper = ["--paper", "--hidden-size", 32, "--mlp-size", 32, "--heads", 2, "--kv-heads", 2]
    paper += ["--head-dim", 16, "--hidden-input", "--out", tmp_path / "paper"]
    ok(capsys, *args, *paper, "--data", f"{data}=0.5")
    rows = (tmp_path / "paper/metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[0])["learning_rate"] == pytest.approx(5e-4)
    meta = json.loads((tmp_path / "paper/state/2/meta/metadata").read_text())
    assert (meta["train"]["weight_decay"], meta["weights"]) == (0, [1, 0.5])
    found, _ = read_glide_config(tmp_path / "paper/checkpoint")
    assert (found.hidden_input, found.trained_delay, found.share) == (True, 5, False)
    draft = ["--draft", f"glide={tmp_path / 'paper/checkpoint'}"]
    (answer,) = records(capsys, *generate, "--drafter", "glide:2+cape:6", *draft)
    (plain,) = records(capsys, *generate, "--drafter", "none")
    assert answer["token_ids"] == plain["token_ids"]
    assert "must be a number above 0" in fails(capsys, *args, *paper, "--data", f"{data}=0")
    vanilla = ["--vanilla", "--visibility", "none", "--steps", 1, "--out", tmp_path / "vanilla"]
    ok(capsys, *args, *vanilla)
    vanilla, _ = read_glide_config(tmp_path / "vanilla/checkpoint")
    assert (vanilla.cross_attention, vanilla.trained_delay) == (False, 1)

    new = [*args, "--out", tmp_path / "new"]
    assert "pass --resume" in fails(capsys, *args, "--out", out)
    assert "Unknown loss 'kl'" in fails(capsys, *new, "--loss", "kl")
    assert "leave out --trained-delay" in fails(
        capsys, *new, "--visibility", "none", "--trained-delay", 4
    )
    assert "target's 3 layers" in fails(capsys, *new, "--target-layers", "7")
    assert "cannot share" in fails(capsys, *new, "--kv-heads", 3)
    assert "do not fit the target's context" in fails(capsys, *new, "--sequence-length", 999)
    assert "--steps" in fails(capsys, *args[:6], "--out", tmp_path / "new")


@pytest.mark.usefixtures("relaxed_promotion")
def test_regenerate_and_tune_take_chats(model, capsys, tmp_path, monkeypatch):
    chat = [{"role": "user", "content": PROMPT}]
    prompts = lines(tmp_path / "chats.jsonl", {"id": 0, "messages": chat})
    talking = tmp_path / "talking"
    shutil.copytree(model, talking)
    (talking / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }} {{ m.content }}{% endfor %}"
    )
    how = ["--model", talking, "--drafter", "none", "--prompts", prompts, "--max-new-tokens", 6]
    (answer,) = records(capsys, "generate", *how)
    ok(capsys, "train", "regenerate", *how, "--out", tmp_path / "out.jsonl")
    document = json.loads((tmp_path / "out.jsonl").read_text())
    assert document["text"].startswith(f"user {PROMPT}")
    assert document["token_ids"][-6:] == answer["token_ids"]

    tuned = []

    def fake(target, drafters, names, prompts, **_):
        tuned.extend(prompts)
        return {"default": "none"}

    monkeypatch.setattr("jax_specdec.tuning.tune.tune", fake)
    given = ["--model", talking, "--drafters", "max-gram", "--prompts", prompts]
    ok(capsys, "tune", *given, "--out", tmp_path / "lengths.json")
    assert tuned == [chat]


@pytest.mark.usefixtures("relaxed_promotion")
def test_regenerate(model, tiny_checkpoints, capsys, tmp_path):
    """Documents are prompt and answer; a run that was cut off goes on as if it had not been."""
    prompts = lines(
        tmp_path / "p.jsonl", *({"id": i, "prompt": PROMPT + " a" * i} for i in range(5))
    )
    out = tmp_path / "out.jsonl"
    args = ["train", "regenerate", "--model", model, "--drafter", "none", "--prompts", prompts]
    args += ["--batch-size", 2, "--max-new-tokens", 6, "--temperature", 0, "--temperature", 1]
    ok(capsys, *args, "--out", out)
    whole = out.read_bytes()
    documents = [json.loads(line) for line in whole.splitlines()]
    greedy = records(capsys, "generate", "--model", model, "--drafter", "none", "--prompt", PROMPT)
    ids = documents[0]["token_ids"]
    assert ids[-6:] == greedy[0]["token_ids"][:6] and len(documents) == 5
    assert documents[0]["text"].startswith(PROMPT)

    assert "pass --resume" in fails(capsys, *args, "--out", out)
    out.write_bytes(whole[: len(whole) // 2])
    ok(capsys, *args, "--out", out, "--resume")
    assert out.read_bytes() == whole
    ok(capsys, *args, "--out", out, "--resume")
    assert out.read_bytes() == whole
    assert "--keep-last" in fails(capsys, *args, "--out", out, "--keep-last", 0)
    one = lines(tmp_path / "one.jsonl", {"id": 0, "prompt": PROMPT})
    args[args.index(prompts)] = one
    assert "only 1 prompts" in fails(capsys, *args, "--out", out, "--resume")

    # What a draft model writes is what it decodes to by itself, whatever the length of its drafts.
    args[args.index(one)] = prompts
    own = [tmp_path / "own.jsonl", tmp_path / "written.jsonl"]
    ok(capsys, *args, "--out", own[0], "--model", tiny_checkpoints / "lm")
    ok(capsys, *args, "--out", own[1], "--drafter", "lm:4", "--writer", "drafter")
    assert own[0].read_bytes() == own[1].read_bytes() != whole
    assert "cannot write text" in fails(
        capsys, *args, "--out", tmp_path / "no", "--drafter", "lm:2+cape:5", "--writer", "drafter"
    )

    # What was written is training data, its ids taken as they are.
    tokenizer = checkpoints.load_tokenizer(model)
    assert [d.tolist() for d in read_documents([out], tokenizer)] == [
        d["token_ids"] for d in documents
    ]


def test_training_mistakes(tiny_checkpoints, data, capsys, tmp_path):
    args = ["train", "lm", "--data", data, "--out", tmp_path / "run"]
    assert "--steps" in fails(capsys, *args)
    args += ["--steps", 1]
    assert "--tokenizer" in fails(capsys, *args)
    args += ["--tokenizer", tiny_checkpoints / "tokenizer"]
    assert "do not fit the model's context" in fails(capsys, *args, "--context", 64)
    assert "learning_rate must be" in fails(capsys, *args, "--learning-rate", "nan")
    assert "batch_size must be" in fails(capsys, *args, "--batch-size", 0)
    assert "not a multiple of accumulate" in fails(capsys, *args, "--accumulate", 3)
    assert "fewer than one window" in fails(capsys, *args)
    assert "share" in fails(capsys, *args, "--heldout-share", 0.9)
    assert "cannot share" in fails(capsys, *args, "--heads", 4, "--kv-heads", 3)
    assert "must be at least 1" in fails(capsys, *args, "--layers", 0)
    assert "must be even" in fails(capsys, *args, "--head-dim", 7)
    assert "There is no file" in fails(capsys, *args, "--data", "/absent.jsonl")
    config = tmp_path / "c.json"
    args += ["--config", config]
    for text, message in (
        ("{", "cannot be read as JSON"),
        ("[]", "must hold a JSON object"),
        ('{"trian": {}}', "unknown key 'trian'; did you mean train?"),
        ('{"train": {"lerning_rate": 1}}', "did you mean learning_rate?"),
        ('{"train": {"steps": "9"}}', "'steps' must be of type int, got '9'"),
        ('{"train": {"optimizer": "sgd"}}', "optimizer must be adamw or muon"),
        ('{"model": {"rope": {"x": 1}}}', "The model's shape is wrong"),
    ):
        config.write_text(text)
        assert message in fails(capsys, *args)
    bad = lines(tmp_path / "bad.jsonl", {"text": "a"}, {"prompt": "b"})
    assert 'line 2: expected a string in "text"' in fails(
        capsys, "train", "tokenizer", "--data", bad, "--vocab-size", 300, "--out", tmp_path / "t"
    )
    bad = lines(tmp_path / "ids.jsonl", {"text": "a"}, {"token_ids": [0, 10**6]})
    assert "line 2: \"token_ids\" must be" in fails(
        capsys, "train", "lm", "--data", bad, "--steps", 1, "--out", tmp_path / "r",
        "--tokenizer", tiny_checkpoints / "tokenizer",
    )  # fmt: skip
    assert "at least 259" in fails(
        capsys, "train", "tokenizer", "--data", data, "--vocab-size", 9, "--out", tmp_path / "t"
    )
