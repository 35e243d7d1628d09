"""Whole rounds at full depth over the chips of a slice, by the real compiler."""

import json
from pathlib import Path

import pytest
from chips import needs_libtpu

from jax_specdec.cli import main

pytestmark = [needs_libtpu, pytest.mark.slow]
CONFIGS = Path(__file__).parents[2] / "benchmarks/configs"


@pytest.mark.parametrize(
    ("model", "topology", "batch", "layers"),
    [
        ("llama-3-8b", "v5e:2x4", 8, 32),
        ("llama-3-8b", "v6e:2x2", 1, 32),
        ("llama-3-70b", "v6e:4x4", 8, 80),
    ],
)
def test_full_depth(capsys, model, topology, batch, layers):
    config = CONFIGS / f"{model}.json"
    given = ["--model", config, "--topology", topology, "--batch-size", batch, "--context", 4096]
    assert main(["plan", "--json", *map(str, given)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["by"] == "compiler" and found["fits"]
    kinds = found["program"]["collectives"]
    # Two for each layer of the target, and those of embedding, head and drafter.
    assert kinds["all-reduce"]["count"] >= 2 * layers + 3
    program = found["program"]["round"]
    gathered = kinds.get("all-gather", {"bytes": 0})["bytes"]
    assert gathered < program["parameters"] // 16  # no weights, no caches
    assert program["parameters"] == pytest.approx(found["memory"]["parameters"], rel=0.2)


@pytest.fixture
def shallow(tmp_path):
    """Llama-3-8B with two layers: depth changes sizes, not the program."""
    fields = json.loads((CONFIGS / "llama-3-8b.json").read_text())
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**fields, "num_hidden_layers": 2}))
    return ["plan", "--json", "--model", str(file), "--topology", "v5e:2x4", "--batch-size", "8"]


def test_the_collectives_of_the_textbook(capsys, shallow):
    """Two for each layer, one for the embedding, one for the choice of the token."""
    assert main([*shallow, "--drafter", "none", "--context", "1024"]) == 0
    found = json.loads(capsys.readouterr().out)
    kinds = found["program"]["collectives"]
    assert list(kinds) == ["all-reduce"] and kinds["all-reduce"]["count"] == 2 * 2 + 2


def test_int8_with_a_drafter(capsys, shallow):
    assert main([*shallow, "--int8", "weights,cache", "--context", "1024"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["by"] == "compiler" and found["fits"]
    kinds = dict(found["program"]["collectives"])
    # GliDe's queries are gathered, some KB a step; no weights, no caches.
    assert kinds.pop("all-gather", {"bytes": 0})["bytes"] < 2**20
    assert list(kinds) == ["all-reduce"]
