"""Every command on tiny checkpoints, and every wrong use: one sentence and an exit status."""

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_specdec import pipeline
from jax_specdec.checkpoints import memory
from jax_specdec.checkpoints import targets as checkpoints
from jax_specdec.checkpoints.glide import read_glide_config
from jax_specdec.checkpoints.medusa import read_medusa_config
from jax_specdec.cli import main
from jax_specdec.cli.common import DEMO_TARGET
from jax_specdec.drafters.bigram import load_bigram
from jax_specdec.training.data import read_documents

PROMPT = "Once upon a time"
SHORT = ["--max-new-tokens", "12"]
STATS = {
    "num_tokens",
    "num_spec_steps",
    "num_draft_tokens",
    "num_accepted_tokens",
    "draft_acceptance_rate",
    "mean_acceptance_length",
    "accepted_per_pos",
    "per_drafter",
    "wall_time_s",
    "prefill_time_s",
    "compile_time_s",
    "tokens_per_second",
    "near_ties",
}


@pytest.fixture(scope="module")
def decoders():
    return {}


@pytest.fixture(autouse=True)
def shared_programs(decoders, monkeypatch):
    """Commands that would build the same decoder share one, and so its compiled programs."""
    real: Any = pipeline.SpeculativeDecoder

    def make(target, drafter=None, *, rule="match", **loop):
        spec = drafter.spec if drafter else "none"
        # Copies of the checkpoints hold the same parameters.
        key = (target.decoder, spec, rule, *loop.values())
        if key not in decoders:
            decoders[key] = real(target, drafter, rule=rule, **loop)
        return decoders[key]

    monkeypatch.setattr(pipeline, "SpeculativeDecoder", make)
    monkeypatch.setattr("jax_specdec.demo.SpeculativeDecoder", make)


@pytest.fixture
def relaxed_promotion():
    """optax's schedules do not pass under strict promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def model(tiny_checkpoints):
    return str(tiny_checkpoints / "target")


@pytest.fixture
def copy(tiny_checkpoints, tmp_path):
    """A copy of the checkpoints to break."""
    shutil.copytree(tiny_checkpoints, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def data(tmp_path):
    texts = ["The cat ran to the dog. " * 4, "One day, the girl had a red ball. " * 4]
    return lines(tmp_path / "data.jsonl", *({"text": text} for text in texts * 5))


def lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def ok(capsys, *argv):
    """Runs a command that must succeed; returns its standard output."""
    status = main([str(a) for a in argv])
    out, err = capsys.readouterr()
    assert status == 0, err
    return out


def records(capsys, *argv):
    """The JSON objects that a command prints."""
    return [json.loads(line) for line in ok(capsys, *argv, "--json").splitlines()]


def fails(capsys, *argv, status=2):
    """Runs a command that must fail; returns its sentence."""
    got = main([str(a) for a in argv])
    out, err = capsys.readouterr()
    messages = [line for line in err.splitlines() if line.startswith("error: ")]
    assert got == status, err
    assert out == "" and len(messages) == 1 and "Traceback" not in err, err
    assert err.splitlines()[-1] == messages[0]
    return messages[0]


# generate


@pytest.mark.smoke
def test_generate(model, capsys):
    status = main(["generate", "--model", model, "--prompt", PROMPT, "--drafter", "lm:3", *SHORT])
    out, err = capsys.readouterr()
    assert status == 0 and out.endswith("\n")
    assert len(err.strip().splitlines()) == 1
    for part in ("12 tokens in", "tokens/s", "mean acceptance length", "near ties"):
        assert part in err


def test_json_record(model, capsys):
    args = ["generate", "--model", model, "--prompt", PROMPT, "--logprobs", *SHORT]
    (plain,) = records(capsys, *args, "--drafter", "none")
    (fast,) = records(capsys, *args, "--drafter", "lm:3")
    keys = {"id", "prompt", "text", "token_ids", "finish_reason", "stats", "logprobs"}
    assert set(fast) == keys and set(fast["stats"]) == STATS
    assert (fast["id"], fast["prompt"], fast["finish_reason"]) == (0, PROMPT, "length")
    assert fast["token_ids"] == plain["token_ids"] and fast["text"] == plain["text"]
    assert len(fast["token_ids"]) == len(fast["logprobs"]) == 12
    assert max(fast["logprobs"]) <= 0
    assert fast["stats"]["mean_acceptance_length"] > 1.5
    assert plain["stats"]["mean_acceptance_length"] == 1
    assert set(fast["stats"]["per_drafter"]) == {"lm"}


def test_several_prompts_in_batches(model, capsys):
    args = ["generate", "--model", model, "--drafter", "lm:3", *SHORT]
    for text in (PROMPT, "Question: Tom", "Task:"):
        args += ["--prompt", text]
    alone = records(capsys, *args)
    batch = records(capsys, *args, "--batch-size", 2)
    assert [a["token_ids"] for a in alone] == [b["token_ids"] for b in batch]
    assert [b["id"] for b in batch] == [0, 1, 2]
    out = ok(capsys, *args)
    assert all(f"[{i}]\n{a['text']}\n" in out for i, a in enumerate(alone))


def test_standard_input(model, capsys, monkeypatch):
    args = ["generate", "--model", model, "--drafter", "lm:3", *SHORT]
    (given,) = records(capsys, *args, "--prompt", PROMPT)
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT + "\n"))
    (read,) = records(capsys, *args)
    assert read["prompt"] == PROMPT and read["token_ids"] == given["token_ids"]


def test_stream_is_the_text(model, capsys):
    args = ["generate", "--model", model, "--drafter", "lm:3", *SHORT, "--prompt", PROMPT]
    assert ok(capsys, *args, "--stream") == ok(capsys, *args)
    args += ["--prompt", "Task:", "--temperature", "0.9"]
    assert ok(capsys, *args, "--stream") == ok(capsys, *args)


def test_stop_strings(model, capsys):
    args = ["generate", "--model", model, "--drafter", "lm:3", *SHORT, "--prompt", PROMPT]
    (whole,) = records(capsys, *args)
    stop = re.findall("[ -~]{2}", whole["text"])[-1]
    (cut,) = records(capsys, *args, "--stop", stop, "--stop", "never there")
    assert cut["finish_reason"] == "stop"
    assert cut["text"] == whole["text"][: whole["text"].index(stop)]
    assert ok(capsys, *args, "--stop", stop, "--stream") == cut["text"] + "\n"


def test_sampling_flags(model, capsys):
    args = ["generate", "--model", model, *SHORT, "--prompt", PROMPT, "--temperature", "1.2"]
    args += ["--top-k", "40", "--top-p", "0.9", "--min-p", "0.01", "--ignore-eos"]
    runs = [
        records(capsys, *args, "--seed", seed, "--drafter", drafter)[0]["token_ids"]
        for seed, drafter in ((1, "none"), (1, "lm:3"), (2, "lm:3"))
    ]
    assert runs[0] == runs[1] != runs[2]
    (other,) = records(capsys, *args, "--drafter", "lm:3", "--rule", "reject")
    assert len(other["token_ids"]) == 12


def test_keep_last_and_chat(model, capsys):
    args = ["generate", "--model", model, "--drafter", "lm:3", *SHORT]
    long = "The cat ran. " * 200
    (kept,) = records(capsys, *args, "--prompt", long, "--keep-last", 20)
    assert kept["prompt"] == long and len(kept["token_ids"]) == 12
    # The template is the text and a newline after the start token.
    (chat,) = records(capsys, *args, "--prompt", PROMPT, "--chat")
    (same,) = records(capsys, *args, "--prompt", PROMPT + "\n")
    assert chat["prompt"] == PROMPT and chat["token_ids"] == same["token_ids"]


def test_records_with_their_own_parameters(model, capsys, tmp_path):
    file = lines(
        tmp_path / "p.jsonl",
        {"id": "greedy", "prompt": PROMPT},
        {"id": "warm", "prompt": PROMPT, "temperature": 1.0, "seed": 5, "max_new_tokens": 9},
        {"id": "same", "prompt": PROMPT, "temperature": 1.0, "seed": 5, "max_new_tokens": 12},
        {"id": "folded", "prompt": PROMPT, "temperature": 1.0},
        {"id": "stop", "prompt": PROMPT, "stop": "a b c", "top_k": 5, "top_p": 0.9, "min_p": 0.1},
    )
    args = ["generate", "--model", model, "--drafter", "lm:3", *SHORT, "--prompts", file]
    got = {a["id"]: a["token_ids"] for a in records(capsys, *args, "--seed", 5, "--batch-size", 2)}
    assert list(got) == ["greedy", "warm", "same", "folded", "stop"]
    assert len(got["warm"]) == 9 and got["warm"] == got["same"][:9]
    # A record without a seed draws from the run's seed folded with its number.
    assert got["folded"] != got["same"]
    (alone,) = records(capsys, *args[:-2], "--prompt", PROMPT)
    assert got["greedy"] == got["stop"] == alone["token_ids"]


def test_spec_bench_records(model, capsys, tmp_path):
    record = {"question_id": 81, "category": "writing", "turns": [PROMPT, "second"]}
    args = ["generate", "--model", model, "--drafter", "lm:3", *SHORT]
    (got,) = records(capsys, *args, "--prompts", lines(tmp_path / "p.jsonl", record))
    assert (got["id"], got["prompt"]) == (81, PROMPT)


def test_default_drafter(copy, capsys):
    args = ["generate", "--model", copy / "target", "--prompt", PROMPT, *SHORT]
    (got,) = records(capsys, *args)
    assert set(got["stats"]["per_drafter"]) == {"prompt-lookup"}
    (copy / "draft_lengths.json").write_text('{"lengths": {"lm": 3}, "default": "lm"}')
    (got,) = records(capsys, *args)
    assert len(got["stats"]["accepted_per_pos"]) == 3 and "lm" in got["stats"]["per_drafter"]
    (copy / "draft_lengths.json").write_text('{"lengths": {"lm": 3}}')
    (copy / "lm").rename(copy / "elsewhere")
    (got,) = records(capsys, *args, "--draft", f"lm={copy / 'elsewhere'}")
    assert "lm" in got["stats"]["per_drafter"]
    (copy / "draft_lengths.json").write_text('{"lengths": 3}')
    assert "draft_lengths.json is damaged" in fails(capsys, *args)


# demo


def test_demo(model, capsys):
    out = ok(capsys, "demo", "--model", model, "--drafter", "lm:3", *SHORT)
    assert out.count("The two outputs are identical.") == 6
    assert "plain" in out and "speculative" in out and "median" in out and "6 of 6" in out
    assert "\x1b" not in out


def test_demo_in_colour(model, capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    out = ok(capsys, "demo", "--model", model, "--drafter", "lm:3", *SHORT)
    assert "Tokens proposed by \x1b[32mlm" in out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in ok(capsys, "demo", "--model", model, "--drafter", "lm:3", *SHORT)


def test_demo_json(model, capsys):
    *rows, last = records(capsys, "demo", "--model", model, "--drafter", "lm:3", *SHORT)
    assert len(rows) == 6 and all(row["identical"] for row in rows)
    assert set(rows[0]["plain"]) == set(rows[0]["stats"]) == STATS
    assert last["summary"]["identical"] == 6 and last["summary"]["speedup"] > 0


@pytest.mark.parametrize(("margin", "status"), [(0.5, 1), (5e-4, 0)])
def test_demo_tells_of_a_difference(model, capsys, monkeypatch, margin, status):
    import dataclasses

    from jax_specdec import demo

    real = pipeline.SpeculativeDecoder

    class Wrong:
        """Changes the third token of plain answers."""

        def __init__(self, target, drafter=None):
            self._inner, self._wrong = real(target, drafter), drafter is None

        def __getattr__(self, name):
            return getattr(self._inner, name)

        def generate(self, *args, **kwargs):
            for out in self._inner.generate(*args, **kwargs):
                if self._wrong:
                    ids, margins = list(out.token_ids), list(out.margins)
                    ids[2], margins[2] = (ids[2] + 1) % 300, margin
                    out = dataclasses.replace(out, token_ids=ids, margins=margins)
                yield out

    monkeypatch.setattr(demo, "SpeculativeDecoder", Wrong)
    args = ["demo", "--model", model, "--drafter", "lm:3", *SHORT]
    assert main(args) == status
    out = capsys.readouterr().out
    assert "The two outputs differ from token 3 on" in out
    assert ("NO near tie" in out) == bool(status)


# train, convert, info


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


def test_convert(model, capsys, tmp_path):
    out = tmp_path / "out"
    ok(capsys, "convert", model, out, "--dtype", "bfloat16", "--max-shard-mb", 0.1)
    config, stored = checkpoints.inspect_checkpoint(out)
    assert stored == "bfloat16" and config == checkpoints.load_config(model)
    assert len(list(out.glob("model-*.safetensors"))) > 1


def test_info(model, capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("info must not load parameters")

    monkeypatch.setattr(checkpoints, "_read_params", refuse)
    args = ["info", "--model", model, "--drafter", "lm:3", "--batch-size", 2, "--dtype", "bfloat16"]
    (found,) = records(capsys, *args)
    assert found["num_parameters"] == checkpoints.load_config(model).parameter_count()
    assert (found["stored_dtype"], found["dtype"]) == ("float32", "bfloat16")
    # 2 x 3 layers x 2 rows x 2 heads x (256 + 4) slots x 16 x 2 bytes
    assert found["memory"]["cache"] == 2 * 3 * 2 * 2 * 260 * 16 * 2
    assert found["memory"]["logits"] == 2 * 4 * 300 * 4
    both = found["memory"]["total"] + found["drafter"]["memory"]["total"]
    assert found["total_bytes"] == both and found["fits"] is True
    assert found["longest_prompt"] == 128
    text = ok(capsys, *args)
    assert "3 layers of 64" in text and "drafter lm, up to 3 tokens" in text and "fits" in text
    assert ok(capsys, "info", "--model", model, "--drafter", "bigram")


# wrong use


def test_arguments(model, capsys, monkeypatch, tmp_path):
    args = ["generate", "--model", model]
    prompt = [*args, "--prompt", PROMPT]
    file = lines(tmp_path / "p.jsonl", {"prompt": PROMPT})
    assert "not both" in fails(capsys, *prompt, "--prompts", file)
    assert "invalid choice: 'gnerate'" in fails(capsys, "gnerate")
    assert "Say which command" in fails(capsys)
    assert "unrecognized arguments: --temp" in fails(capsys, *prompt, "--temp", "1")
    assert "--seed" in fails(capsys, *prompt, "--seed", "x")
    assert "--stream" in fails(capsys, *prompt, "--stream", "--json")
    assert "--stream" in fails(capsys, *prompt, "--stream", "--batch-size", "2")
    assert "--batch-size" in fails(capsys, *prompt, "--batch-size", "0")
    assert "--keep-last" in fails(capsys, *prompt, "--keep-last", "0")
    assert "--logprobs needs" in fails(capsys, *prompt, "--logprobs")
    assert "stop string" in fails(capsys, *prompt, "--stop", "")
    assert "--draft takes NAME=DIR" in fails(capsys, *prompt, "--draft", "lm")
    assert "has no checkpoint" in fails(capsys, *prompt, "--draft", "max-gram=x")
    assert "KIND" in fails(capsys, "train")
    assert "--data" in fails(capsys, "train", "bigram", "--out", tmp_path)
    assert "fewer than 999" in fails(capsys, "info", "--model", model, "--context", 999)
    assert "no room" in fails(capsys, "info", "--model", model, "--max-new-tokens", 256)
    assert "max-shard-mb" in fails(capsys, "convert", model, tmp_path, "--max-shard-mb", 0)

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Terminal())
    assert "Give a prompt" in fails(capsys, *args)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert "The prompt is empty" in fails(capsys, *args)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "-1"], "temperature must be finite and at least 0, got -1.0"),
        (["--temperature", "nan"], "temperature must be finite and at least 0, got nan"),
        (["--temperature", "1e39"], "temperature must be finite and at least 0, got 1e+39"),
        (["--top-p", "0"], "top_p must be in (0, 1], got 0.0"),
        (["--top-p", "1e-60"], "top_p must be in (0, 1], got 1e-60"),
        (["--min-p", "2"], "min_p must be in [0, 1], got 2.0"),
        (["--top-k", "-3"], "top_k must be 0 (off) or a positive count, got -3"),
        (["--seed", "-1"], "seed must be in [0, 2^32), got -1"),
        (["--max-new-tokens", "0"], "max_new_tokens must be at least 1"),
        (["--max-new-tokens", str(10**30)], "max_new_tokens must be at least 1 and below 2^30"),
        (["--drafter", "lmm:4"], "Unknown drafter 'lmm': did you mean lm"),
        (["--drafter", "lm:0"], "A draft length must be in 1..63, got 0"),
        (["--drafter", "xyzzy"], "known are none, lm, glide, medusa"),
        (["--prompt", ""], "The prompt is empty"),
        (["--prompt", "word " * 300], "but the context of 256 must also hold at least one new"),
        (["--prompts", "/absent.jsonl"], "There is no file /absent.jsonl"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_values(flags, message, model, capsys):
    prompt = [] if any(flag.startswith("--prompt") for flag in flags) else ["--prompt", PROMPT]
    assert message in fails(capsys, "generate", "--model", model, *prompt, *flags)


def test_bad_line_is_named(model, capsys, tmp_path):
    args = ["generate", "--model", model, "--prompts"]
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": \n')
    assert f"{file}, line 2: not valid JSON" in fails(capsys, *args, file)
    lines(file, {"prompt": "a"}, {"prompt": "b", "temperature": -2})
    assert f"{file}, line 2: temperature must be" in fails(capsys, *args, file)
    lines(file, {"prompt": "a"}, {"id": "big", "prompt": "word " * 300})
    assert "Prompt big: The prompt has" in fails(capsys, *args, file)


def test_bad_checkpoints(copy, capsys, tmp_path, monkeypatch):
    target = copy / "target"
    args = ["generate", "--prompt", PROMPT, "--drafter", "lm:3", *SHORT, "--model"]
    assert "There is no folder" in fails(capsys, *args, tmp_path / "absent")
    assert "no config.json" in fails(capsys, *args, copy)

    ok(capsys, "convert", target, tmp_path / "parts", "--max-shard-mb", 0.1)
    next((tmp_path / "parts").glob("model-00002*")).unlink()
    assert "lacks 1 of the" in fails(capsys, *args, tmp_path / "parts")

    weights = target / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "truncated or damaged" in fails(capsys, *args, target)
    weights.write_bytes(whole)

    tensors = load_file(weights)
    tensors["stray"] = tensors.pop("model.norm.weight")
    save_file(tensors, weights)
    message = fails(capsys, *args, target)
    assert "missing model.norm.weight" in message and "unexpected stray" in message
    weights.write_bytes(whole)

    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    assert "mamba" in fails(capsys, *args, target)
    (target / "config.json").write_text(json.dumps(config))

    (target / "tokenizer.json").rename(target / "x")
    assert "has no tokenizer" in fails(capsys, *args, target)
    (target / "x").rename(target / "tokenizer.json")

    shutil.rmtree(copy / "lm")
    assert "say where it is with --draft lm=DIR" in fails(capsys, *args, target)

    monkeypatch.setattr("jax_specdec.cli.common.DEMO_TARGET", tmp_path / "absent")
    assert "no embedded checkpoint" in fails(capsys, *args[:-1])


@pytest.mark.usefixtures("relaxed_promotion")
def test_other_vocabulary(copy, data, capsys, tmp_path):
    tokenizer = tmp_path / "tokenizer"
    ok(capsys, "train", "tokenizer", "--data", data, "--vocab-size", 270, "--out", tokenizer)
    args = ["train", "lm", "--data", data, "--tokenizer", tokenizer, "--out", tmp_path / "run"]
    args += ["--heldout-share", 0.5, "--steps", 1, "--batch-size", 2, "--sequence-length", 8]
    ok(capsys, *args, "--hidden-size", 16, "--layers", 1, "--heads", 1, "--context", 64)
    args = ["generate", "--model", copy / "target", "--prompt", PROMPT, "--drafter"]
    draft = ["lm", "--draft", f"lm={tmp_path / 'run/checkpoint'}"]
    assert "vocabulary has 270 entries" in fails(capsys, *args, *draft)
    # As many entries, but other ones.
    written = json.loads((copy / "lm/tokenizer.json").read_text())
    vocab = written["model"]["vocab"]
    a, b = sorted(vocab, key=vocab.get)[40:42]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (copy / "lm/tokenizer.json").write_text(json.dumps(written))
    assert "agrees with the target's on 298 of 300" in fails(capsys, *args, "lm")


def test_no_memory(model, capsys, monkeypatch):
    args = ["generate", "--model", model, "--drafter", "none", "--prompt", PROMPT, *SHORT]
    monkeypatch.setattr(pipeline, "available_memory", lambda: 1000)
    message = fails(capsys, *args, "--batch-size", 5)  # a program that no other test compiles
    assert "cache" in message and "are free" in message
    monkeypatch.setattr(checkpoints, "available_memory", lambda: 1000)
    assert "parameters" in fails(capsys, *args)
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    assert (
        json.loads(ok(capsys, "info", "--model", model, "--drafter", "none", "--json"))["fits"]
        is False
    )


def test_info_of_a_cascade(model, capsys):
    """Each drafter in it once, and what they take together."""
    spec = "cascade(lm[max-gram:4]:3, bigram:2, lm:1)"
    (about,) = records(capsys, "info", "--model", model, "--drafter", spec)
    drafter = about["drafter"]
    assert list(drafter["parts"]) == ["lm", "max-gram", "bigram"]
    sizes = [drafter["parts"][name]["memory"]["total"] for name in ("lm", "bigram")]
    assert drafter["memory"]["total"] == sum(sizes)
    assert about["total_bytes"] == about["memory"]["total"] + sum(sizes)
    assert "lm  " in ok(capsys, "info", "--model", model, "--drafter", spec)


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


def test_run_time_failures(model, capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    args = ["convert", model, tmp_path / "file/out"]
    assert "could not be written" in fails(capsys, *args, status=1)

    def broken(kind):
        def convert(*args, **kwargs):
            raise kind("first line\nsecond line")

        monkeypatch.setattr(checkpoints, "convert", convert)

    broken(KeyError)
    message = fails(capsys, *args, status=1)
    assert message.startswith("error: internal KeyError") and "--debug" in message
    broken(MemoryError)
    assert "The memory ran out" in fails(capsys, *args, status=1)
    assert main([*map(str, args), "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err
    assert main(["--debug", *map(str, args)]) == 1
    assert "Traceback" in capsys.readouterr().err
    broken(KeyboardInterrupt)
    assert main([str(a) for a in args]) == 130


# as a program


def run_python(*argv, **kwargs):
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, **kwargs)


def test_program(model):
    done = run_python("-m", "jax_specdec", "generate", "--model", model, "--json", input="")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: The prompt is empty.\n"
    done = run_python("-m", "jax_specdec", "--version")
    assert done.returncode == 0 and done.stdout.strip()


def test_help_does_not_wait_for_jax():
    code = (
        "import sys\nfrom jax_specdec.cli import main\n"
        "for argv in (['--help'], ['generate', '--help'], ['train', 'lm', '--help'], ['demo', '-h']):\n"
        "    try:\n        main(argv)\n    except SystemExit as end:\n        assert end.code == 0\n"
        "heavy = {'jax', 'numpy', 'transformers', 'rich', 'grain'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert "--max-new-tokens" in done.stdout


def test_import_leaves_out_nnx():
    code = (
        "import sys, jax_specdec\n"
        "for name in jax_specdec.__all__: getattr(jax_specdec, name)\n"
        "import jax_specdec.training.lm, jax_specdec.demo\n"
        "assert set(jax_specdec.__all__) <= set(dir(jax_specdec))\n"
        "nnx = [name for name in sys.modules if name.startswith('flax.nnx')]\n"
        "assert not nnx, nnx[:3]"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


def test_demo_checkpoint_is_beside_the_package():
    assert DEMO_TARGET.parts[-3:] == ("checkpoints", "demo", "target")
    assert (DEMO_TARGET.parents[2] / "jax_specdec").is_dir()
