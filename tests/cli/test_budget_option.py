"""Budgets of rounds in commands."""

import pytest
from commands import PROMPT, SHORT, fails, records

from jax_specdec.cli import main

pytestmark = pytest.mark.usefixtures("budgets")


def test_rounds_are_counted(model, capsys):
    """By width and by depth; without a budget all are alike."""
    args = ["generate", "--model", model, "--prompt", PROMPT, "--drafter", "lm:3", *SHORT]
    (on,) = records(capsys, *args)
    rounds = on["stats"]["num_spec_steps"]
    assert on["stats"]["steps_per_width"] == {"1": 0, "2": 0, "3": 0, "4": rounds}
    assert on["stats"]["steps_per_depth"] == [0, 0, 0, rounds]
    assert main(args) == 0
    assert f", rounds by width 4: {rounds}, without a draft: 0" in capsys.readouterr().err
    assert "argument --budget: invalid choice: 'maybe'" in fails(capsys, *args, "--budget", "maybe")


def test_without_a_budget(model, capsys):
    args = ["generate", "--model", model, "--prompt", PROMPT, "--drafter", "lm:3", *SHORT]
    assert main([*args, "--budget", "off"]) == 0
    assert "rounds by width" not in capsys.readouterr().err
