"""`config.json` in both directions: old and new spellings, round trips, refusals."""

import json
import math
import runpy
from dataclasses import replace
from pathlib import Path

import pytest

from jax_specdec.errors import UserError
from jax_specdec.models import ModelConfig, RopeConfig, config_from_hf, config_to_hf
from jax_specdec.models.glide_config import GliDeConfig
from jax_specdec.models.hf import FAMILIES
from jax_specdec.models.medusa import MedusaConfig

make = runpy.run_path(str(Path(__file__).parents[1] / "goldens" / "make.py"))
LLAMA = make["hf_config"]("llama")
LLAMA3 = make["hf_config"]("llama3")["rope_parameters"]


@pytest.mark.parametrize("case", make["CASES"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip(case, dtype):
    config = config_from_hf(make["hf_config"](case))
    hf = json.loads(json.dumps(config_to_hf(config, dtype)))
    assert config_from_hf(hf) == config
    assert hf["dtype"] == dtype
    assert hf["architectures"] == [FAMILIES[config.family].architecture]


@pytest.mark.parametrize("case", make["CASES"])
def test_transformers_reads_the_same_config(case):
    transformers = pytest.importorskip("transformers")
    config = config_from_hf(make["hf_config"](case))
    theirs = transformers.AutoConfig.for_model(**config_to_hf(config, "float32"))
    assert config_from_hf(json.loads(theirs.to_json_string(use_diff=False))) == config


@pytest.mark.parametrize(
    "keys, rope",
    [
        ({}, RopeConfig()),
        ({"rope_theta": 5e5}, RopeConfig(theta=5e5)),
        ({"rope_theta": 5e5, "rope_scaling": None}, RopeConfig(theta=5e5)),
        (
            {"rope_scaling": {"type": "linear", "factor": 4}},
            RopeConfig(kind="linear", factor=4.0),
        ),
        (
            {"rope_scaling": {"type": "wrong", "rope_type": "linear", "factor": 4.0}},
            RopeConfig(kind="linear", factor=4.0),
        ),
        (
            {"rope_theta": 1.0, "rope_parameters": {"rope_theta": 2.0, "rope_type": "default"}},
            RopeConfig(theta=2.0),
        ),
        ({"rope_theta": 3.0, "rope_parameters": {"rope_type": "default"}}, RopeConfig(theta=3.0)),
        (
            {"rope_parameters": LLAMA3},
            RopeConfig(kind="llama3", factor=8.0, original_context=64),
        ),
    ],
)
def test_rope_spellings(keys, rope):
    assert config_from_hf({**LLAMA, **keys}).rope == rope


LONG = {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}
BOTH = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    "rope_scaling": {"type": "linear", "factor": 4.0},
}
INSIDE = {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"}


@pytest.mark.parametrize(
    "keys, rope",
    [
        (BOTH, RopeConfig(kind="linear", factor=4.0)),
        ({**BOTH, "rope_theta": 7e4}, RopeConfig(theta=7e4, kind="linear", factor=4.0)),
        ({**BOTH, "rope_scaling": {}}, RopeConfig(theta=5e5)),
        (
            {"rope_parameters": INSIDE, "original_max_position_embeddings": 32},
            RopeConfig(kind="llama3", factor=8.0, original_context=32),
        ),
        (
            {"rope_parameters": LLAMA3, "original_max_position_embeddings": 32},
            RopeConfig(kind="llama3", factor=8.0, original_context=32),
        ),
        (
            {"rope_parameters": INSIDE, "max_position_embeddings": 128},
            RopeConfig(kind="llama3", factor=8.0, original_context=128),
        ),
    ],
)
def test_rope_in_two_places(keys, rope):
    """As transformers 5.24 computes: logits of each were compared with its own."""
    assert config_from_hf({**LLAMA, **keys}).rope == rope


def test_rope_kinds():
    """What is left out of a file follows from the rest of it, as in transformers."""
    yarn = config_from_hf({**LLAMA, "rope_scaling": {"type": "yarn", "factor": 4.0}}).rope
    assert (yarn.kind, yarn.original_context, yarn.beta_fast) == ("yarn", 64, 32.0)
    assert yarn.attention_factor == pytest.approx(0.1 * math.log(4) + 1)
    deep = {"type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5}
    deep = config_from_hf({**LLAMA, "rope_scaling": deep}).rope
    assert deep.attention_factor == pytest.approx((math.log(4) + 10) / (0.5 * math.log(4) + 10))
    dynamic = config_from_hf({**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 4.0}})
    assert (dynamic.rope.original_context, dynamic.context) == (64, 256)
    with pytest.raises(ValueError, match="dynamic rotary embedding of 2"):
        replace(dynamic, head_dim=2)
    for kind in ("su", "yarn", "longrope"):  # of Phi-3, all the same
        hf = make["hf_config"]("phi4")
        hf = {**hf, "rope_scaling": {**hf["rope_scaling"], "type": kind}}
        phi = config_from_hf(hf)
        assert (phi.rope.kind, phi.rope.original_context, phi.context) == ("longrope", 32, 64)
        assert phi.rope.attention_factor == pytest.approx(math.sqrt(1 + math.log(2) / math.log(32)))
        assert (phi.within(None).context, phi.within(64).context, phi.within(9).context) == (
            32,
            64,
            9,
        )
    with pytest.raises(ValueError, match="a context of 65 is not among 1 to 64"):
        phi.within(65)
    assert config_from_hf(LLAMA).within(None).context == 64


def test_refused_in_a_family():
    for case, keys, message in (
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma2", {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping as a number above 0"),
        ("gemma2", {"query_pre_attn_scalar": "x"}, "query_pre_attn_scalar as a number above 0"),
        ("gemma2", {"sliding_window": None}, "no sliding_window for them"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"n_embd": 30}, "4 heads do not divide hidden_size 30"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers as a list of 2 integers"),
        ("gpt_neox", {"rotary_pct": 0.4}, "turns 3 of 8 dimensions"),
        (
            "granite",
            {"logits_scaling": float("inf")},
            "logits_scaling as a number above 0, not inf",
        ),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts as a positive integer"),
        ("mixtral", {"num_experts_per_tok": 5}, "5 experts for each token are not among 4"),
        ("mixtral", {"num_local_experts": 10**9}, "are above 1000000"),
        ("qwen3_moe", {"mlp_only_layers": "all"}, "mlp_only_layers as a list of integers"),
    ):
        with pytest.raises(UserError, match=message):
            config_from_hf({**make["hf_config"](case), **keys})


def test_rope_in_two_places_is_what_transformers_reads(tmp_path):
    transformers = pytest.importorskip("transformers")
    for keys in (BOTH, {**BOTH, "rope_theta": 7e4}, {**BOTH, "rope_scaling": {}}):
        (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **keys}))
        theirs = transformers.AutoConfig.from_pretrained(tmp_path).rope_parameters
        ours = config_from_hf({**LLAMA, **keys}).rope
        assert (ours.kind, ours.theta) == (theirs["rope_type"], theirs["rope_theta"])


def test_defaults_of_short_files():
    """transformers leaves out what equals its defaults in some versions."""
    sizes = {k: LLAMA[k] for k in LLAMA if k.endswith("size") or k.startswith("num_hidden")}
    base = {**sizes, "num_attention_heads": 4}
    llama = config_from_hf({**base, "model_type": "llama"})
    assert (llama.num_kv_heads, llama.norm_eps, llama.eos_ids, llama.bos_id) == (4, 1e-6, (2,), 1)
    assert (llama.head_dim, llama.tied_head, llama.context) == (8, False, 2048)
    mistral = config_from_hf({**base, "num_attention_heads": 8, "model_type": "mistral"})
    assert (mistral.windows, mistral.num_kv_heads) == ((4096, 4096), 8)
    qwen3 = config_from_hf({**base, "num_key_value_heads": None, "model_type": "qwen3"})
    assert (qwen3.head_dim, qwen3.num_kv_heads, qwen3.eos_ids) == (128, 4, ())


def test_windows():
    qwen = {**make["hf_config"]("qwen2_window"), "num_hidden_layers": 3}
    assert config_from_hf(qwen).windows == (None, 6, 6)
    assert config_from_hf({**qwen, "use_sliding_window": False}).windows == (None,) * 3
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    assert config_from_hf({**qwen, "layer_types": types}).windows == (6, None, 6)
    mistral = make["hf_config"]("mistral")
    assert config_from_hf(mistral).windows == (8, 8)
    assert config_from_hf({**mistral, "sliding_window": None}).windows == (None, None)


def test_layer_types_of_mistral():
    """transformers reads Mistral with layer_types as Ministral: the window is not in every layer."""
    hf = make["hf_config"]("ministral")
    assert hf["model_type"] == "mistral"
    config = config_from_hf(hf)
    assert (config.family, config.windows) == ("ministral", (None, 6))
    assert config_from_hf({**hf, "layer_types": None}).windows == (6, 6)
    full = {"layer_types": ["full_attention"] * 2}
    assert config_from_hf({**hf, **full}).windows == (None, None)
    assert config_from_hf({**hf, "model_type": "ministral"}) == config
    qwen = {**make["hf_config"]("qwen2_window"), **full}
    assert config_from_hf(qwen).windows == (None, None)
    old = {**qwen, "layer_types": ["attention", "sliding_attention"]}
    assert config_from_hf(old).windows == (None, 6)


def test_end_of_text_ids():
    assert config_from_hf({**LLAMA, "eos_token_id": [2, 5]}).eos_ids == (2, 5)
    assert config_from_hf({**LLAMA, "eos_token_id": None}).eos_ids == ()
    assert config_from_hf(LLAMA, {"eos_token_id": [7, 8]}).eos_ids == (7, 8)
    assert config_from_hf(LLAMA, {"eos_token_id": 7}).eos_ids == (7,)
    assert config_from_hf(LLAMA, {"temperature": 0.6}).eos_ids == (2,)


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"model_type": "bloom"}, "'bloom' are not supported; supported are llama, mistral, qwen2"),
        ({"model_type": None}, "does not say what model it is of"),
        ({"hidden_act": "mish"}, "'mish' is not supported; silu, "),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantized \(gptq\)"),
        ({"rope_scaling": {"rope_type": "xpos", "factor": 4.0}}, "'xpos' are not supported"),
        ({"rope_scaling": {"rope_type": ["yarn"], "factor": 4.0}}, "are not supported; default"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "yarn rotary embedding lacks factor"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "lacks long_factor"),
        ({"rope_scaling": LONG}, "1 short or long factors for 4 frequencies"),
        ({"rope_scaling": {**LONG, "short_factor": [0.0]}}, "factor that is not above 0"),
        ({"rope_scaling": {**LONG, "short_factor": 3}}, "does not describe a model"),
        ({"rope_scaling": {"type": "linear"}}, "lacks factor"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor and high"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "differ between layers"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"vocab_size": None}, "vocab_size as a positive integer, not None"),
        ({"num_hidden_layers": 0}, "num_hidden_layers as a positive integer, not 0"),
        ({"hidden_size": "32"}, "hidden_size as a positive integer, not '32'"),
        ({"num_attention_heads": 5}, "5 heads do not divide hidden_size 32"),
        ({"num_key_value_heads": 3}, "4 query heads cannot share 3"),
        ({"rms_norm_eps": None}, "rms_norm_eps as a number above 0"),
        ({"rope_scaling": "linear"}, "rope_scaling as an object, not 'linear'"),
        ({**BOTH, "rope_scaling": {"type": "xpos", "factor": 4.0}}, "'xpos' are not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 0.0}}, "factor is 0.0"),
        ({"rope_parameters": {**LLAMA3, "high_freq_factor": 1.0}}, "not above its low_freq_factor"),
        ({"eos_token_id": "</s>"}, "config.json must give eos_token_id as a token id .* '</s>'"),
        ({"eos_token_id": [1, None]}, r"eos_token_id as a token id .* \[1, None\]"),
        ({"eos_token_id": True}, "eos_token_id as a token id .* True"),
        ({"bos_token_id": "<s>"}, "bos_token_id as a token id, not '<s>'"),
        ({"quantization_config": "fp8"}, r"quantized \(fp8\)"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers as 1000000000, above 10000"),
        ({"model_type": ["llama"]}, "are not supported; supported are"),
        ({"model_type": "x" * 10**6}, "are not supported; supported are"),
    ],
)
def test_refused(keys, message):
    with pytest.raises(UserError, match=message) as caught:
        config_from_hf({**LLAMA, **keys})
    assert len(str(caught.value)) < 400


def test_refused_end_of_text_of_generation_config():
    with pytest.raises(UserError, match=r"generation_config.json must give eos_token_id .*'</s>'"):
        config_from_hf(LLAMA, {"eos_token_id": "</s>"})


def test_layers_are_counted_before_they_are_listed():
    """A billion layers once took half a minute and 8 GB to refuse."""
    for case in ("llama", "mistral", "ministral", "qwen2_window"):
        with pytest.raises(UserError, match="above 10000"):
            config_from_hf({**make["hf_config"](case), "num_hidden_layers": 10**9})
    config = config_from_hf(LLAMA)
    with pytest.raises(ValueError, match="above 10000"):
        replace(config, num_layers=10**9, windows=())
    with pytest.raises(ValueError, match="above 10000"):
        replace(GliDeConfig.paper(), num_layers=10**9)
    with pytest.raises(ValueError, match="above 10000"):
        MedusaConfig(num_heads=10**9)


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"layer_types": ["full_attention"]}, "1 layer_types for 2"),
        ({"layer_types": ["x"] * 2}, "x"),
        (
            {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 6},
            "no sliding_window for them",  # use_sliding_window is false
        ),
    ],
)
def test_refused_layer_types(keys, message):
    with pytest.raises(UserError, match=message):
        config_from_hf({**make["hf_config"]("qwen2"), **keys})


def test_what_a_family_cannot_express_is_not_written():
    config = config_from_hf(LLAMA)
    assert isinstance(config, ModelConfig)
    for changes, lost in (
        ({"qkv_bias": True}, "out_bias"),
        ({"qk_norm": True}, "qk_norm"),
        ({"windows": (8, 8)}, "windows"),
        ({"family": "mistral", "windows": (None, 8)}, "windows"),
    ):
        with pytest.raises(UserError, match=f"cannot express this model's .*{lost}"):
            config_to_hf(replace(config, **changes), "float32")
    with pytest.raises(UserError, match="'bloom' cannot be written"):
        config_to_hf(replace(config, family="bloom"), "float32")
