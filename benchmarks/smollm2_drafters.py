"""Drafters of several forms, trained side by side on one reading of the target; writes what `checkpoints/smollm2` holds.

    python benchmarks/smollm2_drafters.py --target runs/smollm2/target --data WRITTEN.jsonl --readings DIR --out OUT \\
        --steps 3000 --arm glide:mlp_size=1024:target_layers=15:hidden_input=1:trained_delay=5 \\
        --arm vanilla:mlp_size=1024:cross_attention=0:trained_delay=5 --arm medusa:num_heads=4

The target, which costs most, reads each text once: its keys and values at some layers, its last hidden states and the
normalisers of its distributions are kept in DIR, some 2 KB a token. After that a step costs what the drafters cost.
The draft vocabulary is that of the data, and the loss the cross-entropy to the target's distribution on it, prompts
counting less than answers. Agreement is measured in the answers of held-out documents: every
twentieth document, by a hash of its prompt, is held out. A run goes on where it was interrupted.

An arm's `visibility` says what its tokens see of the target in training: what they see in a draft, or the keys before a
random `shift`, or, with `root`, one key more than there is when a draft begins, the root's own, which shows what that would be
worth; such a drafter cannot decode.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from _common import lines, machine, write_json
from tqdm import tqdm

import jax_specdec as sd
from jax_specdec.checkpoints.draft_vocabulary import most_frequent, write_draft_vocabulary
from jax_specdec.checkpoints.glide import load_own_params, save_glide, target_fingerprint
from jax_specdec.checkpoints.medusa import save_medusa
from jax_specdec.core.context import last_seen
from jax_specdec.core.draft import TOP
from jax_specdec.models.glide import GliDe, glimpse_text
from jax_specdec.models.glide_config import GliDeConfig
from jax_specdec.models.layers import rms_norm
from jax_specdec.models.medusa import Medusa, MedusaConfig
from jax_specdec.training.config import TrainConfig
from jax_specdec.training.glide import twice
from jax_specdec.training.glide_mask import drafts, random_drafts, visible_keys
from jax_specdec.training.reading import positions
from jax_specdec.training.trainer import make_optimizer

LENGTHS = (128, 192, 256, 320)  # tokens of a row; longer documents are cut
READ_AT_ONCE = 8
PROMPT_WEIGHT = 0.3
OWN = ("arms", "seed", "init", "steps")  # by which a run is known in a record
ANSWER = "<|im_end|>\n<|im_start|>assistant\n"  # what stands before it in SmolLM2's template


def documents(data: list[Path], texts: list[Path]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Token ids of the training and the held-out records; of `texts` none is held out."""
    parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for path in (*data, *texts):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            prompt = record["text"].split(ANSWER, 1)[0]
            held = int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % 20 == 0
            held = held and path not in texts
            parts[held].append(np.asarray(record["token_ids"][: LENGTHS[-1] + 1], np.int32))
    return parts


def by_length(texts: list[np.ndarray]) -> dict[int, list[np.ndarray]]:
    found: dict[int, list[np.ndarray]] = {size: [] for size in LENGTHS}
    for ids in texts:
        if len(ids) > 8:
            found[next(size for size in LENGTHS if len(ids) - 1 <= size)].append(ids)
    return found


class Readings:
    """What the target made of some texts: arrays by row length, each with the rows in front.

    Attributes:
      x: `int32[R, T + 1]`. n: tokens of each, the last left out. s: the place from which the answer's first
        token is predicted. k, v: `float16[R, L, T, K, D]` of the layers.
      h: hidden states, `bfloat16[R, T, E]` as bits. z: the normalisers, `float32[R, T]`. a: the best tokens.
    """

    def __init__(self, target: sd.Target, layers: tuple[int, ...], folder: Path):
        self.target, self.layers, self.folder = target, layers, folder
        self.before = target.tokenizer.encode(ANSWER)
        folder.mkdir(parents=True, exist_ok=True)
        self._read = jax.jit(self._reading)

    def _reading(self, params: Any, tokens: Any) -> Any:
        out = self.target.decoder.apply(params, tokens, positions(tokens))
        keys, values = out.new
        some = [
            jnp.stack([x[i] for i in self.layers], 1).astype(jnp.float16) for x in (keys, values)
        ]
        z = jax.nn.logsumexp(out.logits, axis=-1)
        return *some, out.hidden.astype(jnp.bfloat16), z, out.logits.argmax(-1).astype(jnp.int32)

    def of(self, texts: list[np.ndarray]) -> dict[int, dict[str, np.ndarray]]:
        found = {}
        for size, some in by_length(texts).items():
            parts = [
                self._part(some[i : i + READ_AT_ONCE], size)
                for i in tqdm(
                    range(0, len(some), READ_AT_ONCE), f"read, {size} tokens", leave=False
                )
            ]
            if parts:
                whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
                found[size] = {name: x[whole["n"] > 0] for name, x in whole.items()}
                found[size]["s"] = np.array([begin(x, self.before) for x in found[size]["x"]])
        return found

    def _part(self, texts: list[np.ndarray], size: int) -> dict[str, np.ndarray]:
        digest = hashlib.sha256(b"".join(ids.tobytes() for ids in texts)).hexdigest()[:16]
        layers = ".".join(map(str, self.layers))
        path = self.folder / f"{size}-{layers}-{digest}.npz"
        if not path.is_file():
            x = np.zeros((READ_AT_ONCE, size + 1), np.int32)
            n = np.zeros(READ_AT_ONCE, np.int32)
            for row, ids in enumerate(texts):
                x[row, : len(ids)], n[row] = ids, len(ids) - 1
            k, v, h, z, a = jax.device_get(self._read(self.target.params, x[:, :-1]))
            new = path.with_suffix(".new.npz")
            np.savez(new, x=x, n=n, k=k, v=v, h=h.view(np.uint16), z=z, a=a)
            os.replace(new, path)
        with np.load(path) as file:
            return {name: file[name] for name in file.files}


def begin(ids: np.ndarray, before: list[int]) -> int:
    """The last token of the last `before` in `ids`, 0 where there is none."""
    count = len(before)
    at = np.flatnonzero((np.lib.stride_tricks.sliding_window_view(ids, count) == before).all(-1))
    return int(at[-1]) + count - 1 if len(at) else 0


class Arm:
    """A drafter in training: its model, its loss, and how well it agrees with the target.

    Computation is in `dtype`, parameters are float32; sums, distributions and losses are float32.
    """

    def __init__(self, target: sd.Target, ids: np.ndarray, dtype: Any):
        self.config, self.dtype = target.config, dtype
        embed = np.asarray(target.params["embed"], np.float32)
        place = jnp.full(target.vocab_size, len(ids)).at[ids].set(np.arange(len(ids)))
        self.frozen = {
            "embed": jnp.asarray(embed, dtype),
            "norm": jnp.asarray(target.params["norm"], jnp.float32),
            "head": jnp.asarray(embed[ids].T, dtype),
            "place": place,
        }

    def score(self, frozen: Any, x: Any) -> Any:
        """Normed states `[..., E]` -> `float32[..., S]` over the draft vocabulary."""
        return jnp.dot(x.astype(self.dtype), frozen["head"], preferred_element_type=jnp.float32)

    def log_p(self, frozen: Any, b: dict[str, Any]) -> Any:
        """The target's, of the whole vocabulary, at the tokens of the draft vocabulary."""
        y = rms_norm(hidden_of(b), frozen["norm"], self.config.norm_eps)
        return self.score(frozen, y) - b["z"][..., None]

    def cross_entropy(self, frozen: Any, b: dict[str, Any], states: list[Any], ahead: int) -> Any:
        """The mean over tokens and drafters of -sum p log q, the target's p read once for all.

        Args:
          states: of each drafter, before the head, `float32[B, T - ahead, E]`. ahead: what they predict is so many
            places behind the target's next token.
        """
        p = jnp.exp(self.log_p(frozen, b)[:, ahead:])
        keep, mass = weights_of(b)[:, ahead:], p.sum(-1)
        total: Any = 0.0
        for x in states:
            score = self.score(frozen, x)
            every = jax.nn.logsumexp(score, axis=-1) * mass - (p * score).sum(-1)
            total = total + (every * keep).sum()
        return total / (keep.sum() * len(states))


class GliDeArm(Arm):
    def __init__(
        self, target: sd.Target, ids: np.ndarray, dtype: Any, layers: tuple[int, ...], shape: Any
    ):
        super().__init__(target, ids, dtype)
        self.visibility = shape.pop("visibility", "draft")
        if self.visibility not in ("draft", "shift", "root") or shape.get("window"):
            raise SystemExit("An arm's visibility is draft, shift or root, and it has no window.")
        config = GliDeConfig.like(target.config, **shape)
        if config.trained_delay < 2:
            raise SystemExit("An arm is trained and measured at a delay of 2 at least.")
        self.model, self.layers = GliDe(config, target.config, dtype), layers

    def init(self, key: Any) -> Any:
        params = dataclasses.replace(self.model, dtype=jnp.float32).init(key)
        # The target's embedding makes large scores of random states: nearer to none, a hundred steps are saved.
        return {**params, "norm": 0.3 * params["norm"]}

    def states(
        self, params: Any, frozen: Any, b: dict[str, Any], visible: Any, ancestors: Any = None
    ) -> Any:
        """Before the head, `float32[B, T, E]`; or `float32[B, 2T, E]`, with the `visible` and `ancestors` of `Drafts`."""
        model, c, dtype = self.model, self.config, self.dtype
        visible = visible + (self.visibility == "root")
        glimpse = None
        if model.config.cross_attention:
            kv = tuple(
                {
                    layer: b[name][:, self.layers.index(layer)].astype(dtype)
                    for layer in model.config.layers_read(c)
                }
                for name in "kv"
            )
            glimpse = glimpse_text(
                (kv[0], kv[1]), visible, c.windows, scale=c.scale, soft_cap=c.attention_cap
            )
        x = b["x"][:, :-1]
        place = positions(x)
        if ancestors is not None:
            x, place = twice(x), twice(place)
        hidden = last_seen(hidden_of(b), visible) if model.config.hidden_input else None
        joined = {**jax.tree.map(lambda w: w.astype(dtype), params), "embed": frozen["embed"]}
        out = model.apply(
            joined,
            x,
            place,
            glimpse,
            ancestors=ancestors,
            hidden=hidden,
            visible=visible,
            logits=False,
        )
        return rms_norm(out.hidden.astype(jnp.float32), params["norm"], c.norm_eps)

    def loss(self, params: Any, frozen: Any, b: dict[str, Any], key: Any) -> Any:
        shape, delay = b["x"][:, :-1].shape, self.model.config.trained_delay
        if self.visibility != "shift" and self.model.config.sees_target:
            seen = random_drafts(shape, delay, key)
            y = self.states(params, frozen, b, seen.visible, seen.ancestors)
            return self.cross_entropy(frozen, b, jnp.split(y, 2, axis=1), 0)
        visible = visible_keys("shift", shape, delay, key)  # which no vanilla drafter looks at
        return self.cross_entropy(frozen, b, [self.states(params, frozen, b, visible)], 0)

    def agreement(self, params: Any, frozen: Any, b: dict[str, Any]) -> Any:
        """By delay: sums of min(p, q), of equal best tokens, and of places; see `training.glide.Pair.agreement`."""
        delay, keep = self.model.config.trained_delay, answers_of(b)
        seen = drafts(keep.shape, delay, jnp.ones((keep.shape[0], 1), jnp.int32))
        y = self.states(params, frozen, b, seen.visible, seen.ancestors)
        p = twice(self.log_p(frozen, b))
        q = jax.nn.log_softmax(self.score(frozen, y), axis=-1)
        accepted, match = agree(frozen, twice(b["a"]), p, q)
        count = twice(keep)[..., None] * (seen.delay[..., None] == jnp.arange(1, delay + 1))
        return *(jnp.einsum("bt,btd->d", x, count) for x in (accepted, match)), count.sum((0, 1))

    def load(self, folder: Path) -> Any:
        return load_own_params(folder, dataclasses.replace(self.model, dtype=jnp.float32))

    def save(self, folder: Path, params: Any, mark: str, measured: Any) -> None:
        if self.visibility != "root":  # which cannot decode
            save_glide(folder, self.model, params, mark)


class MedusaArm(Arm):
    DECAY = 0.8

    def __init__(self, target: sd.Target, ids: np.ndarray, dtype: Any, shape: Any):
        super().__init__(target, ids, dtype)
        self.model = Medusa(MedusaConfig(**shape), target.config, dtype)

    def init(self, key: Any) -> Any:
        model = dataclasses.replace(self.model, dtype=jnp.float32)
        return model.init({"embed": self.frozen["embed"]})

    def laws(self, params: Any, frozen: Any, b: dict[str, Any], index: int) -> Any:
        """Head k = index + 1: what it says `[B, T - k, S]`, what the target does, and the target's best tokens."""
        k = index + 1
        y = self.states(params, frozen, b, index)
        q = jax.nn.log_softmax(self.score(frozen, y), axis=-1)
        return q, self.log_p(frozen, b)[:, k:], b["a"][:, k:]

    def states(self, params: Any, frozen: Any, b: dict[str, Any], index: int) -> Any:
        """Before the head, `[B, T - k, E]`."""
        joined = {**jax.tree.map(lambda w: w.astype(self.dtype), params), "norm": frozen["norm"]}
        return self.model.states(joined, hidden_of(b)[:, : -index - 1], index)

    def loss(self, params: Any, frozen: Any, b: dict[str, Any], key: Any) -> Any:
        total: Any = 0.0
        for index in range(self.model.config.num_heads):
            y = self.states(params, frozen, b, index).astype(jnp.float32)
            total = total + self.DECAY**index * self.cross_entropy(frozen, b, [y], index + 1)
        return total / self.model.config.num_heads

    def agreement(self, params: Any, frozen: Any, b: dict[str, Any]) -> Any:
        """By head, as of `GliDeArm`; further rows: how often the i-th best is the target's best token."""
        found = []
        for index in range(self.model.config.num_heads):
            q, p, best = self.laws(params, frozen, b, index)
            keep = answers_of(b)[:, index + 1 :]
            accepted, match = agree(frozen, best, p, q)
            ranks = frozen["place"][best][..., None] == jax.lax.top_k(q, TOP)[1]
            rows = jnp.einsum("btk,bt->k", ranks.astype(jnp.float32), keep)
            found.append(
                jnp.stack([(accepted * keep).sum(), (match * keep).sum(), keep.sum(), *rows])
            )
        return jnp.stack(found, axis=1)

    def save(self, folder: Path, params: Any, mark: str, measured: Any) -> None:
        save_medusa(folder, self.model, params, mark, tuple(map(tuple, measured["ranks"])))


def agree(frozen: Any, best: Any, p: Any, q: Any) -> tuple[Any, Any]:
    """Probability of acceptance under the rejection rule, and whether the best tokens are equal."""
    match = frozen["place"][best] == q.argmax(-1)
    return jnp.exp(jnp.minimum(p, q)).sum(-1), match.astype(jnp.float32)


def hidden_of(b: dict[str, Any]) -> Any:
    return jax.lax.bitcast_convert_type(b["h"], jnp.bfloat16).astype(jnp.float32)


def answers_of(b: dict[str, Any]) -> Any:
    """1 where the target predicts a token of the answer."""
    at = jnp.arange(b["x"].shape[1] - 1)[None]
    return ((at >= b["s"][:, None]) & (at < b["n"][:, None])).astype(jnp.float32)


def weights_of(b: dict[str, Any]) -> Any:
    """Of the loss: a prompt's tokens are text, too, but not of the target."""
    at = jnp.arange(b["x"].shape[1] - 1)[None]
    return jnp.where(at >= b["s"][:, None], 1.0, PROMPT_WEIGHT) * (at < b["n"][:, None])


def rows_of(size: int, tokens: int) -> int:
    """Rows of a batch."""
    return max(1, tokens // size)


def batches(data: dict[int, Any], tokens: int, seed: int) -> Any:
    """Rows of one length at a time, some `tokens` of them, for ever."""
    for epoch in range(10**6):
        rng = np.random.default_rng([seed, epoch])
        todo = []
        for size, arrays in data.items():
            rows, count = rng.permutation(len(arrays["n"])), rows_of(size, tokens)
            todo += [(size, rows[i : i + count]) for i in range(0, len(rows) - count + 1, count)]
        for i in rng.permutation(len(todo)):
            size, rows = todo[i]
            yield {name: x[rows] for name, x in data[size].items()}


def parse_arm(text: str) -> tuple[str, dict[str, Any]]:
    name, *fields = text.split(":")
    found: dict[str, Any] = {}
    for field in fields:
        key, _, value = field.partition("=")
        if key == "visibility":
            found[key] = value
            continue
        numbers = tuple(map(int, value.split("+")))
        found[key] = numbers if key == "target_layers" else numbers[0]
        if key in ("cross_attention", "hidden_input"):
            found[key] = bool(found[key])
    return name, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", required=True)
    parser.add_argument(
        "--data", action="append", type=Path, required=True, help="as `train regenerate` writes it"
    )
    parser.add_argument(
        "--text", action="append", type=Path, default=[], help="the same, of other writers"
    )
    parser.add_argument("--readings", type=Path, required=True)
    parser.add_argument("--layers", default="15,29", help="the target's layers that are kept")
    parser.add_argument("--arm", action="append", required=True, metavar="NAME:FIELD=VALUE:...")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--tokens", type=int, default=1536, help="of a batch")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--dtype", default="bfloat16", help="of reading and computation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--init",
        type=Path,
        help="a folder of drafters: arms named as they are begin with their weights",
    )
    parser.add_argument("--record", type=Path, help="JSON in which runs and their arms are kept")
    parser.add_argument(
        "--every", type=int, default=200, help="steps between measurements and states"
    )
    args = parser.parse_args()

    target = sd.load_target(args.target, dtype=args.dtype)
    if not target.config.tied_head:
        raise SystemExit(
            "The head of this target is not its embedding: this script wants one that is."
        )
    layers = tuple(map(int, args.layers.split(",")))
    train, held = documents(args.data, args.text)
    ids = most_frequent(train, args.vocabulary, target.vocab_size, target.config.eos_ids)
    readings = Readings(target, layers, args.readings)
    data, measured = readings.of(train), readings.of(held)
    tokens = sum(int(x["n"].sum()) for x in data.values())
    if not measured or not any(
        len(x["n"]) >= rows_of(size, args.tokens) for size, x in data.items()
    ):
        raise SystemExit("There is too little data: no full batch, or nothing held out.")
    print(f"{tokens:,} tokens of data, draft vocabulary {len(ids):,}", flush=True)

    config = TrainConfig(
        steps=args.steps, learning_rate=args.learning_rate, warmup_steps=50, optimizer="muon"
    )
    optimizer = make_optimizer(config)
    arms, state, steps, tests = {}, {}, {}, {}
    for text in args.arm:
        name, fields = parse_arm(text)
        seed = fields.pop("seed", args.seed)
        dtype = jnp.dtype(args.dtype)
        if name.startswith("medusa"):
            arms[name] = MedusaArm(target, ids, dtype, fields)
        else:
            arms[name] = GliDeArm(target, ids, dtype, layers, fields)
        params = arms[name].init(jax.random.key(seed))
        if args.init and (args.init / name).is_dir():
            if not isinstance(arms[name], GliDeArm):
                raise SystemExit(f"Only a GliDe drafter begins with known weights, not {name}.")
            params = arms[name].load(args.init / name)
        state[name] = {"params": params, "opt": optimizer.init(params)}
        steps[name] = jax.jit(step_of(arms[name], optimizer), donate_argnums=0)
        tests[name] = jax.jit(arms[name].agreement)

    args.out.mkdir(parents=True, exist_ok=True)
    log = (args.out / "metrics.jsonl").open("a", encoding="utf-8")
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager((args.out / "state").absolute(), options=options) as manager:
        begun = manager.latest_step() or 0
        if begun:
            state = manager.restore(begun, args=ocp.args.StandardRestore(state))
        source = batches(data, args.tokens, args.seed)
        for _ in range(begun):
            next(source)
        losses: dict[str, list[float]] = {name: [] for name in arms}
        for done in tqdm(range(begun + 1, args.steps + 1), initial=begun, total=args.steps):
            batch, key = next(source), jax.random.fold_in(jax.random.key(args.seed), done)
            for name, arm in arms.items():
                state[name], loss = steps[name](state[name], arm.frozen, batch, key)
                losses[name].append(float(loss))
            if done % args.every == 0 or done == args.steps:
                for name, arm in arms.items():
                    found = measure(tests[name], state[name]["params"], arm.frozen, measured)
                    row = {"step": done, "time": time.time(), "arm": name} | found
                    row["loss"] = float(np.mean(losses[name][-args.every :]))
                    log.write(json.dumps(row) + "\n")
                    log.flush()
                    print(row, flush=True)
                manager.save(done, args=ocp.args.StandardSave(state))
    for name, arm in arms.items():
        folder = args.out / name
        found = measure(tests[name], state[name]["params"], arm.frozen, measured)
        arm.save(folder, state[name]["params"], target_fingerprint(target.path), found)
        write_draft_vocabulary(folder, ids, target.vocab_size)
    if args.record:
        add_run(args, tokens, {name: arm.model.parameter_count() for name, arm in arms.items()})


def add_run(args: argparse.Namespace, tokens: int, parameters: dict[str, int]) -> None:
    """Adds to the record what this run measured, in place of an older one of the same kind."""
    curve: dict[str, dict[int, Any]] = {}
    for row in lines(args.out / "metrics.jsonl"):
        curve.setdefault(row.pop("arm"), {})[row["step"]] = row
        del row["time"]
    run = {
        "machine": machine(),
        "arms": args.arm,
        "own_parameters": parameters,
        "tokens_of_data": tokens,
        "steps": args.steps,
        "tokens_per_step": args.tokens,
        "draft_vocabulary": args.vocabulary,
        "learning_rate": args.learning_rate,
        "seed": args.seed,
        "init": args.init and args.init.name,
        "dtype": args.dtype,
        "measured": {name: list(some.values()) for name, some in curve.items()},
    }
    old = json.loads(args.record.read_text())["runs"] if args.record.is_file() else []
    runs = [old_run for old_run in old if any(old_run.get(key) != run[key] for key in OWN)]
    write_json(args.record, {"runs": [*runs, run]})


def step_of(arm: Arm, optimizer: optax.GradientTransformation) -> Any:
    def step(state: Any, frozen: Any, batch: Any, key: Any) -> Any:
        loss, grads = jax.value_and_grad(arm.loss)(state["params"], frozen, batch, key)
        updates, opt = optimizer.update(grads, state["opt"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt": opt}, loss

    return step


def measure(test: Any, params: Any, frozen: Any, data: dict[int, Any]) -> dict[str, Any]:
    sums: Any = 0
    for arrays in data.values():
        for i in range(0, len(arrays["n"]), READ_AT_ONCE):
            part = {name: x[i : i + READ_AT_ONCE] for name, x in arrays.items()}
            pad = READ_AT_ONCE - len(part["n"])
            part = {
                name: np.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1)) for name, x in part.items()
            }
            sums = sums + np.stack(jax.device_get(test(params, frozen, part)))
    accepted, match, count, *ranks = sums
    found = {
        "acceptance": np.round(accepted / count, 4).tolist(),
        "greedy_match": np.round(match / count, 4).tolist(),
    }
    return found | ({"ranks": np.round(np.transpose(ranks / count), 4).tolist()} if ranks else {})


if __name__ == "__main__":
    main()
