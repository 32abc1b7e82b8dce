"""One training stage: an optax loop that resumes exactly where it was cut off.

    batches(step) → gradients → update → … every so often: a checkpoint, a line of figures

A batch is a pure function of its step, so the step is the data position, and what is saved —
parameters, optimizer state, step — is the whole state of a run: interrupted and resumed, it ends
in the same bits as uninterrupted.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from jaxtyping import Array, Float
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Params = Any
"""A tree of arrays, such as a model's `nnx.State`."""
Figures = dict[str, Float[Array, ""]]

DECAY = 0.02  # of weights, in `adamw_stage`


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a stage is: how long, from which batches, and what is written down how often.

    `loss(params, frozen, batch, key)` gives the loss and the figures to log; `batches(step)` is the
    batch of a step. `every` counts steps between two lines of figures, `save_every` between two
    checkpoints.
    """

    name: str
    steps: int
    loss: Callable[[Any, Any, Any, Array], tuple[Float[Array, ""], Figures]]
    batches: Callable[[int], Any]
    optimizer: optax.GradientTransformation
    seed: int
    every: int
    save_every: int


def warmup_cosine_adamw(
    peak: float, steps: int, weight_decay: float
) -> optax.GradientTransformation:
    """AdamW, gradients clipped to norm 1; a linear warm-up of 5 % of the steps, then a cosine."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=peak,
        warmup_steps=max(1, steps // 20),
        decay_steps=max(2, steps),
        end_value=peak / 100,
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=weight_decay)
    )


def adamw_stage(
    name: str,
    steps: int,
    loss: Callable[[Any, Any, Any, Array], tuple[Float[Array, ""], Figures]],
    batches: Callable[[int], Any],
    *,
    peak: float | Mapping[str, float],
    seed: int,
) -> Stage:
    """A stage as all models here are trained: by `warmup_cosine_adamw`, up to the rate `peak`, or
    each of the named parts of the parameters up to a rate of its own.
    """
    if isinstance(peak, Mapping):
        optimizer = optax.partition(
            {name: warmup_cosine_adamw(rate, steps, DECAY) for name, rate in peak.items()},
            {name: name for name in peak},
        )
    else:
        optimizer = warmup_cosine_adamw(peak, steps, DECAY)
    return Stage(name, steps, loss, batches, optimizer, seed, every=20, save_every=100)


def train(
    stage: Stage,
    params: Params,
    folder: Path,
    log: Path,
    *,
    frozen: Any = None,
    stop_at: int | None = None,
) -> Params:
    """Runs the stage from its newest checkpoint in `folder`, else from `params`.

    `frozen` goes to the loss as it is. Appends figures to `log` as JSON lines. `stop_at` ends the
    run after that many steps with a checkpoint, as if it had been cut off there.
    """
    # Two programs: fused into one, XLA's CPU backend runs the backward pass four times slower.
    gradients = jax.jit(jax.value_and_grad(stage.loss, has_aux=True))

    def apply(grads: Any, optimizer: Any, params: Params) -> tuple[Params, Any]:
        with jax.numpy_dtype_promotion("standard"):  # optax counts in int32 and decays in float32
            updates, optimizer = stage.optimizer.update(grads, optimizer, params)
        return optax.apply_updates(params, updates), optimizer

    update = jax.jit(apply, donate_argnums=(1, 2))

    params = jax.tree.map(jnp.array, params)  # a copy: the caller's own is not to be donated
    state = (params, stage.optimizer.init(params))
    root = jax.random.key(stage.seed)
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    with ocp.CheckpointManager(folder.absolute(), options=options) as manager:
        start = manager.latest_step() or 0
        if start:
            state = _restore(manager, start, state)
        _forget_after(log, stage.name, start)
        end = stage.steps if stop_at is None else min(stop_at, stage.steps)
        with _progress() as bar:
            task = bar.add_task(stage.name, total=stage.steps, completed=start, figures="")
            since, before = time.monotonic(), start
            for step in range(start, end):
                batch, key = stage.batches(step), jax.random.fold_in(root, step)
                (_, figures), grads = gradients(state[0], frozen, batch, key)
                state = update(grads, state[1], state[0])
                done = step + 1
                bar.advance(task)
                if done % stage.every == 0 or done == stage.steps:
                    values = {name: round(float(value), 6) for name, value in figures.items()}
                    pace = (time.monotonic() - since) / (done - before)
                    since, before = time.monotonic(), done
                    line = {"stage": stage.name, "step": done, **values}
                    _append(log, {**line, "seconds_per_step": round(pace, 4)})
                    bar.update(task, figures=" ".join(f"{k} {v:.4f}" for k, v in values.items()))
                if done % stage.save_every == 0 or done == end:
                    manager.save(done, args=ocp.args.StandardSave(_named(state)))
    return state[0]


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
        refresh_per_second=1,
    )


def _forget_after(log: Path, stage: str, step: int) -> None:
    """Drops the lines of steps that will be run again: they came after the last checkpoint."""
    if log.exists():
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        kept = [line for line in lines if line["stage"] != stage or line["step"] <= step]
        log.write_text("".join(json.dumps(line) + "\n" for line in kept))


def _append(log: Path, line: dict[str, Any]) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        file.write(json.dumps(line) + "\n")


def _named(state: Any) -> dict[str, Array]:
    """Every array by its path, so that a checkpoint needs none of our classes to be read."""
    return {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(state)}


def _restore(manager: ocp.CheckpointManager, step: int, state: Any) -> Any:
    wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, _named(state))
    found = manager.restore(step, args=ocp.args.StandardRestore(wanted))
    leaves = [found[jax.tree_util.keystr(path)] for path, _ in jax.tree.leaves_with_path(state)]
    return jax.tree.unflatten(jax.tree.structure(state), leaves)
