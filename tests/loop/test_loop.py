"""The compiled loop: whatever drafts, the text is plain decoding's, token for token."""

import dataclasses

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loop_runs import MIXED, RAGGED, TREE, check_stats

from jax_specdec import DecodeLoop, Decoder
from jax_specdec.core.acceptance import Reject
from jax_specdec.core.plain import NoDrafter
from jax_specdec.core.processors import History, RepetitionPenalty
from jax_specdec.core.stats import LENGTH, RUNNING
from jax_specdec.drafters.bigram import Bigram
from jax_specdec.drafters.lm import LmDrafter
from jax_specdec.drafters.max_gram import MaxGram
from jax_specdec.drafters.prompt_lookup import PromptLookup
from jax_specdec.models import stack_layers

WIDE = h.random_parents(np.random.default_rng(0), 4, 35)  # more than 32 nodes: two words a bitmask


def table(seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, h.VOCAB, h.VOCAB), jnp.int32)


def drafters():
    """name -> (drafter, its parameters as a function, so that nothing is built on import)."""
    close, small = h.close_params, h.small_params
    out = {
        "lm small": (LmDrafter(h.SMALL, 3), lambda: {"lm": small()}),
        "lm itself": (LmDrafter(h.TARGET, 3), lambda: {"lm": h.target_params()}),
        "lm greedy": (LmDrafter(h.TARGET, 3, proposal="greedy"), lambda: {"lm": close()}),
        # Its least likely tokens: nothing is ever accepted.
        "lm adversarial": (
            LmDrafter(h.TARGET, 3),
            lambda: {"lm": {**h.target_params(), "head": -h.target_params()["head"]}},
        ),
        "max-gram": (MaxGram(5), dict),
        "max-gram fill": (MaxGram(4, fill="table", min_match=2), lambda: {"table": table()}),
        "prompt-lookup": (PromptLookup(4), dict),
        "bigram": (Bigram(2), lambda: {"bigram": table(1)}),
        "siblings": (h.Siblings(LmDrafter(h.TARGET, 3)), lambda: {"lm": close()}),
        "top-8 siblings": (
            h.Siblings(LmDrafter(h.TARGET, 2), count=8, holes=0.0),
            lambda: {"lm": close()},
        ),
    }
    for length in (1, 2, 3, 6):
        out[f"lm:{length}"] = (LmDrafter(h.TARGET, length), lambda: {"lm": close()})
    return out


DRAFTERS = drafters()
SINGLE = ("lm small", "max-gram fill", "siblings")


@pytest.mark.parametrize("name", DRAFTERS)
def test_ragged_batch_is_plain_decoding(name, plain):
    drafter, params = DRAFTERS[name]
    loop = DecodeLoop(h.TARGET, drafter)
    got = h.decode(loop, h.all_params(**params()), h.prompts_of(RAGGED), h.sampling_of(4, **MIXED))
    h.assert_identical(got, plain)
    check_stats(got, loop)
    accepted = got.stats.accepted.sum()
    if name == "lm itself":
        rounds = 24 // 4
        assert (got.stats.rounds == rounds).all(), "the target as its own drafter is always right"
    elif name == "lm adversarial":
        assert accepted < 0.1 * got.stats.drafted.sum()
    elif name not in ("lm small", "bigram", "max-gram fill"):
        assert accepted > 0


@pytest.mark.parametrize("name", SINGLE)
def test_single_row_is_plain_decoding(name, plain_single):
    drafter, params = DRAFTERS[name]
    loop = DecodeLoop(h.TARGET, drafter)
    for temperature, want in plain_single.items():
        sampling = h.sampling_of(1, temperature=temperature, seed=5)
        got = h.decode(loop, h.all_params(**params()), h.prompts_of([9], seed=2), sampling)
        h.assert_identical(got, want)
        check_stats(got, loop)


@pytest.mark.parametrize("holes", [0.0, 0.2])
@pytest.mark.parametrize("tree", [TREE, WIDE], ids=["tree", "two words"])
def test_random_trees(tree, holes, plain):
    """Right tokens hidden on a random path, deep branches off the main chain included."""
    loop = DecodeLoop(h.TARGET, h.Oracle(tree))
    params = h.all_params(**h.Oracle.params(plain.text, holes=holes))
    got = h.decode(loop, params, h.prompts_of(RAGGED), h.sampling_of(4, **MIXED))
    h.assert_identical(got, plain)
    check_stats(got, loop)
    assert (got.stats.accepted[:, 1:] > 0).any(axis=0).all(), "no deep node was accepted"
    if holes == 0 and len(tree) > 20:
        assert got.stats.rounds.sum() < 0.7 * 4 * 24


def test_plain_counts(plain):
    assert (plain.stats.rounds == 24).all()
    assert plain.stats.finish.tolist() == [LENGTH] * 4
    assert [len(t) for t in plain.tokens] == [24] * 4


# Rows, chunks of rounds, layer loops, windows


def test_rows_do_not_depend_on_the_batch(plain):
    """Every row alone, with its own request id, gives the same text."""
    for row, prompt in enumerate(h.prompts_of(RAGGED)):
        one = {name: values[row] for name, values in MIXED.items()}
        got = h.decode(h.plain_loop(), h.all_params(), [prompt], h.sampling_of(1, **one), ids=[row])
        want = dataclasses.replace(plain, tokens=[plain.tokens[row]], margins=[plain.margins[row]])
        h.assert_identical(got, want)


def test_request_ids_and_seeds(plain):
    """The id changes a sampled row and not a greedy one; with its own seed the id does nothing."""
    prompts = h.prompts_of(RAGGED)
    other = h.decode(
        h.plain_loop(), h.all_params(), prompts, h.sampling_of(4, **MIXED), ids=[9, 9, 9, 9]
    )
    assert other.tokens[0] == plain.tokens[0]
    assert other.tokens[1] != plain.tokens[1] and other.tokens[3] != plain.tokens[3]
    own = [
        h.decode(
            h.plain_loop(),
            h.all_params(),
            prompts,
            h.sampling_of(4, **MIXED, own_seed=True),
            ids=ids,
        )
        for ids in ([0, 1, 2, 3], [7, 7, 8, 9])
    ]
    assert own[0].tokens == own[1].tokens


@pytest.mark.parametrize("rounds", [1, 3])
def test_chunks_of_rounds_are_one_run(rounds, plain):
    loop = DecodeLoop(h.TARGET, LmDrafter(h.TARGET, 3))
    params = h.all_params(lm=h.close_params())
    tokens, lengths = h.pad(h.prompts_of(RAGGED))
    sampling, ids = h.sampling_of(4, **MIXED), jnp.arange(4, dtype=jnp.int32)
    whole = h.decode(loop, params, h.prompts_of(RAGGED), sampling)
    state = h.start(loop, params, tokens, lengths, sampling, ids, capacity=48)
    steps = 0
    while (np.asarray(state.stats.finish) == RUNNING).any():
        before = np.asarray(state.stats.rounds)
        state = h.run(loop, params, state, jnp.int32(rounds))
        assert (np.asarray(state.stats.rounds) <= before + rounds).all()
        steps += 1
    assert steps > 1
    got = h.result(state)
    for a, b in zip(
        jax.tree.leaves((got.tokens, got.stats)),
        jax.tree.leaves((whole.tokens, whole.stats)),
        strict=True,
    ):
        # Two programs may round differently; tokens and counts may not differ.
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    done = h.run(loop, params, state, jnp.int32(5))
    assert np.asarray(done.stats.rounds).tolist() == got.stats.rounds.tolist()


def variant(name):
    """A target, and parameters, that decode the same way through another code path."""
    if name == "scan":
        return Decoder(h.CONFIG, layer_loop="scan"), stack_layers(h.target_params())
    if name == "stacked":
        return Decoder(h.CONFIG, stacked_cache=True), h.target_params()
    return Decoder(dataclasses.replace(h.CONFIG, windows=(5, None))), h.target_params()


@pytest.mark.parametrize("name", ["scan", "stacked", "windows"])
@pytest.mark.parametrize("shape", ["lm", "tree"])
def test_other_targets(name, shape, plain):
    """Scanned layers, one cache over all layers, and sliding windows whose edge lies inside the tree."""
    target, params = variant(name)
    prompts, sampling = h.prompts_of(RAGGED), h.sampling_of(4, **MIXED)
    want = h.decode(h.plain_loop(target=target), h.all_params(target=params), prompts, sampling)
    if name != "windows":
        h.assert_identical(want, plain)
    else:
        assert want.tokens != plain.tokens
    if shape == "lm":
        # The drafter runs the same code path, on the same parameters made a little wrong.
        close = h.close_params()
        drafter = LmDrafter(target, 4)
        drafts = {"lm": stack_layers(close) if name == "scan" else close}
    else:
        drafter, drafts = h.Oracle(TREE), h.Oracle.params(want.text)
    loop = DecodeLoop(target, drafter)
    got = h.decode(loop, h.all_params(target=params, **drafts), prompts, sampling)
    h.assert_identical(got, want)
    check_stats(got, loop)
    assert got.stats.accepted.sum() > 10


# A processor with a history


PENALTY = RepetitionPenalty(1.8)


def test_repetition_penalty_follows_the_definition():
    """transformers' semantics: seen tokens' logits are divided if positive, multiplied if negative."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 4, h.VOCAB)).astype(np.float32)
    text = rng.integers(0, h.VOCAB, (2, 10)).astype(np.int32)
    length, nodes = np.array([3, 7], np.int32), rng.integers(0, h.VOCAB, (2, 4)).astype(np.int32)
    on_path = np.tril(np.ones((4, 4), bool))[None].repeat(2, 0)
    on_path[:, 3, 1:3] = False  # node 3 is a child of the root
    got = PENALTY(
        jnp.asarray(logits),
        History(*map(jnp.asarray, (text, length, length, nodes, on_path))),
    )
    for b in range(2):
        for t in range(4):
            seen = set(text[b, : length[b]]) | set(nodes[b, on_path[b, t]])
            want = [
                (x / 1.8 if x > 0 else x * 1.8) if i in seen else x
                for i, x in enumerate(logits[b, t])
            ]
            np.testing.assert_allclose(got[b, t], want, rtol=1e-6)


def repetition_reference(prompt, steps):
    """Greedy decoding with the penalty, token by token, in plain numpy around one forward pass."""
    text = list(prompt)
    for _ in range(steps):
        tokens = np.zeros((1, 40), np.int32)
        tokens[0, : len(text)] = text
        logits = _forward(h.target_params(), jnp.asarray(tokens))
        score = np.array(logits[0, len(text) - 1])
        for token in set(text):
            score[token] = score[token] / 1.8 if score[token] > 0 else score[token] * 1.8
        text.append(int(score.argmax()))
    return text[len(prompt) :]


@jax.jit
def _forward(params, tokens):
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    return h.TARGET.apply(params, tokens, positions).logits


@pytest.mark.parametrize("shape", ["lm", "tree"])
def test_speculation_with_a_processor(shape, plain):
    prompts, sampling = h.prompts_of(RAGGED), h.sampling_of(4, **MIXED)
    want = h.decode(h.plain_loop(processors=(PENALTY,)), h.all_params(), prompts, sampling)
    assert want.tokens != plain.tokens
    assert want.tokens[0] == repetition_reference(prompts[0], 24)
    if shape == "lm":
        drafter, params = LmDrafter(h.TARGET, 3), {"lm": h.close_params()}
    else:
        drafter, params = h.Oracle(TREE), h.Oracle.params(want.text)
    loop = DecodeLoop(h.TARGET, drafter, processors=(PENALTY,))
    got = h.decode(loop, h.all_params(**params), prompts, sampling)
    h.assert_identical(got, want)
    assert got.stats.accepted.sum() > 5


# The rejection rule: exact in law (tests/test_sampling.py); here what holds of every run


@pytest.mark.parametrize("name", ["siblings", "max-gram", "lm itself"])
def test_reject_runs(name, plain):
    drafter, params = DRAFTERS[name]
    loop = DecodeLoop(h.TARGET, drafter, rule=Reject())
    got = h.decode(loop, h.all_params(**params()), h.prompts_of(RAGGED), h.sampling_of(4, **MIXED))
    check_stats(got, loop)
    assert got.tokens[0] == plain.tokens[0], "at temperature 0 the rule is the greedy one"
    assert [len(t) for t in got.tokens] == [24] * 4
    if name == "lm itself":
        assert (got.stats.rounds == 6).all()


def test_none_is_the_default_drafter():
    assert h.plain_loop() == DecodeLoop(h.TARGET, NoDrafter(), margins=True)
