"""A decoder in people's hands: calls, streams, samples, interruptions, threads. One program for all."""

import asyncio
import html
import os
import random
import re
import signal
import threading

import jax.numpy as jnp
import pytest
from tokenizers import Tokenizer, decoders, models

import jax_specdec as sd
from jax_specdec import progress
from jax_specdec.generation import sample_key
from jax_specdec.streaming import Pieces
from jax_specdec.text.detokenize import TextStream, answer_text

PROMPT = "Once upon a time"
SAMPLED = {"max_new_tokens": 24, "temperature": 1.3, "ignore_eos": True}


@pytest.fixture(scope="module")
def decoder(tiny_checkpoints):
    return sd.load(tiny_checkpoints / "target", "lm:3", logprobs=True, margins=True)


@pytest.fixture(scope="module")
def answer(decoder):
    return decoder(PROMPT, **SAMPLED)


def test_one_in_one_out(decoder, answer):
    """In every form; and a list gives a list."""
    assert isinstance(answer, sd.Generation) and len(answer.token_ids) == 24
    ids = decoder.encode(PROMPT)
    encoding = decoder.target.tokenizer(PROMPT)
    forms = [ids, tuple(ids), jnp.array(ids), encoding, sd.Request(PROMPT)]
    for form in forms:
        options = SAMPLED if not isinstance(form, sd.Request) else {}
        if not options:
            form = sd.Request(PROMPT, **SAMPLED)
        assert decoder(form, **options).token_ids == answer.token_ids
    several = decoder([PROMPT, ids], **{**SAMPLED, "key": 0})
    assert [a.token_ids for a in several] == [answer.token_ids] * 2
    assert [a.prompt for a in several] == [PROMPT, ids]
    (only,) = decoder([PROMPT], **SAMPLED)
    assert only.token_ids == answer.token_ids
    (inside,) = decoder.generate([encoding], **SAMPLED)
    assert inside.token_ids == answer.token_ids


def test_a_chat(decoder):
    """The tiny template is the text and a newline."""
    chat = [{"role": "user", "content": PROMPT}]
    got = decoder(chat, **SAMPLED)
    assert got.prompt == chat and got.token_ids == decoder(PROMPT + "\n", **SAMPLED).token_ids


def test_refusals(decoder):
    compiled = decoder.compilations
    for given, sentence in (
        (None, "and not None"),
        ([PROMPT, None], "Prompt 1: A prompt is text"),
        ([], "There are no prompts"),
        ("", "The prompt is empty"),
        ([5, 300], "outside the vocabulary of 300: they are of another model's tokenizer"),
        ([{"role": "user", "content": "Hi"}, "Hi"], "got a message alone"),
    ):
        with pytest.raises(sd.UserError, match=sentence):
            decoder(given)
    for alone in (PROMPT, [5, 6], [{"role": "user", "content": "Hi"}], {"input_ids": [5]}):
        with pytest.raises(sd.UserError, match=r"Prompts come in a list, one prompt too: got a"):
            decoder.generate(alone)
    with pytest.raises(sd.UserError, match="A stream is of one prompt"):
        decoder.stream([PROMPT])
    with pytest.raises(sd.UserError, match="There is no option 'temprature'"):
        decoder(PROMPT, temprature=1.0)
    assert decoder.compilations == compiled


def test_samples(decoder, answer):
    """The first is the one without `n`; each is the one with its key."""
    samples = decoder(PROMPT, n=3, **SAMPLED)
    assert samples[0].token_ids == answer.token_ids and len({a.text for a in samples}) == 3
    assert samples[2].token_ids == decoder(PROMPT, key=sample_key(0, 2), **SAMPLED).token_ids
    nested = decoder([PROMPT, "Task:"], n=2, **SAMPLED)
    assert [len(group) for group in nested] == [2, 2]
    assert [a.token_ids for a in nested[0]] == [a.token_ids for a in samples[:2]]


def test_a_stream_is_the_answer(decoder, answer):
    stream = decoder.stream(PROMPT, **SAMPLED)
    with pytest.raises(sd.UserError, match="has not ended"):
        _ = stream.generation
    pieces = list(stream)
    assert len(pieces) > 3 and "".join(map(str, pieces)) == stream.generation.text == answer.text
    assert [i for piece in pieces for i in piece.token_ids] == answer.token_ids
    assert [s for piece in pieces for s in piece.sources] == answer.sources
    assert "running" not in repr(stream)

    async def read():
        return [piece async for piece in decoder.stream(PROMPT, **SAMPLED)]

    assert "".join(map(str, asyncio.run(read()))) == answer.text


def test_a_stream_given_up(decoder, answer):
    stream = decoder.stream(PROMPT, **SAMPLED)
    next(stream)
    stream.close()
    assert next(stream, None) is None
    assert decoder(PROMPT, **SAMPLED).text == answer.text


def test_answers_are_data(decoder, answer):
    table = answer.table()
    assert len(table) == 24 and "".join(row["text"] for row in table) == answer.text
    assert {"logprob", "margin"} <= set(table.columns)
    assert {row["source"] for row in table} == {"lm", "target"}
    shown = html.unescape(re.sub("<[^>]*>", "", answer._repr_html_()))
    assert answer.text[:5] in shown


def test_reprs_are_short(decoder, answer):
    for thing in (decoder, decoder.target, decoder.loaded, answer):
        assert len(repr(thing)) < 400 and "array" not in repr(thing).lower()
    assert repr(decoder.target).startswith("Target(target: llama, 1") and "KiB" not in repr(decoder)
    assert repr(decoder.loaded).startswith("LoadedDrafter(lm:3, ")
    assert "rule match" in repr(decoder) and "lm:3" in decoder._repr_html_()


def test_load_finds_the_drafter_and_says_why(tiny_checkpoints, monkeypatch, capsys):
    """Once, and on standard error; the decoder tells it, too."""
    monkeypatch.setattr("jax_specdec.progress._said", set())
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    found = sd.load(tiny_checkpoints / "target")
    sd.load(tiny_checkpoints / "target")
    out, err = capsys.readouterr()
    assert out == "" and err.count("drafter prompt-lookup:") == 1
    assert "nothing was measured for this model" in err and "nothing was measured" in repr(found)
    given = sd.load(tiny_checkpoints / "target", draft={"lm": tiny_checkpoints / "lm"}).loaded
    assert given.spec.startswith("lm:") and given.reason == "the first of draft"
    assert sd.load(tiny_checkpoints / "target", None).loaded.spec == "none"
    with pytest.raises(sd.UserError, match="There is no folder nowhere"):
        sd.load("nowhere")
    with pytest.raises(sd.UserError, match="Unknown drafter 'ml'"):
        sd.load(tiny_checkpoints / "target", "ml:3")


def test_a_drafter_of_another_target(tiny_checkpoints, decoder, tmp_path):
    (tmp_path / "other").symlink_to(tiny_checkpoints / "target", target_is_directory=True)
    other = sd.load_target(tmp_path / "other")
    with pytest.raises(
        sd.UserError, match=r"The drafter lm:3 was loaded for the target in .*target, and this"
    ):
        sd.SpeculativeDecoder(other, decoder.loaded)


def test_a_callback_that_fails_leaves_a_decoder_that_goes_on(decoder, answer):
    def fail(chunk):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(decoder.generate([PROMPT], on_chunk=fail, **SAMPLED))
    assert decoder(PROMPT, **SAMPLED).token_ids == answer.token_ids


@pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(),
    reason="signals reach the main thread",
)
def test_ctrl_c_leaves_a_decoder_that_goes_on(decoder, answer, request):
    """A real signal, whenever it comes: while tokens are read, computed or spelled."""
    # A shell starts what it puts into the background with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    for delay in (0.02, 0.09, 0.2):
        timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            for _ in range(500):
                decoder(PROMPT, **{**SAMPLED, "max_new_tokens": 100})
        assert decoder(PROMPT, **SAMPLED).token_ids == answer.token_ids


def test_threads_take_turns(decoder, answer):
    prompts = [PROMPT, "Task:", "One day", "Question: Tom"]
    expected = [decoder(prompt, **SAMPLED).token_ids for prompt in prompts]
    found = {}

    def work(place):
        for _ in range(2):
            stream = decoder.stream(prompts[place], **SAMPLED)
            for _ in stream:
                pass
            found[place] = stream.generation.token_ids

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[place] for place in range(4)] == expected
    assert decoder.compilations == 2, "one program for all of this file"


def test_the_bar_and_the_message(decoder, capsys, monkeypatch):
    """A bar of what takes long, gone when it is done; nothing on standard output."""
    monkeypatch.setattr("jax_specdec.progress.PATIENCE", 0.0)
    decoder(PROMPT, progress=True, **SAMPLED)
    out, err = capsys.readouterr()
    assert out == "" and "/24" in err and "token" in err
    assert err.rstrip(" \r").endswith(("s]", "\r", "")) and "compiling" not in err
    decoder(PROMPT, **SAMPLED)
    assert capsys.readouterr() == ("", "")
    # An interrupt that comes while Python finalises an object is lost, and a disabled tqdm has a finaliser.
    assert not hasattr(progress.bar(24, False), "__del__")


# Pieces, without a model


def letters() -> Tokenizer:
    """Bytes as tokens, so that characters are cut."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    backend = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return backend


@pytest.mark.parametrize("seed", range(20))
def test_pieces_are_the_text_however_it_is_cut(seed):
    """Whole characters, no more than the stop strings leave, every token with its source."""
    rng = random.Random(seed)
    ids = list("".join(rng.choices("abé☃𝄞 ", k=30)).encode())
    ids = ids[: rng.randrange(len(ids))]  # maybe within a character
    sources = [rng.choice([None, "lm", "glide"]) for _ in ids]
    stops = tuple("".join(rng.choices("abé☃", k=rng.randint(1, 3))) for _ in range(2))
    pieces, shown, place = Pieces(TextStream(letters(), stops)), [], 0
    while place < len(ids):
        step = rng.randint(1, 6)
        new = slice(place, place + step)
        shown += pieces.push(ids[new], sources[new])
        place += step
    shown += pieces.finish()
    assert "".join(map(str, shown)) == answer_text(letters(), [], ids, stops)
    assert [i for piece in shown for i in piece.token_ids] == ids
    assert [s for piece in shown for s in piece.sources] == sources
    assert all(piece.text for piece in shown[:-1])


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"stop": 5}, "Give stop strings as a tuple"),
        ({"logit_bias": 5}, "A logit bias is given by its token id"),
        ({"logit_bias": {"the": 1.0}}, "A logit bias is given by its token id"),
        ({"stop_token_ids": 5}, "A stop token is given by its token id"),
        ({"stop_token_ids": ""}, "A stop token is given by its token id"),
        ({"bad_words": ""}, "Give bad words as a tuple"),
        ({"bad_words": "the"}, "Give bad words as a tuple, .*, got 'the'"),
        ({"bad_words": [5]}, r"got 5: give its ids as a tuple, as in bad_words=\(\(5, 6\),\)"),
        ({"bad_words": [[5, 600]]}, r"tokens of the vocabulary of 300, got \[5, 600\]\.$"),
        ({"stop_token_ids": [99999]}, "an id outside the vocabulary of 300: 99999"),
        ({"stop": [5]}, r"Give stop strings as a tuple, as in stop=\(\"\\n\",\), .*, got \(5,\)"),
        ({"bad_words": ("",)}, "A bad word must not be empty"),
        ({"bad_words": ("\ud800",)}, "A bad word is not valid Unicode text"),
        ({"bad_words": (5,)}, "A bad word must be text, or tokens of the vocabulary of 300, got 5"),
        ({"bad_words": (("a",),)}, r"A bad word must be text, or tokens .*, got \('a',\)"),
        ({"own_seed": None}, "own_seed must be True or False, got None"),
        ({"ignore_eos": "no"}, "ignore_eos must be True or False, got 'no'"),
        (
            {"min_new_tokens": 200},
            "min_new_tokens must not be above max_new_tokens, got 200 and 128",
        ),
        ({"progress": "x"}, "progress must be True, False or None, got 'x'"),
        ({"batch_size": "a"}, "batch_size must be at least 1, a whole number"),
        ({"batch_size": 1.0}, "batch_size must be at least 1, a whole number"),
    ],
)
def test_options_of_another_type(decoder, option, says):
    with pytest.raises(sd.UserError, match=says):
        decoder("A text", **option)


def test_streams_and_chats_of_another_type(decoder):
    for call, says in (
        (lambda: decoder.stream("A text", progress="x"), "progress must be True, False or None"),
        (lambda: decoder.stream("A text", rounds_per_chunk="a"), "rounds_per_chunk must be at"),
        (lambda: decoder.generate(["A text"], on_chunk=5), "on_chunk must be a function"),
        (
            lambda: decoder.stream("A text", n=2),
            r"decoder\(prompt, n=2\): a stream is of one sample",
        ),
        (lambda: decoder.generate(["A text"], n=2), "is for a call"),
        (lambda: decoder.chat(n=2), "is for a call"),
        (lambda: decoder.stream("\ud800"), "The prompt is not valid Unicode text"),
        (lambda: decoder.chat("\ud800"), "Message 1 of the chat is not valid Unicode"),
        (lambda: decoder.chat(template_args=5), "template_args are a dictionary"),
        (lambda: decoder.chat(messages=5), "A chat is a list of messages, not an int"),
        (lambda: decoder.chat(sytem="Be brief."), "no option 'sytem'; did you mean system?"),
        (lambda: decoder.chat().stream("\ud800"), "is not valid Unicode text"),
    ):
        with pytest.raises(sd.UserError, match=says):
            call()


@pytest.mark.parametrize(
    ("args", "options", "says"),
    [
        ((5,), {}, "A model is a folder or a hub id, not an int"),
        (("",), {}, "The model's name is empty"),
        ((b"x",), {}, "not bytes"),
        (("x" * 5000,), {}, "names no folder: .*File name too long"),
        ((None, 5), {}, "A drafter is named by a text, as in 'lm:4', not an int"),
        ((None, ""), {}, "Unknown drafter ''"),
        ((None,), {"draft": "DIR"}, "given by name, as in .*, not as a str"),
        ((None,), {"draft": {"lm": 5}}, "given by name, as in .*, got 'lm': 5"),
        ((None,), {"draft": {"max-gram": "x"}}, "'max-gram' has no checkpoint; .*lm"),
        ((None,), {"draft": {"ml": "x"}}, "Unknown drafter 'ml': did you mean lm"),
        ((None,), {"batch_size": "a"}, "batch_size must be at least 1"),
        ((None,), {"int8": "weights"}, "int8 is of weights and cache, as a tuple"),
        ((None,), {"int8": 5}, "int8 is of weights and cache, as a tuple, not of 5"),
        ((None, "lm:3"), {"draft": {"lm": "x" * 5000}}, "names no folder: File name too long"),
        ((None,), {"dtype": "int4"}, r"dtype must be .*'int4': .* give int8=\(\"weights\",\)"),
        ((None,), {"dtype": bool}, "dtype must be float32, bfloat16 or float16, not 'bool'"),
        ((None,), {"dtype": "float64"}, "float16, not 'float64'"),
        ((None,), {"rule": "match"}, "rule is an acceptance rule, .*, not a str"),
    ],
)
def test_load_refuses(tiny_checkpoints, args, options, says):
    model, *rest = args
    with pytest.raises(sd.UserError, match=says) as caught:
        sd.load(tiny_checkpoints / "target" if model is None else model, *rest, **options)
    assert len(str(caught.value)) < 300


def test_parts_in_another_place(decoder):
    target, loaded = decoder.target, decoder.loaded
    for call, says in (
        (lambda: sd.load(target), "not a Target: SpeculativeDecoder takes one that is loaded"),
        (lambda: sd.load(target.path, loaded), "not a LoadedDrafter: SpeculativeDecoder takes"),
        (lambda: sd.load_drafter("lm:3", decoder), "a target of `load_target`, not a SpeculativeD"),
        (lambda: sd.load_drafter("lm:3", target, dtype="int8"), "dtype must be float32, bfloat16"),
        (lambda: sd.load_drafter(5, target), "A drafter is named by a text"),
        (lambda: sd.SpeculativeDecoder(target, "lm:3"), "a drafter of `load_drafter`, not a str"),
        (lambda: sd.SpeculativeDecoder("target"), "a target of `load_target`, not a str"),
    ):
        with pytest.raises(sd.UserError, match=says):
            call()
