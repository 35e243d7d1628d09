"""`info`: what a model is and what decoding with it takes, from its files' headers alone."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from jax_specdec.cli import common
from jax_specdec.errors import UserError


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "info",
        help="sizes and memory, before anything is loaded",
        description="Shows the sizes of a model and what decoding with it takes in memory. Reads "
        "config.json and the headers of the weights, and loads nothing.",
    )
    common.add_model(parser)
    common.add_drafter(parser)
    parser.add_argument("--batch-size", type=int, default=1, metavar="N")
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="tokens of a row (default: all that the model takes)",
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="of them new (default: 128)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    for name in ("batch_size", "max_new_tokens", "context"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")
    found = describe(args)
    if args.json:
        common.print_json(found)
    else:
        print("\n".join(_lines(found)))
    return 0


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """Everything `info` knows, as a JSON object."""
    from jax_specdec.checkpoints.memory import available_memory, memory_plan
    from jax_specdec.checkpoints.targets import default_dtype, find_checkpoint, inspect_checkpoint
    from jax_specdec.checkpoints.tokenizer_files import has_tokenizer
    from jax_specdec.specs.build import complete, parse_drafter
    from jax_specdec.specs.sizes import depth_of

    folders = common.draft_folders(args.draft)
    folder = find_checkpoint(common.model_source(args))
    config, stored = inspect_checkpoint(folder)
    parsed = parse_drafter(common.choose_drafter(args, folder, folders))
    spec = complete(parsed, folder.parent, folders)
    name = str(spec._replace(rule=None, nodes=None)) if spec.inner else spec.name
    length = depth_of(spec)
    width = spec.nodes or length + 1
    context = args.context or config.context
    if context > config.context:
        raise UserError(f"The model's context is {config.context} tokens, fewer than {context}.")
    if args.max_new_tokens >= context:
        raise UserError(
            f"{args.max_new_tokens} new tokens leave no room for a prompt in a context of {context}."
        )
    dtype = args.dtype or default_dtype(folder)
    slots = context + width
    plan = memory_plan(config, dtype, args.batch_size, slots, width=width)
    total = plan.total
    drafter: dict[str, Any] = {"name": name, "length": length}
    if spec.rule is not None:
        drafter |= {"expansion": spec.rule, "nodes": spec.nodes}

    def part(name: str) -> dict[str, Any]:
        """What is known of one drafter, its memory among it unless it takes none."""
        where = folders.get(name, folder.parent / name)
        return _part(name, where, config, dtype, args.batch_size, slots)

    if spec.inner:
        drafter["parts"] = {name: part(name) for name in spec.names}
        sizes = [found["memory"]["total"] for found in drafter["parts"].values() if found]
        drafter["memory"] = {"total": sum(sizes)}
    else:
        drafter |= part(name)
    if "memory" in drafter:
        total += drafter["memory"]["total"]
    available = available_memory()
    return {
        "model": str(folder),
        **_sizes(config),
        "stored_dtype": stored,
        "tokenizer": has_tokenizer(folder),
        "dtype": dtype,
        "batch_size": args.batch_size,
        "context_used": context,
        "longest_prompt": context - args.max_new_tokens,
        "memory": {**dataclasses.asdict(plan), "total": plan.total},
        "drafter": drafter,
        "total_bytes": total,
        "available_bytes": available,
        "fits": None if available is None else total <= available,
    }


def _sizes(config: Any) -> dict[str, Any]:
    return {
        "family": config.family,
        "num_parameters": config.parameter_count(),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "mlp_size": config.mlp_size,
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "context": config.context,
        "tied_head": config.tied_head,
    }


def _part(
    name: str, folder: Path, target: Any, dtype: Any, batch_size: int, slots: int
) -> dict[str, Any]:
    """What one drafter takes; a GliDe drafter uses its target's cache, and maybe embedding and head."""
    import jax.numpy as jnp

    from jax_specdec.checkpoints.glide import make_glide, read_glide_config
    from jax_specdec.checkpoints.memory import memory_plan
    from jax_specdec.checkpoints.targets import inspect_checkpoint
    from jax_specdec.specs.language import WITH_CHECKPOINT, kind_of

    kind = kind_of(name)
    if kind not in WITH_CHECKPOINT:
        return {}
    if kind == "bigram":
        size = 4 * target.vocab_size
        return {"memory": {"parameters": size, "total": size}}
    if not folder.is_dir():
        raise UserError(
            f"The drafter {name!r} has no checkpoint at {folder}: say where it is with --draft {name}=DIR."
        )
    if kind == "lm":
        small, stored = inspect_checkpoint(folder)
        plan = memory_plan(small, dtype, batch_size, slots)
        memory = {**dataclasses.asdict(plan), "total": plan.total}
        return {"path": str(folder), **_sizes(small), "stored_dtype": stored, "memory": memory}
    if kind == "medusa":
        return _medusa(folder, target, dtype, batch_size, slots)
    model = make_glide(read_glide_config(folder)[0], target, dtype)
    count = model.parameter_count()
    cache = memory_plan(model.decoder.config, dtype, batch_size, slots).cache
    parameters = count * jnp.dtype(dtype).itemsize
    memory = {"parameters": parameters, "cache": cache, "total": parameters + cache}
    return {"path": str(folder), "own_parameters": count, "memory": memory}


def _medusa(folder: Path, target: Any, dtype: Any, batch_size: int, slots: int) -> dict[str, Any]:
    """What Medusa heads take beside their target, whose hidden states are kept for them."""
    import jax.numpy as jnp

    from jax_specdec.checkpoints.medusa import read_medusa_config
    from jax_specdec.models.medusa import Medusa

    config, accuracies, _ = read_medusa_config(folder)
    count, size = Medusa(config, target, dtype).parameter_count(), jnp.dtype(dtype).itemsize
    hidden = batch_size * slots * target.hidden_size * size
    memory = {"parameters": count * size, "cache": hidden, "total": count * size + hidden}
    return {
        "path": str(folder),
        "num_heads": config.num_heads,
        "own_parameters": count,
        "accuracies": accuracies,
        "memory": memory,
    }


def _shape(found: dict[str, Any]) -> str:
    return (
        f"{found['num_parameters']:,} parameters ({found['family']}, stored as {found['stored_dtype']}): "
        f"{found['num_layers']} layers of {found['hidden_size']}, MLP {found['mlp_size']}, "
        f"{found['num_heads']} heads on {found['num_kv_heads']} key heads of {found['head_dim']}, "
        f"vocabulary {found['vocab_size']}, context {found['context']}"
    )


def _memory(plan: dict[str, int]) -> str:
    parts = [f"{name} {common.gib(size)}" for name, size in plan.items() if name != "total"]
    return f"{common.gib(plan['total'])} ({', '.join(parts)})"


def _lines(found: dict[str, Any]) -> list[str]:
    drafter = found["drafter"]
    lines = [f"model    {found['model']}", f"         {_shape(found)}"]
    if not found["tokenizer"]:
        lines.append("         no tokenizer")
    if "num_parameters" in drafter:
        lines += [f"drafter  {drafter['path']}", f"         {_shape(drafter)}"]
    lines.append(
        f"decoding {found['batch_size']} rows of {found['context_used']} tokens (prompts of up to "
        f"{found['longest_prompt']}) in {found['dtype']}, drafter {drafter['name']}, "
        f"up to {drafter['length']} tokens a draft"
    )
    lines.append(f"         model   {_memory(found['memory'])}")
    if "memory" in drafter:
        parts = drafter.get("parts") or {"drafter": drafter}
        shown = {name: part["memory"] for name, part in parts.items() if part}
        lines += [f"         {name:7} {_memory(memory)}" for name, memory in shown.items()]
    free = found["available_bytes"]
    fits = (
        "unknown"
        if free is None
        else f"{common.gib(free)}, {'fits' if found['fits'] else 'too little'}"
    )
    lines.append(f"         total   {common.gib(found['total_bytes'])} (free: {fits})")
    return lines
