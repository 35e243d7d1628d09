"""Medusa's heads: fresh ones, in float64, in training and in decoding; how often they are right."""

import dataclasses
import functools

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from medusa_drafts import MODEL, drafter, texts, trained

from jax_specdec import Decoder
from jax_specdec.core.context import Tapped
from jax_specdec.core.draft import Text
from jax_specdec.core.prefill import read_text
from jax_specdec.models.medusa import Medusa, MedusaConfig
from jax_specdec.training import medusa


@functools.cache
def reading_program():
    heads = medusa.Heads(MODEL, h.SMALL)

    @jax.jit
    def read(own, target, tokens):
        reading = heads.read(target, tokens)
        laws = [heads.laws(own, target, reading, index) for index in range(4)]
        loss = heads.loss(own, target, reading, tokens)
        return laws, loss, heads.accuracies(own, target, reading), reading.log_p

    return read


def all_laws(tokens):
    """`(log_p, log_q)` of each head over a text, on the host."""
    return jax.device_get(reading_program()(trained()[0], h.small_params(), tokens))[0]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("share", [False, True])
def test_fresh_heads_say_what_the_target_says(share, tied):
    target = Decoder(dataclasses.replace(h.SMALL_CONFIG, tied_head=tied))
    weights = h.weights(target, 4)
    model = Medusa(MedusaConfig(3, num_layers=2, share=share), target.config)
    own = model.init(weights)
    joined = model.join(own, weights)
    assert model.parameter_count() == sum(x.size for x in jax.tree.leaves(own))
    assert jax.tree.structure(model.shapes()) == jax.tree.structure(own)
    hidden = jax.random.normal(jax.random.key(0), (2, 5, 16))
    want = target.head(weights, hidden)
    for index in range(3):
        np.testing.assert_allclose(model.head(joined, hidden, index), want, rtol=1e-6, atol=1e-6)
    got = model.first(joined, hidden[:, :1], 2)
    np.testing.assert_allclose(got, jnp.repeat(want[:, :1], 2, axis=1), rtol=1e-6, atol=1e-6)
    if share:
        name = "embed" if tied else "head"
        assert "out" not in own and joined[name] is weights[name]


def test_heads_in_float64():
    model = Medusa(MedusaConfig(2, num_layers=2, share=False), h.SMALL_CONFIG)
    rng = np.random.default_rng(0)
    own = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), model.shapes())
    joined = model.join(own, h.small_params())
    hidden = rng.normal(size=(1, 3, 16)).astype(np.float32)
    w = jax.tree.map(lambda x: np.asarray(x, np.float64), joined)
    x = hidden[0] / np.sqrt((hidden[0] ** 2).mean(-1, keepdims=True) + h.SMALL_CONFIG.norm_eps)
    for index in range(2):
        y = x * w["norm"]
        for block in w["heads"][index]:
            z = y @ block["weight"] + block["bias"]
            y = y + z / (1 + np.exp(-z))
        got = model.head(joined, jnp.asarray(hidden), index)[0]
        np.testing.assert_allclose(got, y @ w["out"][index], rtol=2e-4, atol=2e-4)


def test_decoding_reads_what_training_reads():
    """Head k, from the state that predicted the root, for the token k places behind the root; in a cascade
    the heads of places that others drafted are passed over."""
    tokens, target = jnp.asarray(texts()[:3, :21]), h.small_params()
    laws = all_laws(tokens)
    committed, ahead = np.array([4, 7, 11]), np.array([0, 2, 1])
    tapped = Tapped(h.SMALL, drafter(2).info.taps)
    view = jax.jit(lambda *x: read_text(tapped, *x))(
        target, tapped.init_view(target, 3, 24), tokens, jnp.asarray(committed - 1, jnp.int32)
    )
    scores = jax.jit(drafter(2).scores)
    for extra in (0 * ahead, ahead):
        text = Text(tokens, jnp.asarray(committed + extra, jnp.int32))
        got = jax.nn.log_softmax(scores(trained()[1], text, view))
        for row, (known, skip) in enumerate(zip(committed, extra, strict=True)):
            for i in range(2):
                at = known - 2  # of the hidden state that predicted the root
                want = laws[i + skip][1][row, at]
                np.testing.assert_allclose(got[row, i], want, rtol=1e-4, atol=1e-4)


def test_the_loss_and_the_laws_in_float64():
    """Sum over k of 0.8^k times the cross-entropy of head k at token t + k + 1; the target's law of head k is
    that of the same token, once all before it are known."""
    tokens, joined = texts()[:3, :21], trained()[1]
    laws, loss, _, log_p = jax.device_get(
        reading_program()(trained()[0], h.small_params(), jnp.asarray(tokens))
    )
    hidden = medusa.Heads(MODEL, h.SMALL).read(h.small_params(), jnp.asarray(tokens)).hidden
    want = 0.0
    for k in range(1, 5):
        scores = np.asarray(MODEL.head(joined, hidden, k - 1), np.float64)
        log_q = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
        places = [(row, t) for row in range(3) for t in range(20 - k)]
        want += 0.8**k * -np.mean([log_q[row, t, tokens[row, t + k + 1]] for row, t in places])
        np.testing.assert_allclose(laws[k - 1][1], log_q[:, : 20 - k], rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(laws[k - 1][0], log_p[:, k:])
    assert loss == pytest.approx(want, rel=1e-4)


def test_accuracies_by_rank():
    own, _, accuracies = trained()
    assert len(accuracies) == 4 and all(len(row) == 8 for row in accuracies)
    laws, _, got, _ = jax.device_get(
        reading_program()(own, h.small_params(), jnp.asarray(texts()[:3, :21]))
    )
    for (log_p, log_q), shares in zip(laws, got, strict=True):
        order, best = np.argsort(-log_q, axis=-1), log_p.argmax(-1)
        want = [(order[..., i] == best).mean() for i in range(8)]
        np.testing.assert_allclose(shares, want, atol=1e-6)
    assert min(row[0] for row in accuracies) > 1.2 / h.VOCAB, (
        "they were measured on what was learnt"
    )
