"""Tables of block sizes: every one is complete, the first entry that fits decides, devices are told apart."""

import json
import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels import _triton, autotune, tuning

CONFIGS = {"tpu": tuning.TpuConfig, "gpu": tuning.GpuConfig}


def described(kind, platform, cores=None):
    device = AbstractDevice(device_kind=kind, num_cores=cores, platform=platform)
    return use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))


@pytest.mark.parametrize("name", [x.name for x in tuning.FOLDER.iterdir() if x.suffix == ".json"])
def test_tables_are_complete(name):
    table = json.loads((tuning.FOLDER / name).read_text())
    platform = "gpu" if "multiprocessors" in table else "tpu"
    assert table["device"] and table["source"]
    widest = 0
    for entry in table["entries"]:
        CONFIGS[platform](**entry["config"])
        widest = max(widest, entry["rows"])
    # A prefill of the longest chain with eight query heads a KV head.
    assert widest >= 1024
    for itemsize in (2, 4):
        assert any(e["bytes"] >= itemsize and e["head_dim"] == 256 for e in table["entries"])


def test_the_first_entry_that_fits(monkeypatch):
    entries = [
        {"bytes": 2, "head_dim": 64, "rows": 16, "config": {"keys": 128}},
        {"bytes": 2, "head_dim": 128, "rows": 64, "config": {"keys": 256}},
        {"bytes": 4, "head_dim": 256, "rows": 1024, "config": {"keys": 1024}},
    ]
    monkeypatch.setattr(tuning, "table", lambda *_: {"entries": entries})
    wanted = {
        (jnp.bfloat16, 64, 16): 128,
        (jnp.bfloat16, 64, 17): 256,
        (jnp.bfloat16, 80, 8): 256,
        (jnp.float32, 64, 8): 1024,
        (jnp.bfloat16, 256, 4096): 1024,  # wider than all: the widest of its kind
        (jnp.bfloat16, 128, 4096): 256,
    }
    for (dtype, head_dim, rows), keys in wanted.items():
        assert tuning.tpu(dtype, head_dim, rows).keys == keys


def test_devices():
    assert tuning.device().platform == "cpu" and tuning.multiprocessors() == 1
    with jax.default_device("cpu"):
        assert tuning.device().platform == "cpu"
    with jax.default_device(jax.devices()[-1]):
        assert tuning.device().platform == "cpu"
    with described("TPU v5 lite", "tpu"):
        assert tuning.device() == tuning.Device("tpu", "TPU v5 lite")
    with described("NVIDIA H100 80GB HBM3", "gpu", 132):
        assert tuning.device().platform == "gpu" and tuning.multiprocessors() == 132
    with described("NVIDIA A100", "gpu"):
        assert tuning.multiprocessors() == 108  # the table's
    assert tuning.file_of("TPU v5 lite").name == "tpu_v5_lite.json"


@pytest.mark.parametrize(("capability", "enough"), [("7.5", False), ("8.0", True), ("12.0", True)])
def test_gpus_without_tensor_cores(monkeypatch, capability, enough):
    gpu = types.SimpleNamespace(
        platform="gpu", device_kind="Tesla", core_count=40, compute_capability=capability
    )
    monkeypatch.setattr(tuning, "default_device", lambda: gpu)
    assert tuning.has_tensor_cores(tuning.device()) == enough
    q = jax.ShapeDtypeStruct((1, 1, 8, 64), "bfloat16")
    why = _triton.reason_against(q, None, new_tokens=False)
    assert (why is None) == enough
    assert enough or why == "needs compute capability 8.0 or more, which Tesla has not"


def test_candidates():
    """Some for every shape that is tuned, and none that holds more than there is."""
    for platform, config in CONFIGS.items():
        for dtype, head_dim in autotune.SHAPES:
            itemsize = jnp.dtype(dtype).itemsize
            for rows in autotune.ROWS:
                found = list(autotune.candidates(platform, rows, head_dim, itemsize))
                assert found and len(set(found)) == len(found)
                assert all(isinstance(x, config) for x in found)
    for config in autotune.candidates("tpu", 64, 256, 4):
        assert 4 * config.heads * config.keys * 256 * 4 <= 8 << 20


def test_nothing_to_tune_here(capsys):
    assert autotune.main([]) == 2
    assert "nothing to tune on cpu: run this on a TPU or a GPU" in capsys.readouterr().err
