"""Compiled programs in the user's cache: where, whether, and one for all requests of a size class."""

import random

import jax
import pytest

import jax_specdec as sd
from jax_specdec import loading, progress, user_cache
from jax_specdec.doctor import compile_cache

BEGINNING = {
    "jax_compilation_cache_dir": None,
    "jax_compilation_cache_max_size": -1,
    "jax_enable_compilation_cache": True,
    "jax_persistent_cache_min_compile_time_secs": 0,
}


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """JAX as it begins, and a user without a cache."""
    old = {name: getattr(jax.config, name) for name in BEGINNING}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(progress, "_said", set())
    for name, value in BEGINNING.items():
        jax.config.update(name, value)
    yield tmp_path / "cache"
    for name, value in old.items():
        jax.config.update(name, value)
    from jax.experimental.compilation_cache import compilation_cache

    compilation_cache.reset_cache()


def test_programs_are_kept_in_the_users_cache(fresh):
    constant = random.SystemRandom().random()
    assert user_cache.keep_programs() is None
    folder = user_cache.programs_folder()
    assert folder is not None and folder.is_relative_to(fresh)
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert jax.config.jax_compilation_cache_max_size == user_cache.MOST_BYTES
    jax.jit(lambda x: x + constant)(1.0).block_until_ready()
    assert any(file.name.endswith("-cache") for file in folder.iterdir())
    (found,) = compile_cache()
    assert found.state == "ok" and str(folder) in found.text


def test_what_the_user_said_of_jaxs_cache_holds(fresh, tmp_path):
    jax.config.update("jax_enable_compilation_cache", False)
    assert user_cache.keep_programs() is None and jax.config.jax_compilation_cache_dir is None
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    assert user_cache.keep_programs() is None
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine") and not fresh.exists()


def test_a_folder_that_cannot_be_written_is_said_and_does_no_harm(fresh, monkeypatch):
    fresh.write_text("a file")
    lines = []
    monkeypatch.setattr(progress, "say", lines.append)
    for _ in range(2):
        loading.keep_compiled()
    (line,) = lines
    assert "cannot be written (Not a directory)" in line and str(fresh) in line
    assert jax.config.jax_compilation_cache_dir is None
    (found,) = compile_cache()
    assert found.state != "fail"


def test_it_can_be_switched_off(fresh, tiny_checkpoints, monkeypatch):
    asked = []
    monkeypatch.setattr(loading, "keep_compiled", lambda: asked.append(1))
    sd.load(tiny_checkpoints / "target", "none", keep_programs=False)
    assert not asked
    sd.load(tiny_checkpoints / "target", "none")
    assert asked == [1]


def test_one_program_serves_a_size_class(tiny_checkpoints):
    """Any number of new tokens, a few stop tokens, and stop strings of about the same length."""
    target = sd.load_target(tiny_checkpoints / "target", dtype="float32")
    decoder = sd.SpeculativeDecoder(target, sd.load_drafter("max-gram:3", target))
    for tokens in (1, 7, 40):
        decoder("the cat", max_new_tokens=tokens)
    decoder("One day, the girl", max_new_tokens=9, stop_token_ids=(7, 8), temperature=0.7)
    assert decoder.compilations == 2
    for stop in ("the end", ("girl", "a"), "cat", ("xyz", "uvw")):
        decoder("the cat", max_new_tokens=5, stop=stop)
    assert decoder.compilations == 4
