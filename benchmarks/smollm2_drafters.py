"""Drafters of several forms, trained side by side on one reading of the target; writes what `checkpoints/smollm2` holds.

    python benchmarks/smollm2_drafters.py --target runs/smollm2/target --data WRITTEN.jsonl --readings DIR --out OUT \\
        --steps 4000 --arm glide:target_layers=15:hidden_input=1 --arm vanilla:cross_attention=0

The target, which costs most, reads each text once: its keys and values at some layers, its last hidden states and the
normalisers of its distributions are kept in DIR, some 2 KB a token. After that a step costs what the drafters cost.
The draft vocabulary is that of the data, and the loss the cross-entropy to the target's distribution on it; every
twentieth document, by a hash of its prompt, is held out. A run goes on where it was interrupted.
"""

import argparse
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
from tqdm import tqdm

import jax_specdec as sd
from jax_specdec.checkpoints.draft_vocabulary import most_frequent, write_draft_vocabulary
from jax_specdec.checkpoints.glide import save_glide, target_fingerprint
from jax_specdec.core.context import last_seen
from jax_specdec.models.glide import GliDe, glimpse_text
from jax_specdec.models.glide_config import GliDeConfig
from jax_specdec.models.layers import rms_norm
from jax_specdec.training.config import TrainConfig
from jax_specdec.training.glide_mask import visible_keys
from jax_specdec.training.reading import positions
from jax_specdec.training.trainer import make_optimizer

LENGTHS = (128, 192, 256, 320)  # tokens of a row; longer documents are cut
READ_AT_ONCE = 8
ANSWER = "<|im_end|>\n<|im_start|>assistant\n"  # what stands before it in SmolLM2's template


def documents(files: list[Path]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Token ids of the training and the held-out records."""
    parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for path in files:
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            prompt = record["text"].split(ANSWER, 1)[0]
            held = int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % 20 == 0
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
      x: `int32[R, T + 1]`. n: tokens of each, the last left out. k, v: `float16[R, L, T, K, D]` of the layers.
      h: hidden states, `bfloat16[R, T, E]` as bits. z: the normalisers, `float32[R, T]`. a: the best tokens.
    """

    def __init__(self, target: sd.Target, layers: tuple[int, ...], folder: Path):
        self.target, self.layers, self.folder = target, layers, folder
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


class Arm:
    """One drafter: its model, its loss, and how well it agrees with the target."""

    def __init__(self, model: GliDe, target: sd.Target, ids: np.ndarray, layers: tuple[int, ...]):
        self.model, self.config, self.layers = model, target.config, layers
        params = target.params
        self.frozen = {"embed": params["embed"], "norm": params["norm"]}
        self.frozen["head"] = jnp.asarray(np.asarray(params["embed"])[ids].T)
        self.frozen["place"] = (
            jnp.full(target.vocab_size, len(ids)).at[ids].set(np.arange(len(ids)))
        )

    def log_q(self, params: Any, frozen: Any, b: dict[str, Any], visible: Any) -> Any:
        """`float32[B, T, S]` over the draft vocabulary."""
        model, c = self.model, self.config
        (layer,) = set(model.config.layers_read(c)) if model.config.cross_attention else (None,)
        kv = None
        if layer is not None:
            place = self.layers.index(layer)
            kv = tuple({layer: b[name][:, place].astype(jnp.float32)} for name in "kv")
        glimpse = kv and glimpse_text(
            kv,
            visible,
            c.windows,
            scale=c.scale,
            soft_cap=c.attention_cap,  # type: ignore[arg-type]
        )
        x = b["x"][:, :-1]
        hidden = last_seen(_hidden(b), visible) if model.config.hidden_input else None
        joined = {**params, "embed": frozen["embed"]}
        out = model.apply(joined, x, positions(x), glimpse, hidden=hidden, logits=False)
        y = rms_norm(out.hidden, params["norm"], c.norm_eps)
        return jax.nn.log_softmax(y @ frozen["head"], axis=-1)

    def log_p(self, frozen: Any, b: dict[str, Any]) -> Any:
        """The target's, of the whole vocabulary, at the tokens of the draft vocabulary."""
        y = rms_norm(_hidden(b), frozen["norm"], self.config.norm_eps)
        return y @ frozen["head"] - b["z"][..., None]

    def loss(self, params: Any, frozen: Any, b: dict[str, Any], key: Any) -> Any:
        delay = self.model.config.trained_delay
        visible = visible_keys("shift", b["x"][:, :-1].shape, delay, key)
        q = self.log_q(params, frozen, b, visible)
        every = -jnp.sum(jnp.exp(self.log_p(frozen, b)) * q, axis=-1)
        keep = _kept(b)
        return (every * keep).sum() / keep.sum()

    def agreement(self, params: Any, frozen: Any, b: dict[str, Any]) -> Any:
        """By delay: sums of min(p, q), of equal best tokens, and of places; see `training.glide.Pair.agreement`."""
        delay, keep = self.model.config.trained_delay, _kept(b)
        visible = visible_keys("block", keep.shape, delay, jax.random.key(0))
        q, p = self.log_q(params, frozen, b, visible), self.log_p(frozen, b)
        accepted = jnp.exp(jnp.minimum(p, q)).sum(-1)
        match = frozen["place"][b["a"]] == q.argmax(-1)
        at = np.arange(keep.shape[1])[:, None]
        count = keep[..., None] * ((at % delay == np.arange(delay)) & (at >= delay))
        sums = [jnp.einsum("bt,btd->d", x, count) for x in (accepted, match.astype(jnp.float32))]
        return *sums, count.sum((0, 1))


def _hidden(b: dict[str, Any]) -> Any:
    return jax.lax.bitcast_convert_type(b["h"], jnp.bfloat16).astype(jnp.float32)


def _kept(b: dict[str, Any]) -> Any:
    return (jnp.arange(b["x"].shape[1] - 1)[None] < b["n"][:, None]).astype(jnp.float32)


def batches(data: dict[int, Any], tokens: int, seed: int) -> Any:
    """Rows of one length at a time, some `tokens` of them, for ever."""
    for epoch in range(10**6):
        rng = np.random.default_rng([seed, epoch])
        todo = []
        for size, arrays in data.items():
            rows, count = rng.permutation(len(arrays["n"])), max(1, tokens // size)
            todo += [(size, rows[i : i + count]) for i in range(0, len(rows) - count + 1, count)]
        for i in rng.permutation(len(todo)):
            size, rows = todo[i]
            yield {name: x[rows] for name, x in data[size].items()}


def parse_arm(text: str) -> tuple[str, dict[str, Any]]:
    name, *fields = text.split(":")
    found: dict[str, Any] = {}
    for field in fields:
        key, _, value = field.partition("=")
        found[key] = (int(value),) if key == "target_layers" else int(value)
        if key in ("cross_attention", "hidden_input"):
            found[key] = bool(found[key])
    return name, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", required=True)
    parser.add_argument("--data", action="append", type=Path, required=True)
    parser.add_argument("--readings", type=Path, required=True)
    parser.add_argument("--layers", default="15,29", help="the target's layers that are kept")
    parser.add_argument("--arm", action="append", required=True, metavar="NAME:FIELD=VALUE:...")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--tokens", type=int, default=1536, help="of a batch")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--mlp-size", type=int, default=1024)
    parser.add_argument("--trained-delay", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--every", type=int, default=200, help="steps between measurements and states"
    )
    args = parser.parse_args()

    target = sd.load_target(args.target, dtype="float32")
    layers = tuple(map(int, args.layers.split(",")))
    train, held = documents(args.data)
    ids = most_frequent(train, args.vocabulary, target.vocab_size, target.config.eos_ids)
    readings = Readings(target, layers, args.readings)
    data, measured = readings.of(train), readings.of(held)
    tokens = sum(int(x["n"].sum()) for x in data.values())
    print(f"{tokens:,} tokens of data, draft vocabulary {len(ids):,}", flush=True)

    config = TrainConfig(
        steps=args.steps, learning_rate=args.learning_rate, warmup_steps=50, optimizer="muon"
    )
    optimizer = make_optimizer(config)
    arms, state, steps, tests = {}, {}, {}, {}
    for text in args.arm:
        name, fields = parse_arm(text)
        seed = fields.pop("seed", args.seed)
        shape = {"mlp_size": args.mlp_size, "trained_delay": args.trained_delay, **fields}
        model = GliDe(GliDeConfig.like(target.config, **shape), target.config, jnp.float32)
        arms[name] = Arm(model, target, ids, layers)
        params = model.init(jax.random.key(seed))
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
        mark = target_fingerprint(target.path)
        save_glide(folder, arm.model, state[name]["params"], mark)
        write_draft_vocabulary(folder, ids, target.vocab_size)


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
    accepted, match, count = sums
    return {
        "acceptance": np.round(accepted / count, 4).tolist(),
        "greedy_match": np.round(match / count, 4).tolist(),
    }


if __name__ == "__main__":
    main()
