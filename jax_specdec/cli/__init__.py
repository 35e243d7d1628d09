"""The command line: one module per command, each with a `register`.

Nothing here imports jax before a command runs, so that help and errors of wrong use come at once.
"""

import os
import sys
import traceback
from collections.abc import Callable, Sequence

from jax_specdec import progress
from jax_specdec.cli import chat, common, convert, demo, doctor, generate, info, plan, train, tune
from jax_specdec.cli.parser import Commands, Parser
from jax_specdec.errors import RunError, UserError

LONGEST_MESSAGE = 2000  # characters: what a user gave may be echoed

EXAMPLES = """examples:
  jax-specdec doctor
  jax-specdec demo
  jax-specdec generate --prompt "Once upon a time, there was a" --stream
  jax-specdec chat --model DIR --drafter max-gram:6
  jax-specdec generate --help    # every command has its own"""

# The commands, by what they are for.
COMMANDS: dict[str, tuple[Callable, ...]] = {
    "decode": (demo.register, generate.register, chat.register),
    "look before you load": (doctor.register, info.register, plan.register),
    "measure, train, convert": (tune.register, train.register, convert.register),
}


def make_parser() -> Parser:
    parser = Parser(prog="jax-specdec")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = Commands(parser, "command", "COMMAND")
    for title, registers in COMMANDS.items():
        commands.lines += ["", f"{title}:"]
        for register in registers:
            register(commands)
    what = "Lossless speculative decoding of large language models."
    parser.description = "\n".join([what, *commands.lines])
    parser.epilog = EXAMPLES
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status.

    0: done. 1: failed at run time. 2: wrong use. 130: interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    # Only tokenizers are used of transformers, which otherwise tells each user that torch is missing.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure:  # a terminal that cannot show a character shows another
            reconfigure(errors="replace")
    try:
        args = make_parser().parse_args(argv)
        if args.version:
            import jax_specdec

            print(jax_specdec.__version__)
            return 0
        if args.command is None:
            raise UserError("Say which command to run (see `jax-specdec --help`).")
        with progress.told_always(), common.warnings_said():
            return args.run(args) or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, say `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        status, sentence = _describe(error)
        sentence = " ".join(sentence.split())
        if len(sentence) > LONGEST_MESSAGE:
            sentence = f"{sentence[:LONGEST_MESSAGE]} ..."
        print("error:", sentence, file=sys.stderr)
        return status


def _describe(error: Exception) -> tuple[int, str]:
    """The exit status of an error, and its sentence."""
    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, RunError):
        return 1, str(error)
    if "No space left on device" in str(error):  # tensorstore calls that RESOURCE_EXHAUSTED, too
        return 1, "The disk is full."
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return 1, (
            "The memory ran out: use a narrower --dtype, a smaller --batch-size or fewer "
            "--max-new-tokens."
        )
    if isinstance(error, RecursionError):
        return 2, "Something that was given is nested too deeply to be read."
    if sentence := _no_device():
        return 2, sentence
    if isinstance(error, OSError) and error.strerror:
        file = f" ({error.filename})" if error.filename else ""
        return 1, f"{error.strerror}{file}."
    first = (str(error).strip().splitlines() or [""])[0]
    return 1, f"internal {type(error).__name__}: {first} (rerun with --debug for the traceback)"


def _no_device() -> str | None:
    """Why JAX has no device to run on, if that is so."""
    wanted = os.environ.get("JAX_PLATFORMS")
    if not wanted or "jax" not in sys.modules:
        return None
    import jax

    try:
        jax.devices()
    except Exception:
        return f"JAX finds no device for JAX_PLATFORMS={wanted[:40]}: unset it, or install JAX for that platform."
    return None
