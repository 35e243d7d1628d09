"""`chat`: a conversation in the terminal."""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_specdec.cli import common, sampling, templates
from jax_specdec.errors import RunError, UserError, shown

if TYPE_CHECKING:
    from rich.console import Console

    from jax_specdec.conversation import Conversation
    from jax_specdec.generation import Generation

BLOCK = '"""'
HELP = f"""/help          these lines
/reset         begin anew
/undo          take back the last turn
/system TEXT   set the system message; /system alone shows it, /system - takes it away
/save FILE     write the messages, for `chat --messages` or `generate --prompts`
/quit          end, as Ctrl-D does
//TEXT         the message /TEXT
{BLOCK} begins and ends a message of several lines; Ctrl-C stops an answer, and the turn is taken back."""
# Of sources in their order; what the target itself says has the terminal's own colour.
COLOURS = ("green", "cyan", "magenta", "yellow", "blue", "red")


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "chat",
        help="a conversation in the terminal",
        description="A conversation, its answers coloured by the drafter that each token is from. What was read "
        "stays in the caches, so a turn reads its own tokens only. From a pipe each line is a message or one of the "
        "terminal's commands (/reset, /undo, /quit, ...; /help lists them); answers go to standard output, all "
        "else to standard error, and the first error ends it.",
        examples=(
            "--model DIR --drafter max-gram:6",
            '--model DIR --drafter lm:5 --draft lm=SMALL --system "Be brief." --temperature 0.7',
        ),
    )
    group = common.model_group(parser)
    common.add_model(group)
    common.add_drafter(group)
    common.add_budget(group)
    common.add_keep_programs(group)
    common.add_int8(group)
    group = parser.add_argument_group("the conversation")
    templates.add_template(group)
    group.add_argument(
        "--messages", metavar="FILE", help="go on with a conversation that /save has written"
    )
    sampling.add_sampling(parser, "model", max_new_tokens=512)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    sampling.settle(args)
    form = templates.template_options(args)
    messages = _read(args.messages) if args.messages is not None else []
    if sys.stdin is None:
        raise UserError("There is no standard input to read messages from.")

    from rich.console import Console

    from jax_specdec.core.sampling import make_sampling
    from jax_specdec.generation import SAMPLED
    from jax_specdec.pipeline import SpeculativeDecoder

    make_sampling(1, **{name: getattr(args, name) for name in SAMPLED})  # before a model is loaded
    target, drafter = common.load(args)
    sampling.heed(args, target)
    decoder = SpeculativeDecoder(target, drafter, **common.budget(args))
    names = (*args.usual, "stop", "stop_token_ids", "bad_words", "logit_bias", "ignore_eos")
    options = {name: getattr(args, name) for name in names}
    options |= {name: tuple(options[name]) for name in ("stop", "stop_token_ids", "bad_words")}
    chat = decoder.chat(args.system, messages=messages, **form, **options)
    console = Console(highlight=False, soft_wrap=True)
    if sys.stdin.isatty() and console.is_terminal:
        name = "the demo's model" if args.model is None else args.model
        _Terminal(chat, console, decoder.loop.sources).run(f"{name}, drafter {drafter.spec}")
    else:
        _Pipe(chat).run()
    return 0


class _Session:
    """Messages and commands of one conversation; how they come and where answers go is left to the others."""

    def __init__(self, chat: "Conversation"):
        self._chat = chat

    def _line(self, prompt: str) -> str:
        """The next line; raises EOFError at the end."""
        raise NotImplementedError

    def _answer(self, message: str) -> None:
        raise NotImplementedError

    def _say(self, sentence: str) -> None:
        raise NotImplementedError

    def _message(self) -> str:
        """What is written next, maybe over several lines, which are never a command."""
        message = self._line("\n> ").strip()
        if not message.startswith(BLOCK):
            return message
        lines = [message.removeprefix(BLOCK)]
        while not lines[-1].endswith(BLOCK):
            lines.append(self._line("... ").rstrip())
        text = "\n".join(lines).removesuffix(BLOCK).strip()
        return f"/{text}" if text.startswith("/") else text

    def _do(self, message: str) -> bool:
        """Answers, or does what is asked; whether that is to end."""
        if message.startswith("/") and not message.startswith("//"):
            return self._command(*message[1:].split(maxsplit=1))
        self._answer(message.removeprefix("/"))
        return False

    def _command(self, name: str = "", rest: str = "") -> bool:
        messages = self._chat.messages
        if rest and name in ("quit", "help", "reset", "undo"):
            raise UserError(f"/{name} has nothing behind it: /help says what there is.")
        if name == "quit":
            return True
        if name == "help":
            self._say(HELP)
        elif name == "reset":
            self._chat.reset()
            self._say("The conversation begins anew.")
        elif name == "undo":
            self._chat.undo()
            self._say(f"The last turn is taken back; {len(messages)} messages are left.")
        elif name == "system":
            if rest:
                self._chat.system = None if rest == "-" else rest
            self._say(
                f"The system message is {shown(self._chat.system, 300)}."
                if self._chat.system
                else "There is no system message."
            )
        elif name == "save" and rest:
            _write(rest, messages)
            self._say(f"{len(messages)} messages are in {shown(rest)}.")
        else:
            known = (
                "/save takes the name of a file"
                if name == "save"
                else f"There is no command /{name[:40]}"
            )
            raise UserError(f"{known}: /help says which there are.")
        return False


class _Pipe(_Session):
    """Answers lines of standard input on standard output."""

    def run(self) -> None:
        """Raises the first error, and a `UserError` where no message or command came."""
        done = 0
        while (message := self._next()) is not None:
            if message:
                done += 1
                if self._do(message):
                    return
        if not done:
            raise UserError("Standard input is empty: write messages to it, one a line.")

    def _next(self) -> str | None:
        self._within = False
        try:
            return self._message()
        except EOFError:
            if self._within:
                raise UserError(
                    f"Standard input ends within a message: end it with {BLOCK}."
                ) from None
            return None
        except UnicodeDecodeError as error:
            raise UserError(f"Standard input is not {sys.stdin.encoding} text ({error}).") from None

    def _line(self, prompt: str) -> str:
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        self._within = True
        return line

    def _answer(self, message: str) -> None:
        for piece in (stream := self._chat.stream(message)):
            print(piece, end="", flush=True)
        print(flush=True)
        common.say(_figures(stream.generation))

    def _say(self, sentence: str) -> None:
        common.say(sentence)


class _Terminal(_Session):
    """Shows answers while they are decoded; errors and Ctrl-C end none but the turn."""

    def __init__(self, chat: "Conversation", console: "Console", sources: tuple[str, ...]):
        super().__init__(chat)
        self._console = console
        self._colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(sources)}

    def run(self, title: str) -> None:
        from rich.text import Text

        self._console.print(Text(title, "bold"))
        legend = Text("the target itself", "dim")
        for name, colour in self._colours.items():
            legend.append(", ").append(name, f"not dim {colour}")
        self._console.print(legend.append("; /help for commands, Ctrl-D ends"))
        with contextlib.suppress(ImportError):  # there is none on Windows
            import readline  # noqa: F401  (`input` edits lines with it)
        for message in self._inputs():
            try:
                if self._do(message):
                    return
            except (UserError, RunError) as error:
                self._console.print(Text(f"error: {error}", "red"))

    def _inputs(self) -> Iterator[str]:
        """What is typed, until the input ends."""
        while True:
            try:
                message = self._message()
            except KeyboardInterrupt:
                self._console.print()
                continue
            except EOFError:
                self._console.print()
                return
            if message:
                yield message

    def _line(self, prompt: str) -> str:
        return input(prompt)

    def _answer(self, message: str) -> None:
        from rich.text import Text

        stream = self._chat.stream(message)
        try:
            for piece in stream:
                self._console.print(
                    Text(piece.text, self._colours.get(piece.source or "", "")), end=""
                )
        except KeyboardInterrupt:
            stream.close()
            self._console.print(Text("\n(stopped; the turn is taken back)", "dim"))
            return
        self._console.print()
        self._console.print(Text(_figures(stream.generation), "dim"))

    def _say(self, sentence: str) -> None:
        from rich.text import Text

        look = "" if sentence == HELP else "dim"
        self._console.print(Text(sentence, look))


def _figures(answer: "Generation") -> str:
    stats = answer.stats
    prompt = len(answer.prompt)
    return (
        f"[{stats.num_tokens} tokens, {stats.tokens_per_second:.1f} tokens/s, tau {stats.mean_acceptance_length:.2f}; "
        f"{prompt - stats.num_cached_tokens} of {prompt} prompt tokens read]"
    )


def _write(path: str, messages: list[dict[str, Any]]) -> None:
    try:
        Path(path).write_text(
            json.dumps({"messages": messages}, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    except OSError as error:
        raise UserError(f"{shown(path)} cannot be written: {error.strerror}.") from None


def _read(path: str) -> list[dict[str, Any]]:
    """The messages of the one record of a file."""
    from jax_specdec.text.jsonl import read_jsonl

    records = [record for _, record in read_jsonl(path)]
    if len(records) != 1 or not isinstance(records[0].get("messages"), list):
        raise UserError(
            f'{shown(path)} must hold one record, {{"messages": [...]}}, as /save writes it.'
        )
    return records[0]["messages"]
