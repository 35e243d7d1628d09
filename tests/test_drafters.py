"""Statistical drafters against a specification in plain Python, and the contract of every drafter."""

import dataclasses

import helpers as h
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_specdec.core.context import TargetView, make_context
from jax_specdec.core.draft import Text
from jax_specdec.core.drafter import Drafter, foreseen
from jax_specdec.core.plain import NoDrafter
from jax_specdec.drafters.bigram import Bigram, count_bigrams, successors
from jax_specdec.drafters.first import First
from jax_specdec.drafters.lm import LmDrafter
from jax_specdec.drafters.max_gram import MaxGram
from jax_specdec.drafters.ngram import copied as copied_chances
from jax_specdec.drafters.ngram import longest_suffix_match
from jax_specdec.drafters.prompt_lookup import PromptLookup
from jax_specdec.errors import UserError
from jax_specdec.testing import check_drafter

ROWS, CAPACITY = 512, 48


def random_texts(seed):
    """Ragged rows over few letters, many of them periodic; other letters behind the end."""
    rng = np.random.default_rng(seed)
    texts, tokens = [], rng.integers(0, 5, (ROWS, CAPACITY)).astype(np.int32)
    for row in range(ROWS):
        n = int(rng.integers(1, 41))
        letters = int(rng.integers(1, 6))
        text = rng.integers(0, letters, n)
        if row % 3 == 0:
            text = np.tile(text[: int(rng.integers(1, 8))], n)[:n]
        tokens[row, :n] = text
        texts.append(text.tolist())
    lengths = jnp.asarray([len(t) for t in texts], jnp.int32)
    return texts, Text(jnp.asarray(tokens), lengths)


def matched(text, j):
    """How many tokens ending at place j are the last ones of the text."""
    m = 0
    while m <= j and text[j - m] == text[len(text) - 1 - m]:
        m += 1
    return m


def best_match(text, min_match, max_match, ties):
    """The place where the longest earlier match ends, or None."""
    scores = [min(matched(text, j), max_match or len(text)) for j in range(len(text) - 1)]
    best = max(scores, default=0)
    if best < min_match:
        return None
    places = [j for j, m in enumerate(scores) if m == best]
    return places[0] if ties == "earliest" else places[-1]


def copied(text, end, length):
    """What follows place `end`, the copy reading on into itself."""
    out = list(text)
    for i in range(length):
        out.append(out[end + 1 + i])
    return out[len(text) :]


def draft(drafter, text, params=None):
    def call(text):
        batch = text.length.shape[0]
        ctx = make_context(text, TargetView(None), h.sampling_of(batch), h.VOCAB)
        return jax.jit(drafter.draft)(params or {}, {}, ctx)[0]

    return jax.device_get(call(text))


SEARCHES = [
    (ties, min_match, max_match)
    for ties in ("earliest", "latest")
    for min_match, max_match in ((1, None), (2, None), (3, 5), (1, 1), (2, 3), (4, None))
]


@pytest.mark.parametrize(("ties", "min_match", "max_match"), SEARCHES)
def test_search(ties, min_match, max_match):
    search = jax.jit(
        lambda text: longest_suffix_match(text, min_match=min_match, max_match=max_match, ties=ties)
    )
    texts, packed = random_texts(min_match)
    match, end = map(np.asarray, search(packed))
    chance = np.asarray(copied_chances(jnp.asarray(match), 3))
    assert ((chance > 0) == (match > 0)[:, None]).all() and (chance < 1).all()
    assert (np.diff(chance[match > 0], axis=1) > 0).all()
    for row, text in enumerate(texts):
        want = best_match(text, min_match, max_match, ties)
        assert (match[row] > 0) == (want is not None)
        if want is not None:
            assert end[row] == want
            # The count may stop early, once one candidate is left, and never overstates.
            assert min_match <= match[row] <= matched(text, want)


@pytest.mark.parametrize("ties", ["earliest", "latest"])
@pytest.mark.parametrize("min_match", [1, 2])
def test_max_gram(ties, min_match):
    drafter = MaxGram(6, ties=ties, min_match=min_match)
    texts, packed = random_texts(10 + min_match)
    got = draft(drafter, packed)
    nothing = 0
    for row, text in enumerate(texts):
        end = best_match(text, min_match, None, ties)
        assert got.tokens[row, 0] == text[-1] and got.valid[row, 0]
        if end is None:
            assert not got.valid[row, 1:].any()
            nothing += 1
        else:
            assert got.valid[row].all()
            assert got.tokens[row, 1:].tolist() == copied(text, end, 6)
    assert nothing > 10


def test_max_gram_fills_where_nothing_matched():
    table = np.random.default_rng(0).integers(0, 5, 5).astype(np.int32)
    drafter = MaxGram(4, min_match=3, fill="table")
    texts, packed = random_texts(3)
    got = draft(drafter, packed, {"table": jnp.asarray(table)})
    filled = 0
    for row, text in enumerate(texts):
        end = best_match(text, 3, None, "latest")
        if end is None:
            filled += 1
            want = [text[-1]]
            for _ in range(4):
                want.append(int(table[want[-1]]))
            want = want[1:]
        else:
            want = copied(text, end, 4)
        assert got.valid[row].all() and got.tokens[row, 1:].tolist() == want
    assert 10 < filled < ROWS - 10


@pytest.mark.parametrize("max_ngram", [1, 3])
def test_prompt_lookup(max_ngram):
    """As transformers: the longest n-gram, its first occurrence, copied up to the end of the text."""
    texts, packed = random_texts(20 + max_ngram)
    got = draft(PromptLookup(5, max_ngram=max_ngram), packed)
    for row, text in enumerate(texts):
        want = []
        for n in range(min(max_ngram, len(text) - 1), 0, -1):
            places = [i for i in range(len(text) - n) if text[i : i + n] == text[-n:]]
            if places:
                want = text[places[0] + n : places[0] + n + 5]
                break
        assert got.valid[row, 1:].tolist() == [i < len(want) for i in range(5)]
        assert got.tokens[row, 1 : 1 + len(want)].tolist() == want


def test_counting_bigrams():
    documents = [np.array(x) for x in ([0, 1, 0, 1, 0, 2], [0, 2, 3], [3, 3], [1], [], [0, 2])]
    # 0 is followed by 1 twice and by 2 three times; 1 by 0; 2 by 3; 3 by 3; 4 never occurs, and 0 is
    # the most frequent token.
    assert count_bigrams(documents, 5).tolist() == [2, 0, 3, 3, 0]
    assert count_bigrams([np.array([0, 2, 0, 1])], 3)[0] == 1, "ties go to the smaller id"


@pytest.mark.parametrize("seed", range(3))
def test_counting_bigrams_against_a_matrix(seed):
    rng = np.random.default_rng(seed)
    documents = [rng.integers(0, 9, rng.integers(0, 60)) for _ in range(20)]
    counts = np.zeros((9, 9), int)
    for d in documents:
        np.add.at(counts, (d[:-1], d[1:]), 1)
    assert count_bigrams(iter(documents), 9).tolist() == counts.argmax(1).tolist()


def test_successors():
    table = jnp.asarray([1, 2, 0, 3], jnp.int32)
    got = successors(table, jnp.asarray([0, 3], jnp.int32), 4)
    assert got.tolist() == [[1, 2, 0, 1], [3, 3, 3, 3]]


def test_the_first_that_finds_something():
    """Row by row: a copy where the text repeats itself, and what the next one says elsewhere."""
    table = np.random.default_rng(0).integers(0, 5, 5).astype(np.int32)
    gram, follow = MaxGram(4, min_match=3), Bigram(2)
    texts, packed = random_texts(3)
    params = {"bigram": jnp.asarray(table)}
    both, one, other = (draft(x, packed, params) for x in (First((gram, follow)), gram, follow))
    copied = one.valid[:, 1]
    assert 10 < copied.sum() < len(texts) - 10
    says, nothing = foreseen(First((gram, follow)), packed)
    assert says is not None and ((np.asarray(says[:, 0]) > 0) == copied).all() and nothing is None
    for row, mine in enumerate(copied):
        want = one if mine else other
        assert both.valid[row].sum() == want.valid[row].sum() == (5 if mine else 3)
        many = int(want.valid[row].sum())
        assert (both.tokens[row, :many] == want.tokens[row, :many]).all()
        assert (both.source[row, 1:many] == (1 if mine else 2)).all()


# The contract


CONFORMING = {
    "none": (NoDrafter(), dict),
    "lm": (LmDrafter(h.TARGET, 3), lambda: {"lm": h.close_params()}),
    "max-gram": (MaxGram(4, fill="t"), lambda: {"t": jnp.arange(h.VOCAB, dtype=jnp.int32)}),
    "prompt-lookup": (PromptLookup(4), dict),
    "bigram": (Bigram(2), lambda: {"bigram": jnp.arange(h.VOCAB, dtype=jnp.int32)}),
    "siblings": (h.Siblings(LmDrafter(h.TARGET, 2)), lambda: {"lm": h.close_params()}),
    "first": (
        First((MaxGram(5, min_match=2), LmDrafter(h.TARGET, 3))),
        lambda: {"lm": h.close_params()},
    ),
}


@pytest.mark.parametrize("name", CONFORMING)
def test_contract(name):
    drafter, params = CONFORMING[name]
    assert isinstance(drafter, Drafter)
    check_drafter(drafter, params(), h.TARGET, h.target_params())


MISSHAPEN = ("a number", "flat", "many rows", "deep")


@dataclasses.dataclass(frozen=True)
class Broken(Bigram):
    """A bigram drafter that breaks the contract in one way."""

    how: str = ""

    @property
    def info(self):
        info = super().info
        told = {"too early": "after", "someday": "someday", "blind": "before", "boastful": "before"}
        told |= dict.fromkeys(MISSHAPEN, "before")
        info = dataclasses.replace(info, chances=told.get(self.how))
        return dataclasses.replace(info, nodes=64) if self.how == "wide" else info

    def chances(self, text):
        chance = 2.0 if self.how == "boastful" else 0.0
        shape = (text.length.shape[0], self.length)
        shape = {"flat": (2,), "many rows": (9, 2), "deep": (2, 99)}.get(self.how, shape)
        return 0.5 if self.how == "a number" else jnp.full(shape, chance, jnp.float32)

    def init(self, batch, capacity):
        states = {"bigram": jnp.zeros((batch,), jnp.int32)}
        return [states] if self.how == "list" else states

    def extend(self, params, states, ctx):
        if self.how == "selfish":
            return {"bigram": states["bigram"]}
        if self.how == "retyped":
            return {**states, "bigram": states["bigram"].astype(jnp.float32)}
        return states

    def draft(self, params, states, ctx):
        draft, states = super().draft(params, states, ctx)
        tokens = draft.tokens
        if self.how == "stateful":  # what was drafted before is never forgotten
            shift = states["bigram"][:, None].at[:, 0].add(0)
            tokens = tokens.at[:, 1:].set((tokens[:, 1:] + shift) % h.VOCAB)
            states = {**states, "bigram": states["bigram"] + 1}
        if self.how == "mixing":
            others = jnp.where(jnp.all(ctx.active), 0, 1)
            tokens = tokens.at[:, 1:].set((tokens[:, 1:] + others) % h.VOCAB)
        changes = {
            "rootless": {"tokens": tokens.at[:, 0].set(0)},
            "floats": {"probability": draft.probability.astype(jnp.bfloat16)},
            "narrow": {"tokens": tokens[:, :-1]},
            "unknown source": {"source": draft.source * 2},
            "outside": {"tokens": tokens.at[:, 1].set(h.VOCAB)},
            "holes": {"valid": draft.valid.at[:, 1].set(False)},
            "half a tree": {"parent": jnp.zeros_like(tokens)},
            "always q": {"q": jnp.ones((tokens.shape[0], self.length, h.VOCAB), jnp.float32)},
            "too sure": {"probability": draft.probability * 2},
            "too early": {"probability": draft.probability * 0},
        }
        return draft.replace(**{"tokens": tokens, **changes.get(self.how, {})}), states


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("wide", "nodes < 64"),
        ("list", "dictionary of states"),
        ("selfish", "extend must pass on the states of other drafters"),
        ("retyped", "extend must return states of the structure"),
        ("stateful", "rolled back"),
        ("mixing", "rows that are not active"),
        ("rootless", "node 0 must be the root"),
        ("floats", "Draft.probability must be float32"),
        ("narrow", "Draft.tokens must be int32"),
        ("unknown source", "source of a drafted node"),
        ("outside", "in the vocabulary"),
        ("holes", "below an invalid one"),
        ("half a tree", "must all be given"),
        ("always q", "q must be None"),
        ("blind", r"chances\(text\) must be above 0 where the drafter proposes"),
        ("boastful", r"chances\(text\) must be in \[0, 1\]"),
        ("too early", "must say how likely they are"),
        ("someday", r"must be 'before', 'after' or None"),
        ("too sure", r"probability of a node must be in \[0, 1\]"),
    ],
)
def test_contract_broken(how, sentence):
    table = {"bigram": jnp.asarray(np.random.default_rng(0).permutation(h.VOCAB), jnp.int32)}
    with pytest.raises(AssertionError, match=sentence):
        check_drafter(Broken(2, how=how), table, h.SMALL, h.small_params())


@pytest.mark.parametrize("how", MISSHAPEN)
def test_chances_of_another_shape(how):
    """One sentence where the loop asks, too."""
    packed = random_texts(3)[1]
    with pytest.raises(UserError, match="The chances of drafter 'bigram' must be float32"):
        foreseen(Broken(2, how=how), packed)


def test_unhashable_drafters_are_refused():
    @dataclasses.dataclass
    class Loose(Bigram.__mro__[1]):
        length: int = 2
        name: str = "loose"
        info = None

        def init(self, batch, capacity): ...

        reset = extend = draft = commit = init

    with pytest.raises(AssertionError, match="hashable"):
        check_drafter(Loose(), {}, h.SMALL, h.small_params())
