"""The examples of docs/sharding.md run."""

import re
from pathlib import Path

import jax
import pytest

PAGE = Path(__file__).parents[2] / "docs/sharding.md"


@pytest.mark.slow
def test_examples(tiny_checkpoints, capsys):
    pytest.importorskip("flatbuffers")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 5
    names = {"FOLDER": tiny_checkpoints / "target"}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), names)
    assert capsys.readouterr().out.count("\n") == 4
