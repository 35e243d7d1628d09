"""Rows are slots: a request's text and counts are the same in any row, at any time, beside anything."""

import functools
import math
import re
from types import SimpleNamespace

import drafters as d
import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import computations

from jax_specdec import DecodeLoop
from jax_specdec.core.stats import FINISH_REASONS, LENGTH, RUNNING, STOP
from jax_specdec.text.stop_strings import stop_automaton

ROWS, CAPACITY, WIDTH = 3, 40, 12
PROMPTS = h.prompts_of([5, 1, 9, 12, 3, 7, 2], seed=1)
LAWS = {
    "max_new_tokens": [24, 9, 17, 28, 4, 20, 24],
    "temperature": [0.0, 1.0, 0.7, 0.0, 1.3, 1.0, 1.0],
    "top_k": [0, 0, 5, 0, 0, 9, 0],
    "seed": [1, 2, 13, 4, 5, 16, 17],
    "own_seed": [False, True, False, True, False, True, True],
}
PIECES = [bytes([65 + token]) for token in range(h.VOCAB)]
NAMES = ("none", "max-gram", "lm", "glide+cape", "medusa", "lm[max-gram]")


def one(values, index):
    return {name: np.asarray(value)[[index]] for name, value in values.items()}


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def insert(loop, params, state, row, tokens, length, sampling, request):
    return loop.insert(params, state, row, tokens, length, sampling, request)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def run(loop, params, state, rounds, until):
    return loop.run(params, state, rounds, until)


@pytest.fixture(scope="module")
def requests():
    """Seven requests, two of which end at a stop token, and two at a stop string."""
    tokens, lengths = h.pad(PROMPTS, WIDTH)
    free = h.decode(
        h.plain_loop(),
        h.all_params(),
        PROMPTS,
        h.sampling_of(7, **LAWS),
        capacity=CAPACITY,
        ids=np.arange(7) + 10,
        width=WIDTH,
    ).tokens
    stop_ids = np.full((7, 2), -1, np.int32)
    stop_ids[2], stop_ids[5] = free[2][6], free[5][11]
    stops = [[] for _ in PROMPTS]
    for row, least in ((3, 2), (6, 4)):
        pairs = list(zip(free[row], free[row][1:], strict=False))
        pair = next(pair for i, pair in enumerate(pairs) if i >= least and pair not in pairs[:i])
        stops[row] = [b"".join(PIECES[token] for token in pair).decode()]
    table, start = stop_automaton(stops, PIECES)
    samplings = [
        h.sampling_of(
            1, stop_ids=stop_ids[i], stop_state=int(start[i]), stop_table=table, **one(LAWS, i)
        )
        for i in range(7)
    ]
    return SimpleNamespace(tokens=tokens, lengths=lengths, samplings=samplings, table=table)


class Server:
    """A batch of three rows; requests come and go."""

    def __init__(self, name, requests, drafter=None):
        drafter, params = (drafter, {"lm": h.close_params()}) if drafter else d.made(name)
        self.loop, self.params = DecodeLoop(h.TARGET, drafter), h.all_params(**params)
        self.requests = requests

    def start(self):
        """Rows that end after one token."""
        sampling = h.sampling_of(ROWS, max_new_tokens=1, stop_table=self.requests.table)
        tokens, lengths = h.pad([[1], [2, 3], [4]], WIDTH)
        ids = jnp.arange(ROWS, dtype=jnp.int32)
        state = h.start(self.loop, self.params, tokens, lengths, sampling, ids, capacity=CAPACITY)
        return self.run(state)

    def insert(self, state, row, index):
        r = self.requests
        at = slice(index, index + 1)
        ids = jnp.full((1,), index + 10, jnp.int32)
        row = jnp.int32(row)
        args = (row, r.tokens[at], r.lengths[at], r.samplings[index], ids)
        return insert(self.loop, self.params, state, row, *args[1:])

    def run(self, state, rounds=1000, until=ROWS):
        return run(self.loop, self.params, state, jnp.int32(rounds), jnp.int32(until))

    def alone(self, index):
        """What becomes of a request with no other beside it."""
        state = self.run(self.insert(self.start(), 0, index))
        return outcome(jax.device_get(state), 0)

    def serve(self, order, rng):
        """Requests in an order, in any free row, after any number of rounds; outcomes by request."""
        state, held, done = self.start(), {}, {}
        waiting = list(order)
        while waiting or held:
            finish = np.asarray(state.stats.finish)
            for row in [row for row in held if finish[row] != RUNNING]:
                done[held.pop(row)] = outcome(jax.device_get(state), row)
            free = [row for row in range(ROWS) if row not in held]
            rng.shuffle(free)
            for row in free[: int(rng.integers(1, ROWS + 1))]:
                if waiting:
                    held[row] = waiting.pop(0)
                    state = self.insert(state, row, held[row])
            idle = ROWS - len(held)
            state = self.run(state, int(rng.integers(1, 6)), min(idle + 1, ROWS))
        return [done[index] for index in range(7)]


def outcome(state, row):
    """Text, how it ended, and all that was counted of a row."""
    text = slice(int(state.prompt_length[row]), int(state.text.length[row]))
    stats = state.stats
    names = ("rounds", "drafted", "accepted", "calls", "accepted_per_pos")
    return {
        "text": state.text.tokens[row, text].tolist(),
        "finish": FINISH_REASONS[int(stats.finish[row])],
        "source": stats.source[row, text].tolist(),
        **{name: getattr(stats, name)[row].tolist() for name in names},
    }


@pytest.fixture(scope="module")
def plain(requests):
    server = Server("none", requests)
    return [server.alone(index) for index in range(7)]


def test_requests_end_in_every_way(plain):
    assert [x["finish"] for x in plain] == [
        *("length", "length", "stop", "stop", "length", "stop", "stop")
    ]
    assert [len(plain[i]["text"]) for i in (0, 1, 4)] == [24, 9, 4]
    assert all(2 < len(plain[i]["text"]) < LAWS["max_new_tokens"][i] for i in (2, 3, 5, 6))


@pytest.mark.parametrize("name", NAMES)
def test_any_row_any_time_beside_anything(name, requests, plain):
    server = Server(name, requests)
    alone = [server.alone(index) for index in range(7)]
    assert [x["text"] for x in alone] == [x["text"] for x in plain]
    assert [x["finish"] for x in alone] == [x["finish"] for x in plain]
    for seed in range(3):
        rng = np.random.default_rng(seed)
        assert server.serve(rng.permutation(7).tolist(), rng) == alone
    if name != "none":
        assert sum(x["rounds"] for x in alone) < sum(x["rounds"] for x in plain)


def test_a_state_that_stays_is_found(requests):
    """The negative control: what the request before left behind changes what is drafted."""
    server = Server("lm", requests, d.Forgetless(h.TARGET, 3))
    alone = [server.alone(index) for index in range(7)]
    rng = np.random.default_rng(0)
    served = server.serve(rng.permutation(7).tolist(), rng)
    assert [x["text"] for x in served] == [x["text"] for x in alone]  # lossless all the same
    assert served != alone


def test_until_some_rows_have_finished(requests):
    """Limits of 4, 9 and 24 tokens: plain decoding returns after as many rounds."""
    server = Server("none", requests)
    state = server.start()
    for row, index in enumerate((0, 4, 1)):
        state = server.insert(state, row, index)
    seen = []
    for until in (1, 2, 3):
        state = server.run(state, until=until)
        seen.append((state.stats.rounds.tolist(), state.stats.finish.tolist()))
    assert seen == [
        ([4, 4, 4], [RUNNING, LENGTH, RUNNING]),
        ([9, 4, 9], [RUNNING, LENGTH, LENGTH]),
        ([24, 4, 9], [LENGTH] * 3),
    ]
    before = np.asarray(state.text.tokens)
    state = server.run(state)  # nothing runs: nothing changes
    np.testing.assert_array_equal(before, state.text.tokens)


def copies(text: str, elements: int) -> list[str]:
    """Copies of an array with at least so many elements, anywhere in a program."""
    found = []
    for lines in computations(text).values():
        for line in lines:
            m = re.match(r"(?:ROOT )?%?[\w.\-]+ = \(?\w+\[([\d,]*)\].* (copy|copy-start)\(", line)
            if m and math.prod(int(n) for n in m[1].split(",") if n) >= elements:
                found.append(line)
    return found


@pytest.mark.parametrize("donated", [True, False])
def test_insertion_writes_in_place(donated, requests):
    """No copy of a cache of all rows; the negative control is a state that is not donated."""
    batch, capacity = 16, 300
    drafter, params = d.made("lm")
    loop, params = DecodeLoop(h.TARGET, drafter), h.all_params(**params)
    tokens, lengths = h.pad([[1]] * batch, WIDTH)
    sampling = h.sampling_of(batch, stop_table=requests.table)
    ids = jnp.arange(batch, dtype=jnp.int32)
    state = jax.eval_shape(
        lambda *a: loop.start(*a, capacity=capacity), params, tokens, lengths, sampling, ids
    )
    donate = {"donate_argnums": 1} if donated else {}
    args = (tokens[:1], lengths[:1], requests.samplings[0], ids[:1])
    compiled = jax.jit(loop.insert, **donate).lower(params, state, jnp.int32(0), *args).compile()
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    layer = batch * h.CONFIG.num_kv_heads * h.CONFIG.head_dim * capacity
    aliased = compiled.memory_analysis().alias_size_in_bytes
    if donated:
        assert copies(compiled.as_text(), layer) == []
        assert aliased > 0.9 * size
        assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * size
    else:
        assert aliased == 0 and len(copies(compiled.as_text(), layer)) >= 8


def test_a_row_that_is_refilled_gives_no_trace_of_the_old_one(requests):
    """A longer text was there before, and its tokens lie behind the new one's."""
    server = Server("lm", requests)
    want = server.alone(4)
    state = server.run(server.insert(server.start(), 1, 3))
    assert int(state.stats.finish[1]) == STOP
    state = server.run(server.insert(state, 1, 4))
    assert outcome(jax.device_get(state), 1) == want
