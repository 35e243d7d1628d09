"""Reading prompts, and every record that is wrong."""

import json
import os

import pytest

from jax_specdec.errors import UserError
from jax_specdec.text.prompts import PromptRecord, prompt_of_input, read_prompts


def write(path, *lines):
    path.write_text(
        "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines),
        encoding="utf-8",
    )
    return path


def test_records(tmp_path):
    file = write(
        tmp_path / "p.jsonl",
        {"id": "a", "prompt": "one", "answer": 3},
        "",
        {"question_id": 81, "category": "writing", "turns": ["two", "three"]},
        {"prompt": "four", "temperature": 0, "top_k": 3, "seed": 5, "stop": "x", "min_p": None},
        {"prompt": "five", "stop": ["x", "y"], "max_new_tokens": 7, "top_p": 0.5},
    )
    a, b, c, d = read_prompts(file)
    assert (a.id, a.prompt, a.settings, a.where) == ("a", "one", {}, f"{file}, line 1")
    assert (b.id, b.prompt, b.category, b.where) == (81, "two", "writing", f"{file}, line 3")
    assert (c.id, c.settings) == (2, {"temperature": 0, "top_k": 3, "seed": 5, "stop": ("x",)})
    assert (d.id, d.settings) == (3, {"stop": ("x", "y"), "max_new_tokens": 7, "top_p": 0.5})


def test_chats(tmp_path):
    said = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    file = write(tmp_path / "p.jsonl", {"id": "a", "messages": said}, {"prompt": "b"})
    chat, text = read_prompts(file, chats=True)
    assert (chat.messages, chat.prompt, text.messages, text.prompt) == (said, "Hi", [], "b")
    with pytest.raises(UserError, match='line 1: expected a string in "prompt"'):
        read_prompts(file)  # of commands that do not know chats
    for wrong, sentence in (
        ("Hi", '"messages" must be a list of objects'),
        ([], '"messages" must be a list of objects'),
        ([{"role": "user"}], 'Message 1 of the chat: "content" must be a text'),
        ([*said, {"role": "assistant", "content": "Hi"}], "there is nothing to answer"),
        ([{"role": "user", "content": "\ud800"}], "is not valid Unicode"),
    ):
        with pytest.raises(UserError, match=f"line 1: .*{sentence}"):
            read_prompts(write(tmp_path / "w.jsonl", {"messages": wrong}), chats=True)


def test_byte_order_mark_and_line_ends(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"prompt": "a\\n"}\r\n{"prompt": "\xc3\xa9"}')
    assert [record.prompt for record in read_prompts(file)] == ["a\n", "é"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not valid JSON"),
        ("[1]", "line 2: expected a JSON object"),
        ({"text": "a"}, 'line 2: expected a string in "prompt"'),
        ({"prompt": 3}, 'line 2: expected a string in "prompt"'),
        ({"turns": []}, 'line 2: expected a list of strings in "turns"'),
        ({"turns": "no"}, 'line 2: expected a list of strings in "turns"'),
        ({"prompt": ""}, "line 2: the prompt is empty"),
        ({"prompt": "\ud800"}, "line 2: the prompt is not valid Unicode"),
        ({"prompt": "a", "seed": 1.5}, 'line 2: "seed" must be a whole number, got 1.5'),
        ({"prompt": "a", "top_k": True}, 'line 2: "top_k" must be a whole number, got True'),
        ({"prompt": "a", "temperature": "0"}, "line 2: \"temperature\" must be a number, got '0'"),
        ({"prompt": "a", "stop": [""]}, 'line 2: "stop" must be'),
        ({"prompt": "a", "stop": 3}, 'line 2: "stop" must be'),
        (
            {"prompt": "a", "temprature": 1},
            'line 2: unknown setting "temprature"; did you mean "temperature"?',
        ),
        (
            {"prompt": "a", "max_tokens": 5},
            'line 2: unknown setting "max_tokens"; did you mean "max_new_tokens"?',
        ),
        (
            {"prompt": "a", "maxNewTokens": 5},
            'line 2: unknown setting "maxNewTokens"; did you mean "max_new_tokens"?',
        ),
        ({"prompt": "a", "topK": 5}, 'line 2: unknown setting "topK"; did you mean "top_k"?'),
        ({"prompt": "a", "top-p": 0.5}, 'line 2: unknown setting "top-p"; did you mean "top_p"?'),
        ({"prompt": "a", "stops": ["x"]}, 'line 2: unknown setting "stops"; did you mean "stop"?'),
        ({"prompt": "a", "Seed": 1}, 'line 2: unknown setting "Seed"; did you mean "seed"?'),
    ],
)
def test_bad_record(line, message, tmp_path):
    file = write(tmp_path / "p.jsonl", {"prompt": "fine"}, line)
    with pytest.raises(UserError) as caught:
        read_prompts(file)
    assert f"{file}, {message}" in str(caught.value)


def test_long_values_are_not_echoed_whole(tmp_path):
    file = write(tmp_path / "p.jsonl", {"prompt": "a", "seed": "9" * 100_000})
    with pytest.raises(UserError) as caught:
        read_prompts(file)
    assert len(str(caught.value)) < 300 + len(str(file))


def test_keys_that_are_no_settings_are_kept_out(tmp_path):
    """What a data set has beside its prompts is not taken for a misspelling."""
    extra = {"answer": 1, "reference": [], "step": 2, "topic": "x", "speed": 3, "tokens": 4}
    (record,) = read_prompts(write(tmp_path / "p.jsonl", {"prompt": "a", **extra}))
    assert record.settings == {}


def test_deeply_nested_json_is_refused(tmp_path):
    file = write(tmp_path / "p.jsonl", "[" * 100_000)
    with pytest.raises(UserError, match="line 1: not valid JSON"):
        read_prompts(file)


def test_white_space_is_a_prompt(tmp_path):
    (record,) = read_prompts(write(tmp_path / "p.jsonl", {"prompt": " \n"}))
    assert record.prompt == " \n"


def test_prompts_from_a_pipe(tmp_path):
    """Process substitution gives the name of a pipe, which is no regular file."""
    read, write_end = os.pipe()
    os.write(write_end, b'{"prompt": "a"}\n{"prompt": "b"}\n')
    os.close(write_end)
    try:
        assert [record.prompt for record in read_prompts(f"/dev/fd/{read}")] == ["a", "b"]
    finally:
        os.close(read)


def test_standard_input_as_a_prompt():
    assert prompt_of_input("\ufeffOnce\r\n").prompt == "Once"
    assert prompt_of_input(" \n").prompt == " "
    with pytest.raises(UserError, match="The prompt is empty"):
        prompt_of_input("\ufeff\n")


def test_bad_files(tmp_path):
    with pytest.raises(UserError, match="There is no file"):
        read_prompts(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match="holds no prompts"):
        read_prompts(write(tmp_path / "empty.jsonl", ""))
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}\n')
    with pytest.raises(UserError, match="line 1: not UTF-8"):
        read_prompts(tmp_path / "latin.jsonl")


def test_prompt_of_the_command_line():
    with pytest.raises(UserError, match="The prompt is empty"):
        PromptRecord(0, "")
    with pytest.raises(UserError, match="not valid Unicode"):
        PromptRecord(0, "\udcff")
