"""Logits of every family against transformers: golden files everywhere, PyTorch where it is."""

import functools
import importlib.util
import json
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jax_specdec.checkpoints import targets as checkpoints
from jax_specdec.core.cache import commit, init_cache
from jax_specdec.models import Decoder, config_from_hf, stack_layers, unstack_layers
from jax_specdec.models.hf import weight_names

GOLDENS = Path(__file__).parents[1] / "goldens"
make = runpy.run_path(str(GOLDENS / "make.py"))
CASES = list(make["CASES"])
TOLERANCE = 1e-5  # of the largest logit
needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="PyTorch is not installed"
)


@functools.cache
def golden(case):
    with np.load(GOLDENS / f"{case}.npz") as file:
        return json.loads(str(file["config"])), file["tokens"], file["logits"]


@functools.cache
def told(case):
    """Length of the prompt before the golden text, None where it is no answer; the controls' last logits."""
    with np.load(GOLDENS / f"{case}.npz") as file:
        controls = [file[f"control{i}"] for i in range(len(make["CONTROLS"].get(case, [])))]
        return (int(file["prompt"]) if "prompt" in file else None), controls


pytestmark = pytest.mark.smoke


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """case -> a checkpoint folder with the golden's weights; or with changes of its configuration."""

    @functools.cache
    def write(case, changes="{}"):
        hf = {**golden(case)[0], **json.loads(changes)}
        path = tmp_path_factory.mktemp(case)
        (path / "config.json").write_text(json.dumps(hf))
        names = weight_names(config_from_hf(hf))
        tensors = {name: make["weight"](name, w.shape) for name, w in names.items()}
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path

    return write


def load(folder, case, **options):
    """A golden's target; of one whose text is longer than short factors serve, all of its context."""
    if case.endswith("_long"):
        options["context"] = golden(case)[0]["max_position_embeddings"]
    return checkpoints.load_target(folder, tokenizer=False, **options)


def relative_error(got, want):
    return np.abs(np.asarray(got) - want).max() / np.abs(want).max()


def one_pass(decoder, params, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    return jax.jit(decoder.apply)(params, jnp.asarray(tokens), positions).logits


def through_cache(decoder, params, tokens):
    """A ragged prefill, a ragged chunk and then token by token, each committed to the cache."""
    c = decoder.config
    batch, total = tokens.shape
    cache = init_cache(
        c.num_layers,
        batch,
        c.num_kv_heads,
        total + 8,
        c.head_dim,
        decoder.dtype,
        stacked=decoder.layer_loop == "scan",
    )

    @functools.partial(jax.jit, donate_argnums=3)
    def step(params, new, count, cache):
        depth = jnp.arange(new.shape[1], dtype=jnp.int32)
        out = decoder.apply(params, new, cache.length[:, None] + depth[None], cache)
        return out.logits, commit(cache, out.new, count)

    logits = np.full((batch, total, c.vocab_size), np.nan, np.float32)
    start = np.zeros(batch, np.int32)
    widths = [(8, np.array([8, 5])), (4, np.array([4, 3]))] + [(1, np.array([1, 1]))] * total
    for width, count in widths:
        count = np.minimum(count, total - start)
        if not count.any():
            break
        new = np.zeros((batch, width), np.int32)
        for row, (a, n) in enumerate(zip(start, count, strict=True)):
            new[row, :n] = tokens[row, a : a + n]
        out, cache = step(params, jnp.asarray(new), jnp.asarray(count, jnp.int32), cache)
        for row, (a, n) in enumerate(zip(start, count, strict=True)):
            logits[row, a : a + n] = np.asarray(out)[row, :n]
        start = start + count
    np.testing.assert_array_equal(np.asarray(cache.length), total)
    return logits


@pytest.mark.parametrize("layer_loop", ["unroll", "scan"])
@pytest.mark.parametrize("case", CASES)
def test_logits_match_golden(case, layer_loop, folder):
    hf, tokens, want = golden(case)
    if layer_loop == "scan" and not config_from_hf(hf).uniform:
        with pytest.raises(checkpoints.UserError, match="use unroll"):
            checkpoints.load_target(folder(case), layer_loop=layer_loop, tokenizer=False)
        return
    target = load(folder(case), case, layer_loop=layer_loop)
    got = one_pass(target.decoder, target.params, tokens)
    assert relative_error(got, want) < TOLERANCE
    if prompt := told(case)[0]:  # what follows is the answer of `generate`
        np.testing.assert_array_equal(jnp.argmax(got, -1)[:, prompt - 1 : -1], tokens[:, prompt:])
    assert relative_error(through_cache(target.decoder, target.params, tokens), want) < TOLERANCE


@pytest.mark.parametrize("case", make["CONTROLS"])
def test_what_is_switched_off_changes_the_logits(case, folder):
    """As it changes those of transformers, and to the same."""
    hf, tokens, want = golden(case)
    for changes, off in zip(make["CONTROLS"][case], told(case)[1], strict=True):
        assert relative_error(off, want[:, -1]) > 1e-4
        where = folder(case, json.dumps(changes))
        target = load(where, case)
        if hf.get("original_max_position_embeddings") and "original" in str(changes):
            target = checkpoints.load_target(where, tokenizer=False, context=64)
        got = one_pass(target.decoder, target.params, tokens)[:, -1]
        assert relative_error(got, off) < TOLERANCE, changes


@needs_torch
@pytest.mark.parametrize("case", CASES)
def test_logits_match_torch(case, tmp_path):
    """Live: what transformers saves today is what we load, and the golden files are not stale."""
    hf, tokens, stored = golden(case)
    assert hf == make["hf_config"](case)
    model = make["torch_model"](hf)
    want = make["torch_logits"](model, tokens)
    assert relative_error(stored, want) < TOLERANCE
    model.save_pretrained(tmp_path)
    target = load(tmp_path, case)
    assert relative_error(one_pass(target.decoder, target.params, tokens), want) < TOLERANCE


@needs_torch
@pytest.mark.parametrize("case", CASES)
def test_names_and_shapes_match_torch(case):
    hf = golden(case)[0]
    ours = {name: weight.shape for name, weight in weight_names(config_from_hf(hf)).items()}
    assert ours == make["torch_names"](make["torch_model"](hf))


@pytest.mark.parametrize("case", CASES)
def test_tree_matches_decoder(case, folder):
    config = config_from_hf(golden(case)[0])
    decoder = Decoder(config)
    want = jax.eval_shape(decoder.init, jax.random.key(0))
    got = checkpoints.load_params(folder(case), config)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, want)
    assert config.parameter_count() == sum(x.size for x in jax.tree.leaves(got))


def test_layer_layouts_are_the_same_weights(folder):
    config = config_from_hf(golden("llama")[0])
    unrolled = checkpoints.load_params(folder("llama"), config)
    scanned = checkpoints.load_params(folder("llama"), config, layer_loop="scan")
    for a, b in ((stack_layers(unrolled), scanned), (unrolled, unstack_layers(scanned))):
        jax.tree.map(np.testing.assert_array_equal, a, b)
