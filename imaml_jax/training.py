"""Meta-training: one meta-step as a pure function, and the thin loop that drives many of them."""

import contextlib
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping
from importlib import metadata
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from imaml_jax import checkpoint, json_lines, mapping, metrics, plots, processes
from imaml_jax import non_finite as non_finites
from imaml_jax import workdir as workdirs
from imaml_jax.evaluation import Evaluation
from imaml_jax.learners.base import check_steps
from imaml_jax.non_finite import NonFinite, NonFiniteError
from imaml_jax.types import Array, MetaLearner, PyTree, Task

_INIT_INDEX = 2**32 - 1  # No meta-step has this number, so no batch shares the key of `init`.
_CHECKPOINTS, _METRICS, _CURVE = "checkpoints", "metrics.jsonl", "learning_curve.png"
_PACKAGES = ("imaml_jax", "flax", "jax", "jaxlib", "optax", "orbax-checkpoint")


class TrainState(NamedTuple):
    """What a meta-step changes.

    Attributes:
      step: int32, the number of finished meta-steps.
      meta_params: the meta-parameters.
      opt_state: the state of the outer Optax transform.
      failed_step: int32, the meta-step whose loss or gradient was not finite, or -1. Once set, the
        state stays as it was before that step.
    """

    step: Array
    meta_params: PyTree
    opt_state: PyTree
    failed_step: Array


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


def init_state(tx: optax.GradientTransformation, meta_params: PyTree) -> TrainState:
    """The state before the first meta-step; copies `meta_params`, so that it may be donated."""
    state = TrainState(jnp.int32(0), meta_params, tx.init(meta_params), jnp.int32(-1))
    # A weak type would become strong in the first step and compile the second one anew.
    return jax.tree.map(lambda x: jnp.array(x, jnp.asarray(x).dtype, copy=True), state)


def init_meta_params(learner: MetaLearner, key: Array, example_inputs: Any) -> PyTree:
    """The meta-parameters from which `train` starts with this key."""
    return learner.init(jax.random.fold_in(key, _INIT_INDEX), example_inputs)


TrainStep = Callable[[TrainState, Array], tuple[TrainState, dict[str, Array]]]


def make_train_step(
    learner: MetaLearner,
    tx: optax.GradientTransformation,
    sample: mapping.Sample,
    *,
    map_tasks: mapping.MapTasks = None,
    devices: mapping.Devices = None,
    non_finite: NonFinite = "stop",
) -> TrainStep:
    """Makes the pure function of one meta-step.

    It draws task batch number `state.step`, averages `learner.meta_grad` over the tasks and feeds
    the mean to `tx`. If the mean gradient, the new parameters or a field of `info` that ends in
    `loss` is not finite, it changes nothing but `failed_step`, then and ever after. With
    `non_finite="skip"` it leaves out the tasks of which that is true, unless it is true of all.

    Args:
      learner: the algorithm.
      tx: the outer optimiser, with its clipping and schedules.
      sample: `key -> Task` with a leading task axis of fixed length; keep it unjitted.
      map_tasks: how tasks are mapped, see `mapping.map_over_tasks`.
      devices: devices over which the tasks are sharded; None (default) for no sharding. The
        batch does not depend on it, and its number of tasks must be a multiple of theirs.
      non_finite: "stop" or "skip".

    Returns:
      `(state, root_key) -> (state, metrics)`. `metrics` has the fields of the learner's info, each
      reduced over tasks by `metrics.reduce_scalars`, `gradient_norm` of the mean gradient, and with
      "skip", the number of `skipped_tasks`.

    Raises:
      ValueError: if `map_tasks`, `devices` or `non_finite` is invalid.
    """
    if non_finite not in get_args(NonFinite):
        raise ValueError(f"non_finite={non_finite!r} must be one of {get_args(NonFinite)}")

    def task_grad(shared: tuple[PyTree, Array], task: Task, key: Array) -> tuple[PyTree, dict]:
        meta_params, step = shared
        grads, info = learner.meta_grad(meta_params, task, key, step)
        return grads, metrics.info_scalars(info)

    task_grads = mapping.map_over_tasks(task_grad, map_tasks, devices)

    def update(state: TrainState, root_key: Array) -> Update:
        tasks, keys = mapping.draw_tasks(sample, root_key, state.step)
        grads, infos = task_grads((state.meta_params, state.step), tasks, keys)
        skipped = {}
        if non_finite == "skip":
            sound = jax.vmap(non_finites.is_sound)(grads, infos)
            grads, infos = non_finites.without(~sound, (grads, infos))
            skipped = {"skipped_tasks": jnp.sum(~sound)}
        grads = jax.tree.map(lambda g: jnp.mean(g, axis=0), grads)
        scalars = metrics.reduce_scalars(infos) | {"gradient_norm": optax.tree.norm(grads)}
        scalars |= skipped
        updates, opt_state = tx.update(grads, state.opt_state, state.meta_params)
        meta_params = optax.apply_updates(state.meta_params, updates)
        return Update(meta_params, opt_state, grads, scalars)

    return latched(update)


class Update(NamedTuple):
    """What a meta-step would change, before it is known to be finite.

    Attributes:
      meta_params: the new meta-parameters.
      opt_state: the new state of the outer optimiser.
      grads: the mean gradient.
      scalars: what to log.
    """

    meta_params: PyTree
    opt_state: PyTree
    grads: PyTree
    scalars: dict[str, Array]


def latched(update: Callable[[TrainState, Array], Update]) -> TrainStep:
    """The meta-step of any outer optimiser: `update`, unless something in it is not finite.

    If the gradient, the new parameters or a scalar whose name ends in `loss` is not finite, it
    changes nothing but `failed_step`, then and ever after.

    Args:
      update: `(state, root_key) -> Update`.

    Returns:
      `(state, root_key) -> (state, scalars)`.
    """

    def train_step(state: TrainState, root_key: Array) -> tuple[TrainState, dict[str, Array]]:
        meta_params, opt_state, grads, scalars = update(state, root_key)
        losses = [value for name, value in scalars.items() if name.endswith("loss")]
        watched = [*jax.tree.leaves((grads, meta_params)), *losses]
        finite = [jnp.all(jnp.isfinite(x)) for x in watched]
        good = jnp.all(jnp.stack(finite)) & (state.failed_step < 0)

        new = TrainState(state.step + 1, meta_params, opt_state, state.failed_step)
        # A frozen state meets the same batch again, so `failed_step` keeps its first value.
        failed = state._replace(failed_step=state.step)
        return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, failed), scalars

    return train_step


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
    if keep_best != 1:
        check_steps("train", keep_best=keep_best)
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
                workdirs.check(home, config, accept_changes)
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
