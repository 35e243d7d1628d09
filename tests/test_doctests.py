"""The examples of docstrings run."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import jax_specdec

MODULES = [
    info.name
    for info in pkgutil.walk_packages(jax_specdec.__path__, "jax_specdec.")
    if not info.ispkg
    and ">>> " in Path(info.module_finder.path, f"{info.name.rpartition('.')[2]}.py").read_text()  # type: ignore[union-attr]
]


def test_there_are_examples():
    assert {"jax_specdec.generation", "jax_specdec.core.draft"} <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0 and result.failed == 0
