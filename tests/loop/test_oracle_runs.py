"""Runs of a drafter that knows the text: where a row ends, and the log-probabilities of its tokens."""

import helpers as h
import jax.numpy as jnp
import numpy as np
import pytest
from loop_runs import MIXED, RAGGED, TREE, check_stats

from jax_specdec import DecodeLoop
from jax_specdec.core.stats import LENGTH, STOP
from jax_specdec.drafters.max_gram import MaxGram
from jax_specdec.text.stop_strings import stop_automaton

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


# Where a row ends


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
