"""`generate` and `demo` on tiny checkpoints."""

import io
import re
import sys

import pytest
from commands import PROMPT, SHORT, fails, lines, ok, records

from jax_specdec import pipeline
from jax_specdec.cli import main

STATS = {
    "num_tokens",
    "num_spec_steps",
    "num_cached_tokens",
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
    "steps_per_width",
    "steps_per_depth",
}


# generate


@pytest.mark.smoke
def test_generate(model, capsys):
    status = main(["generate", "--model", model, "--prompt", PROMPT, "--drafter", "lm:3", *SHORT])
    out, err = capsys.readouterr()
    assert status == 0 and out.endswith("\n")
    # On a slow machine, it also says what it compiles.
    assert len([line for line in err.splitlines() if not line.startswith("compiling")]) == 1
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
    out = ok(
        capsys, "demo", "--model", model, "--drafter", "first(max-gram[match=2]:4, lm:3)", *SHORT
    )
    assert "plain and with first(max-gram[match=2]:4, lm:3)" in " ".join(out.split()), (
        "brackets are no markup"
    )


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

        def __init__(self, target, drafter=None, **options):
            self._inner, self._wrong = real(target, drafter, **options), drafter is None

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
