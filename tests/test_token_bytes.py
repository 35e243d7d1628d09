"""What tokens add to a text, on the device and in the answer, against the tokenizer's own decoding."""

import json

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jax_specdec.core.sampling import STRING_COMPLETE
from jax_specdec.errors import UserError
from jax_specdec.text.detokenize import TextStream, answer_text
from jax_specdec.text.stop_strings import special_stops, stop_automaton, stop_rows
from jax_specdec.text.token_bytes import TokenBytes, id_bound, token_bytes
from jax_specdec.training.data import read_documents

pytestmark = pytest.mark.smoke

# Special tokens are not part of a text; other added ones are, with U+2581 as the decoder has it.
SPECIAL = ("<s>", "</s>", "<|im_end|>")
ADDED = ("<|tool|>", "<\uff5c\u2581pad\u2581\uff5c>", "  ")
CHARS = ("a", "b", " ", "\n", "\u00e9", "\u65e5", "\U0001f600")
WORDS = (*CHARS, "ab", " a", " ba", "b\n", "   ", "\u00e9a", " \u65e5")
PIECES = tuple(word.replace(" ", "\u2581") for word in WORDS[:4] + WORDS[7:])
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
SPACES = decoders.Replace("\u2581", " ")
FALLBACK = decoders.ByteFallback()
FUSE = decoders.Fuse()


def made(names, *decoder, model=lambda vocab: models.BPE(vocab, [])):
    """A tokenizer of these names, with holes in its ids and special tokens in the middle."""
    names = dict.fromkeys([SPECIAL[0], *names, *SPECIAL[1:], *ADDED])
    tokenizer = Tokenizer(model({name: i + 3 * (i // 7) for i, name in enumerate(names)}))
    if decoder:
        tokenizer.decoder = decoders.Sequence(list(decoder)) if len(decoder) > 1 else decoder[0]
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in ADDED])
    return tokenizer


def byte_level():
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelled = [level.pre_tokenize_str(word)[0][0] for word in WORDS]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return made([*alphabet, *spelled, *(s[:-1] for s in spelled[4:7])], decoders.ByteLevel())


def unigram():
    names = dict.fromkeys([*SPECIAL, *BYTES, *PIECES, *ADDED])
    tokenizer = Tokenizer(models.Unigram([(name, -1.0) for name in names], 0, True))
    tokenizer.decoder = decoders.Sequence([FALLBACK, decoders.Metaspace()])
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.add_tokens(list(ADDED))
    return tokenizer


def wordpiece(vocab):
    return models.WordPiece(vocab, unk_token="<s>")


def words(vocab):
    return models.WordLevel(vocab, unk_token="<s>")


FALLING = (*BYTES, *PIECES)
LLAMA = (SPACES, FALLBACK, FUSE, decoders.Strip(" ", 1, 0))
NEVER = decoders.Metaspace(prepend_scheme="never")
KINDS = {
    "byte level": byte_level,
    "llama": lambda: made(FALLING, *LLAMA),
    "strips two": lambda: made(FALLING, *LLAMA[:3], decoders.Strip(" ", 2, 0)),
    "gemma": lambda: made(FALLING, *LLAMA[:3]),
    "replaces late": lambda: made(FALLING, FALLBACK, FUSE, SPACES),
    "unigram": unigram,
    "metaspace": lambda: made(PIECES, decoders.Metaspace()),
    "metaspace, never": lambda: made(PIECES, NEVER),
    "metaspace of a whole": lambda: made(FALLING, FALLBACK, FUSE, NEVER),
    "regex": lambda: made(PIECES, decoders.Replace(Regex("a+"), "x"), SPACES),
    "strips each": lambda: made(PIECES, SPACES, decoders.Strip(" ", 0, 1)),
    "wordpiece": lambda: made(["a", "##b", "##a", "."], decoders.WordPiece(), model=wordpiece),
    "no decoder": lambda: made(["a", "b", "ab"], model=words),
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    return KINDS[request.param]()


def ids_of(tokenizer, *names):
    vocab = tokenizer.get_vocab()
    return [vocab[name] for name in names]


def random_ids(rng, tokenizer, size):
    """Any ids, those of no token among them, and as many of a few that often meet."""
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    few = ("a", "b", "\u2581", "\u0120", "\u2581a", "\u0120a", "  ", "</s>")
    halves = ("<0xC3>", "<0xA9>", "\u00c3", "\u00a9")
    often = [vocab[name] for name in (*few, *halves) if name in vocab]
    size_all = id_bound(tokenizer) + 3
    return [
        int(rng.choice(often) if rng.random() < 0.5 else rng.integers(size_all))
        for _ in range(size)
    ]


def random_case(rng, tokenizer):
    """Token ids of a prompt, which may hold no text, and of an answer."""
    prompt = random_ids(rng, tokenizer, int(rng.integers(0, 4)))
    special = [tokenizer.token_to_id("<s>")] * int(rng.integers(0, 2))
    return special + prompt, random_ids(rng, tokenizer, 12)


def whole_runs(rng, tokenizer, ids):
    """Byte-fallback tokens become characters: the library decodes a run of them all or nothing."""
    out = []
    for index in ids:
        run = rng.choice(CHARS).encode() if tokenizer.id_to_token(index) in BYTES else b""
        out += ids_of(tokenizer, *(BYTES[byte] for byte in run)) or [index]
    return out


def test_prompt_and_answer_are_the_text(tokenizer):
    """`decode(prompt + answer)` less `decode(prompt)`."""
    rng, known = np.random.default_rng(0), TokenBytes(tokenizer)
    for _ in range(300):
        prompt, ids = (whole_runs(rng, tokenizer, x) for x in random_case(rng, tokenizer))
        before, text = tokenizer.decode(prompt), tokenizer.decode(prompt + ids)
        if not text.startswith(before):
            # Half a character at the end of the prompt, which the answer makes whole.
            assert before.endswith("\ufffd")
            before = before[:-1]
        assert text == before + answer_text(known, prompt, ids)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    ids = [i for i in rng.permutation(id_bound(tokenizer)).tolist() if tokenizer.id_to_token(i)]
    ids = [i for i in ids if tokenizer.id_to_token(i) not in BYTES]
    assert answer_text(fast, [], ids) == fast.decode(ids, skip_special_tokens=True)


def test_a_stream_is_the_text(tokenizer):
    """In any pieces and cut anywhere: what was shown is the start of every longer answer's text."""
    rng, known = np.random.default_rng(1), TokenBytes(tokenizer)
    for _ in range(100):
        prompt, ids = random_case(rng, tokenizer)
        stream, shown, begin = TextStream(known, (), prompt), "", 0
        while begin < len(ids):
            end = begin + int(rng.integers(1, 4))
            shown += stream.push(ids[begin:end])
            begin = end
            text = answer_text(known, prompt, ids[:end])
            assert text.startswith(shown) and len(text) - len(shown) <= 1
        assert shown + stream.finish() == text


def random_stops(rng, text):
    """Parts of a text, parts with a wrong end, special tokens."""
    text = "".join(char for char in text if char != "\ufffd") or "b"
    stops = []
    for _ in range(int(rng.integers(1, 4))):
        begin = int(rng.integers(len(text)))
        stop = text[begin : begin + int(rng.integers(1, 6))]
        stops.append(stop + "|" if rng.random() < 0.3 else stop)
    return (*stops, "</s>") if rng.random() < 0.2 else tuple(stops)


def walk(table, state, ids):
    """How many tokens are emitted until the row ends, or None."""
    for n, index in enumerate(ids, 1):
        state = table[state, index]
        if state == STRING_COMPLETE:
            return n
    return None


def test_rows_end_where_the_text_holds_a_stop(tokenizer):
    """Device, answer and stream, over several rows of one table."""
    rng, known = np.random.default_rng(2), TokenBytes(tokenizer)
    size, ended, at_start = id_bound(tokenizer) + 3, 0, 0
    special = tokenizer.token_to_id("</s>")
    for _ in range(60):
        cases = [random_case(rng, tokenizer) for _ in range(3)]
        stops = [random_stops(rng, answer_text(known, *case)) for case in cases]
        stops[0] = stops[1] if rng.random() < 0.5 else ()
        table, start = stop_rows(known, size, stops, [prompt for prompt, _ in cases])
        assert table.max() < len(table)
        assert (start[0] == -1) == (not stops[0])
        for row, (prompt, ids) in enumerate(cases):
            if not stops[row]:
                continue
            texts = [answer_text(known, prompt, ids[:n]) for n in range(len(ids) + 1)]
            wanted = (
                n
                for n in range(1, len(ids) + 1)
                if any(stop in texts[n] for stop in stops[row])
                or ("</s>" in stops[row] and ids[n - 1] == special)
            )
            end = walk(table, start[row], ids)
            assert end == next(wanted, None)
            ended += end is not None
            at_start += end is not None and not tokenizer.decode(prompt)
            text = answer_text(known, prompt, ids[:end], stops[row])
            assert (texts[end] if end else texts[-1]).startswith(text)
            assert not any(stop in text for stop in stops[row])
            stream = TextStream(known, stops[row], prompt)
            assert "".join(stream.push([i]) for i in ids[:end]) + stream.finish() == text
    assert ended > 40 and at_start > 5


def ends(tokenizer, stops, *names, prompt=("a",)):
    table, start = stop_rows(tokenizer, id_bound(tokenizer), [stops], [ids_of(tokenizer, *prompt)])
    return walk(table, start[0], ids_of(tokenizer, *names))


def test_an_added_token_does_not_make_sentencepiece():
    """DeepSeek's padding token is named with U+2581, and its vocabulary is byte-level."""
    tokenizer = byte_level()
    assert ends(tokenizer, ("\n",), "a", "\u010a") == 2
    assert ends(tokenizer, (" a",), "b", "\u0120a") == 2
    assert ends(tokenizer, ("\u2581pad",), "b", ADDED[1]) == 2
    assert answer_text(tokenizer, [], ids_of(tokenizer, ADDED[1], "\u0120a")) == ADDED[1] + " a"


def test_special_tokens_and_stops():
    """A stop that is a special token ends the row there; others are not found inside special tokens."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token="</s>")
    assert "<|im_end|>" not in tokenizer.all_special_tokens
    back = tokenizer.backend_tokenizer
    end = back.token_to_id("<|im_end|>")
    assert special_stops(tokenizer, ("a", "<|im_end|>")) == (end,)
    assert ends(back, ("<|im_end|>",), "a", "<|im_end|>", "b") == 2
    assert ends(back, ("a", "<|im_end|>"), "b", "<|im_end|>") == 2
    assert ends(back, ("</s>",), *"b</s>") == 5, "spelled by other tokens, it is text"
    assert ends(back, ("|",), "<|im_end|>", "b", "|") == 3
    assert ends(back, ("|",), "<|im_end|>", "b", "<|tool|>") == 3
    assert answer_text(tokenizer, [], [end, *ids_of(back, "b", "<|tool|>")], ("|",)) == "b<"


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        ("", "A stop string must not be empty."),
        ("x\n<|im_end|>", r"'x\\n<\|im_end\|>' holds the special token '<\|im_end\|>'"),
        ("<|im_end|></s>", "holds the special token"),
        ("a\ufffd", "not valid Unicode"),
        ("\ud800", "not valid Unicode"),
    ],
)
def test_stops_that_no_text_holds(stop, message):
    with pytest.raises(UserError, match=message):
        special_stops(byte_level(), ("ok", stop))
    with pytest.raises(UserError) as caught:
        special_stops(byte_level(), ("<|im_end|>" + "x" * 10_000,))
    assert len(str(caught.value)) < 300


def test_stop_token_ids():
    """Of each row, beside strings or alone."""
    tokenizer = byte_level()
    a, b, space = ids_of(tokenizer, "a", "b", "\u0120")
    size = id_bound(tokenizer)
    table, start = stop_rows(tokenizer, size, [(), ("ba",), ()], [[a]] * 3, [[b], [space], []])
    got = [walk(table, s, [a, b, space, b, a]) for s in start[:2]]
    assert got == [2, 3] and start[2] == -1
    with pytest.raises(UserError, match=f"{size} is outside the model's vocabulary of {size}"):
        stop_rows(tokenizer, size, [()], [[a]], [[size]])


def test_holes_in_the_ids(tmp_path):
    """The highest id counts, not the number of tokens."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token="</s>")
    highest = max(tokenizer.get_vocab().values())
    assert id_bound(tokenizer) == highest + 1 > len(tokenizer) + 50
    pieces = token_bytes(tokenizer, highest + 5)
    assert pieces[tokenizer.convert_tokens_to_ids("  ")] == b"  "
    assert pieces[highest + 1 :] == [b""] * 4 and pieces[7:10] == [b""] * 3
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"token_ids": [0, highest]}))
    assert [d.tolist() for d in read_documents([path], tokenizer)] == [[0, highest]]
    path.write_text(json.dumps({"token_ids": [highest + 1]}))
    with pytest.raises(UserError, match=f"line 1.*vocabulary of {highest + 1}"):
        read_documents([path], tokenizer)


def test_leading_spaces_stay():
    """As in "The capital" and " Paris": sentencepiece strips the start of a text, not of an answer."""
    tokenizer = made(FALLING, *LLAMA)
    prompt, ids = ids_of(tokenizer, "<s>", "\u2581a"), ids_of(tokenizer, "\u2581ba", "\u2581a")
    assert tokenizer.decode(prompt) == "a" and tokenizer.decode(ids) == "ba a"
    assert answer_text(tokenizer, prompt, ids) == " ba a"
    assert TextStream(tokenizer, (), prompt).push(ids) == " ba a"
    assert answer_text(tokenizer, prompt[:1], ids) == "ba a"
    assert ends(tokenizer, (" b",), "\u2581ba", prompt=("\u2581a",)) == 1
    assert ends(tokenizer, (" b",), "\u2581ba", prompt=("<s>",)) is None


def test_bytes_that_the_limit_cuts():
    """A whole character stays, whatever follows it in its run of byte tokens."""
    tokenizer = made(FALLING, *LLAMA)
    prompt, ids = ids_of(tokenizer, "a"), ids_of(tokenizer, "<0xC3>", "<0xA9>", "<0xE6>", "<0x97>")
    stream = TextStream(tokenizer, (), prompt)
    assert stream.push(ids[:3]) == "\u00e9" and stream.push(ids[3:]) == ""
    assert stream.finish() == "\ufffd"
    assert answer_text(tokenizer, prompt, ids) == "\u00e9\ufffd"
    assert answer_text(tokenizer, prompt + ids[:1], ids[1:2]) == "\u00e9", "begun by the prompt"
    assert answer_text(tokenizer, prompt + ids[:1], prompt) == "a", "begun and never ended"
    assert answer_text(tokenizer, prompt + ids[:1], []) == ""
    assert ends(tokenizer, ("\u00e9",), "<0xA9>", prompt=("a", "<0xC3>")) == 1


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.CTC(),
        decoders.BPEDecoder(),
        decoders.Sequence([FALLBACK, decoders.ByteLevel()]),
        decoders.Sequence([FUSE, decoders.ByteLevel()]),
        decoders.Sequence([FUSE, decoders.Strip(" ", 0, 1)]),
        decoders.Sequence([SPACES, decoders.Strip(" ", 1, 1)]),
        decoders.Sequence([FUSE, decoders.Replace("ab", "")]),
        decoders.Sequence([FALLBACK, decoders.Strip(" ", 1, 0)]),
        decoders.Sequence([FUSE, decoders.Metaspace()]),
        decoders.Sequence([FUSE, decoders.Strip(" ", 1, 0), decoders.Replace("a", "b")]),
    ],
)
def test_decoders_that_do_not_work_token_by_token(decoder):
    with pytest.raises(UserError, match="The tokenizer's decoder has the step"):
        TokenBytes(made(PIECES, decoder))
    with pytest.raises(UserError, match="object is no tokenizer"):
        TokenBytes(object())


def test_equal_stops_share_states():
    """Rows that begin alike too, whatever their prompts."""
    tokenizer = made(FALLING, *LLAMA)
    a, begin = ids_of(tokenizer, "a", "<s>")
    size = id_bound(tokenizer)
    table, start = stop_rows(tokenizer, size, [("ab",)] * 4, [[a], [begin], [a, a], [begin, begin]])
    alone, _ = stop_automaton([("ab",)], token_bytes(tokenizer, size))
    assert start[0] == start[2] and start[1] == start[3]
    assert len(table) == 2 * len(alone) + 1
