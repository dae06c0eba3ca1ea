"""Meta-training: the thin loop that drives many meta-steps."""

import contextlib
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping
from importlib import metadata
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from imaml_jax.learners.base import check_steps
from imaml_jax.training import checkpoint, json_lines, mapping, metrics, plots, processes
from imaml_jax.training import non_finite as non_finites
from imaml_jax.training import workdir as workdirs
from imaml_jax.training.evaluation import Evaluation
from imaml_jax.training.non_finite import NonFinite, NonFiniteError
from imaml_jax.training.step import (
    TrainState,
    TrainStep,
    init_meta_params,
    init_state,
    make_train_step,
)
from imaml_jax.types import Array, MetaLearner, PyTree

_CHECKPOINTS, _METRICS, _CURVE = "checkpoints", "metrics.jsonl", "learning_curve.png"
_PACKAGES = ("imaml_jax", "flax", "jax", "jaxlib", "optax", "orbax-checkpoint")


class Scored(NamedTuple):
    """Meta-parameters with the meta-step that made them and their validation score."""

    meta_params: PyTree
    step: int
    score: float


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
    started = time.perf_counter()
    validate_every = log_every if validate_every is None else validate_every
    checkpoint_every = log_every if checkpoint_every is None else checkpoint_every
    _check_counts(
        log_every=log_every,
        num_steps=num_steps,
        validate_every=validate_every,
        checkpoint_every=checkpoint_every,
    )
    if max_seconds is not None and not max_seconds > 0:
        raise ValueError(f"max_seconds must be None or positive; got {max_seconds!r}")
    if (example_inputs is None) == (meta_params is None):
        raise ValueError("give exactly one of example_inputs and meta_params")
    step_fn = train_step or make_train_step(
        learner, tx, sample, map_tasks=map_tasks, devices=devices, non_finite=non_finite
    )
    run_chunk = _make_chunk(step_fn, log_every, devices)
    root_key = key
    config = {**(config or {}), "root_key": non_finites.key_data(key)}
    check_steps("train", keep_best=keep_best)
    if keep_best != 1:
        config["keep_best"] = keep_best
    if meta_params is None:
        meta_params = init_meta_params(learner, key, example_inputs)
    state, history = init_state(tx, meta_params), []
    best: list[Scored] = []
    earlier_seconds, last_checkpoint = 0.0, None
    folder = None if workdir is None else Path(workdir)
    home = folder if processes.is_first() else None  # where this process writes
    with contextlib.ExitStack() as stack:
        interrupted = lambda: None  # noqa: E731
        if home is not None:
            stack.enter_context(workdirs.lock(home))
            if checkpoint.steps(home / _CHECKPOINTS):
                workdirs.check(home, config, accept_changes, fixed=("keep_best",))
        if folder is not None:
            interrupted = stack.enter_context(workdirs.deferred_signals())
            like = (state, (state.meta_params,) * keep_best)
            found = checkpoint.restore(folder / _CHECKPOINTS, like)
            if found:
                (state, kept), notes = found
                best = [Scored(*each) for each in zip(kept, *notes["best"], strict=False)]
                earlier_seconds, last_checkpoint = notes["seconds"], notes["path"]
                _warn_of_other_versions(notes["versions"])
        step = int(state.step)
        processes.check_same(f"the meta-step to resume from in workdir {workdir}", step)
        if step % log_every:
            raise ValueError(
                f"log_every must divide the meta-step to resume from; got {log_every} and {step}"
            )
        if home is not None:
            workdirs.claim(home, config)
            non_finites.forget(home)
            history = json_lines.rewind(home / _METRICS, step)
        if devices is not None:
            state, key = mapping.replicate((state, key), devices)

        def seconds() -> float:
            return earlier_seconds + time.perf_counter() - started

        def stop() -> bool:
            out_of_time = max_seconds is not None and seconds() > max_seconds
            return processes.any_of(step >= num_steps or (step > 0 and out_of_time))

        shown = progress and processes.is_first()
        report = stack.enter_context(plots.reporter(shown, step, num_steps))
        last = stop()
        while not last:
            state, scalars = run_chunk(state, key)
            scalars, failed_step = jax.device_get((scalars, state.failed_step))
            if failed_step >= 0:
                params = jax.device_get(state.meta_params)
                task = non_finites.failing_task(learner, sample, root_key, params, failed_step)
                failure = NonFiniteError(int(failed_step), task, root_key, last_checkpoint)
                if home is not None and task is not None:
                    try:
                        non_finites.keep(home, params, int(failed_step), task, root_key)
                    except OSError as error:
                        failure.add_note(f"It could not be kept for a replay: {error}")
                raise failure
            step += log_every
            row = {"step": step, **scalars}
            last = stop()
            scheduled = step % validate_every == 0 or step == num_steps
            if validate and (scheduled or last):
                evaluation = validate(state.meta_params)
                row |= {"validation": evaluation.mean, "validation_ci95": evaluation.ci95}
                if scheduled:  # so that where a run was stopped does not decide which is best
                    best = _with(best, state.meta_params, step, evaluation.mean)[:keep_best]
            history.append(json_lines.row_of(row | {"seconds": seconds()}))
            if home is not None:
                json_lines.append(home / _METRICS, history[-1])
            if log is not None and processes.is_first():
                log(history[-1])
            with contextlib.suppress(OSError):  # whoever read the report may be gone
                report(history[-1])
            if folder is None:
                continue
            signal_name = interrupted()
            leaves = processes.any_of(signal_name is not None)
            if step % checkpoint_every == 0 or last or leaves:
                notes = {
                    "best": [[each.step for each in best], [each.score for each in best]],
                    "seconds": seconds(),
                    "config": config,
                    "versions": _versions(),
                }
                kept = [each.meta_params for each in best]
                kept += [state.meta_params] * (keep_best - len(kept))
                if home is not None:
                    last_checkpoint = checkpoint.save(
                        home / _CHECKPOINTS, step, (state, tuple(kept)), notes
                    )
                if leaves:
                    name = signal_name or "a signal to another process"
                    raise workdirs.InterruptedRunError(name, step, folder)
        if home is not None:
            plots.learning_curve(history, home / _CURVE)
    first = best[0] if best else Scored(state.meta_params, step, math.nan)
    return TrainResult(state.meta_params, first.meta_params, first.step, history, state, best)


def _versions() -> dict[str, str]:
    """Of what is installed; the library itself may run from a folder that is not."""
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _warn_of_other_versions(saved: Mapping[str, str]) -> None:
    now = _versions()
    changed = [f"{n} {v} -> {now[n]}" for n, v in saved.items() if n in now and now[n] != v]
    if changed:
        warnings.warn(
            f"the run goes on with other versions ({', '.join(changed)}), so that its bits may "
            "differ from those of one that was not stopped",
            stacklevel=3,
        )


def _with(best: list[Scored], meta_params: PyTree, step: int, score: float) -> list[Scored]:
    """Best first; of equal scores the earlier."""
    if math.isnan(score):
        return best
    new = Scored(jax.tree.map(jnp.copy, meta_params), step, score)  # The next chunk donates.
    return sorted([*best, new], key=lambda each: -each.score)


def _make_chunk(train_step: Callable[..., Any], length: int, devices: Any) -> Callable[..., Any]:
    """`length` meta-steps in one compiled call, with their metrics summarised on the device."""

    def chunk(state: TrainState, root_key: Array) -> tuple[TrainState, dict[str, Array]]:
        state, scalars = jax.lax.scan(lambda s, _: train_step(s, root_key), state, length=length)
        return state, metrics.reduce_scalars(scalars)

    return mapping.jit_lifted(chunk, donate_argnum=0, devices=devices)


def _check_counts(**counts: Any) -> None:
    for name, value in counts.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1; got {value!r}")
        if value % counts["log_every"]:
            raise ValueError(
                f"{name} must be a multiple of log_every, {counts['log_every']}; got {value}"
            )
