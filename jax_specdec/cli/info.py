"""`info`: what a model is and what decoding with it takes, from its files' headers alone."""

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from jax_specdec import display
from jax_specdec.cli import common
from jax_specdec.errors import UserError

if TYPE_CHECKING:
    from jax_specdec.checkpoints.targets import Target
    from jax_specdec.specs.build import Drafters


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "info",
        help="sizes and memory, before anything is loaded",
        description="Shows the sizes of a model and what decoding with it takes in memory. Reads "
        "config.json and the headers of the weights, and loads nothing.",
        examples=("--model DIR", "--model DIR --drafter lm:5 --batch-size 8", "--drafters"),
    )
    group = common.model_group(parser)
    common.add_model(group)
    common.add_drafter(group)
    common.add_int8(group)
    parser.add_argument(
        "--batch-size", type=int, default=1, metavar="N", help="rows at a time (default: 1)"
    )
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="tokens of a row (default: all that the model takes)",
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="of them new (default: 128)"
    )
    parser.add_argument(
        "--drafters",
        action="store_true",
        help="list the kinds of drafters instead, and what each takes",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    common.at_least_one(args, "batch_size", "max_new_tokens", "context")
    if args.drafters:
        print("\n".join(_kinds()))
        return 0
    found = describe(args, *open_headers(args))
    if args.json:
        common.print_json(found)
    else:
        print("\n".join(_lines(found)))
    return 0


def open_headers(args: argparse.Namespace) -> "tuple[Target, str, Drafters]":
    """The target without parameters, the dtype that it is stored in, and the drafters beside it."""
    from jax_specdec.checkpoints.hub import find_checkpoint
    from jax_specdec.checkpoints.targets import (
        Target,
        default_dtype,
        inspect_checkpoint,
        load_tokenizer,
    )
    from jax_specdec.checkpoints.tokenizer_files import has_tokenizer
    from jax_specdec.models.decoder import Decoder
    from jax_specdec.specs.build import Drafters
    from jax_specdec.tuning.plan import in_int8

    folders = common.draft_folders(args.draft)
    folder = find_checkpoint(common.model_source(args))
    config, stored = inspect_checkpoint(folder)
    tokenizer = load_tokenizer(folder) if has_tokenizer(folder) else None
    decoder = in_int8(Decoder(config, args.dtype or default_dtype(folder)), args.int8)
    target = Target(decoder, {}, tokenizer, folder)
    options = {"batch_size": args.batch_size, "int8": args.draft_int8}
    return target, stored, Drafters(target, drafts=folders, **options)


def describe(
    args: argparse.Namespace, target: "Target", stored: str, drafters: "Drafters"
) -> dict[str, Any]:
    """Everything `info` knows, as a JSON object.

    Args:
      target, stored, drafters: what `open_headers` gives.
    """
    from jax_specdec.checkpoints.draft_vocabulary import read_draft_vocabulary
    from jax_specdec.checkpoints.memory import available_memory, memory_plan, sizes_of
    from jax_specdec.checkpoints.target_tensors import packing_of
    from jax_specdec.loading import choose_drafter
    from jax_specdec.specs.build import check_taken

    folders, given = common.draft_folders(args.draft), common.given_drafter(args)
    config, dtype = target.config, str(target.decoder.dtype)
    context = args.context or config.context
    if context > config.context:
        raise UserError(f"The model's context is {config.context} tokens, fewer than {context}.")
    if args.max_new_tokens >= context:
        raise UserError(
            f"{args.max_new_tokens} new tokens leave no room for a prompt in a context of {context}."
        )
    if given is None:
        given, _ = choose_drafter(drafters.setting, folders)
    spec, outline = drafters.outline(given)
    check_taken(spec.names, args.draft_int8)
    name = str(spec._replace(rule=None, nodes=None)) if spec.inner else spec.name
    length, width = outline.info.depth, outline.info.nodes + 1
    slots = context + width
    plan = memory_plan(config, dtype, args.batch_size, slots, width=width, int8=args.int8)
    total = plan.total
    drafter: dict[str, Any] = {"name": name, "length": length}
    if spec.rule is not None:
        drafter |= {"expansion": spec.rule, "nodes": spec.nodes}

    def part(name: str) -> dict[str, Any]:
        """What is known of one drafter, its memory among it unless it takes none."""
        request = drafters.request(name)
        found = request.kind.describe(request, args.batch_size, slots)
        if request.kind.distribution and request.kind.needs_checkpoint:
            ids = read_draft_vocabulary(request.folder, target)
            found |= {} if ids is None else {"draft_vocabulary": len(ids)}
        return found

    if spec.inner:
        drafter["parts"] = {name: part(name) for name in spec.names}
        sizes = [
            found["memory"]["total"] for found in drafter["parts"].values() if "memory" in found
        ]
        drafter["memory"] = {"total": sum(sizes)}
    else:
        drafter |= part(name)
    if "memory" in drafter:
        total += drafter["memory"]["total"]
    available = available_memory()
    return {
        "model": str(target.path),
        **sizes_of(config),
        "stored_dtype": stored,
        "packing": packing_of(target.path),
        "tokenizer": target.tokenizer is not None,
        "dtype": dtype,
        "int8": list(args.int8),
        "draft_int8": list(args.draft_int8),
        "batch_size": args.batch_size,
        "context_used": context,
        "longest_prompt": context - args.max_new_tokens,
        "memory": {**dataclasses.asdict(plan), "total": plan.total},
        "drafter": drafter,
        "total_bytes": total,
        "available_bytes": available,
        "fits": None if available is None else total <= available,
    }


def _kinds() -> list[str]:
    """A line for each kind of drafter."""
    from jax_specdec.drafters import registry
    from jax_specdec.specs.whole import expansions_of

    lines = []
    for kind in registry.kinds():
        about = ["a checkpoint" if kind.needs_checkpoint else "no checkpoint"]
        if kind.usual_length:
            about.append(f"{kind.usual_length} tokens a draft where nothing is said or measured")
        if kind.verifies:
            about.append("can verify others")
        if kind.numbered:
            about.append(f"may be several, as {kind.name}2")
        if rules := expansions_of(kind):
            about.append(" ".join(f"+{rule}" for rule in rules))
        lines.append(f"{kind.name:14} {'; '.join(about)}")
    return lines


def _shape(found: dict[str, Any]) -> str:
    stored = found["stored_dtype"]
    if found.get("packing"):
        stored = f"{found['packing']}, read as {stored}"
    mlp = f"MLP {found['mlp_size']}"
    if "num_experts" in found:
        mlp = f"{found['num_experts']} experts of {found['expert_size']}, {found['experts_per_token']} a token"
    return (
        f"{found['num_parameters']:,} parameters ({found['family']}, stored as {stored}): "
        f"{found['num_layers']} layers of {found['hidden_size']}, {mlp}, "
        f"{found['num_heads']} heads on {found['num_kv_heads']} key heads of {found['head_dim']}, "
        f"vocabulary {found['vocab_size']}, context {found['context']}"
    )


def _memory(plan: dict[str, int]) -> str:
    parts = [f"{name} {display.size(size)}" for name, size in plan.items() if name != "total"]
    return f"{display.size(plan['total'])} ({', '.join(parts)})"


def _lines(found: dict[str, Any]) -> list[str]:
    drafter = found["drafter"]
    lines = [f"model    {found['model']}", f"         {_shape(found)}"]
    if not found["tokenizer"]:
        lines.append("         no tokenizer")
    if "num_parameters" in drafter:
        lines += [f"drafter  {drafter['path']}", f"         {_shape(drafter)}"]
    lines.append(
        f"decoding {found['batch_size']} rows of {found['context_used']} tokens (prompts of up to "
        f"{found['longest_prompt']}) in {found['dtype']}{common.int8_note(found['int8'])}, drafter {drafter['name']}"
        f"{common.int8_note(found['draft_int8'])}, up to {drafter['length']} tokens a draft"
        + (f" of {drafter['draft_vocabulary']:,}" if "draft_vocabulary" in drafter else "")
    )
    lines.append(f"         model   {_memory(found['memory'])}")
    if "memory" in drafter:
        parts = drafter.get("parts") or {"drafter": drafter}
        sizes = {name: part["memory"] for name, part in parts.items() if "memory" in part}
        lines += [f"         {name:7} {_memory(memory)}" for name, memory in sizes.items()]
    free = found["available_bytes"]
    fits = (
        "unknown"
        if free is None
        else f"{display.size(free)}, {'fits' if found['fits'] else 'too little'}"
    )
    lines.append(f"         total   {display.size(found['total_bytes'])} (free: {fits})")
    return lines
