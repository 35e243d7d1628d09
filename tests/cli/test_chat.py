"""`chat`: from a pipe, and in a terminal; the flags that it shares with `generate --chat`."""

import io
import json
from types import SimpleNamespace

import pytest
from commands import PROMPT, fails, lines, records
from rich.console import Console

from jax_specdec import UserError
from jax_specdec.checkpoints.generation_config import GenerationDefaults
from jax_specdec.cli import chat as command
from jax_specdec.cli import main, sampling
from jax_specdec.cli.parser import Parser
from jax_specdec.streaming import Piece

SHORT = ("--drafter", "lm:3", "--max-new-tokens", "12")
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% if brief %} In short,{% endif %}{% endif %}"
)


@pytest.fixture
def template(tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text(TEMPLATE)
    return str(file)


def piped(capsys, monkeypatch, text, *argv):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    status = main(["chat", *map(str, argv)])
    out, err = capsys.readouterr()
    return status, out, err


def test_turns_of_a_pipe(model, template, capsys, monkeypatch, tmp_path):
    """Each line is a turn: the answers are those of the same chats as records."""
    args = ("--model", model, *SHORT, "--template", template, "--system", "Be kind.")
    status, out, err = piped(capsys, monkeypatch, f"{PROMPT}\n\nThe cat saw\n", *args)
    assert status == 0, err
    assert "\x1b" not in out + err  # no colours
    figures = [line for line in err.splitlines() if line.startswith("[")]
    assert len(figures) == 2 and all(" tokens/s, tau " in line for line in figures)
    first = records(capsys, "generate", *args, "--chat", "--prompt", PROMPT)[0]
    assert out.startswith(first["text"])
    messages = [
        {"role": "user", "content": PROMPT},
        {"role": "assistant", "content": first["text"]},
        {"role": "user", "content": "The cat saw"},
    ]
    file = lines(tmp_path / "chat.jsonl", {"messages": messages}, {"prompt": PROMPT})
    second, plain = records(capsys, "generate", *args, "--prompts", file)
    assert second["prompt"] == messages and plain["prompt"] == PROMPT
    if first["text"] == first["text"].strip():  # spelled again as it was written, or nearly
        assert out.count("\n") >= 2


def lines_in(monkeypatch, capsys, chat, text):
    """What a pipe of these lines leaves on standard output and on standard error."""
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    command._Pipe(chat).run()
    return capsys.readouterr()


def test_commands_of_a_pipe(capsys, monkeypatch, tmp_path):
    """As in the terminal; what they say is not mixed with the answers."""
    file = tmp_path / "saved.json"
    chat = Chat(ANSWER, ANSWER)
    text = f'Hello\n/system Be kind.\n\n"""two\nlines"""\n/save {file}\n/help\n/quit\nnever said\n'
    out, err = lines_in(monkeypatch, capsys, chat, text)
    assert out == "Paris is [b]it\n" * 2 and chat.system == "Be kind."
    assert [message["content"] for message in chat.messages] == ["Hello", "two\nlines"]
    assert json.loads(file.read_text())["messages"] == chat.messages
    assert "The system message is 'Be kind.'." in err and command.HELP in err
    assert err.count(" tokens/s, tau ") == 2
    lines_in(monkeypatch, capsys, chat, "/reset\n")
    assert chat.messages == []
    out, err = lines_in(monkeypatch, capsys, chat, "/system -\n")
    assert chat.system is None and "There is no system message." in err


def test_messages_that_begin_with_a_slash(capsys, monkeypatch):
    chat = Chat(ANSWER, ANSWER, ANSWER)
    lines_in(monkeypatch, capsys, chat, '//etc/hosts\n"""/* code\n*/"""\n"""// more"""\n')
    said = [message["content"] for message in chat.messages]
    assert said == ["/etc/hosts", "/* code\n*/", "// more"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "Standard input is empty: write messages to it, one a line"),
        ("\n \n", "Standard input is empty"),
        ("/undo\nHello\n", "There is no turn to undo"),
        ("/x\nHello\n", "There is no command /x: /help says which there are"),
        ("/undo 2\nHello\n", "/undo has nothing behind it: /help says"),
        ("/reset all\nHello\n", "/reset has nothing behind it"),
        ("/quit now\nHello\n", "/quit has nothing behind it"),
        ('"""never\nended\n', 'ends within a message: end it with """'),
    ],
)
def test_the_first_error_ends_a_pipe(text, sentence, capsys, monkeypatch):
    with pytest.raises(UserError, match=sentence):
        lines_in(monkeypatch, capsys, Chat(ANSWER), text)


def test_generate_with_templates(model, template, capsys):
    args = ("--model", model, *SHORT, "--prompt", "Hi", "--chat", "--template", template)
    (plain,) = records(capsys, "generate", *args)
    (brief,) = records(capsys, "generate", *args, "--template-arg", "brief=true")
    (off,) = records(capsys, "generate", *args, "--template-arg", "brief=false")
    assert plain["token_ids"] == off["token_ids"]
    text = "user: Hi\nassistant: In short,"
    (same,) = records(capsys, "generate", "--model", model, *SHORT, "--prompt", text)
    # Templates bring their special tokens along; this one has none, and a plain prompt begins with one.
    assert len(brief["token_ids"]) == len(same["token_ids"])


WRONG = {
    "template": (("--template", "nowhere"), "'nowhere' cannot be read: No such file"),
    "argument": (("--template-arg", "brief"), "NAME=VALUE, as in enable_thinking=false"),
    "unknown": (("--template-arg", "breif=1"), "no argument 'breif'; its arguments: brief"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_templates(name, model, template, capsys):
    flags, sentence = WRONG[name]
    args = ("--model", model, *SHORT, "--prompt", "Hi", "--chat", "--template", template)
    assert sentence in fails(capsys, "generate", *args, *flags)


def test_wrong_use(model, capsys, monkeypatch, tmp_path):
    args = ("generate", "--model", model, *SHORT, "--prompt", "Hi")
    assert "--system is for --chat" in fails(capsys, *args, "--system", "Be kind.")
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n"))
    file = lines(tmp_path / "none.jsonl", {"text": "Hi"})
    assert "must hold one record" in fails(capsys, "chat", "--model", model, "--messages", file)
    file = lines(tmp_path / "odd.jsonl", {"messages": ["Hi"]})
    assert 'must have "role" and "content"' in fails(
        capsys, "chat", "--model", model, "--messages", file
    )


class Chat:
    """A conversation of prepared answers."""

    def __init__(self, *answers):
        self.messages, self.system, self._answers = [], None, list(answers)
        self.closed = 0

    def stream(self, message):
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        self.messages += [{"role": "user", "content": message}]

        def pieces():
            for piece in answer:
                if piece is None:
                    raise KeyboardInterrupt
                yield piece

        class Stream:
            def __iter__(self):
                return pieces()

            def close(inner):
                self.closed += 1

            generation = SimpleNamespace(
                prompt=[1] * 30,
                stats=SimpleNamespace(
                    num_tokens=7,
                    tokens_per_second=35.0,
                    mean_acceptance_length=1.75,
                    num_cached_tokens=18,
                ),
            )

        return Stream()

    def undo(self):
        raise UserError("There is no turn to undo.")

    def reset(self):
        self.messages = []


def screen(monkeypatch, chat, *typed, **console):
    """What a terminal shows of what is typed; an exception is raised where it stands."""
    waiting = [*typed, EOFError()]

    def read(prompt=""):
        item = waiting.pop(0)
        if isinstance(item, BaseException):
            raise item
        return item

    monkeypatch.setattr("builtins.input", read)
    out = io.StringIO()
    options = {"force_terminal": True, "color_system": "standard", **console}
    shown = Console(file=out, highlight=False, soft_wrap=True, width=80, **options)
    command._Terminal(chat, shown, ("lm", "max-gram")).run("small, drafter lm:3")
    assert not waiting
    return out.getvalue()


ANSWER = [Piece("Paris", [1], [None]), Piece(" is [b]it", [2, 3], ["lm", "lm"])]


def test_terminal(monkeypatch, tmp_path):
    monkeypatch.delenv("NO_COLOR", raising=False)
    chat = Chat(ANSWER, [*ANSWER[:1], None], UserError("too long"))
    file = tmp_path / "saved.json"
    typed = ("Hello", "/system", "/system Be kind.", "/help", f"/save {file}", "/save", "/x")
    typed += (KeyboardInterrupt(), '"""two', 'lines"""', "/undo", "again", "/reset", "")
    text = screen(monkeypatch, chat, *typed)
    assert "Paris\x1b[32m is [b]it\x1b[0m" in text  # green is the first source
    assert "[7 tokens, 35.0 tokens/s, tau 1.75; 12 of 30 prompt tokens read]" in text
    assert "There is no system message." in text and chat.system == "Be kind."
    assert "error: /save takes the name of a file" in text and "no command /x" in text
    assert "(stopped; the turn is taken back)" in text and chat.closed == 1
    assert "error: There is no turn to undo." in text and "error: too long" in text
    saved = json.loads(file.read_text())
    assert saved == {"messages": [{"role": "user", "content": "Hello"}]}
    assert command._read(str(file)) == saved["messages"]
    assert chat.messages == []


def test_no_colours(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    text = screen(monkeypatch, Chat(ANSWER), "Hello", no_color=None)
    assert "\x1b[32m" not in text and "Paris is [b]it" in text
    shown = Console(file=io.StringIO())
    assert command._Terminal(Chat(), shown, ())._command("quit") is True


def test_settings_of_the_checkpoint(capsys):
    def settled(*argv, **asked):
        parser = Parser(prog="x")
        sampling.add_sampling(parser, "none")
        args = parser.parse_args(list(argv))
        sampling.settle(args)
        target = SimpleNamespace(
            generation=GenerationDefaults(**asked), config=SimpleNamespace(context=100)
        )
        sampling.heed(args, target)
        return args, capsys.readouterr().err

    asked = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.05}
    asked |= {"suppress_tokens": (5, 6), "no_repeat_ngram_size": 3, "others": ("num_beams",)}
    args, said = settled(**asked)
    assert (args.temperature, args.top_k, args.max_new_tokens, args.bad_words) == (0, 0, 128, [])
    assert said == (
        "generation_config.json: left out temperature 0.7, top_p 0.8, repetition_penalty 1.05, suppress_tokens, "
        "no_repeat_ngram_size, num_beams (--generation-config model heeds what it can)\n"
    )
    args, said = settled("--generation-config", "model", "--top-p", "1", **asked)
    assert (args.temperature, args.top_k, args.top_p) == (0.7, 50, 1.0)
    assert args.bad_words == [(5,), (6,)] and args.repetition_penalty == 1.05
    assert said == "generation_config.json: left out no_repeat_ngram_size, num_beams\n"
    args, said = settled("--generation-config", "model", temperature=0.7, max_length=20)
    assert args.temperature == 0  # transformers samples where do_sample says so
    assert said == "generation_config.json: left out max_length\n"
    assert settled("--temperature", "1", max_length=100)[1] == ""
    asked = {"bad_words_ids": ((5, 6),), "stop_strings": ("\n",)}
    args, said = settled(**asked)
    assert (args.stop, args.bad_words) == ([], [])
    assert "left out bad_words_ids, stop_strings (--generation-config" in said
    args, said = settled("--generation-config", "model", "--stop", "x", **asked)
    assert (args.stop, args.bad_words, said) == (["x", "\n"], [(5, 6)], "")
