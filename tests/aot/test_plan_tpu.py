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
        ("llama-3-70b", "v6e:4x4", 64, 80),
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
    assert 2 * layers + 3 <= kinds["all-reduce"]["count"] <= 2 * layers + 70
    weights = 2 * json.loads(config.read_text())["hidden_size"] ** 2
    gathered = kinds.get("all-gather", {"bytes": 0})["bytes"]
    assert gathered < weights // 4
    # What arithmetic says of parameters and cache is what the compiler needs.
    memory, program = found["memory"], found["program"]["round"]
    assert program["parameters"] == pytest.approx(memory["parameters"], rel=0.08)
    assert program["state"] == pytest.approx(memory["cache"], rel=0.5)
