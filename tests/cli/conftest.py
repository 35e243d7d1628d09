"""Tiny checkpoints for the commands, and decoders that they share."""

import shutil
from typing import Any

import jax
import pytest
from commands import lines

from jax_specdec import pipeline
from jax_specdec.core.acceptance import MATCH


@pytest.fixture(scope="module")
def decoders():
    return {}


@pytest.fixture(autouse=True)
def shared_programs(decoders, monkeypatch):
    """Commands that would build the same decoder share one, and so its compiled programs."""
    real: Any = pipeline.SpeculativeDecoder

    def make(target, drafter=None, *, rule=MATCH, **loop):
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
