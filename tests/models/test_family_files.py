"""Checkpoints of every family: written again, on a mesh, in `info`."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_families import (  # noqa: F401 (a fixture)
    CASES,
    TOLERANCE,
    folder,
    golden,
    load,
    make,
    one_pass,
    relative_error,
)

from jax_specdec import UserError
from jax_specdec.checkpoints.target_bound import target_fingerprint
from jax_specdec.checkpoints.targets import convert, inspect_checkpoint, load_target
from jax_specdec.cli import main
from jax_specdec.models.tensor_parallel import divide

NEW = [case for case in CASES if case in make["CONTROLS"]]


def tensors_of(path):
    files = sorted(path.glob("*.safetensors"))
    return {name: value for file in files for name, value in load_file(file).items()}


@pytest.mark.parametrize("case", NEW)
def test_what_is_written_is_what_was_read(case, folder, tmp_path):  # noqa: F811
    convert(folder(case), tmp_path / "again", max_shard_bytes=20_000)
    want, got = tensors_of(folder(case)), tensors_of(tmp_path / "again")
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name])
    assert inspect_checkpoint(tmp_path / "again") == inspect_checkpoint(folder(case))
    assert target_fingerprint(tmp_path / "again") == target_fingerprint(folder(case))


def mesh_of(tensor):
    axes = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((tensor,), ("tensor",), axes, devices=jax.devices()[:tensor])


@pytest.mark.parametrize("case", NEW)
def test_parts_of_a_mesh_are_those_of_the_whole(case, folder):  # noqa: F811
    """Over four devices, twice as many as most cases have KV heads."""
    from jax_specdec.core.sharding import ShardingRules

    one = load(folder(case), case)
    one.params.pop("head" if one.config.tied_head else "", None)  # CPU's transposed copy
    rules = ShardingRules(batch=None)
    got = load(folder(case), case, mesh=mesh_of(4), rules=rules)
    got.params.pop("head" if one.config.tied_head else "", None)
    want = divide(one.params, one.config, got.decoder)
    jax.tree.map(np.testing.assert_array_equal, got.params, want)


@pytest.mark.parametrize(
    "case", ["olmo2", "gpt_neox", "mixtral", "gpt2", "gemma2", "qwen3_moe_mixed"]
)
def test_logits_on_a_mesh(case, folder):  # noqa: F811
    from jax_specdec.core.sharding import ShardingRules

    _, tokens, want = golden(case)
    target = load(folder(case), case, mesh=mesh_of(4), rules=ShardingRules(batch=None))
    got = one_pass(target.decoder, target.params, tokens)
    assert relative_error(got, want) < TOLERANCE


def test_int8_experts(folder):  # noqa: F811
    _, tokens, want = golden("mixtral")
    target = load(folder("mixtral"), "mixtral", int8=("weights",))
    got = one_pass(target.decoder, target.params, tokens)
    assert 1e-4 < relative_error(got, want) < 0.2


def test_a_mixture_that_does_not_divide(folder):  # noqa: F811
    from jax_specdec.core.sharding import ShardingRules

    with pytest.raises(UserError, match="axis mlp of 16 does not divide over 3"):
        rules = ShardingRules(batch=None, heads=None, kv_heads=None, vocab=None)
        load(folder("qwen3_moe"), "qwen3_moe", mesh=mesh_of(3), rules=rules)


def test_a_context_of_long_rotary_factors(folder):  # noqa: F811
    """Short texts are read with short factors, longer ones are refused unless they are asked for."""
    path = folder("phi4")
    assert load_target(path, tokenizer=False).config.context == 32
    assert load_target(path, tokenizer=False, context=64).config.context == 64
    with pytest.raises(UserError, match="a context of 65 is not among 1 to 64 tokens"):
        load_target(path, tokenizer=False, context=65)


def test_info_of_a_mixture(folder, capsys):  # noqa: F811
    asked = ["info", "--model", str(folder("qwen3_moe")), "--max-new-tokens", "8"]
    assert main([*asked, "--drafter", "none", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["num_experts"], found["experts_per_token"], found["expert_size"]) == (8, 3, 16)
    assert found["num_parameters"] == sum(x.size for x in tensors_of(folder("qwen3_moe")).values())
    assert main([*asked, "--drafter", "none"]) == 0
    assert "8 experts of 16, 3 a token" in capsys.readouterr().out


def test_names_without_their_first_part_and_buffers(folder, tmp_path):  # noqa: F811
    """As the first GPT-2 is published: no `transformer.`, and each layer's causal mask."""
    (tmp_path / "config.json").write_text(json.dumps(golden("gpt2")[0]))
    tensors = tensors_of(folder("gpt2"))
    tensors = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    tensors |= {f"h.{i}.attn.bias": np.ones((1, 1, 4, 4), np.float32) for i in range(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    got = load_target(tmp_path, tokenizer=False).params
    want = load_target(folder("gpt2"), tokenizer=False).params
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert jnp.isfinite(got["positions"]).all()
