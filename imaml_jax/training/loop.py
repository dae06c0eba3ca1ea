"""Meta-training: the thin loop that drives many meta-steps."""

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax

from imaml_jax.training import mapping, metrics
from imaml_jax.training.evaluation import Evaluation
from imaml_jax.training.non_finite import NonFinite, key_data
from imaml_jax.training.run import Run, Scored
from imaml_jax.training.step import (
    TrainState,
    TrainStep,
    init_meta_params,
    init_state,
    make_train_step,
)
from imaml_jax.types import Array, MetaLearner, PyTree


class TrainResult(NamedTuple):
    """What `train` returns.

    Attributes:
      meta_params: the meta-parameters after the last meta-step.
      best_meta_params: those of the highest validation score; the last where nothing was validated.
      best_step: the number of meta-steps that made them.
      history: one row a log point, as in `metrics.jsonl`.
      state: the last state.
      best: those of the `keep_best` highest validation scores, best first; empty where nothing was
        validated.
    """

    meta_params: PyTree
    best_meta_params: PyTree
    best_step: int
    history: list[dict[str, Any]]
    state: TrainState
    best: list[Scored]


def train(
    learner: MetaLearner,
    tx: optax.GradientTransformation,
    sample: mapping.Sample,
    *,
    key: Array,
    num_steps: int,
    example_inputs: Any = None,
    meta_params: PyTree = None,
    log_every: int = 100,
    validate: Callable[[PyTree], Evaluation] | None = None,
    validate_every: int | None = None,
    keep_best: int = 1,
    checkpoint_every: int | None = None,
    workdir: str | os.PathLike | None = None,
    map_tasks: mapping.MapTasks = None,
    devices: mapping.Devices = None,
    max_seconds: float | None = None,
    progress: bool = True,
    config: Mapping[str, Any] | None = None,
    accept_changes: bool = False,
    non_finite: NonFinite = "stop",
    train_step: TrainStep | None = None,
    log: Callable[[Mapping[str, Any]], None] | None = None,
) -> TrainResult:
    """Meta-trains, or goes on where an earlier call in the same `workdir` stopped.

    `log_every` meta-steps are one compiled `lax.scan`; the host hears from the device between them.
    All randomness follows from `key` and the number of the step, so a run that was killed and
    resumed ends with the same bits as one that was not, on the same device and versions.

    With a workdir, SIGTERM and SIGINT let the chunk end and be kept before they stop the run; the
    second one stops it at once.

    Args:
      learner: the algorithm.
      tx: the outer optimiser; schedules belong in it, so that they resume exactly.
      sample: `key -> Task` with a leading task axis of fixed length; keep it unjitted.
      key: the root key.
      num_steps: meta-steps in all, a multiple of `log_every`.
      example_inputs: what `learner.init` takes, or else
      meta_params: where to start; exactly one of the two.
      log_every: meta-steps of one chunk, that is of one compiled call and one row of the log.
      validate: `meta_params -> Evaluation`, higher is better, with keys of its own that do not
        change from call to call. None (default) for no validation.
      validate_every: a multiple of `log_every`, its default; the last meta-step is validated too,
        and where `max_seconds` stops, which is logged but not taken for the best.
      keep_best: how many of the best validated meta-parameters to keep, for an `ensemble`.
      checkpoint_every: a multiple of `log_every`, its default; the end is checkpointed too.
      workdir: holds `config.json`, `metrics.jsonl`, `checkpoints/` and, at the end,
        `learning_curve.png`. None (default) writes nothing.
      map_tasks: how tasks are mapped, see `mapping.map_over_tasks`.
      devices: devices over which tasks are sharded; with several processes, those of all. They need
        a workdir that all of them see, which the first one writes.
      max_seconds: stops after the first chunk that ends later than this many seconds of wall clock,
        compilation, validation and the earlier parts of a resumed run included.
      progress: whether standard error shows a progress bar, or a line a log point where it is not a
        terminal.
      config: what JSON can hold, kept with the run; a run resumes only with an equal one, so leave
        out what may change.
      accept_changes: resumes with another config all the same; a warning names what differs.
      non_finite: "stop" stops at a loss or gradient that is not finite, "skip" leaves out the tasks
        that have one and counts them in `skipped_tasks`, on average over the meta-steps of a chunk.
      train_step: the meta-step of another outer optimiser, made by `latched`, in place of that of
        `make_train_step`, whose settings then have no effect. `learner` still initialises and finds
        the failing task, and `tx` makes the state; `optax.identity()` where there is none.
      log: takes each new row of the log, in the first process only, such as `writers.open_writers`
        yields. None (default) for nothing beside `metrics.jsonl`.

    Returns:
      The last and the best meta-parameters, the log and the state.

    Raises:
      ValueError: if an argument is out of range, or `workdir` is in use by another process or holds
        a run of another config, key or model.
      NonFiniteError: if a meta-step met a loss or gradient that is not finite.
      InterruptedRunError: if a signal stopped the run; what was done is in a checkpoint.
    """
    if (example_inputs is None) == (meta_params is None):
        raise ValueError("give exactly one of example_inputs and meta_params")
    with Run(
        folder=None if workdir is None else Path(workdir),
        config={**(config or {}), "root_key": key_data(key)},
        num_steps=num_steps,
        log_every=log_every,
        validate_every=log_every if validate_every is None else validate_every,
        checkpoint_every=log_every if checkpoint_every is None else checkpoint_every,
        keep_best=keep_best,
        max_seconds=max_seconds,
        progress=progress,
        log=log,
    ) as run:
        step_fn = train_step or make_train_step(
            learner, tx, sample, map_tasks=map_tasks, devices=devices, non_finite=non_finite
        )
        run_chunk = _make_chunk(step_fn, log_every, devices)
        if meta_params is None:
            meta_params = init_meta_params(learner, key, example_inputs)
        state, root_key = run.resume(init_state(tx, meta_params), accept_changes), key
        if devices is not None:
            state, root_key = mapping.replicate((state, key), devices)
        while not run.last:
            state, scalars = run_chunk(state, root_key)
            scalars, failed_step = jax.device_get((scalars, state.failed_step))
            if failed_step >= 0:
                raise run.failure(learner, sample, key, state)
            run.advance(log_every)
            if validate is not None:
                scalars |= run.validate(validate, state.meta_params)
            run.tell(scalars)
            run.keep(state)
        run.draw()
    best = run.best[0] if run.best else Scored(state.meta_params, run.step, math.nan)
    return TrainResult(state.meta_params, best.meta_params, best.step, run.history, state, run.best)


def _make_chunk(train_step: Callable[..., Any], length: int, devices: Any) -> Callable[..., Any]:
    """`length` meta-steps in one compiled call, with their metrics summarised on the device."""

    def chunk(state: TrainState, root_key: Array) -> tuple[TrainState, dict[str, Array]]:
        state, scalars = jax.lax.scan(lambda s, _: train_step(s, root_key), state, length=length)
        return state, metrics.reduce_scalars(scalars)

    return mapping.jit_lifted(chunk, donate_argnum=0, devices=devices)
