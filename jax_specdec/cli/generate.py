"""`generate`: answers prompts."""

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from jax_specdec.cli import common
from jax_specdec.cli import mesh as meshes
from jax_specdec.errors import UserError
from jax_specdec.text.chat import chat_ids
from jax_specdec.text.prompts import PromptRecord, prompt_of_input, read_prompts

if TYPE_CHECKING:
    from jax_specdec.checkpoints.targets import Target
    from jax_specdec.generation import Generation
    from jax_specdec.streaming import Stream

LOSSY = "lossy-typical"


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help="answer prompts",
        description="Answers prompts, as plain decoding would.",
        examples=(
            '--prompt "Once upon a time, there was a" --stream',
            '--model DIR --chat --prompt "Who are you?"',
            "--model DIR --drafter lm:5 --draft lm=SMALL --prompts FILE --json",
            '--prompt "The fox" --temperature 0.8 --top-p 0.95 --seed 7',
        ),
    )
    group = common.model_group(parser)
    common.add_model(group)
    common.add_drafter(group)
    common.add_int8(group)
    prompts = parser.add_argument_group("prompts (default: standard input is one prompt)")
    prompts.add_argument(
        "--prompt", metavar="TEXT", action="append", help="may be given several times"
    )
    prompts.add_argument(
        "--prompts",
        metavar="FILE",
        help='JSONL of {"id", "prompt"} or of Spec-Bench; a record may carry its own sampling '
        "parameters, and one with a seed uses that seed alone",
    )
    prompts.add_argument("--chat", action="store_true", help="apply the model's chat template")
    prompts.add_argument(
        "--keep-last", type=int, metavar="N", help="keep the last N tokens of each prompt"
    )
    sampling = parser.add_argument_group("sampling")
    for flag, kind, default, text in (
        ("--max-new-tokens", int, 128, "the longest answer (default: 128)"),
        ("--temperature", float, 0.0, "0, the default, is greedy"),
        ("--top-k", int, 0, "of the N likeliest tokens alone; 0, the default, is off"),
        ("--top-p", float, 1.0, "of the likeliest that make up P; 1, the default, is off"),
        ("--min-p", float, 0.0, "of those above P times the likeliest; 0, the default, is off"),
        ("--seed", int, 0, "of the sampled text (default: 0)"),
    ):
        name = "P" if flag.endswith("-p") else "N" if kind is int else "X"
        sampling.add_argument(flag, type=kind, default=default, metavar=name, help=text)
    sampling.add_argument(
        "--stop",
        metavar="TEXT",
        action="append",
        default=[],
        help="end before this text, or at this special token; may be given several times",
    )
    sampling.add_argument(
        "--stop-token-id",
        dest="stop_token_ids",
        type=int,
        metavar="ID",
        action="append",
        default=[],
        help="end at this token, too; may be given several times",
    )
    sampling.add_argument(
        "--ignore-eos", action="store_true", help="decode past end-of-text tokens"
    )
    sampling.add_argument(
        "--min-new-tokens", type=int, default=0, metavar="N", help="no stop token before so many"
    )
    sampling.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="for tokens in prompt or answer, as in transformers; 1, the default, is off",
    )
    sampling.add_argument(
        "--presence-penalty",
        type=float,
        default=0.0,
        metavar="X",
        help="taken off the scores of tokens in the answer; 0, the default, is off",
    )
    sampling.add_argument(
        "--frequency-penalty",
        type=float,
        default=0.0,
        metavar="X",
        help="the same, as often as they occur there",
    )
    sampling.add_argument(
        "--logit-bias",
        type=_bias,
        metavar="ID=X",
        action="append",
        default=[],
        help="added to a token's score; may be given several times",
    )
    sampling.add_argument(
        "--bad-words",
        metavar="TEXT",
        action="append",
        default=[],
        help="text that must not occur; may be given several times",
    )
    sampling.add_argument(
        "--rule",
        choices=("match", "reject", LOSSY),
        default="match",
        help="match: the very tokens of plain decoding; reject: speculative sampling, the same law; "
        "lossy-typical: NOT exact, takes every draft that the target finds likely enough (Medusa's "
        "typical acceptance)",
    )
    sampling.add_argument(
        "--lossy-epsilon",
        type=float,
        metavar="P",
        help="of lossy-typical: likely enough is what is above min(P, D exp(-entropy)) (default: 0.09)",
    )
    sampling.add_argument(
        "--lossy-delta", type=float, metavar="D", help="of lossy-typical (default: 0.3)"
    )
    meshes.add_mesh(parser)
    running = parser.add_argument_group("running and output")
    running.add_argument(
        "--batch-size", type=int, default=1, metavar="N", help="prompts at a time (default: 1)"
    )
    running.add_argument("--stream", action="store_true", help="print the text as it is decoded")
    running.add_argument("--json", action="store_true", help="print one JSON object per prompt")
    running.add_argument(
        "--logprobs", action="store_true", help="with --json: of each token, in nats"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.stream and (args.json or args.batch_size != 1):
        raise UserError("--stream shows one text at a time: leave out --json and --batch-size.")
    if args.logprobs and not args.json:
        raise UserError("--logprobs needs --json.")
    common.at_least_one(args, "keep_last", "batch_size")
    if any(not stop for stop in args.stop):
        raise UserError("A stop string must not be empty.")
    chosen = {"epsilon": args.lossy_epsilon, "delta": args.lossy_delta}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if chosen and args.rule != LOSSY:
        raise UserError(f"--lossy-{next(iter(chosen))} is a setting of --rule {LOSSY}.")
    args.logit_bias = dict(args.logit_bias)
    records = read_records(args)

    from jax_specdec.core.acceptance import RULES
    from jax_specdec.generation import SAMPLED, each, id_key, make_requests
    from jax_specdec.pipeline import SpeculativeDecoder

    mesh = meshes.start(args)  # before anything else asks JAX for its devices
    settings: dict[str, Any] = {name: _rows(args, records, name) for name in SAMPLED}
    _check(records, settings)
    rule = RULES[args.rule](**chosen)
    target, drafter = common.load(args, mesh)
    decoder = SpeculativeDecoder(target, drafter, rule=rule, logprobs=args.logprobs, margins=True)
    requests = make_requests(
        [_prompt(record, target, args) for record in records],
        [record.id for record in records],
        {
            **settings,
            "own_seed": ["seed" in record.settings for record in records],
            "stop": _lists(args, records, "stop"),
            "stop_token_ids": _lists(args, records, "stop_token_ids"),
            "bad_words": _lists(args, records, "bad_words"),
            "ignore_eos": args.ignore_eos,
            "key": [id_key(record.id) for record in records],
        },
    )
    if args.stream:
        answers = _streamed(each(requests, decoder.stream), records)
    else:
        answers = decoder.generate(requests, batch_size=args.batch_size)
    done = []
    for record, answer in zip(records, answers, strict=True):
        if not meshes.first():  # of several processes one writes, and all decode
            continue
        done.append(answer)
        if args.json:
            common.print_json(as_record(record, answer, args.logprobs))
        elif not args.stream:
            _head(records, record)
            print(answer.text, flush=True)
    if not meshes.first():
        return 0
    if not args.json:
        common.say(summary(done, args.batch_size) + f", {LOSSY}" * (args.rule == LOSSY))
    return 0


def read_records(args: argparse.Namespace) -> list[PromptRecord]:
    """The prompts of `--prompt`, `--prompts` or standard input."""
    if args.prompt is not None and args.prompts is not None:
        raise UserError("Give --prompt or --prompts, not both.")
    if args.prompts is not None:
        return read_prompts(args.prompts)
    if args.prompt is not None:
        return [PromptRecord(i, text) for i, text in enumerate(args.prompt)]
    if sys.stdin is None or sys.stdin.isatty():
        raise UserError("Give a prompt: --prompt TEXT, --prompts FILE or standard input.")
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(f"Standard input is not {sys.stdin.encoding} text ({error}).") from None
    return [prompt_of_input(text)]


def as_record(record: PromptRecord, answer: "Generation", logprobs: bool = False) -> dict[str, Any]:
    """The JSON object of an answer."""
    value = {
        "id": answer.id,
        "prompt": record.prompt,
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "stats": dataclasses.asdict(answer.stats),
    }
    return {**value, "logprobs": answer.logprobs} if logprobs else value


def summary(answers: "Sequence[Generation]", batch_size: int) -> str:
    """All answers in one line."""
    tokens = sum(a.stats.num_tokens for a in answers)
    steps = sum(a.stats.num_spec_steps for a in answers)
    seconds = sum(
        a.stats.wall_time_s for a in answers[::batch_size]
    )  # rows of a batch share theirs
    ties = sum(a.stats.near_ties or 0 for a in answers)
    compiling = sum(a.stats.compile_time_s for a in answers[::batch_size])
    return (
        f"{tokens} tokens in {seconds:.2f} s ({tokens / seconds:.1f} tokens/s, and {compiling:.1f} s of "
        f"compilation), mean acceptance length {tokens / steps:.2f}, near ties {ties}"
    )


def _rows(args: argparse.Namespace, records: Sequence[PromptRecord], name: str) -> list[Any]:
    """A sampling parameter of each record: its own, or the command line's."""
    return [record.settings.get(name, getattr(args, name)) for record in records]


def _lists(args: argparse.Namespace, records: Sequence[PromptRecord], name: str) -> list[Any]:
    """The same of a parameter that is a list."""
    return list(map(tuple, _rows(args, records, name)))


def _bias(text: str) -> tuple[int, float]:
    """`ID=X` of `--logit-bias`."""
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a token id and a number, as in 42=-5, got {text[:40]!r}"
        ) from None


def _check(records: Sequence[PromptRecord], settings: dict[str, Any]) -> None:
    """Ranges, before a model is loaded; names the line of a record that is wrong."""
    from jax_specdec.core.sampling import make_sampling

    try:
        make_sampling(len(records), **settings)
    except UserError:
        for i, record in enumerate(records):
            try:
                make_sampling(1, **{name: rows[i : i + 1] for name, rows in settings.items()})
            except UserError as error:
                if not record.where:
                    raise
                raise UserError(f"{record.where}: {error}") from None
        raise


def _prompt(record: PromptRecord, target: "Target", args: argparse.Namespace) -> str | list[int]:
    """The text, or its token ids where more than tokenising is asked for."""
    tokenizer = target.tokenizer
    if args.chat:
        ids = chat_ids(tokenizer, record.prompt)
    elif args.keep_last is None:
        return record.prompt
    else:
        ids = tokenizer(record.prompt, verbose=False)["input_ids"]
    return ids if args.keep_last is None else ids[-args.keep_last :]


def _head(records: Sequence[PromptRecord], record: PromptRecord) -> None:
    if len(records) > 1:
        print(f"[{record.id}]", flush=True)


def _streamed(
    streams: "Sequence[Stream]", records: Sequence[PromptRecord]
) -> "Iterator[Generation]":
    """Prints texts as they grow, one after the other."""
    write = print if meshes.first() else _ignore
    for record, stream in zip(records, streams, strict=True):
        if meshes.first():
            _head(records, record)
        for piece in stream:
            write(piece, end="", flush=True)
        write(flush=True)
        yield stream.generation


def _ignore(*_: Any, **__: Any) -> None:
    """Of processes that do not print: they too must decode in pieces."""
