"""`generate`: answers prompts."""

import argparse
import dataclasses
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from jax_specdec.cli import common, sampling, templates
from jax_specdec.cli import mesh as meshes
from jax_specdec.errors import UserError
from jax_specdec.text.chat import Message, chat_ids
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
    common.add_budget(group)
    common.add_keep_programs(group)
    common.add_int8(group)
    prompts = parser.add_argument_group("prompts (default: standard input is one prompt)")
    prompts.add_argument(
        "--prompt", metavar="TEXT", action="append", help="may be given several times"
    )
    prompts.add_argument(
        "--prompts",
        metavar="FILE",
        help='JSONL of {"id", "prompt"}, of {"id", "messages"} (a chat, in the chat template) or of Spec-Bench; '
        "a record may carry its own sampling parameters, and one with a seed uses that seed alone",
    )
    prompts.add_argument("--chat", action="store_true", help="apply the model's chat template")
    templates.add_template(prompts)
    prompts.add_argument(
        "--keep-last", type=int, metavar="N", help="keep the last N tokens of each prompt"
    )
    prompts.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="longest text in tokens, the prompt among them (default: all that the model takes; of Phi with "
        "longrope, what its short rotary factors serve)",
    )
    rules = sampling.add_sampling(parser, "none")
    rules.add_argument(
        "--rule",
        choices=("match", "reject", LOSSY),
        default="match",
        help="match: the very tokens of plain decoding; reject: speculative sampling, the same law; "
        "lossy-typical: NOT exact, takes every draft that the target finds likely enough (Medusa's "
        "typical acceptance)",
    )
    rules.add_argument(
        "--lossy-epsilon",
        type=float,
        metavar="P",
        help="of lossy-typical: likely enough is what is above min(P, D exp(-entropy)) (default: 0.09)",
    )
    rules.add_argument(
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
    sampling.settle(args)
    records, form = read_records(args), templates.template_options(args)
    flag = templates.given(args)
    if flag and not args.chat and not any(record.messages for record in records):
        raise UserError(f"{flag} is for --chat, or for records of messages.")

    from jax_specdec.core.acceptance import RULES
    from jax_specdec.generation import SAMPLED, each, id_key, make_requests
    from jax_specdec.pipeline import SpeculativeDecoder

    mesh = meshes.start(args)  # before anything else asks JAX for its devices
    _check(records, {name: _rows(args, records, name) for name in SAMPLED})
    rule = RULES[args.rule](**chosen)
    target, drafter = common.load(args, mesh)
    sampling.heed(args, target)
    recorded = {"logprobs": args.logprobs, "margins": True}
    decoder = SpeculativeDecoder(target, drafter, rule=rule, **recorded, **common.budget(args))
    requests = make_requests(
        [_prompt(record, target, args, form) for record in records],
        [record.id for record in records],
        {
            **{name: _rows(args, records, name) for name in SAMPLED},
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
        return read_prompts(args.prompts, chats=True)
    if args.prompt is not None:
        return [PromptRecord(i, text) for i, text in enumerate(args.prompt)]
    if sys.stdin is None or sys.stdin.isatty():
        raise UserError("Give a prompt: --prompt TEXT, --prompts FILE or standard input.")
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(f"Standard input is not {sys.stdin.encoding} text ({error}).") from None
    if not text:
        raise UserError(
            "Standard input is empty: write a prompt to it, or give --prompt TEXT or --prompts FILE."
        )
    return [prompt_of_input(text)]


def as_record(record: PromptRecord, answer: "Generation", logprobs: bool = False) -> dict[str, Any]:
    """The JSON object of an answer."""
    value = {
        "id": answer.id,
        "prompt": record.messages or record.prompt,
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
    widths = sum((Counter(a.stats.steps_per_width) for a in answers), Counter())
    undrafted = sum(sum(a.stats.steps_per_depth[:1]) for a in answers)
    rounds = ""
    if len(answers[0].stats.steps_per_width) > 1:
        each = ", ".join(f"{width}: {widths[width]}" for width in sorted(widths))
        rounds = f", rounds by width {each}, without a draft: {undrafted}"
    return (
        f"{tokens} tokens in {seconds:.2f} s ({tokens / seconds:.1f} tokens/s, and {compiling:.1f} s of "
        f"compilation), mean acceptance length {tokens / steps:.2f}, near ties {ties}{rounds}"
    )


def _rows(args: argparse.Namespace, records: Sequence[PromptRecord], name: str) -> list[Any]:
    """A sampling parameter of each record: its own, or the command line's."""
    return [record.settings.get(name, getattr(args, name)) for record in records]


def _lists(args: argparse.Namespace, records: Sequence[PromptRecord], name: str) -> list[Any]:
    """The same of a parameter that is a list."""
    return list(map(tuple, _rows(args, records, name)))


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


def _prompt(
    record: PromptRecord, target: "Target", args: argparse.Namespace, form: dict[str, Any]
) -> str | list[int]:
    """The text, or its token ids where more than tokenising is asked for."""
    tokenizer = target.tokenizer
    if args.chat or record.messages:
        try:
            ids = chat_ids(tokenizer, _chat(record, args.system), **form)
        except UserError as error:
            raise UserError(f"{record.where}: {error}" if record.where else str(error)) from None
    elif args.keep_last is None:
        return record.prompt
    else:
        ids = tokenizer(record.prompt, verbose=False)["input_ids"]
    return ids if args.keep_last is None else ids[-args.keep_last :]


def _chat(record: PromptRecord, system: str | None) -> str | list[Message]:
    """The chat of a record; its own system message wins."""
    if not record.messages and system is None:
        return record.prompt
    messages = list(record.messages) or [{"role": "user", "content": record.prompt}]
    if system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


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
