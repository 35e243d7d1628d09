"""How a budget follows a text: a drafter that knows nothing, and a text that turns from prose into a copied table.

    python benchmarks/turning_text.py --out benchmarks/results/turning_text.json --plot docs/turning_text.png

The first part times a draft model of random weights, and Max-Gram on text drawn at a high temperature, against plain decoding
over 2,000 tokens; the arms take turns. In the second part a logits processor dictates the text, so that its turns are where
they were put: prose of the target, a table that has stood in the prompt, prose again. Each round's tokens are plotted.
"""

import argparse
import dataclasses
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _common import machine, spread, write_json

import jax_specdec as sd
from jax_specdec.core.processors import History
from jax_specdec.drafters.lm import LmDrafter
from jax_specdec.models.decoder import Decoder
from jax_specdec.specs.build import LoadedDrafter

PROMPT = "Once upon a time, there was a girl who kept a book with numbers."
ROWS = [
    "apple 12 red",
    "pear 7 green",
    "plum 31 blue",
    "fig 5 brown",
    "lime 18 green",
    "date 9 dark",
]
TABLE = "".join(f"\n| {row.replace(' ', ' | ')} |" for row in ROWS)


@dataclasses.dataclass(frozen=True)
class Dictated:
    """A processor that leaves one token at each place of the answer."""

    tokens: tuple[int, ...]

    def __call__(self, logits: Any, history: History) -> Any:
        place = (history.length - history.prompt_length)[:, None] + history.depth()
        wanted = jnp.asarray(self.tokens)[jnp.minimum(place, len(self.tokens) - 1)]
        return jnp.where(jnp.arange(logits.shape[-1]) == wanted[..., None], logits + 1e4, logits)


def useless(target: sd.Target, repeats: int) -> dict[str, Any]:
    """2,000 tokens, in four answers where the context holds no longer one, timed; plain decoding over each of the drafters."""
    shape = dataclasses.replace(
        target.config, num_layers=2, hidden_size=128, mlp_size=256, num_heads=2, num_kv_heads=2,
        head_dim=64, windows=(),
    )  # fmt: skip
    model = Decoder(shape, target.decoder.dtype)
    random = LoadedDrafter(LmDrafter(model, 4), {"lm": model.init(jax.random.key(0))}, "lm:4")
    arms = {
        "plain": sd.SpeculativeDecoder(target),
        "draft model of random weights": sd.SpeculativeDecoder(target, random),
        "max-gram:6": sd.SpeculativeDecoder(target, sd.load_drafter("max-gram:6", target)),
    }
    length = 2000 if target.config.context > 2100 else 500
    options = {"max_new_tokens": length, "ignore_eos": True, "temperature": 1.5, "seed": 3}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    texts, rounds = {}, {}
    for repeat in range(-1, repeats):
        for name in list(arms)[:: -1 if repeat % 2 else 1]:
            answers = list(
                arms[name].generate([PROMPT] * (2000 // length), batch_size=1, **options)
            )
            texts[name] = [a.token_ids for a in answers]
            rounds[name] = sum(a.stats.num_spec_steps for a in answers)
            if repeat >= 0:
                seconds[name].append(sum(a.stats.wall_time_s for a in answers))
    return {
        name: {
            "seconds": spread(seconds[name]),
            "over_plain": statistics.median(seconds[name]) / statistics.median(seconds["plain"]),
            "tokens_per_round": 2000 / rounds[name],
            "same_text": texts[name] == texts["plain"],
        }
        for name in arms
    }


def turning(target: sd.Target) -> dict[str, Any]:
    """The tokens of each round, with a budget and without."""
    plain = sd.SpeculativeDecoder(target)
    prose = plain(PROMPT, max_new_tokens=400, ignore_eos=True, temperature=1.2, seed=1).token_ids
    table = target.tokenizer(TABLE, add_special_tokens=False)["input_ids"]
    parts = [prose[:150], table * 2, prose[150:300]]
    dictated = Dictated(tuple(token for part in parts for token in part))
    turns = np.cumsum([len(part) for part in parts]).tolist()
    prompt = [*plain.encode(PROMPT), *table]
    found: dict[str, Any] = {"turns_at_token": turns[:-1]}
    for name, budget in (("budget", True), ("no budget", False)):
        decoder = sd.SpeculativeDecoder(
            target, sd.load_drafter("max-gram:6", target), processors=(dictated,), budget=budget
        )
        steps: list[int] = []
        (answer,) = decoder.generate(
            [prompt],
            max_new_tokens=turns[-1],
            ignore_eos=True,
            rounds_per_chunk=1,
            on_chunk=lambda chunk, steps=steps: steps.append(len(chunk.token_ids)),
        )
        assert answer.token_ids == list(dictated.tokens)
        places = np.cumsum([0, *steps])
        begins = [int(np.searchsorted(places, turn)) for turn in turns[:-1]]
        inside = [i for i in range(begins[0], begins[1]) if steps[i] > 1]
        found[name] = {
            "tokens_by_round": steps,
            "turns_at_round": begins,
            "rounds_until_followed": (inside[0] - begins[0]) if inside else None,
            "steps_per_width": answer.stats.steps_per_width,
            "steps_per_depth": answer.stats.steps_per_depth,
        }
    return found


def plot(found: dict[str, Any], path: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 1, figsize=(8, 4), sharey=True, constrained_layout=True)
    for ax, name in zip(axes, ("budget", "no budget"), strict=True):
        steps, turns = found[name]["tokens_by_round"], found[name]["turns_at_round"]
        ax.bar(range(len(steps)), steps, width=1.0)
        for turn, what, side in zip(turns, ("table", "prose"), ("right", "left"), strict=True):
            ax.axvline(turn, color="black", linewidth=0.8)
            ax.text(turn, 6.6, f" {what} ", va="top", ha=side)
        ax.set(ylabel="tokens", title=f"max-gram:6, {name}", ylim=(0, 7.2))
    axes[-1].set_xlabel("round")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="checkpoints/demo/target")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", required=True)
    parser.add_argument("--plot")
    args = parser.parse_args()
    target = sd.load_target(args.model, dtype="float32")
    found = turning(target)
    if args.plot:
        plot(found, args.plot)
    record = {"machine": machine(), "model": args.model, "turning": found}
    record["useless"] = useless(target, args.repeats)
    write_json(args.out, record)
    print({name: round(row["over_plain"], 3) for name, row in record["useless"].items()})
    print({name: found[name]["rounds_until_followed"] for name in ("budget", "no budget")})


if __name__ == "__main__":
    main()
