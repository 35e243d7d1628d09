"""Stop strings as automata, against searching the text."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models

from jax_specdec.core.sampling import STRING_COMPLETE
from jax_specdec.errors import UserError
from jax_specdec.text.stop_strings import stop_automaton, truncate
from jax_specdec.text.token_bytes import token_bytes

pytestmark = pytest.mark.smoke


def walk(table, state, tokens):
    """How many tokens complete a stop string, or None."""
    if state < 0:
        return None
    for n, token in enumerate(tokens, 1):
        state = table[state, token]
        if state == STRING_COMPLETE:
            return n
    return None


def search(pieces, stops, tokens):
    text = b""
    for n, token in enumerate(tokens, 1):
        text += pieces[token]
        if any(s.encode() in text for s in stops):
            return n
    return None


@pytest.mark.parametrize("seed", range(10))
def test_automaton_is_a_search(seed):
    """Random pieces of up to four letters, empty ones too; strings that overlap and contain others."""
    rng = np.random.default_rng(seed)
    letters = "ab" if seed % 2 else "abé"
    pieces = ["".join(rng.choice(list(letters), rng.integers(0, 5))).encode() for _ in range(12)]
    rows = [
        tuple(
            "".join(rng.choice(list(letters), rng.integers(1, 7)))
            for _ in range(rng.integers(0, 4))
        )
        for _ in range(5)
    ]
    rows.append(rows[0])
    table, start = stop_automaton(rows, pieces)
    assert table.dtype == np.int32 and start.dtype == np.int32
    assert table.max(initial=-1) < len(table) and (start < len(table)).all()
    assert start[-1] == start[0], "the same strings share states"
    for _ in range(100):
        tokens = rng.integers(0, 12, 15)
        for row, state in zip(rows, start, strict=True):
            assert walk(table, state, tokens) == (search(pieces, row, tokens) if row else None)


@pytest.mark.parametrize(
    ("stops", "pieces", "at"),
    [
        (("ab",), [b"a", b"b"], 2),  # spans two tokens
        (("b",), [b"abc", b"x"], 1),  # inside one token
        (("aab",), [b"a", b"a", b"a", b"b"], 4),  # the failure link keeps two letters
        (("abab", "bc"), [b"aba", b"bc"], 2),  # the second one ends inside the first's token
        (("he", "she", "hers"), [b"us", b"her"], 2),
        (("\n\n",), [b"\n", b"", b"\n"], 3),  # a special token in between adds nothing
        (("é",), [b"\xc3", b"\xa9"], 2),  # a character split over tokens
        (("zz",), [b"z", b"yz"], None),
    ],
)
def test_places(stops, pieces, at):
    table, start = stop_automaton([stops], pieces)
    assert walk(table, start[0], range(len(pieces))) == at


def test_rows_without_stops():
    table, start = stop_automaton([(), ()], [b"a", b"b"])
    assert table.shape == (0, 2) and start.tolist() == [-1, -1]
    table, start = stop_automaton([(), ("a",)], [b"a", b"b"])
    assert start.tolist() == [-1, 0]


def test_an_empty_string_is_refused():
    with pytest.raises(UserError, match="must not be empty"):
        stop_automaton([("a", "")], [b"a"])


def test_truncate():
    assert truncate("one two three", ("three", "two")) == "one "
    assert truncate("one", ("x",)) == "one" and truncate("one", ()) == "one"
    assert truncate("aXbX", ("X",)) == "a" and truncate("Xab", ("X",)) == ""


LLAMA = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])


def Names(names, special=(), decoder=None):
    """A tokenizer with these names, None for a hole."""
    vocab = {name: i for i, name in enumerate(names) if name is not None}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.decoder = decoder or decoders.ByteLevel()
    tokenizer.add_special_tokens([names[i] for i in special])
    return tokenizer


def test_byte_level_pieces():
    names = ["<s>", "Ġthe", "Ċ", "Ã©", "abc", "<tool>", None, "日"]
    got = token_bytes(Names(names, [0]), 10)
    assert got == [
        b"",
        b" the",
        b"\n",
        "é".encode(),
        b"abc",
        b"<tool>",
        b"",
        "日".encode(),
        b"",
        b"",
    ]


def test_sentencepiece_pieces():
    names = ["<unk>", "▁the", "<0x0A>", "é", "<0xC3>", "▁▁"]
    got = token_bytes(Names(names, [0], LLAMA), 6)
    assert got == [b"", b" the", b"\n", "é".encode(), b"\xc3", b"  "]


def test_vocabulary_smaller_than_the_tokenizer():
    assert token_bytes(Names(["a", "b", "c"]), 2) == [b"a", b"b"]
