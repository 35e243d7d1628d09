"""`plan`: what a model takes on devices that are not here."""

import json
from pathlib import Path

import pytest
from commands import fails, ok
from jax.experimental import topologies

CONFIGS = Path(__file__).parents[2] / "benchmarks/configs"
LLAMA_8B, LLAMA_70B = (CONFIGS / f"llama-3-{size}.json" for size in ("8b", "70b"))


def plan(capsys, *argv):
    return json.loads(ok(capsys, "plan", "--json", *argv))


def test_arithmetic(capsys):
    found = plan(capsys, "--model", LLAMA_8B, "--topology", "v5e:2x4", "--arithmetic")
    # 8.03e9 parameters over 8 devices, and a GliDe layer with its cross-attention on each.
    own = found["memory"]["parameters"] - 8_030_261_248 * 2 / 8
    assert 0.4e9 < own < 0.6e9
    assert found["memory"]["cache"] == 2 * 32 * 1 * 128 * 2 * (8192 + 16)
    assert found["fits"] and found["by"] == "arithmetic"
    assert found["mesh"] == {"data": 1, "tensor": 8}
    one, four = (found["tokens_per_second"][tau] for tau in ("1.0", "4.0"))
    assert four == pytest.approx(4 * one)


def test_what_does_not_fit_is_refused_with_what_does(capsys):
    text = ok(capsys, "plan", "--model", LLAMA_70B, "--topology", "v5e:2x2")
    assert "It does not fit" in text and "16 devices as data=1,tensor=16" in text
    found = plan(
        capsys, "--model", LLAMA_8B, "--topology", "v5e:2x2", "--batch-size", 256, "--arithmetic"
    )
    assert not found["fits"]
    batch = next(x for x in found["alternatives"] if x.startswith("a batch of "))
    fewer = ("--batch-size", batch.split()[-1])
    again = plan(capsys, "--model", LLAMA_8B, "--topology", "v5e:2x2", "--arithmetic", *fewer)
    assert again["fits"]


def test_int8(capsys):
    """What would help is offered, and by the formulas it does."""
    given = ("--model", LLAMA_70B, "--topology", "v6e:2x2", "--arithmetic")
    found = plan(capsys, *given)
    assert not found["fits"] and "weights in int8" in found["alternatives"]
    again = plan(capsys, *given, "--int8", "weights")
    assert again["fits"] and again["int8"] == ["weights"]
    both = plan(capsys, *given, "--int8", "weights,cache")
    assert both["memory"]["cache"] == pytest.approx(again["memory"]["cache"] / 2)


def test_gpus_by_arithmetic(capsys):
    found = plan(capsys, "--model", LLAMA_70B, "--topology", "h100:8", "--batch-size", "8")
    assert found["by"] == "arithmetic" and found["fits"]


def test_compiled_for_this_machine(capsys, tiny_checkpoints):
    """Memory and collectives of a real program."""
    found = plan(
        capsys,
        *(
            "--model",
            tiny_checkpoints / "target",
            "--topology",
            "cpu:8",
            "--mesh",
            "data=4,tensor=2",
        ),
        *("--drafter", "max-gram:3", "--batch-size", 4, "--context", 128, "--dtype", "float32"),
    )
    assert found["by"] == "compiler" and found["fits"]
    part = found["program"]["round"]
    assert part["total"] == sum(part[x] for x in ("parameters", "state", "temporaries", "code"))
    reduced = found["program"]["collectives"]["all-reduce"]["count"]
    assert 2 * 3 + 1 <= reduced <= 2 * 3 + 8


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--topology", "v5e"], "There is no topology 'v5e'"),
        (["--topology", "v9:2x2"], "There is no topology 'v9:2x2'"),
        (["--topology", "v5e:2x2x1"], "has a shape like 2x4"),
        (["--topology", "v5e:2x4", "--mesh", "tensor=4"], "has 4 devices and v5e:2x4 8"),
        (["--topology", "v5e:2x4", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["--topology", "v5e:2x4", "--context", "99999"], "context is 8192 tokens"),
        (["--topology", "v5e:2x4", "--drafter", "lm:3"], "needs its checkpoint"),
        (["--topology", "v5e:2x4", "--drafter", "bigram:3"], "plan knows the drafters"),
        (
            ["--topology", "v5e:2x4", "--mesh", "data=8", "--batch-size", "4"],
            "does not divide over data=8",
        ),
    ],
)
def test_wrong_use(capsys, argv, sentence):
    assert sentence in fails(capsys, "plan", "--model", LLAMA_8B, *argv)


@pytest.mark.parametrize(
    ("reason", "status", "sentence"),
    [
        ("libtpu.so: cannot open", 1, "The TPU compiler is not installed: `pip install libtpu`"),
        ("No such slice", 2, "The compiler does not know the topology v5e:2x4: No such slice."),
    ],
)
def test_what_the_compiler_refuses(capsys, monkeypatch, reason, status, sentence):
    def refuse(**_):
        raise RuntimeError(reason)

    monkeypatch.setattr(topologies, "get_topology_desc", refuse)
    given = ("--model", LLAMA_8B, "--topology", "v5e:2x4", "--drafter", "none")
    assert sentence in fails(capsys, "plan", *given, status=status)


def test_heads_that_do_not_divide(capsys, tmp_path):
    """The mesh is our choice, so the sentence says more than of one that was given."""
    config = json.loads(LLAMA_8B.read_text()) | {"num_attention_heads": 9, "num_key_value_heads": 3}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config | {"head_dim": 64}))
    given = ("plan", "--model", file, "--topology", "v5e:2x4", "--arithmetic")
    assert "--batch-size that is a multiple of 8" in fails(capsys, *given)
    ok(capsys, *given, "--batch-size", 8)


def test_no_model(capsys, tmp_path):
    assert "no folder or file" in fails(
        capsys, "plan", "--model", tmp_path / "none.json", "--topology", "v5e:2x4"
    )
