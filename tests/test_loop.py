"""The compiled loop: whatever drafts, the text is plain decoding's, token for token."""

import dataclasses

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_specdec import DecodeLoop, Decoder
from jax_specdec.core.acceptance import Reject
from jax_specdec.core.plain import NoDrafter
from jax_specdec.core.processors import History, RepetitionPenalty
from jax_specdec.core.stats import LENGTH, RUNNING, STOP
from jax_specdec.drafters.bigram import Bigram
from jax_specdec.drafters.lm import LmDrafter
from jax_specdec.drafters.max_gram import MaxGram
from jax_specdec.drafters.prompt_lookup import PromptLookup
from jax_specdec.models import stack_layers
from jax_specdec.text.stop_strings import stop_automaton

# Prompt lengths of a ragged batch; a prompt of one token has nothing in the cache.
RAGGED = (1, 7, 2, 12)
# One row greedy, the others sampled, each with filters of its own.
MIXED = {
    "temperature": [0.0, 1.0, 0.3, 1.7],
    "top_k": [0, 0, 5, 12],
    "top_p": [1.0, 0.9, 1.0, 0.8],
    "min_p": [0.0, 0.0, 0.05, 0.0],
    "seed": [1, 2, 3, 4],
}
TREE = (0, 0, 1, 2, 3, 0, 5, 6, 1, 8, 8, 2, 5, 0)
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


def check_stats(result, loop):
    """What must hold of the counts of any run."""
    stats = result.stats
    emitted = np.array([len(t) for t in result.tokens])
    accepted = stats.accepted.sum(axis=1)
    assert (stats.accepted[:, 0] == 0).all() and (stats.drafted[:, 0] == 0).all()
    assert (stats.accepted <= stats.drafted).all()
    assert (accepted == stats.accepted_per_pos.sum(axis=1)).all()
    assert (np.diff(stats.accepted_per_pos, axis=1) <= 0).all(), "a path is accepted from its top"
    # A round emits what it accepts and the target's own token, unless it was cut short.
    assert (emitted <= stats.rounds + accepted).all()
    assert (emitted >= stats.rounds + accepted - 1).all()
    assert (stats.calls <= stats.rounds[:, None]).all()
    assert (stats.rounds >= 1).all()
    capacity = result.text.shape[1]
    place = np.arange(capacity)[None]
    span = (place >= result.state.prompt_length[:, None]) & (
        place < result.state.text.length[:, None]
    )
    for i in range(1, stats.accepted.shape[1]):
        assert ((stats.source == i) & span).sum(axis=1).tolist() == stats.accepted[:, i].tolist()
    cache = result.state.view.cache
    assert (cache.length == result.state.text.length - 1).all()


@pytest.fixture(scope="module")
def plain():
    """Plain decoding of the ragged mixed batch."""
    return h.decode(
        h.plain_loop(logprobs=True),
        h.all_params(),
        h.prompts_of(RAGGED),
        h.sampling_of(4, **MIXED),
    )


@pytest.fixture(scope="module")
def plain_single():
    out = {}
    for temperature in (0.0, 1.0):
        sampling = h.sampling_of(1, temperature=temperature, seed=5)
        out[temperature] = h.decode(
            h.plain_loop(), h.all_params(), h.prompts_of([9], seed=2), sampling
        )
    return out


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


# Where a row ends

# How the oracle drafts: any right prefix of a chain; all of it, so that each block has five tokens and
# every place in it is known; paths of a tree.
HOW = ("any", "all", "tree")


def oracle_run(plain, sampling, how="any", capacity=48):
    drafter = h.Oracle(TREE) if how == "tree" else h.chain_oracle(4)
    params = h.all_params(**h.Oracle.params(plain.text, certain=how == "all"))
    loop = DecodeLoop(h.TARGET, drafter, logprobs=True, margins=True)
    return h.decode(loop, params, h.prompts_of(RAGGED), sampling, capacity=capacity)


def first_use(tokens):
    """The places whose token has not come before them."""
    return [i for i, t in enumerate(tokens) if t not in tokens[:i]]


@pytest.mark.parametrize("how", HOW)
def test_eos_at_every_place(how, plain):
    """Each row stops at its own token, the n-th it emits, wherever that falls in a block."""
    seen = set()
    choices = [first_use(t) for t in plain.tokens]
    for i in range(max(map(len, choices))):
        at = [c[i % len(c)] for c in choices]
        stop_ids = np.array([[t[n], -1] for t, n in zip(plain.tokens, at, strict=True)])
        got = oracle_run(plain, h.sampling_of(4, **MIXED, stop_ids=stop_ids), how)
        for row, n in enumerate(at):
            assert got.tokens[row] == plain.tokens[row][: n + 1]
            seen.add(n % 5)
        assert got.stats.finish.tolist() == [STOP] * 4
        check_stats(got, None)
    assert seen == set(range(5))


def test_several_stop_ids(plain):
    early = [t[: 8 + i] for i, t in enumerate(plain.tokens)]
    stop_ids = np.array([[e[-1], e[2]] for e in early])
    got = oracle_run(plain, h.sampling_of(4, **MIXED, stop_ids=stop_ids))
    for row, tokens in enumerate(plain.tokens):
        end = next(i for i, t in enumerate(tokens) if t in stop_ids[row])
        assert got.tokens[row] == tokens[: end + 1]


@pytest.mark.parametrize("how", HOW)
def test_max_tokens_at_every_place(how, plain):
    for first in range(1, 21, 4):
        limits = [first, first + 1, first + 2, first + 3]
        got = oracle_run(plain, h.sampling_of(4, **MIXED, max_new_tokens=limits), how)
        for row, limit in enumerate(limits):
            assert got.tokens[row] == plain.tokens[row][:limit]
        assert got.stats.finish.tolist() == [LENGTH] * 4
        check_stats(got, None)


def test_stop_token_on_the_last_place(plain):
    """A stop token that is also the last allowed one counts as a stop."""
    at = [first_use(t)[5] for t in plain.tokens]
    stop_ids = np.array([[t[n], -1] for t, n in zip(plain.tokens, at, strict=True)])
    for extra, reason in ((1, STOP), (0, LENGTH)):
        limits = [n + extra for n in at]
        got = oracle_run(
            plain, h.sampling_of(4, **MIXED, stop_ids=stop_ids, max_new_tokens=limits), "all"
        )
        assert got.stats.finish.tolist() == [reason] * 4
        assert [len(t) for t in got.tokens] == limits


@pytest.mark.parametrize("how", HOW[1:])
def test_capacity_full(how, plain):
    """Rows end when the buffer does, at whatever place of a block; nothing live is overwritten."""
    capacity = 19
    got = oracle_run(plain, h.sampling_of(4, **MIXED, max_new_tokens=400), how, capacity=capacity)
    for row, prompt in enumerate(h.prompts_of(RAGGED)):
        text = (prompt + plain.tokens[row])[:capacity]
        assert got.text[row, : len(text)].tolist() == text
    assert got.state.text.length.tolist() == [capacity] * 4
    assert got.stats.finish.tolist() == [LENGTH] * 4
    check_stats(got, None)


def test_prompt_fills_the_buffer():
    """A row with no room at all emits nothing and takes no round; its neighbour goes on."""
    prompts = h.prompts_of([16, 3])
    loop = DecodeLoop(h.TARGET, MaxGram(5))
    got = h.decode(loop, h.all_params(), prompts, h.sampling_of(2), capacity=16)
    assert got.tokens[0] == [] and got.stats.finish.tolist() == [LENGTH, LENGTH]
    assert got.stats.rounds[0] == 0 and got.stats.drafted[0].sum() == 0
    assert got.text[0, :16].tolist() == prompts[0]
    assert len(got.tokens[1]) == 13


PIECES = [bytes([97 + i % 3]) * (1 + i % 2) + (b"d" if i % 5 == 0 else b"") for i in range(h.VOCAB)]


def stop_place(tokens, stops):
    """How many tokens are emitted until a stop string is in the text, or None."""
    text = b""
    for n, token in enumerate(tokens, 1):
        text += PIECES[token]
        if any(s.encode() in text for s in stops):
            return n
    return None


@pytest.mark.parametrize("how", HOW[1:])
def test_stop_strings_at_every_place(how, plain):
    """Strings that end inside tokens, span several, overlap themselves or contain each other."""
    seen, reasons = set(), set()
    texts = [b"".join(PIECES[t] for t in row).decode() for row in plain.tokens]
    for offset in range(0, 20, 2):
        # Two strings a row: one cut from its own text, so that it occurs, and one that overlaps it.
        stops = [(t[offset + i : offset + i + 4], t[1:3] * 3) for i, t in enumerate(texts)]
        stops[offset % 4] = ()
        automaton, state = stop_automaton(stops, PIECES)
        automaton = np.pad(automaton, ((0, 64 - len(automaton)), (0, 0)))
        sampling = h.sampling_of(4, **MIXED, stop_table=automaton, stop_state=state)
        got = oracle_run(plain, sampling, how)
        for row in range(4):
            end = stop_place(plain.tokens[row], stops[row]) if stops[row] else None
            assert got.tokens[row] == plain.tokens[row][:end]
            assert got.stats.finish[row] == (LENGTH if end is None else STOP)
            reasons.add(int(got.stats.finish[row]))
            if end is not None:
                seen.add((end - 1) % 5)
        check_stats(got, None)
    assert reasons == {STOP, LENGTH} and seen == set(range(5))


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


# Log-probabilities, margins


def teacher_forced(result, row):
    """Logits after every token of the finished text, by one forward pass with no cache."""
    n = int(result.state.text.length[row])
    tokens = jnp.asarray(result.text[row : row + 1])
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    out = h.TARGET.apply(h.target_params(), tokens, positions)
    return np.asarray(out.logits, np.float64)[0, :n]


@pytest.mark.parametrize("how", [None, "tree"])
def test_log_probabilities_and_margins(how, plain):
    got = plain if how is None else oracle_run(plain, h.sampling_of(4, **MIXED), "tree")
    for row, prompt in enumerate(h.prompts_of(RAGGED)):
        logits = teacher_forced(got, row)
        span = slice(len(prompt), len(logits))
        text = got.text[row, span]
        before = logits[len(prompt) - 1 : -1]
        log_p = before - np.log(
            np.exp(before - before.max(-1, keepdims=True)).sum(-1, keepdims=True)
        )
        log_p = log_p - before.max(-1, keepdims=True)
        want = np.take_along_axis(log_p, text[:, None], 1)[:, 0]
        np.testing.assert_allclose(got.stats.logprobs[row, span], want, atol=2e-4)
        assert (got.stats.logprobs[row, : len(prompt)] == 0).all()
        assert (got.stats.margins[row, span] >= 0).all()
        if MIXED["temperature"][row] == 0:
            best = np.sort(before, axis=1)
            np.testing.assert_allclose(
                got.stats.margins[row, span], best[:, -1] - best[:, -2], atol=2e-4
            )
        np.testing.assert_allclose(got.margins[row], plain.margins[row], rtol=1e-3, atol=1e-3)


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
