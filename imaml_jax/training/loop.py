"""Meta-training: the thin loop that drives many meta-steps."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from imaml_jax.training import mapping, metrics
from imaml_jax.training.non_finite import NonFinite
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
    example_inputs: Any = None,
    meta_params: PyTree = None,
    map_tasks: mapping.MapTasks = None,
    devices: mapping.Devices = None,
    non_finite: NonFinite = "stop",
    train_step: TrainStep | None = None,
    **settings: Any,
) -> TrainResult:
    """Meta-trains, or goes on where an earlier call in the same `workdir` stopped.

    `log_every` meta-steps are one compiled `lax.scan`; the host hears from the device between them.
    All randomness follows from `key` and the number of the step, so a run that was killed and
    resumed ends with the same bits as one that was not, on the same device and versions.

    Args:
      learner: the algorithm.
      tx: the outer optimiser; schedules belong in it, so that they resume exactly.
      sample: `key -> Task` with a leading task axis of fixed length; keep it unjitted.
      key: the root key.
      example_inputs: what `learner.init` takes, or else
      meta_params: where to start; exactly one of the two.
      map_tasks: how tasks are mapped, see `mapping.map_over_tasks`.
      devices: devices over which tasks are sharded; with several processes, those of all. They need
        a workdir that all of them see, which the first one writes.
      non_finite: "stop" stops at a loss or gradient that is not finite, "skip" leaves out the tasks
        that have one and counts them in `skipped_tasks`, on average over the meta-steps of a chunk.
      train_step: the meta-step of another outer optimiser, made by `latched`, in place of that of
        `make_train_step`, whose settings then have no effect. `learner` still initialises and finds
        the failing task, and `tx` makes the state; `optax.identity()` where there is none.
      **settings: those of `Run`: `num_steps`, which must be given, `log_every`, `validate`,
        `validate_every`, `keep_best`, `checkpoint_every`, `workdir`, `max_seconds`, `progress`,
        `config`, `accept_changes`, `migrate` and `log`.

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
    with Run(**settings) as run:
        step_fn = train_step or make_train_step(
            learner, tx, sample, map_tasks=map_tasks, devices=devices, non_finite=non_finite
        )
        run_chunk = _make_chunk(step_fn, run.log_every, devices)
        if meta_params is None:
            meta_params = init_meta_params(learner, key, example_inputs)
        state, root_key = run.resume(init_state(tx, meta_params), key), key
        if devices is not None:
            state, root_key = mapping.replicate((state, key), devices)
        while not run.last:
            state, scalars = run_chunk(state, root_key)
            scalars, failed_step = jax.device_get((scalars, state.failed_step))
            if failed_step >= 0:
                raise run.failure(learner, sample, key, state)
            run.advance(run.log_every)
            run.tell(scalars | run.validated(state.meta_params))
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
