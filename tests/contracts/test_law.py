"""Penalties, bias and forbidden words against slow plain Python at every node of a tree; bad values."""

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_specdec import UserError, make_sampling
from jax_specdec.core import processors
from jax_specdec.core.draft import Text
from jax_specdec.core.law import Law
from pallas_kernels import masks

BATCH, COLUMNS, CHAIN, EXTRA = 8, 20, 4, 7
VOCAB = 12  # few tokens, so that all of them repeat
# One row each: off, every processor alone, and all at once.
ROWS = {
    "repetition_penalty": [1.0, 1.7, 1, 1, 1, 1, 0.6, 1.3],
    "presence_penalty": [0.0, 0, 1.5, 0, 0, 0, -0.5, 0.7],
    "frequency_penalty": [0.0, 0, 0, 0.8, 0, 0, 0, -0.4],
    "min_new_tokens": [0, 0, 0, 0, 3, 0, 5, 4],
}
BIAS = [{}, {}, {}, {}, {}, {3: 2.5, 0: -float("inf"), 11: -4.0}, {}, {1: 1.0}]
WORDS = [[], [], [], [[7], [2]], [[1, 2]], [[4, 4, 4], [5, 6]], [[0]], [[9], [8, 1], [3, 2, 1]]]
STOPS = np.asarray([[5, -1], [5, 6], [0, 1], [2, 2], [11, 0], [3, 3], [1, -1], [4, 10]], np.int32)


def reference(logits, text, prompt_length, row, *, rows=ROWS, bias=BIAS, words=WORDS, stops=STOPS):
    """The logits after one text, which holds the path to a node; token by token, in float64."""
    x = np.asarray(logits, np.float64).copy()
    for token, value in bias[row].items():
        x[token] += value
    penalty = rows["repetition_penalty"][row]
    for token in set(text):
        x[token] = x[token] / penalty if x[token] > 0 else x[token] * penalty
    output = list(text[prompt_length:])
    for token in set(output):
        x[token] -= rows["presence_penalty"][row]
        x[token] -= rows["frequency_penalty"][row] * output.count(token)
    for word in words[row]:
        start = word[:-1]
        if len(start) <= len(text) and list(text[len(text) - len(start) :]) == start:
            x[word[-1]] = -np.inf
    if len(output) < rows["min_new_tokens"][row]:
        x[[token for token in stops[row] if token >= 0]] = -np.inf
    return x


def sampling_of(**fields):
    return make_sampling(BATCH, **{"max_new_tokens": 9, "stop_ids": STOPS, **fields})


@jax.jit
def process(logits, tokens, length, prompt_length, sampling, drafted, ancestors):
    on_path = masks.unpack(ancestors, drafted.shape[1] + 1)[..., 1:]
    return Law(sampling, prompt_length).process(logits, Text(tokens, length), drafted, on_path)


@pytest.mark.parametrize("seed", range(6))
def test_every_node_of_a_tree(seed):
    """Random trees below texts of any length, the shortest shorter than a forbidden word."""
    rng = np.random.default_rng(seed)
    sampling = sampling_of(logit_bias=BIAS, bad_words=WORDS, **ROWS)
    length = rng.integers(1, COLUMNS - 8, BATCH)
    prompt_length = np.asarray([rng.integers(1, n + 1) for n in length])
    tokens = rng.integers(0, VOCAB, (BATCH, COLUMNS))
    parent = np.stack([h.random_parents(rng, CHAIN, EXTRA) for _ in range(BATCH)]).astype(np.int32)
    nodes = parent.shape[1]
    drafted = rng.integers(0, VOCAB, (BATCH, nodes - 1))
    drafted[5] = 4  # a word of equal tokens
    logits = rng.normal(size=(BATCH, nodes, VOCAB)).astype(np.float32) * 3
    i32 = (jnp.asarray(x, jnp.int32) for x in (tokens, length, prompt_length))
    bits = h.ancestor_bits(parent)
    got = process(jnp.asarray(logits), *i32, sampling, jnp.asarray(drafted, jnp.int32), bits)
    forbidden = 0
    for b in range(BATCH):
        for node in range(nodes):
            path, at = [], node
            while at:
                path.insert(0, int(drafted[b, at - 1]))
                at = parent[b, at]
            text = tokens[b, : length[b]].tolist() + path
            want = reference(logits[b, node], text, prompt_length[b], b)
            np.testing.assert_allclose(got[b, node], want, rtol=1e-5, atol=1e-5)
            forbidden += np.isinf(want).sum()
    assert forbidden > 50
    np.testing.assert_array_equal(got[0], logits[0])  # a row that asks for nothing


def test_the_path_matters():
    """The negative control: without the drafted tokens on the way nodes get other logits."""
    rng = np.random.default_rng(0)
    sampling = sampling_of(logit_bias=BIAS, bad_words=WORDS, **ROWS)
    ones = jnp.ones((BATCH,), jnp.int32)
    parent = np.tile(np.asarray([[0, 0, 1, 2]], np.int32), (BATCH, 1))
    args = (
        jnp.asarray(rng.normal(size=(BATCH, 4, VOCAB)), jnp.float32),
        jnp.asarray(rng.integers(0, VOCAB, (BATCH, COLUMNS)), jnp.int32),
        5 * ones,
        2 * ones,
        sampling,
        jnp.asarray(rng.integers(0, VOCAB, (BATCH, 3)), jnp.int32),
    )
    got = np.asarray(process(*args, h.ancestor_bits(parent)))
    without = np.asarray(process(*args, h.ancestor_bits(np.zeros_like(parent))))
    np.testing.assert_array_equal(got[:, :2], without[:, :2])  # the root, and its child
    assert (got[:, 2:] != without[:, 2:]).any(axis=(1, 2))[[2, 3, 7]].all()


def test_nothing_asked_for_is_nothing_done():
    assert make_sampling(3, max_new_tokens=1).processing is None
    assert make_sampling(3, max_new_tokens=1, repetition_penalty=[1, 1, 1]).processing is None
    assert make_sampling(2, max_new_tokens=1, bad_words=[[], []]).processing is None
    assert make_sampling(2, max_new_tokens=1, min_new_tokens=[0, 1]).processing is not None


@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": 0.0},
        {"repetition_penalty": -1.0},
        {"repetition_penalty": float("nan")},
        {"repetition_penalty": [1.0, 2.0, 3.0]},
        {"presence_penalty": float("inf")},
        {"presence_penalty": float("nan")},
        {"frequency_penalty": 1e39},
        {"min_new_tokens": -1},
        {"min_new_tokens": 2.5},
        {"min_new_tokens": 2**30},
        {"logit_bias": {3: float("nan")}},
        {"logit_bias": {3: float("inf")}},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {"3": 1.0}},
        {"logit_bias": {3: "more"}},
        {"logit_bias": {2.5: 1.0}},
        {"logit_bias": {2**31: 1.0}},
        {"logit_bias": [{}, {}, {}]},
        {"logit_bias": [3, 4]},
        {"logit_bias": 3},
        {"bad_words": [[]]},
        {"bad_words": [3, 4]},
        {"bad_words": 7},
        {"bad_words": [[3, -1]]},
        {"bad_words": [[2**31]]},
        {"bad_words": ["word"]},
        {"bad_words": [[[1]], [[2]], [[3]]]},
        {"bad_words": [[[1]], [[]]]},
        {"bad_words": [[[1]], [["a"]]]},
        {"bad_words": [[1.5]]},
    ],
    ids=str,
)
def test_a_bad_value_is_one_sentence(fields):
    ((name, value),) = fields.items()
    with pytest.raises(UserError) as error:
        # The suite's type checks would refuse some of these before `make_sampling` could.
        if name == "logit_bias":
            processors._biases(value, 2)
        elif name == "bad_words":
            processors._word_lists(value, 2)
        else:
            make_sampling(2, max_new_tokens=4, **fields)
    sentence = str(error.value)
    assert sentence.endswith(".") and "\n" not in sentence and len(sentence) < 160
    assert name in sentence
