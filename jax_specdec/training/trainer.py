"""The training loop of every model here: optimiser, exact resume, held-out measurements, metrics, plot.

What is trained is an `Objective`. Parameters and optimiser state are float32; `dtype="bfloat16"` computes
in bfloat16. The state is saved by orbax, every batch and random draw is a function of (seed, step), and the
metrics file is cut back to the restored step, so a run that is killed and resumed logs the same losses as one
that was not.

On a mesh, rows are divided over its `data` axis, and parameters and optimiser state as an objective says. What is
saved fits any other mesh: a run goes on there from the same state to the bit, and then differs as sums of another
order do. Of several processes all train and save, and the first one writes the rest.
"""

import dataclasses
import json
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax import lax
from jax.sharding import AxisType, NamedSharding

from jax_specdec._types import Params
from jax_specdec.checkpoints.layouts import keys
from jax_specdec.core.sharding import Sharding, check_agreement, put, to_host
from jax_specdec.errors import RunError, UserError
from jax_specdec.progress import bar as progress_bar
from jax_specdec.training.config import TrainConfig
from jax_specdec.training.data import (
    Documents,
    Mixed,
    fingerprint,
    heldout_windows,
    training_batches,
)
from jax_specdec.training.workdir import (
    locked,
    plot_metrics,
    read_metrics,
    restore_newest,
    written,
)

logger = logging.getLogger(__name__)

# `(params, frozen, tokens int32[B, T+1], key) -> loss`, params in the compute dtype.
LossFn = Callable[[Params, Any, jax.Array, jax.Array], jax.Array]
# `(params, frozen, tokens) -> {name: float32[] or float32[n]}`, means over the batch.
MeasureFn = Callable[[Params, Any, jax.Array], dict[str, jax.Array]]

# The parts of a parameter tree whose matrices Muon trains; not embeddings and output matrices.
INNER = ("layers", "heads")
# As are these: AdamW's steps are too large for a projection of hidden states, a few of whose numbers are large.
PROJECTIONS = ("hidden_in", "embed_in", "head_out")


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a run trains.

    Attributes:
      init: fresh float32 parameters from a key.
      loss: differentiated with respect to its first argument.
      measure: taken of held-out windows; `heldout_loss` must be among the names.
      frozen: what the loss reads beside the parameters, such as a target's parameters; on the mesh already, or
        whole.
      settings: what must be the same in a resumed run; JSON.
      places: where the parameters lie on a mesh, a tree of `NamedSharding`; without, each device holds them whole.
    """

    init: Callable[[jax.Array], Params]
    loss: LossFn
    measure: MeasureFn
    settings: dict[str, Any]
    frozen: Any = None
    places: Callable[[Sharding], Params] | None = None


def learning_rate_schedule(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up and cosine decay over `config.steps`."""
    warmup = min(config.warmup_steps, max(1, config.steps // 10), config.steps - 1)
    return optax.warmup_cosine_decay_schedule(
        0.0,
        config.learning_rate,
        warmup,
        config.steps,
        config.learning_rate * config.final_fraction,
    )


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """The optimiser of a run. Weight decay touches matrices only."""
    schedule = learning_rate_schedule(config)

    def matrices(params: Any) -> Any:
        return jax.tree.map(lambda x: x.ndim >= 2, params)

    if config.optimizer == "adamw":
        core = optax.adamw(
            schedule, b1=0.9, b2=0.95, weight_decay=config.weight_decay, mask=matrices
        )
    else:

        def muon_axes(params: Any) -> Any:
            numbers = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)

            def of(name: str) -> Any:
                if name in PROJECTIONS:
                    return numbers
                if name not in INNER:
                    return None
                stacked = not isinstance(params[name], tuple)
                return jax.tree.map(
                    lambda x: numbers if x.ndim - stacked == 2 else None, params[name]
                )

            return {name: of(name) for name in params}

        core = optax.contrib.muon(
            schedule,
            weight_decay=config.weight_decay,
            adam_b2=0.95,
            muon_weight_dimension_numbers=muon_axes,
            consistent_rms=0.2,
        )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), core)


def make_step(
    loss_fn: LossFn, config: TrainConfig, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[Params, Any, dict[str, jax.Array]]]:
    """One optimiser step.

    `(params, opt_state, frozen, batch[B, T+1], key) -> (params, opt_state, metrics)`; with accumulation
    each micro-batch has a key of its own.
    """

    def step(params, opt_state, frozen, batch, key):
        if config.accumulate == 1:
            loss, grads = jax.value_and_grad(loss_fn)(params, frozen, batch, key)
        else:
            micro = batch.reshape(config.accumulate, -1, batch.shape[-1])

            def add(carry, part):
                tokens, key = part
                loss, grads = jax.value_and_grad(loss_fn)(params, frozen, tokens, key)
                return jax.tree.map(jnp.add, carry, (loss, grads)), None

            zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
            total, _ = lax.scan(add, zero, (micro, jax.random.split(key, config.accumulate)))
            loss, grads = jax.tree.map(lambda x: x / config.accumulate, total)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return cast(Params, optax.apply_updates(params, updates)), opt_state, metrics

    return step


def train(
    objective: Objective,
    config: TrainConfig,
    documents: Documents,
    heldout: Sequence[np.ndarray],
    workdir: str | Path,
    *,
    sharding: Sharding | None = None,
    initial: Params | None = None,
    resume: bool = False,
    stop_after: int | None = None,
    progress: bool | None = True,
    callback: Callable[[int, dict[str, Any]], None] | None = None,
    on_save: Callable[[Params], None] | None = None,
) -> Params:
    """Trains and returns the float32 parameters.

    Args:
      documents, heldout: token ids per document, end-of-text included; `Mixed` sources by weight.
      sharding: None divides rows over all devices of all processes.
      workdir: of a file system that all processes see; receives `state/` (orbax), `metrics.jsonl` and `loss.png`.
      initial: parameters to start from; fresh ones from `config.seed` otherwise.
      resume: go on from the newest state in `workdir` that can be read; a damaged newer one is deleted,
        with a warning. Without it a used workdir is refused.
      stop_after: return after this step, as a killed run would.
      progress: whether to show a bar; None on a terminal and in a notebook.
      callback: called by the first process after each step with its number and its row of the metrics: `loss`,
        `tokens`, `grad_norm`, `learning_rate`, `tokens_per_second`, and what was measured at that step. What it
        raises ends the run, which can be resumed.
      on_save: called by every process, with the parameters as numpy, whenever the state is saved, and if a
        resumed run has no step left, since the run before it may have been killed between saving and the call.

    Raises:
      UserError: a used workdir without `resume`, other settings or data than the saved run's, or a
        workdir that another run is in.
      RunError: the loss is not finite, no saved state can be read, the disk is full, or processes were given
        different data or settings.
    """
    workdir = Path(workdir).absolute()
    if sharding is None:
        names = ("data", "tensor")
        shape = (len(jax.devices()), 1)
        sharding = Sharding(jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * 2))
    with written(workdir), locked(workdir):
        return _train(
            objective,
            config,
            documents,
            heldout,
            workdir,
            sharding,
            initial=initial,
            resume=resume,
            stop_after=stop_after,
            progress=progress,
            callback=callback,
            on_save=on_save,
        )


def _train(
    objective: Objective,
    config: TrainConfig,
    documents: Documents,
    heldout: Sequence[np.ndarray],
    workdir: Path,
    sharding: Sharding,
    *,
    initial: Params | None,
    resume: bool,
    stop_after: int | None,
    progress: bool | None,
    callback: Callable[[int, dict[str, Any]], None] | None,
    on_save: Callable[[Params], None] | None,
) -> Params:
    first_process = jax.process_index() == 0
    metrics_path = workdir / "metrics.jsonl" if first_process else Path(os.devnull)
    settings = {"train": dataclasses.asdict(config), **objective.settings}
    if isinstance(documents, Mixed):
        settings["weights"] = documents.weights
    settings = json.loads(json.dumps({**settings, "data": fingerprint(documents, heldout)}))
    check_agreement(settings)
    micro, parts = config.batch_size // config.accumulate, sharding.size("batch")
    if micro % parts:
        raise UserError(
            f"A micro-batch of {micro} windows (batch_size / accumulate) does not divide over {parts} devices."
        )
    replicated, by_row = sharding.of(), sharding.of("batch", None)

    def compute(function: Callable) -> Callable:
        def call(params, *args):
            narrow = jax.tree.map(lambda x: x.astype(jnp.dtype(config.dtype)), params)
            return function(narrow, *args)

        return call

    optimizer = make_optimizer(config)
    manager = ocp.CheckpointManager(
        workdir / "state", options=ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
    )
    try:
        latest = manager.latest_step()
        if latest is not None and not resume:
            raise UserError(
                f"{workdir} already holds a run at step {latest}: pass --resume (resume=True) to go on, or use a new folder."
            )
        if resume and latest is None and first_process:
            logger.warning("%s holds no run to go on with: this one begins anew.", workdir)
        key = jax.random.key(config.seed)
        params = objective.init(key) if initial is None else initial
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
        where = objective.places
        places = sharding.whole(params) if where is None else where(sharding)
        params = jax.tree.map(_put, params, places)
        frozen = jax.tree.map(
            lambda x: x if _lies_on(x, sharding.mesh) else put(x, replicated), objective.frozen
        )
        state_places = like_params(jax.eval_shape(optimizer.init, params), places, replicated)
        opt_state = jax.jit(optimizer.init, out_shardings=state_places)(params)
        first = 0
        if latest is not None:
            (params, opt_state), first = restore_newest(
                manager, (params, opt_state), settings, workdir
            )
        rows = read_metrics(metrics_path, first)
        metrics_path.write_text("".join(json.dumps(row) + "\n" for row in rows))

        step_fn = jax.jit(
            make_step(compute(objective.loss), config, optimizer),
            out_shardings=(places, state_places, replicated),
            donate_argnums=(0, 1),
        )
        measure_fn = jax.jit(compute(objective.measure), out_shardings=replicated)
        windows = heldout_windows(heldout, config.sequence_length)
        windows = windows[: len(windows) // micro * micro] if len(windows) > micro else windows

        def measure() -> dict[str, Any]:
            place = replicated if len(windows) % parts else by_row
            found = [
                jax.device_get(measure_fn(params, frozen, put(windows[i : i + micro], place)))
                for i in range(0, len(windows), micro)
            ]
            return {k: np.mean([part[k] for part in found], axis=0).tolist() for k in found[0]}

        def save(step: int) -> None:
            manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave((params, opt_state)),
                    meta=ocp.args.JsonSave(settings),
                ),
            )
            if first_process:
                plot_metrics(rows, workdir / "loss.png")
            saved(params)

        def saved(params: Params) -> None:
            if on_save is not None:
                on_save(to_host(params))

        batches = training_batches(
            documents, config.sequence_length, config.batch_size, config.steps, config.seed
        )
        schedule = learning_rate_schedule(config)
        last = min(config.steps, stop_after or config.steps)
        tokens_per_step = config.batch_size * config.sequence_length
        shown = progress if first_process else False
        bar = progress_bar(config.steps, shown, initial=first, unit="step", delay=0, leave=True)
        with bar, metrics_path.open("a", encoding="utf-8") as log:
            for index in range(first, last):
                began = time.perf_counter()
                batch = put(batches[index], by_row)
                params, opt_state, metrics = step_fn(
                    params, opt_state, frozen, batch, jax.random.fold_in(key, index)
                )
                step = index + 1
                loss = float(metrics["loss"])
                if not math.isfinite(loss):
                    raise RunError(f"The loss is {loss} at step {step}: lower the learning rate.")
                row = {
                    "step": step,
                    "tokens": step * tokens_per_step,
                    "loss": loss,
                    "grad_norm": float(metrics["grad_norm"]),
                    "learning_rate": float(np.asarray(schedule(index))),
                    "tokens_per_second": tokens_per_step / (time.perf_counter() - began),
                }
                final = step == config.steps
                if step % config.eval_every == 0 or final:
                    row |= measure()
                log.write(json.dumps(row) + "\n")
                log.flush()
                rows.append(row)
                bar.update()
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                if step % config.save_every == 0 or final:
                    save(step)
                if callback is not None and first_process:
                    callback(step, dict(row))
        manager.wait_until_finished()
        if first >= last:
            saved(params)
    finally:
        manager.close()
    return params


def like_params(state: Any, places: Params, otherwise: NamedSharding) -> Any:
    """Where an optimiser's state lies: what it holds of a parameter, where that is."""
    of = {keys(path): place for path, place in jax.tree_util.tree_leaves_with_path(places)}

    def place(path: Any, leaf: Any) -> NamedSharding:
        # A moment's path ends with its parameter's; counts have none, and nor have factored moments that shape.
        names = keys(path)
        ends = (of.get(names[i:]) for i in range(len(names)))
        found = next((end for end in ends if end is not None), otherwise)
        return found if len(found.spec) == len(leaf.shape) else otherwise

    return jax.tree_util.tree_map_with_path(place, state)


def _put(x: Any, place: NamedSharding) -> Any:
    return jax.device_put(x, place) if _lies_on(x, place.mesh) else put(x, place)


def _lies_on(x: Any, mesh: Any) -> bool:
    here = getattr(x, "sharding", None)
    return isinstance(here, NamedSharding) and here.mesh == mesh
