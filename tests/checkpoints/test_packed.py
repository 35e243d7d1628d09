"""Quantized safetensors: what a package's numbers and scales stand for, packed here as its documentation says."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from small_checkpoint import CONFIG, assert_trees_equal, rewrite, write_random

from jax_specdec.checkpoints.target_tensors import read_hf_config
from jax_specdec.checkpoints.targets import convert, inspect_checkpoint, load_target
from jax_specdec.cli import main
from jax_specdec.errors import UserError

GROUP = 16
E4M3 = ml_dtypes.float8_e4m3fn
# Column of each nibble of an AWQ word, low bits first (AutoAWQ's order_map).
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@pytest.fixture
def folder(tmp_path):
    return write_random(tmp_path / "model", CONFIG)


def mesh_of(tensor):
    names, types = ("data", "tensor"), (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((1, tensor), names, axis_types=types, devices=jax.devices()[:tensor])


def pack(folder, about, change, file="config.json", damage=lambda tensors: None):
    """Replaces the weights of all projections; returns the folder's plain tensors of the same values.

    Args:
      about: what the configuration says. change: gives the stored tensors, by the end of their names, and the weights
        that they stand for.
    """
    plain = load_file(folder / "model.safetensors")

    def packed(tensors):
        for i, name in enumerate(n for n in plain if n.endswith("_proj.weight")):
            stored, value = change(np.random.default_rng(i), plain[name].shape)
            del tensors[name]
            tensors.update({name.replace("weight", end): x for end, x in stored.items()})
            plain[name] = value
        damage(tensors)

    rewrite(folder, packed)
    said = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
    (folder / file).write_text(json.dumps({**said, **about}))
    return plain


def fp8(scale_of, end="weight_scale", kind=E4M3):
    """FP8 weights whose scale is `scale_of` of random numbers, and the matrix of all scales."""

    def change(rng, shape):
        weight = rng.normal(size=shape).astype(kind)
        scale, whole = scale_of(rng, shape)
        stored = {"weight": weight, end: scale, "input_scale": np.ones(1, np.float32)}
        return stored, weight.astype(np.float32) * whole

    return change


def tensor_scale(rng, shape):
    scale = rng.uniform(0.5, 2, (1,)).astype(np.float32)
    return scale, np.broadcast_to(scale, shape)


def row_scale(rng, shape):
    scale = rng.uniform(0.5, 2, (shape[0], 1)).astype(ml_dtypes.bfloat16)
    return scale, np.broadcast_to(scale.astype(np.float32), shape)


def block_scale(rng, shape):
    """In blocks of 12 by 16, which do not divide every matrix."""
    scale = rng.uniform(0.5, 2, (-(-shape[0] // 12), -(-shape[1] // 16))).astype(np.float32)
    whole = np.empty(shape, np.float32)
    for row in range(shape[0]):
        for column in range(shape[1]):
            whole[row, column] = scale[row // 12, column // 16]
    return scale, whole


def int8(rng, shape):
    weight = rng.integers(-127, 128, shape, np.int8)
    scale, whole = row_scale(rng, shape)
    return {"weight": weight, "weight_scale": scale}, weight.astype(np.float32) * whole


def words(parts, bits):
    """`[rows, parts]` of a word each, the first part in the lowest bits, as int32."""
    out = np.zeros((len(parts), parts.shape[1] * bits // 32), np.uint32)
    each = 32 // bits
    for column in range(parts.shape[1]):
        out[:, column // each] |= parts[:, column].astype(np.uint32) << bits * (column % each)
    return out.view(np.int32)


def integers(rng, shape, bits):
    """Weights, zero points and scales as their quantizers have them: `[in, out]`, and a group of inputs."""
    outputs, inputs = shape
    groups = -(-inputs // GROUP)
    weight = rng.integers(0, 1 << bits, (inputs, outputs))
    zero = rng.integers(1, 1 << bits, (groups, outputs))
    scale = rng.uniform(0.01, 0.1, (groups, outputs)).astype(np.float16)
    return weight, zero, scale


def gptq(bits=4, below=1, shuffled=False):
    def change(rng, shape):
        weight, zero, scale = integers(rng, shape, bits)
        index = np.arange(shape[1], dtype=np.int32) // GROUP
        index = rng.permutation(index) if shuffled else index
        value = (weight - zero[index]).astype(np.float32) * scale[index].astype(np.float32)
        stored = {
            "qweight": words(weight.T, bits).T.copy(),
            "qzeros": words(zero - below, bits),
            "scales": scale,
        }
        return stored | ({"g_idx": index} if shuffled else {}), value.T

    return change


def awq(rng, shape):
    weight, zero, scale = integers(rng, shape, 4)
    index = np.arange(shape[1]) // GROUP
    value = (weight - zero[index]).astype(np.float32) * scale[index].astype(np.float32)

    def ordered(x):
        return x.reshape(len(x), -1, 8)[..., list(AWQ_ORDER)].reshape(x.shape)

    stored = {"qweight": words(ordered(weight), 4), "qzeros": words(ordered(zero), 4)}
    return stored | {"scales": scale}, value.T


def method(name, **more):
    return {"quantization_config": {"quant_method": name, **more}}


def compressed(**weights):
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, **weights}}}
    return method("compressed-tensors", format="float-quantized", config_groups=groups)


MODELOPT = {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None}}
BLOCKS = {"weight_block_size": [12, 16]}
WAYS = {
    "DeepSeek": (method("fp8", **BLOCKS), fp8(block_scale, "weight_scale_inv"), "fp8"),
    "fp8 tensors": (method("fp8"), fp8(tensor_scale), "fp8"),
    "fp8 e5m2": (method("fp8"), fp8(tensor_scale, kind=ml_dtypes.float8_e5m2), "fp8"),
    "fbgemm": (method("fbgemm_fp8"), fp8(row_scale), "fbgemm_fp8"),
    "modelopt": (MODELOPT, fp8(tensor_scale), "modelopt"),
    "compressed rows": (compressed(strategy="channel"), fp8(row_scale), "compressed-tensors"),
    "compressed blocks": (
        compressed(strategy="block", block_structure=[12, 16]),
        fp8(block_scale),
        "compressed-tensors",
    ),
    "int8": (compressed(type="int"), int8, "compressed-tensors"),
    "GPTQ": (method("gptq", bits=4, group_size=GROUP), gptq(), "GPTQ of 4 bits"),
    "GPTQ, ordered": (
        method("gptq", bits=4, group_size=GROUP, desc_act=True),
        gptq(shuffled=True),
        "GPTQ of 4 bits",
    ),
    "GPTQ 8": (method("gptq", bits=8, group_size=GROUP), gptq(8), "GPTQ of 8 bits"),
    "GPTQ v2": (
        method("gptq", bits=4, group_size=GROUP, checkpoint_format="gptq_v2"),
        gptq(below=0),
        "GPTQ of 4 bits",
    ),
    "AWQ": (method("awq", bits=4, group_size=GROUP, version="gemm"), awq, "AWQ of 4 bits"),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_packed_weights_stand_for(way, folder, tmp_path):
    about, change, _ = WAYS[way]
    file = "hf_quant_config.json" if way == "modelopt" else "config.json"
    plain = pack(folder, about, change, file)
    convert(folder, tmp_path / "again")
    written = load_file(tmp_path / "again/model.safetensors")
    assert written.keys() == plain.keys()
    for name, value in plain.items():
        np.testing.assert_array_equal(written[name], value, name)
    hf = json.loads((tmp_path / "again/config.json").read_text())
    assert "quantization_config" not in hf
    assert inspect_checkpoint(folder) == (CONFIG, "float32")


@pytest.mark.parametrize("way", ["DeepSeek", "GPTQ, ordered", "AWQ"])
def test_parts_for_a_mesh(way, folder, tmp_path):
    about, change, _ = WAYS[way]
    pack(folder, about, change)
    convert(folder, tmp_path / "again")
    got, want = (
        load_target(path, tokenizer=False, mesh=mesh_of(2)).params
        for path in (folder, tmp_path / "again")
    )
    assert_trees_equal(got, want)


def test_info_names_the_packing(folder, capsys):
    about, change, name = WAYS["AWQ"]
    pack(folder, about, change)
    assert main(["info", "--model", str(folder), "--max-new-tokens", "8"]) == 0
    assert f"stored as {name}, read as float32" in capsys.readouterr().out


@pytest.mark.parametrize("way", ["modelopt", "GPTQ"])
def test_plan_counts_what_is_computed_with(way, folder, capsys):
    """Weights are turned into the dtype of computation while they are read."""
    asked = ["plan", "--model", str(folder), "--drafter", "none", "--topology", "v5e:1x1"]
    asked += ["--arithmetic", "--context", "64", "--json"]
    found = []
    for pack_it in (False, True):
        if pack_it:
            about, change, _ = WAYS[way]
            pack(
                folder,
                about,
                change,
                "hf_quant_config.json" if way == "modelopt" else "config.json",
            )
        assert main(asked) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("about", "message"),
    [
        (method("bitsandbytes"), r"quantized \(bitsandbytes\), which is not supported"),
        (method("modelopt", quant_algo="NVFP4"), r"quantized \(modelopt, NVFP4\)"),
        (method("gptq", bits=3), "GPTQ of 3 bits in the format gptq"),
        (method("gptq", bits=4, checkpoint_format="marlin"), "4 bits in the format marlin"),
        (method("awq", bits=4, version="gemv"), "AWQ of 4 bits in the version gemv"),
        (method("awq", bits=4, zero_point=False), "AWQ of 4 bits"),
        (method("gptq", bits=4, group_size=0), "group_size must be a positive number or -1"),
        (method("fp8", weight_block_size=[128]), "must be two sizes"),
        (compressed(num_bits=4), "compressed-tensors, float-quantized, 4 bits"),
        (compressed(symmetric=False), "compressed-tensors, float-quantized, 8 bits"),
        (method("compressed-tensors"), "of no groups"),
        ({"quantization_config": "fp8"}, r"quantized \(fp8\)"),
        ({"quantization_config": {}}, "an unnamed method"),
    ],
)
def test_unknown_ways(about, message, folder):
    hf = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**hf, **about}))
    with pytest.raises(UserError, match=message):
        load_target(folder, tokenizer=False)
    with pytest.raises(UserError, match=message):
        read_hf_config(folder / "config.json")  # as `plan` does


NAME = "model.layers.0.mlp.down_proj"


def test_packed_by_the_config_alone(folder):
    hf = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**hf, **method("gptq", bits=4)}))
    with pytest.raises(
        UserError, match=r"GPTQ of 4 bits by its config.json, and none by its files"
    ):
        load_target(folder, tokenizer=False)


@pytest.mark.parametrize(
    ("way", "end", "value", "message"),
    [
        ("fp8 tensors", "weight_scale", None, "no scale that fits model.layers.0.mlp.down_proj"),
        ("fp8 tensors", "weight_scale", np.ones((2, 1), np.float32), "no scale that fits"),
        ("GPTQ", "qzeros", None, "lacks the qzeros or scales of model.layers.0.mlp.down_proj"),
        ("GPTQ", "scales", np.ones((1, 32), np.float16), "in shapes that do not fit"),
        ("GPTQ", "qweight", np.ones(3, np.int32), "as matrices"),
        ("GPTQ, ordered", "g_idx", np.full(40, 7, np.int32), "names groups"),
        ("AWQ", "qweight", np.ones((40, 5), np.int32), "in shapes that do not fit"),
    ],
)
def test_parts_that_do_not_fit(way, end, value, message, folder):
    def damage(tensors):
        tensors.pop(f"{NAME}.{end}")
        if value is not None:
            tensors[f"{NAME}.{end}"] = value

    about, change, _ = WAYS[way]
    pack(folder, about, change, damage=damage)
    with pytest.raises(UserError, match=message):
        load_target(folder, tokenizer=False)
