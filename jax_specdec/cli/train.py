"""`train` and its kinds; `lm`, `tokenizer` and `bigram` are here."""

import argparse
from pathlib import Path
from typing import Any

from jax_specdec.cli import (
    arguments,
    common,
    mesh,
    regenerate,
    train_glide,
    train_medusa,
    train_vocabulary,
)
from jax_specdec.cli.parser import Commands
from jax_specdec.errors import UserError
from jax_specdec.training.config import TrainConfig

# Flag, field of ModelConfig, help. Further fields can be set in the file of --config.
SHAPE = (
    ("layers", "num_layers", "default: 4"),
    ("hidden-size", "hidden_size", "default: 256"),
    ("mlp-size", "mlp_size", "default: 8/3 of the hidden size, a multiple of 64"),
    ("heads", "num_heads", "default: hidden size / 64"),
    ("kv-heads", "num_kv_heads", "default: as many as heads"),
    ("head-dim", "head_dim", "default: hidden size / heads"),
    ("context", "context", "default: 1024"),
)


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="train drafters, models, tokenizers and bigram tables",
        description="Trains a drafter, a language model, a tokenizer or a bigram table, or has a\n"
        "target write the text to train drafters on.",
        examples=("glide --help", "lm --data FILE --tokenizer DIR --out OUT --steps 1000"),
    )
    kinds = Commands(parser, "kind", "KIND", required=True)
    register_lm(kinds)
    train_glide.register(kinds)
    train_medusa.register(kinds)
    register_tokenizer(kinds)
    register_bigram(kinds)
    train_vocabulary.register(kinds)
    regenerate.register(kinds)
    parser.description = "\n".join([parser.description, "", "kinds:", *kinds.lines])


def register_lm(kinds: Any) -> None:
    parser = kinds.add_parser(
        "lm",
        help="a language model, for example a draft model",
        description="Trains a language model and writes it to OUT/checkpoint; the state to resume from, "
        "metrics.jsonl and loss.png go to OUT.",
        examples=(
            "--data FILE --tokenizer DIR --out OUT --layers 2 --steps 1000",
            "--data FILE --init OUT/checkpoint --out OUT2 --steps 500",
        ),
    )
    arguments.add_data(parser)
    parser.add_argument(
        "--tokenizer", metavar="DIR", help="folder of the tokenizer (default: that of --init)"
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="folder to write")
    parser.add_argument("--resume", action="store_true", help="go on from the newest state in OUT")
    parser.add_argument("--init", metavar="DIR", help="start from this checkpoint")
    parser.add_argument("--config", metavar="FILE", help='JSON {"train": {...}, "model": {...}}')
    parser.add_argument(
        "--save-dtype",
        choices=common.DTYPES,
        default="bfloat16",
        help="of what is written (default: bfloat16)",
    )
    shape = parser.add_argument_group("shape of a new model")
    for flag, field, text in SHAPE:
        shape.add_argument(f"--{flag}", dest=f"model.{field}", type=int, metavar="N", help=text)
    shape.add_argument(
        "--tied-head",
        dest="model.tied_head",
        action=argparse.BooleanOptionalAction,
        help="use the embedding as the output matrix (default: no)",
    )
    arguments.add_dataclass(parser.add_argument_group("training"), TrainConfig, "train")
    mesh.add_mesh(parser, "rows over all devices")
    parser.set_defaults(run=run_lm)


def register_tokenizer(kinds: Any) -> None:
    parser = kinds.add_parser(
        "tokenizer",
        help="a byte-level BPE tokenizer",
        description="Trains a byte-level BPE tokenizer on the texts of JSONL files.",
        examples=("--data FILE --vocab-size 4096 --out OUT",),
    )
    parser.add_argument(
        "--data",
        metavar="FILE",
        action="append",
        required=True,
        help='JSONL of {"text"}; may be given several times',
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        required=True,
        metavar="N",
        help="entries, special tokens included",
    )
    parser.add_argument(
        "--context",
        type=int,
        default=1024,
        metavar="N",
        help="the longest text, written for whoever reads the tokenizer (default: 1024)",
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="folder to write")
    parser.set_defaults(run=run_tokenizer)


def register_bigram(kinds: Any) -> None:
    parser = kinds.add_parser(
        "bigram",
        help="the table of the drafter 'bigram'",
        description="Counts the most frequent successor of each token, for the drafter 'bigram'.",
        examples=("--data FILE --tokenizer DIR --out OUT",),
    )
    parser.add_argument(
        "--data",
        metavar="FILE",
        action="append",
        required=True,
        help='JSONL of {"text"}; may be given several times',
    )
    parser.add_argument(
        "--tokenizer",
        metavar="DIR",
        required=True,
        help="tokenizer or target folder; a config.json there says the vocabulary's size",
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="folder to write")
    parser.set_defaults(run=run_bigram)


def run_lm(args: argparse.Namespace) -> int:
    from jax_specdec.core.sharding import Sharding
    from jax_specdec.models.config import ModelConfig
    from jax_specdec.training import runs

    sections = arguments.read_config(args.config, {"train": TrainConfig, "model": ModelConfig})
    wanted = {**sections["train"], **arguments.given(args, "train")}
    if "steps" not in wanted:
        raise UserError("Say how long to train, with --steps N.")
    config = TrainConfig(**wanted)
    source = args.tokenizer or args.init
    if source is None:
        raise UserError("Name the tokenizer's folder with --tokenizer DIR.")
    devices = mesh.start(args)
    sharding = None if devices is None else Sharding(devices)
    shape = {**sections["model"], **arguments.given(args, "model")}
    run = arguments.training_run(args)
    runs.train_lm(run, config, shape, source, sharding)
    common.say(f"Wrote {run.checkpoint}.")
    return 0


def run_tokenizer(args: argparse.Namespace) -> int:
    from jax_specdec.training.data import read_texts
    from jax_specdec.training.tokenizer import train_tokenizer

    texts = [text for path in args.data for text in read_texts(path)]
    tokenizer = train_tokenizer(texts, args.vocab_size, args.out, context=args.context)
    common.say(f"Wrote {args.out}: {len(tokenizer)} entries.")
    return 0


def run_bigram(args: argparse.Namespace) -> int:
    from jax_specdec.checkpoints.targets import load_config, load_tokenizer
    from jax_specdec.drafters.bigram import BIGRAM_FILE, count_bigrams, save_bigram
    from jax_specdec.text.token_bytes import id_bound
    from jax_specdec.training.data import read_documents

    tokenizer = load_tokenizer(args.tokenizer)
    vocab_size = id_bound(tokenizer)
    if (Path(args.tokenizer) / "config.json").is_file():
        vocab_size = load_config(args.tokenizer).vocab_size
    table = count_bigrams(read_documents(args.data, tokenizer), vocab_size)
    save_bigram(args.out, table)
    common.say(f"Wrote {Path(args.out) / BIGRAM_FILE}: {vocab_size} entries.")
    return 0
