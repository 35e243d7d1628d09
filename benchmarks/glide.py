"""GliDe's claims and choices: drafters trained side by side, and what each of them is accepted.

    python benchmarks/glide.py train --data FILE ... --heldout FILE --arms-dir runs/glide
    python benchmarks/glide.py measure --prompts runs/data --arms-dir runs/glide \\
        --out benchmarks/results/glide.json
    python benchmarks/glide.py widen --prompts runs/data --out benchmarks/results/glide.json
    python benchmarks/glide.py table --out benchmarks/results/glide.json

All arms see the same windows in the same order, and one forward pass of the frozen target serves them
all; an arm's seed is that of its initialisation and of its random delays. `measure` decodes held-out
prompts with each arm: sampling at temperature 1 under both rules, and greedily. Every round drafts five
tokens, as in the paper's acceptance tables (arXiv 2402.02082, section 5.1). `widen` does so for the model's
own drafters as chains and with every expansion, all expansions of the same number of nodes.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _common import machine, read_prompts
from tabulate import tabulate
from tqdm.auto import tqdm

import jax_specdec as sd
from jax_specdec.checkpoints.glide import make_glide, save_glide, target_fingerprint
from jax_specdec.drafters import registry
from jax_specdec.models.glide_config import GliDeConfig
from jax_specdec.specs import language as specs
from jax_specdec.specs.whole import expansions_of
from jax_specdec.training import data, glide, trainer
from jax_specdec.training.config import GliDeRecipe, TrainConfig
from jax_specdec.tuning.measure import acceptance_by_position

SETS = ("gsm8k", "mbpp", "stories", "spec_bench")
LENGTH = 5


@dataclasses.dataclass(frozen=True)
class Arm:
    """What differs from the drafter of the default recipe."""

    shape: dict[str, Any] = dataclasses.field(default_factory=dict)
    recipe: GliDeRecipe = dataclasses.field(default_factory=GliDeRecipe)
    seed: int = 0


@dataclasses.dataclass
class Run:
    """An arm in training."""

    model: Any
    key: jax.Array
    params: Any
    state: Any
    step: Any
    measure: Any


LAST = {"target_layers": (-1,)}
# Without cross-attention the MLP is widened until the number of parameters is the same.
VANILLA = {"cross_attention": False, "mlp_size": 875}
ARMS = {
    **{f"glide-{seed}": Arm(seed=seed) for seed in range(3)},
    **{f"vanilla-{seed}": Arm(VANILLA, seed=seed) for seed in range(3)},
    "vanilla, same MLP": Arm({"cross_attention": False}),
    "first target layer": Arm({"target_layers": (0,)}),
    "last target layer": Arm(LAST),
    "target layer 8": Arm({"target_layers": (8,)}),
    "block mask 5": Arm({"trained_delay": 5}, GliDeRecipe(visibility="block")),
    "block mask 16": Arm({}, GliDeRecipe(visibility="block")),
    "no mask": Arm({}, GliDeRecipe(visibility="none")),
    "no norm before cross-attention": Arm({"cross_norm": False}),
    "hidden state": Arm({"hidden_input": True}),
    "two layers": Arm({"num_layers": 2}),
    "two layers, the last two": Arm({"num_layers": 2, "target_layers": (-2, -1)}),
    **{
        f"last target layer, {loss.replace('_', ' ')}": Arm(LAST, GliDeRecipe(loss=loss))
        for loss in ("cross_entropy", "reverse_kl", "jensen_shannon", "total_variation")
    },
}


def train(args: argparse.Namespace) -> None:
    target = sd.load_target(args.model, dtype="float32")
    fingerprint = target_fingerprint(target.path)
    config = TrainConfig(
        steps=args.steps,
        batch_size=8,
        sequence_length=256,
        learning_rate=3e-3,
        optimizer="muon",
        warmup_steps=30,
        final_fraction=0.02,
    )
    documents = data.read_documents(args.data, target.tokenizer)
    heldout = data.read_documents([args.heldout], target.tokenizer)
    batches = data.training_batches(
        documents, config.sequence_length, config.batch_size, config.steps, config.seed
    )
    windows = data.heldout_windows(heldout, config.sequence_length)[: args.heldout_windows]
    optimizer = trainer.make_optimizer(config)
    shape = {
        name: getattr(target.config, name)
        for name in ("hidden_size", "mlp_size", "num_heads", "num_kv_heads", "head_dim")
    }
    steps: dict[Any, Any] = {}  # arms that differ by their seed share a program
    runs: dict[str, Run] = {}
    for name in args.arms:
        arm = ARMS[name]
        model = make_glide(GliDeConfig(**{**shape, **arm.shape}), target.config, "float32")
        key = jax.random.key(arm.seed)
        params = model.init(key)
        pair = glide.Pair(model, target.decoder, arm.recipe)
        if pair not in steps:
            steps[pair] = _programs(pair, optimizer)
        runs[name] = Run(model, key, params, optimizer.init(params), *steps[pair])
        print(f"{name}: {model.parameter_count():,} parameters of its own", file=sys.stderr)
    read = jax.jit(pair.read)  # the target's part is the same for all
    for index in tqdm(range(config.steps), unit="step"):
        batch = jnp.asarray(np.asarray(batches[index]))
        seen = read(target.params, batch)
        for run in runs.values():
            folded = jax.random.fold_in(run.key, index)
            run.params, run.state = run.step(
                run.params, run.state, target.params, seen, batch, folded
            )
    records: dict[str, Any] = {}
    for name, run in runs.items():
        found: list[Any] = []
        for i in range(0, len(windows) // 8 * 8, 8):
            tokens = jnp.asarray(windows[i : i + 8])
            seen = read(target.params, tokens)
            found.append(jax.device_get(run.measure(run.params, target.params, seen, tokens)))
        means = {k: np.mean([part[k] for part in found], axis=0).tolist() for k in found[0]}
        folder = Path(args.arms_dir) / name
        save_glide(folder, run.model, run.params, fingerprint)
        records[name] = {
            "parameters": run.model.parameter_count(),
            "training_tokens": config.steps * config.batch_size * config.sequence_length,
            **means,
        }
        (folder / "heldout.json").write_text(json.dumps(records[name], indent=1) + "\n")
        first, fifth = (records[name]["acceptance"][i] for i in (0, 4))
        print(f"{name:32}{first:8.3f}{fifth:8.3f}")


def _programs(pair: glide.Pair, optimizer: Any) -> tuple[Any, Any]:
    """`step(params, state, frozen, seen, batch, key)` and `measure(params, frozen, seen, batch)`."""

    def step(params, state, frozen, seen, batch, key):
        grads = jax.grad(pair.loss)(params, frozen, seen, batch, key)
        updates, state = optimizer.update(grads, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    return jax.jit(step, donate_argnums=(0, 1)), jax.jit(pair.agreement)


def _alpha(accepted: list[float]) -> float:
    """Chance that a drafted token is accepted when it is judged, from A_1, A_2, ..."""
    return sum(accepted) / sum([1.0, *accepted[:-1]])


SETTINGS = {
    "reject, T=1": ("reject", 1.0),
    "match, T=1": ("match", 1.0),
    "greedy": ("match", 0.0),
}


class Judge:
    """Held-out prompts, what they are decoded with, and the record that grows with every arm."""

    def __init__(self, args: argparse.Namespace, part: str):
        self.args, self.out = args, Path(args.out)
        self.target = sd.load_target(args.model, dtype="float32")
        encode = sd.SpeculativeDecoder(self.target).encode
        self.prompts = {
            name: [
                encode(record["prompt"])[-args.keep_last :]
                for record in read_prompts(args.prompts, (name,), args.per_set)
            ]
            for name in SETS
        }
        known = json.loads(self.out.read_text()) if self.out.is_file() else {}
        self.record = known | {
            "machine": machine(),
            "prompts_per_set": args.per_set,
            "new_tokens": args.max_new_tokens,
        }
        self.rows: dict[str, Any] = self.record.setdefault(part, {})
        print(
            f"{'chance that a judged token is accepted, and tau':48}"
            + "".join(f"{s:>15}" for s in SETTINGS)
        )

    def add(self, name: str, drafter: Any, row: dict[str, Any]) -> None:
        """Decodes every set in every setting, prints a line and writes the record."""
        for setting, (rule, temperature) in SETTINGS.items():
            decoder = sd.SpeculativeDecoder(self.target, drafter, rule=rule, budget=False)
            by_set = {}
            for subset, ids in self.prompts.items():
                answers = list(
                    decoder.generate(
                        ids,
                        max_new_tokens=self.args.max_new_tokens,
                        temperature=temperature,
                        seed=11,
                        batch_size=len(ids),
                    )
                )
                accepted = acceptance_by_position(answers)
                by_set[subset] = {"accepted_per_pos": accepted, "alpha": _alpha(accepted)}
                by_set[subset]["tau"] = 1 + sum(accepted)
            row[setting] = by_set
        self.rows[name] = row
        means = [
            [np.mean([v[what] for v in row[s].values()]) for what in ("alpha", "tau")]
            for s in SETTINGS
        ]
        print(f"{name:48}" + "".join(f"{a:8.3f}{t:7.2f}" for a, t in means), flush=True)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")


def measure(args: argparse.Namespace) -> None:
    judge = Judge(args, "arms")
    folders = {"lm": None}
    found = sorted(path.parent for path in Path(args.arms_dir).glob("*/config.json"))
    folders |= {path.name: path for path in found}
    for name, folder in folders.items():
        if args.arms and name not in args.arms:
            continue
        row: dict[str, Any] = {}
        if folder is not None and (folder / "heldout.json").is_file():
            row["heldout"] = json.loads((folder / "heldout.json").read_text())
        length = LENGTH
        if folder is not None:
            config = json.loads((folder / "config.json").read_text())
            if config["cross_attention"]:
                length = min(length, config["trained_delay"])
        spec = f"{'lm' if folder is None else 'glide'}:{length}"
        drafter = sd.load_drafter(spec, judge.target, drafts={"glide": folder} if folder else None)
        row["length"] = length
        judge.add(name, drafter, row)


def widen(args: argparse.Namespace) -> None:
    """Decodes with chains and their expansions; prints what CaPE wins beside the most that it could."""
    judge = Judge(args, "expansions")
    for name in specs.split(args.drafters):
        chain = f"{name}:{LENGTH}"
        for spec in (
            chain,
            *(f"{chain}+{rule}:{args.nodes}" for rule in expansions_of(registry.of("glide"))),
        ):
            judge.add(spec, sd.load_drafter(spec, judge.target), {})
        # A sibling that nothing follows wins one token where the chain ends early, and never more.
        for setting in SETTINGS:
            most = gain = 0.0
            for subset, plain in judge.rows[chain][setting].items():
                wide = judge.rows[f"{chain}+cape:{args.nodes}"][setting][subset]
                most += (1 - plain["accepted_per_pos"][-1]) / len(SETS)
                gain += (wide["tau"] - plain["tau"]) / len(SETS)
            print(f"{name}, {setting}: cape wins {gain:.2f} of at most {most:.2f} tokens a round")


def table(args: argparse.Namespace) -> None:
    """Prints a record as the tables of docs/results.md."""
    record = json.loads(Path(args.out).read_text())
    head = [f"{s}: {what}" for s in SETTINGS for what in ("alpha", "tau")]
    # Arms that were not decoded have held-out figures alone.
    only = {name: {"heldout": row} for name, row in record.get("heldout", {}).items()}
    for part, known in (("arms", only), ("expansions", {})):
        rows = []
        for name, row in (known | record.get(part, {})).items():
            held = row.get("heldout", {}).get("acceptance")
            means = [
                float(np.mean([found[what] for found in row[setting].values()]))
                for setting in SETTINGS
                if setting in row
                for what in ("alpha", "tau")
            ]
            rows.append([name, *([held[i] if held else None for i in (0, 4, 15)]), *means])
        print(tabulate(rows, [part, "held out, 1", "5", "16", *head], "github", ".3f"), "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="checkpoints/demo/target")
    kinds = parser.add_subparsers(required=True)
    training = kinds.add_parser("train")
    training.add_argument("--data", action="append", required=True)
    training.add_argument("--heldout", required=True)
    training.add_argument("--heldout-windows", type=int, default=128)
    training.add_argument("--steps", type=int, default=512, help="of 2,048 tokens")
    training.set_defaults(run=train)
    measuring = kinds.add_parser("measure")
    measuring.set_defaults(run=measure)
    widening = kinds.add_parser("widen")
    widening.add_argument("--drafters", default="glide,lm")
    widening.add_argument("--nodes", type=int, default=16, help="of a verification")
    widening.set_defaults(run=widen)
    for sub, default in ((training, list(ARMS)), (measuring, [])):
        sub.add_argument("--arms-dir", required=True)
        sub.add_argument("--arms", type=lambda s: s.split(";"), default=default, help="a;b;...")
    printing = kinds.add_parser("table")
    printing.add_argument("--out", required=True, help="the record to print")
    printing.set_defaults(run=table)
    for sub in (measuring, widening):
        sub.add_argument("--prompts", required=True, help="folder written by prepare.py")
        sub.add_argument("--per-set", type=int, default=16)
        sub.add_argument("--keep-last", type=int, default=256, help="prompt tokens kept")
        sub.add_argument("--max-new-tokens", type=int, default=64)
        sub.add_argument("--out", required=True)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
