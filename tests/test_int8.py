"""int8 weights and caches: near what they round, and with every drafter still plain decoding's text."""

import dataclasses

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jax_specdec import (
    DecodeLoop,
    Decoder,
    SpeculativeDecoder,
    UserError,
    load_drafter,
    load_target,
)
from jax_specdec.checkpoints.memory import bytes_per_device
from jax_specdec.cli import main
from jax_specdec.core.cache import KVCache, KVScales
from jax_specdec.core.plain import NoDrafter
from jax_specdec.drafters.cascade import Cascade
from jax_specdec.drafters.glide import GliDeDrafter
from jax_specdec.drafters.lm import LmDrafter
from jax_specdec.drafters.max_gram import MaxGram
from jax_specdec.expansions.cape import Cape
from jax_specdec.expansions.dynamic_tree import DynamicTree
from jax_specdec.expansions.expand import Expand
from jax_specdec.models import stack_layers
from jax_specdec.models.glide import GliDe
from jax_specdec.models.glide_config import GliDeConfig
from jax_specdec.models.quantized import Quantized, quantize
from jax_specdec.specs.defaults import Setting, add_record, measured, measured_on, read_records

PROMPTS = h.prompts_of([5, 1, 9])
TEMPERATURES = [0.0, 1.0, 0.7]


def scales_of(config, by=0.02):
    rng = np.random.default_rng(0)
    shape = (config.num_layers, config.num_kv_heads)
    return KVScales(*(rng.uniform(by, 2 * by, shape).astype(np.float32) for _ in range(2)))


def decoder(layer_loop="unroll", **fields):
    return Decoder(h.CONFIG, layer_loop=layer_loop, kv_scales=scales_of(h.CONFIG), **fields)


def decode(target, drafter, params):
    loop = DecodeLoop(target, drafter or NoDrafter())
    sampling = h.sampling_of(len(PROMPTS), temperature=TEMPERATURES, max_new_tokens=24)
    return h.decode(loop, params, PROMPTS, sampling, capacity=48).tokens


def drafters(target):
    small = Decoder(h.CONFIG)
    glide = GliDe(GliDeConfig.like(h.CONFIG), h.CONFIG)
    weights = h.perturbed(glide.init(jax.random.key(3)), 0.5)
    return {
        "lm": (LmDrafter(small, 3), {"lm": h.close_params()}),
        "lm+tree": (Expand(LmDrafter(small, 4), DynamicTree(10)), {"lm": h.close_params()}),
        "cascade": (
            Cascade(LmDrafter(small, 1), (MaxGram(4),), (4,)),
            {"lm": h.close_params()},
        ),
        "glide+cape": (
            Expand(GliDeDrafter(glide, 4), Cape(12)),
            {"glide": glide.join(weights, target)},
        ),
    }


@pytest.fixture(scope="module")
def plain():
    target = decoder(quantized=True)
    params = quantize(h.target_params())
    return params, decode(target, None, {"target": params, "drafters": {}})


@pytest.mark.parametrize("name", ["lm", "lm+tree", "cascade", "glide+cape"])
def test_texts_are_plain_decodings(plain, name):
    """A token sees itself and its draft through the cache's rounding; otherwise they would see more than later."""
    params, want = plain
    drafter, own = drafters(params)[name]
    assert decode(decoder(quantized=True), drafter, {"target": params, "drafters": own}) == want


def test_without_the_rounding_texts_differ(plain, monkeypatch):
    """The control: new tokens as they are, and committed ones rounded."""
    params, _ = plain
    monkeypatch.setattr(KVCache, "seen", lambda self, k, v, index: (k, v))
    coarse = dataclasses.replace(decoder(quantized=True), kv_scales=scales_of(h.CONFIG, 0.3))
    drafter, own = drafters(params)["lm"]
    plainly = decode(coarse, None, {"target": params, "drafters": {}})
    assert decode(coarse, drafter, {"target": params, "drafters": own}) != plainly


@pytest.mark.parametrize("layer_loop", ["unroll", "scan"])
def test_stacked_caches_and_layers(plain, layer_loop):
    params, want = plain
    target = decoder(layer_loop, quantized=True, stacked_cache=True)
    params = stack_layers(params) if layer_loop == "scan" else params
    drafter, own = drafters(plain[0])["lm"]
    assert decode(target, drafter, {"target": params, "drafters": own}) == want


def test_rounding_is_small():
    params = h.target_params()
    tokens = jnp.asarray(np.arange(24).reshape(2, 12) % h.CONFIG.vocab_size, jnp.int32)
    position = jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32)[None], tokens.shape)
    apply = jax.jit(Decoder(h.CONFIG).apply)
    exact = apply(params, tokens, position).logits
    rounded = apply(quantize(params), tokens, position).logits
    error = jnp.linalg.norm(rounded - exact) / jnp.linalg.norm(exact)
    assert 0 < error < 0.03


def test_each_channel_has_its_scale():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(3, 40, 6)).astype(np.float32) * np.float32(10.0) ** np.arange(
        -3, 3, dtype=np.float32
    )
    got = quantize({"qkv": jnp.asarray(w), "norm": jnp.ones((4,)), "qkv_bias": jnp.ones((4,))})
    q = got["qkv"]
    assert isinstance(q, Quantized) and q.values.dtype == jnp.int8 and q.scale.shape == (3, 6)
    back = np.asarray(q.values, np.float32) * np.asarray(q.scale)[:, None]
    assert (np.abs(back - w) <= np.asarray(q.scale)[:, None] * 0.5001).all()
    assert got["norm"].dtype == got["qkv_bias"].dtype == jnp.float32
    assert quantize(got)["qkv"] is q, "what is in int8 stays as it is"


def test_loading(tiny_checkpoints):
    exact = load_target(tiny_checkpoints / "target", dtype="float32")
    target = load_target(tiny_checkpoints / "target", dtype="float32", int8=("weights", "cache"))
    drafter = load_drafter("lm:3", target, int8=("weights", "cache"))
    held = sum(x.nbytes for x in jax.tree.leaves(target.params))
    assert held == bytes_per_device(target.decoder)
    assert held < 0.55 * sum(x.nbytes for x in jax.tree.leaves(exact.params))
    assert isinstance(drafter.params["lm"]["head"], Quantized)
    scales = target.decoder.kv_scales
    assert scales.k.shape == (exact.config.num_layers, exact.config.num_kv_heads)
    assert (scales.k > 0).all() and (scales.v > 0).all()

    prompts = ["Once upon a time", "The cat saw a"]
    options = {"max_new_tokens": 16, "temperature": 0.8, "seed": 2, "batch_size": 2}
    want = SpeculativeDecoder(target).generate(prompts, **options)
    got = SpeculativeDecoder(target, drafter).generate(prompts, **options)
    assert [a.token_ids for a in got] == [a.token_ids for a in want]


def test_on_a_mesh(tiny_checkpoints):
    """Scales are of whole channels, however they are divided."""
    if len(jax.devices()) < 4:
        pytest.skip("one device")
    mesh = jax.make_mesh(
        (2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4]
    )
    texts = []
    for where in (None, mesh):
        folder, int8 = tiny_checkpoints / "target", ("weights", "cache")
        target = load_target(folder, dtype="float32", mesh=where, int8=int8)
        drafter = load_drafter("lm:3", target, int8=("weights",))
        answers = SpeculativeDecoder(target, drafter).generate(
            ["Once upon a time", "The cat saw a"], max_new_tokens=16, batch_size=2
        )
        texts.append([answer.token_ids for answer in answers])
    assert texts[0] == texts[1]


def test_only_whole_models_have_a_cache_in_int8(tiny_checkpoints):
    target = load_target(tiny_checkpoints / "target", tokenizer=False)
    with pytest.raises(
        UserError, match="of the cache of lm, and max-gram has none that is its own"
    ):
        load_drafter("max-gram:4", target, int8=("cache",))


def test_measurements_are_of_what_is_in_int8(tiny_checkpoints, tmp_path):
    file, record = tmp_path / "draft_lengths.json", {"dtype": "float32", "batch_size": 1}
    for default, int8 in (("lm:1", ()), ("lm:2", ("weights",)), ("lm:3", ("weights",))):
        add_record(file, {**record, "default": default, **({"int8": int8} if int8 else {})})

    def best(int8):
        return measured(tmp_path, Setting(tmp_path / "target", "float32", 1, int8))

    assert best(())["default"] == "lm:1" and best(("weights",))["default"] == "lm:3"
    assert measured_on({**best(("weights",)), "device": "cpu"}).endswith("batch 1, weights in int8")
    file.write_text('{"int8": ["wheights"]}')
    with pytest.raises(UserError, match="is damaged"):
        best(())


def test_tune_takes_int8(tiny_checkpoints, tmp_path, monkeypatch):
    tuned, out = [], tmp_path / "lengths.json"

    def fake(target, drafters, names, *_, **__):
        tuned.append((target.int8, drafters.int8, names))
        return {"default": "lm:2", "int8": list(target.int8)}

    monkeypatch.setattr("jax_specdec.tuning.tune.tune", fake)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "The cat"}\n')
    given = ["tune", "--model", tiny_checkpoints / "target", "--drafters", "lm", "--out", out]
    given += ["--prompts", tmp_path / "prompts.jsonl", "--int8", "weights"]
    assert main([*map(str, given), "--draft-int8", "weights"]) == 0
    assert tuned == [(("weights",), ("weights",), ["lm"])]
    (record,) = read_records(out)
    assert record["int8"] == record["draft_int8"] == ["weights"]


def test_wrong_parts(tiny_checkpoints):
    with pytest.raises(
        UserError, match="int8 is of weights and cache, as a tuple, not of 'wheights'"
    ):
        load_target(tiny_checkpoints / "target", int8=("wheights",))
    with pytest.raises(UserError, match="not of 'weights'"):
        load_target(tiny_checkpoints / "target", int8="weights")
