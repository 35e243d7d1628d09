"""How often drafted tokens are right of which their drafter says how likely that is, and what knowing it is worth.

    python benchmarks/chances.py --model runs/smollm2/target --data DATA --drafters "glide:4,max-gram:15" --out FILE.json

Prompts are those of `never_slower.py`. Each drafter drafts at every token of the target's greedy answers. The first table has, by
what the drafter says of a token (a model's confidence, a copy's figure for the length of its match), how many such tokens there
were behind right ones and which share was right. The second plays the budget's own policy over these drafts with the costs of
rounds that are measured here, with what drafters say and without: then what was accepted of them so far decides alone.
"""

import argparse
import itertools
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from _common import machine, write_json
from never_slower import questions

import jax_specdec as sd
from jax_specdec.specs import language as specs
from jax_specdec.text.chat import chat_ids
from jax_specdec.tuning.budgeted import budgeted_speedup
from jax_specdec.tuning.replay import Record, acceptance, read_whole, record
from jax_specdec.tuning.round_costs import kept_file, owner_of, read_table

EDGES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97, 1.0)
TOGETHER = 16  # texts that are drafted along at once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--drafters", default="glide:4,max-gram:15")
    parser.add_argument("--draft", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--per-category", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--longest", type=int, default=350, help="prompt tokens kept, the last")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--out", required=True)
    args = parser.parse_args()

    target = sd.load_target(args.model, dtype=args.dtype)
    drafts = dict(item.split("=", 1) for item in args.draft)
    asked = questions(args.data, args.per_category)
    prompts = [
        chat_ids(target.tokenizer, [{"role": "user", "content": text}])[-args.longest :]
        for some in asked.values()
        for text in some
    ]
    options: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "ignore_eos": True}
    answers = sd.SpeculativeDecoder(target).generate(prompts, batch_size=8, **options)
    texts = [ids + answer.token_ids for ids, answer in zip(prompts, answers, strict=True)]
    starts = [len(ids) for ids in prompts]
    found = {"machine": machine(), "model": args.model, "dtype": args.dtype, "answers": len(texts)}
    found |= {"max_new_tokens": args.max_new_tokens, "edges": EDGES, "drafters": {}}
    for spec in specs.split(args.drafters):
        loaded = sd.load_drafter(spec, target, drafts=drafts or None)
        chains = along(target, loaded, texts, starts)
        decoder = sd.SpeculativeDecoder(target, loaded)
        list(decoder.generate(prompts[:1], **options))  # which measures what its rounds cost
        file = kept_file(owner_of(target, decoder.loop, loaded, 1))
        assert file is not None, "costs are kept in the user's cache"
        table = read_table(file)
        costs = sd.RoundCosts(
            jnp.asarray(table["verify_s"], jnp.float32), jnp.asarray(table["draft_s"], jnp.float32)
        )
        told, untold = (
            played(chains, costs, decoder.loop.widths, kind)
            for kind in (decoder.loop.told, (None,))
        )
        found["drafters"][spec] = {
            "accepted": acceptance(chains, loaded.drafter.info.depth),
            "by_chance": by_chance(chains, np.asarray([len(text) for text in texts])),
            "played": {"told": told, "untold": untold},
            "widths": decoder.loop.widths,
            "costs": {"verify_s": table["verify_s"], "draft_s": table["draft_s"]},
        }
        print(f"{spec}: played {told:.2f} times plain, {untold:.2f} without what it says")
        for line in found["drafters"][spec]["by_chance"]:
            print(
                f"  said {line['from']:.2f} to {line['to']:.2f}: {line['tokens']:5d} tokens, {line['right']:.2f} right"
            )
    write_json(args.out, found)


def along(target: sd.Target, loaded: Any, texts: list, starts: list) -> Record:
    """Drafts at every token of the answers."""
    parts, info = [], loaded.drafter.info
    for at in range(0, len(texts), TOGETHER):
        some = slice(at, at + TOGETHER)
        view = read_whole(target, info.taps, texts[some], info.depth + 1)
        part = record(target, loaded, texts[some], starts[some], everywhere=True, view=view)
        parts.append(part._replace(row=part.row + at))
    return Record(*(np.concatenate(values) for values in zip(*parts, strict=True)))


def by_chance(drafts: Record, ends: np.ndarray) -> list[dict[str, float]]:
    """Tokens behind right ones, by what was said of them; `ends` are the texts' lengths."""
    place = np.arange(drafts.chance.shape[1])
    reached = (drafts.matched[:, None] >= place) & (place < drafts.proposed[:, None])
    reached &= drafts.length[:, None] + place < ends[drafts.row][:, None]
    right, said = (drafts.matched[:, None] > place)[reached], drafts.chance[reached]
    lines = []
    for low, high in itertools.pairwise(EDGES):
        here = (said >= low) & ((said < high) | (high == EDGES[-1]))
        if here.any():
            tokens, share = int(here.sum()), float(right[here].mean())
            lines.append({"from": low, "to": high, "tokens": tokens, "right": share})
    return lines


def played(drafts: Record, costs: sd.RoundCosts, widths: tuple[int, ...], told: Any) -> float:
    """The mean speed over plain decoding, without the prefill, of the texts one by one."""
    speeds = []
    for row in np.unique(drafts.row):
        mine = Record(*(values[drafts.row == row] for values in drafts))
        speeds.append(budgeted_speedup([mine], costs, widths, told=told))
    return float(np.mean(speeds))


if __name__ == "__main__":
    main()
