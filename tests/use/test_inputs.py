"""What a decoder may be asked: every form that is understood, and what is refused by name and type."""

import decimal
from collections import UserDict
from pathlib import Path
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from jax_specdec import Request, UserError, make_sampling
from jax_specdec.core.rows import per_row
from jax_specdec.generation import OPTIONS, make_requests, sample_key, samples_of
from jax_specdec.options import Options
from jax_specdec.text.chat import chat_text
from jax_specdec.text.inputs import as_prompt, split

HELLO = [{"role": "user", "content": "Hello"}]


def understood(given):
    prompts, alone = split(given)
    prompts = [as_prompt(prompt) for prompt in prompts]
    return prompts[0] if alone else tuple(prompts)


class Encoding:
    """As the package tokenizers has it."""

    ids, attention_mask = [0, 5, 6], [0, 1, 1]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("Hi", "Hi"),
        (["Hi"], ("Hi",)),
        (("Hi", [5, 6]), ("Hi", [5, 6])),
        ([5, 6], [5, 6]),
        ((5, 6), [5, 6]),
        (range(2), [0, 1]),
        ([np.int64(5), jnp.int32(6)], [5, 6]),
        ([[5, 6]], ([5, 6],)),
        (np.array([5, 6], np.uint16), [5, 6]),
        (jnp.array([5, 6]), [5, 6]),
        (jnp.array([[5, 6], [7, 8]]), ([5, 6], [7, 8])),
        (jnp.array([[5, 6]]), ([5, 6],)),  # dimensions decide, not sizes
        ([np.array([5]), [6, 7]], ([5], [6, 7])),
        (HELLO, HELLO),
        ([HELLO, "Hi"], (HELLO, "Hi")),
        ({"input_ids": [5, 6]}, [5, 6]),
        (UserDict(input_ids=[5, 6], attention_mask=[1, 1]), [5, 6]),
        ({"input_ids": [[0, 5], [6, 7]], "attention_mask": [[0, 1], [1, 1]]}, ([5], [6, 7])),
        ({"input_ids": np.array([[5, 0]]), "attention_mask": np.array([[1, 0]])}, ([5],)),
        ([{"input_ids": [5]}, {"input_ids": [6]}], ([5], [6])),
        (Encoding(), [5, 6]),
        ([Encoding()], ([5, 6],)),
        ((text for text in ("a", "b")), ("a", "b")),
        ((ids for ids in ([5], [6])), ([5], [6])),
        ([], ()),
    ],
)
def test_forms(given, expected):
    assert understood(given) == expected


def test_an_encoding_of_tokenizers():
    vocab = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 5, "?": 0}, unk_token="?"))
    assert understood(vocab.encode("a")) == [5]
    assert understood(vocab.encode_batch(["a", "b"])) == ([5], [0])


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (None, "text, a chat or token ids, and not None"),
        ([None], "and not None"),
        (["Hi", None], "and not None"),
        (b"Hi", r"not bytes: decode it first"),
        ([bytearray(b"Hi")], "not a bytearray: decode it first"),
        (Path("prompt.txt"), r"not a PosixPath: read it first, as with \.read_text"),
        (5, "not an int"),
        (1.5, "not a float"),
        (True, "not a bool"),
        ({"Hi"}, "not a set"),
        (object, "not a type"),
        ({"text": "Hi"}, "not a dict"),
        (HELLO[0], "a list of messages: got a message alone"),
        ([5, 6.0], "whole numbers, and 6.0 is among them"),
        ([5, float("nan")], "whole numbers, and nan is among them"),
        ([5, True], "whole numbers, and a bool is among them"),
        ([True, False], "whole numbers, and True is among them"),
        ([5, 2**70], "whole numbers, and 1180591620717411303424 is among them"),
        ([decimal.Decimal(5)], "whole numbers, and Decimal"),
        ([5, None], "not an int"),
        ([5, "a"], "not an int"),
        ([[5, "a"]], "not a list with a str in it"),
        ([[5, None]], "not a list with None in it"),
        ([[[5]]], "nested too deeply"),
        ([[[5], [6, 7]]], "nested too deeply"),
        (np.array([0.5, np.nan]), "not of the dtype float64"),
        (np.array([True]), "not of the dtype bool"),
        (np.array(["a"]), "not of the dtype <U1"),
        (np.array(5), "one dimension, and not 0"),
        (np.zeros((1, 1, 1), int), "one dimension, and not 3"),
        ([np.zeros((2, 1), int)], "one dimension, and not 2"),
        ({"input_ids": []}, "has no token ids"),
        ({"input_ids": "Hi"}, "has no token ids"),
        ({"input_ids": None}, "has no token ids: they are None"),
        ({"input_ids": 5}, "has no token ids: they are an int"),
        ({"input_ids": [5, 6], "attention_mask": [1, [1]]}, "another shape"),
        ({"input_ids": [[5], [6]], "attention_mask": 1}, "another shape"),
        ("Hi \ud800", "character 4 is half of a surrogate pair"),
        ([{"role": "user", "content": "\udfff"}], "Message 1 of the chat is not valid Unicode"),
        ([{"input_ids": [[5], [6]]}], "has 2 rows: give it by itself"),
        ({"input_ids": [5, 6], "attention_mask": [1]}, "another shape"),
        ({"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1]}, "leaves out tokens within"),
        ({"input_ids": [[5], [6]], "attention_mask": [[1]]}, "2 rows and 1 attention masks"),
        ([{"role": "user"}], '"content" must be a text, got None'),
        ([{"role": 5, "content": "Hi"}], '"role" must be a text, got 5'),
        ([*HELLO, {"role": "user", "content": b"Hi"}], "Message 2 of the chat"),
    ],
)
def test_refusals_name_what_was_given(given, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        understood(given)
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


def test_a_long_value_is_cut():
    with pytest.raises(UserError) as caught:
        understood([[5, decimal.Decimal("1" * 5000)]])
    assert len(str(caught.value)) < 300


def test_a_chat_becomes_the_templates_text():
    class Tokenizer:
        chat_template = "given"

        def apply_chat_template(self, messages, add_generation_prompt, tokenize):
            assert add_generation_prompt and not tokenize
            return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"

    chat = [{"role": "system", "content": "Be brief."}, *HELLO]
    assert chat_text(Tokenizer(), chat) == "<system>Be brief.<user>Hello<assistant>"
    Tokenizer.chat_template = ""
    with pytest.raises(UserError, match="no chat template: give the prompt as text"):
        chat_text(Tokenizer(), chat)


class Echo:
    """A tokenizer whose template is what was said."""

    chat_template = "given {{ loud }}"
    special_tokens_map: ClassVar = {}

    def apply_chat_template(self, messages, add_generation_prompt, tokenize, **options):
        said = (message["content"] for message in messages)
        return "".join(text if isinstance(text, str) else text[0]["text"] for text in said)


def test_parts_of_a_message():
    parts = [{"type": "text", "text": text} for text in ("How are", " you?")]
    chat = [*HELLO[:-1], {"role": "user", "content": parts}]
    whole = [*HELLO[:-1], {"role": "user", "content": "How are you?"}]
    assert chat_text(Echo(), chat) == chat_text(Echo(), whole)


@pytest.mark.parametrize(
    ("chat", "options", "sentence"),
    [
        ("Hi", {"template_args": 5}, "template_args are a dictionary, .* not an int"),
        ("Hi", {"template_args": {"lowd": 1}}, "no argument 'lowd'; its arguments: loud"),
        ("Hi", {"template": 5}, "A template is Jinja as text, not an int"),
        (5, {}, "A chat is a list of messages, not an int"),
        (HELLO[0], {}, "A chat is a list of messages, not a dict"),
        ("\ud800", {}, "The chat is not valid Unicode text"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}],
            {},
            "Message 1 of the chat is not valid Unicode text",
        ),
        (
            [{"role": "user", "content": [{"type": "image", "url": "a.png"}]}],
            {},
            "Message 1 .* each part of its content must be .*'image'",
        ),
    ],
)
def test_templates_refuse(chat, options, sentence):
    with pytest.raises(UserError, match=sentence):
        chat_text(Echo(), chat, **options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"temprature": 1.0}, "There is no option 'temprature'; did you mean temperature?"),
        ({"batchsize": 1}, "There is no option 'batchsize'; did you mean batch_size?"),
        ({"x" * 500: 1}, "; there are key, max_new_tokens"),
        ({"stop": [""]}, r"Give stop strings as a tuple, .* one tuple per prompt, got \[''\]"),
        ({"stop": ["a", "b"]}, r"Give stop strings as a tuple, .*, got \['a', 'b'\]"),
        ({"stop_token_ids": [5]}, r"Give stop tokens as a tuple, .*, got \[5\]"),
        ({"bad_words": ["a"]}, r"Give bad words as a tuple, .*, got \['a'\]"),
        ({"key": "a"}, r"A key must be in \[0, 2\^31\), got 'a'"),
        ({"key": None, "seed": [1, 2]}, "Got 2 values for 1 prompts: seed"),
    ],
)
def test_options_refused(options, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        make_requests(["a"], None, options, beside=("batch_size",))
    assert len(str(caught.value)) < 500


OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "logit_bias": {}}
OFF |= {"presence_penalty": 0.0, "frequency_penalty": 0.0, "bad_words": ()}
OFF |= {"stop": (), "stop_token_ids": ()}


def test_none_is_off():
    for given in (
        make_requests(["a"], None, dict.fromkeys(OFF), alone=True),
        make_requests(["a"], None, {name: [None] for name in OFF}),
        make_requests([Request("a", **dict.fromkeys(OFF))], None, {}),
    ):
        assert {name: getattr(given[0], name) for name in OFF} == OFF


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("stop", "a", ("a",)),
        ("stop", ["a", "b"], ("a", "b")),
        ("stop", [], ()),
        ("stop", [("a", "b")], ("a", "b")),
        ("stop", [["a"]], ["a"]),
        ("stop_token_ids", [2], (2,)),
        ("stop_token_ids", np.array([2, 3]), (2, 3)),
        ("stop_token_ids", [(2, 3)], (2, 3)),
        ("bad_words", ["a", [5, 6]], ("a", [5, 6])),
        ("bad_words", [[5, 6]], ([5, 6],)),
        ("bad_words", [(5, 6), (7,)], ((5, 6), (7,))),
        ("bad_words", [("a", (5, 6))], ("a", (5, 6))),
        ("bad_words", [["a", "b"]], ["a", "b"]),
        ("bad_words", [()], ()),
    ],
)
def test_a_list_beside_one_prompt_is_its_own(name, value, expected):
    (request,) = make_requests(["a"], None, {name: value}, alone=True)
    assert getattr(request, name) == expected


def test_a_list_beside_several_has_one_for_each():
    made = make_requests(["a", "b"], None, {"stop": [("x",), ()], "bad_words": None})
    assert [request.stop for request in made] == [("x",), ()]
    says = r'as in stop=\("\\n",\), or as a list with one tuple per prompt'
    with pytest.raises(UserError, match=says):
        make_requests(["a", "b"], None, {"stop": ["x", "y"]})


def test_ids_refused():
    for ids in (5, "names"):
        with pytest.raises(UserError, match="ids are a list with a name for each prompt, not a"):
            make_requests(["a"], ids, {})


@pytest.mark.parametrize(
    ("value", "got"),
    [
        ([None], "got None"),
        ([1.0, "hot"], "got 'hot'"),
        ([True, False], "got True"),
        ([[1, 2], [3]], r"got \[1, 2\]"),
        ([[0.5, 0.7]], r"got \[0.5, 0.7\]"),
        (None, "got None"),
        ({}, r"got \{\}"),
    ],
)
def test_a_setting_is_echoed_as_it_was_given(value, got):
    with pytest.raises(UserError, match=rf"temperature must be below 5, {got}\.$"):
        per_row("temperature", value, 2, "f4", lambda t: t < 5, "below 5")


def test_fewest_and_most_tokens():
    make_sampling(2, max_new_tokens=[4, 9], min_new_tokens=[4, 5])
    with pytest.raises(UserError, match=r"min_new_tokens must not be above .*, got 5 and 4"):
        make_sampling(2, max_new_tokens=[9, 4], min_new_tokens=5)


def test_options_are_the_fields_of_a_request():
    assert set(Options.__annotations__) == set(OPTIONS)


def test_samples_are_the_same_whatever_their_number():
    requests = make_requests(["a", "b"], None, {"temperature": 1.0})
    few, many = samples_of(requests, 2), samples_of(requests, 5)
    assert [r.key for r in few] == [0, sample_key(0, 1), 1, sample_key(1, 1)]
    assert [r.key for r in many[:2]] == [r.key for r in few[:2]]
    assert len({r.key for r in many}) == 10 and [r.id for r in many] == [0] * 5 + [1] * 5


@pytest.mark.parametrize(
    ("options", "n", "sentence"),
    [
        ({}, 2, "At temperature 0 all 2 samples would be the same text"),
        ({"temperature": 1.0, "own_seed": True}, 2, "n samples would be the same"),
        ({"temperature": 1.0}, 0, "n must be a whole number of at least 1, got 0"),
        ({"temperature": 1.0}, True, "n must be a whole number"),
        ({"temperature": 1.0}, 2.0, "n must be a whole number"),
        ({"temperature": 1.0}, "2", "n must be a whole number"),
    ],
)
def test_samples_refused(options, n, sentence):
    with pytest.raises(UserError, match=sentence):
        samples_of(make_requests(["a"], None, options), n)


def test_a_request_may_hold_any_form():
    (request,) = make_requests([Request({"input_ids": [5]})], None, {})
    assert as_prompt(request.prompt) == [5]
