"""The examples of docstrings and of docs/api.md run, and every public name has one."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import jax
import pytest

import jax_specdec

MODULES = [
    info.name
    for info in pkgutil.walk_packages(jax_specdec.__path__, "jax_specdec.")
    if not info.ispkg
    and ">>> " in Path(info.module_finder.path, f"{info.name.rpartition('.')[2]}.py").read_text()  # type: ignore[union-attr]
]
API = Path(__file__).parents[1] / "docs/api.md"


@pytest.fixture
def checkout(tiny_checkpoints, two_devices, tmp_path, monkeypatch):
    """A folder in which the demo's checkpoint is a tiny one, and what people's programs have: JAX's usual promotion."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/demo").symlink_to(tiny_checkpoints, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_there_are_examples():
    assert {"jax_specdec.generation", "jax_specdec.core.draft"} <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0 and result.failed == 0


def test_examples_of_public_names(checkout):
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.testfile(str(API), module_relative=False, optionflags=flags)
    assert result.attempted > 50 and result.failed == 0


def test_every_public_name_has_an_example():
    code = "\n".join(e.source for e in doctest.DocTestParser().get_examples(API.read_text()))
    shown = set(re.findall(r"\bsd\.(\w+)", code))
    missing = set(jax_specdec.__all__) - shown
    assert not missing, f"docs/api.md shows no use of {sorted(missing)}"
    assert shown <= set(jax_specdec.__all__)
