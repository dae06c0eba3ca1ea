"""What makes a run last: one writer, checkpoints, signals that wait, a log, and when it ends."""

import contextlib
import dataclasses
import functools
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

from imaml_jax.learners.base import check_steps
from imaml_jax.training import checkpoint, json_lines, non_finite, plots, processes
from imaml_jax.training import workdir as workdirs
from imaml_jax.training.evaluation import Evaluation
from imaml_jax.training.mapping import Sample
from imaml_jax.training.step import TrainState
from imaml_jax.types import Array, MetaLearner, PyTree

_CHECKPOINTS, _METRICS, _CURVE = "checkpoints", "metrics.jsonl", "learning_curve.png"
_PACKAGES = ("imaml_jax", "flax", "jax", "jaxlib", "optax", "orbax-checkpoint")


class Scored(NamedTuple):
    """Meta-parameters with the meta-step that made them and their validation score."""

    meta_params: PyTree
    step: int
    score: float


@dataclasses.dataclass(kw_only=True)
class Run(contextlib.ExitStack):
    """What makes a training last; `train` opens one as a context, and takes its settings.

    With a workdir, which from `resume` on has no other writer, SIGTERM and SIGINT let the chunk end
    and be kept before they stop the run; the second one stops it at once. Of several processes,
    each calls every method, and the first one writes.

    Attributes:
      num_steps: meta-steps in all, a multiple of `log_every`.
      log_every: meta-steps of one chunk, that is of one compiled call and one row of the log.
      validate: `meta_params -> Evaluation`, higher is better, with keys of its own that do not
        change from call to call. None (default) for no validation.
      validate_every: a multiple of `log_every`, its default; the last meta-step is validated too,
        and where `max_seconds` stops, which is logged but not taken for the best.
      keep_best: how many of the best validated meta-parameters to keep, for an `ensemble`.
      checkpoint_every: a multiple of `log_every`, its default; the end is checkpointed too.
      workdir: holds `config.json`, `metrics.jsonl`, `checkpoints/` and, at the end,
        `learning_curve.png`. None (default) writes nothing.
      max_seconds: stops after the first chunk that ends later than this many seconds of wall clock,
        compilation, validation and the earlier parts of a resumed run included.
      progress: whether standard error shows a progress bar, or a line a log point where it is not a
        terminal.
      config: what JSON can hold, kept with the run; a run resumes only with an equal one, so leave
        out what may change.
      accept_changes: resumes with another config all the same; a warning names what differs.
      migrate: translates the `config` that an earlier version kept with the run into the form of
        this one, before they are compared. None (default) for none.
      log: takes each new row of the log, in the first process only, such as `writers.open_writers`
        yields. None (default) for nothing beside `metrics.jsonl`.
      step: finished meta-steps; no setting, as those below.
      last: whether no chunk follows.
      best: the best validated meta-parameters, best first.
      history: the rows of the log.

    Raises:
      ValueError: a setting that is out of range.
    """

    num_steps: int
    log_every: int = 100
    validate: Callable[[PyTree], Evaluation] | None = None
    validate_every: int | None = None
    keep_best: int = 1
    checkpoint_every: int | None = None
    workdir: str | os.PathLike | None = None
    max_seconds: float | None = None
    progress: bool = True
    config: Mapping[str, Any] | None = None
    accept_changes: bool = False
    migrate: workdirs.Migrate | None = None
    log: plots.Listener | None = None
    step: int = dataclasses.field(default=0, init=False)
    last: bool = dataclasses.field(default=False, init=False)
    best: list[Scored] = dataclasses.field(default_factory=list, init=False)
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list, init=False)

    def __post_init__(self):
        super().__init__()
        self._started, self._last_checkpoint = time.perf_counter(), None
        self._listeners: list[plots.Listener] = []
        self._folder = None if self.workdir is None else Path(self.workdir)
        self._home = self._folder if processes.is_first() else None  # where this process writes
        for name in ("log_every", "num_steps", "validate_every", "checkpoint_every"):
            value = getattr(self, name)
            if value is None and name in ("validate_every", "checkpoint_every"):
                continue
            if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1; got {value!r}")
            if value % self.log_every:
                raise ValueError(
                    f"{name} must be a multiple of log_every, {self.log_every}; got {value}"
                )
        check_steps("train", keep_best=self.keep_best)
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise ValueError(f"max_seconds must be None or positive; got {self.max_seconds!r}")

    def resume(self, state: TrainState, key: Array) -> TrainState:
        """The newest state in the workdir, now this run's; `state` where there is none.

        Raises:
          ValueError: the workdir is in use, or holds a run of another config, key or model.
        """
        self._config = {**(self.config or {}), "root_key": non_finite.key_data(key)}
        if self.keep_best != 1:
            self._config["keep_best"] = self.keep_best
        if self._home is not None:
            self.enter_context(workdirs.lock(self._home))
            if checkpoint.steps(self._home / _CHECKPOINTS):
                fixed = ("keep_best",)
                options = (self.accept_changes, fixed, self.migrate)
                workdirs.check(self._home, self._config, *options)
        if self._folder is not None:
            self._interrupted = self.enter_context(workdirs.deferred_signals())
            like = (state, (state.meta_params,) * self.keep_best)
            found = checkpoint.restore(self._folder / _CHECKPOINTS, like)
            if found:
                (state, kept), notes = found
                self.best = [Scored(*each) for each in zip(kept, *notes["best"], strict=False)]
                self._started -= notes["seconds"]
                self._last_checkpoint = notes["path"]
                _warn_of_other_versions(notes["versions"])
        self.step = int(state.step)
        processes.check_same(f"the meta-step to resume from in workdir {self.workdir}", self.step)
        if self.step % self.log_every:
            raise ValueError(
                "log_every must divide the meta-step to resume from; got "
                f"{self.log_every} and {self.step}"
            )
        if self._home is not None:
            workdirs.claim(self._home, self._config)
            non_finite.forget(self._home)
            self.history = json_lines.rewind(self._home / _METRICS, self.step)
            self._listeners.append(functools.partial(json_lines.append, self._home / _METRICS))
        if self.log is not None and processes.is_first():
            self._listeners.append(self.log)
        if self.progress and processes.is_first():
            report = plots.reporter(self.step, self.num_steps)
            self._listeners.append(self.enter_context(report))
        self.advance(0)
        return state

    def seconds(self) -> float:
        """What the run has taken, without the time for which it was stopped."""
        return time.perf_counter() - self._started

    def advance(self, meta_steps: int) -> None:
        """Counts finished meta-steps and finds out whether more follow."""
        self.step += meta_steps
        out_of_time = self.max_seconds is not None and self.seconds() > self.max_seconds
        ended = self.step >= self.num_steps or (self.step > 0 and out_of_time)
        self.last = processes.any_of(ended)

    def validated(self, meta_params: PyTree) -> dict[str, float]:
        """What to log of a validation where one is due; ranks the meta-parameters by it."""
        is_due = self._is_due(self.validate_every) or self.step == self.num_steps
        if self.validate is None or not (is_due or self.last):
            return {}
        found = self.validate(meta_params)
        # Where a run was stopped does not decide which is best; of equal ones, the earlier is.
        if is_due and not math.isnan(found.mean):
            copy = jax.tree.map(jnp.copy, meta_params)  # the next chunk donates
            ranked = [*self.best, Scored(copy, self.step, found.mean)]
            self.best = sorted(ranked, key=lambda each: -each.score)[: self.keep_best]
        return {"validation": found.mean, "validation_ci95": found.ci95}

    def tell(self, scalars: Mapping[str, Any]) -> None:
        """Adds a row to the history, the log, and what a person sees."""
        row = json_lines.row_of({"step": self.step, **scalars, "seconds": self.seconds()})
        self.history.append(row)
        for listen in self._listeners:
            listen(row)

    def keep(self, state: TrainState) -> None:
        """Saves a checkpoint where one is due: by schedule, at the end, or at a signal.

        Raises:
          InterruptedRunError: a signal came.
        """
        if self._folder is None:
            return
        signal_name = self._interrupted()
        leaves = processes.any_of(signal_name is not None)
        is_due = self._is_due(self.checkpoint_every) or self.last or leaves
        if is_due and self._home is not None:
            notes = {
                "best": [[each.step for each in self.best], [each.score for each in self.best]],
                "seconds": self.seconds(),
                "config": self._config,
                "versions": _versions(),
            }
            kept = [each.meta_params for each in self.best]
            kept += [state.meta_params] * (self.keep_best - len(kept))
            place, tree = self._home / _CHECKPOINTS, (state, tuple(kept))
            self._last_checkpoint = checkpoint.save(place, self.step, tree, notes)
        if leaves:
            name = signal_name or "a signal to another process"
            raise workdirs.InterruptedRunError(name, self.step, self._folder)

    def failure(
        self, learner: MetaLearner, sample: Sample, key: Array, state: TrainState
    ) -> non_finite.NonFiniteError:
        """What stops a run that met a loss or gradient that is not finite, kept for `replay`."""
        params, step = jax.device_get((state.meta_params, state.failed_step))
        task = non_finite.failing_task(learner, sample, key, params, step)
        error = non_finite.NonFiniteError(int(step), task, key, self._last_checkpoint)
        if self._home is not None and task is not None:
            try:
                non_finite.keep(self._home, params, int(step), task, key)
            except OSError as reason:
                error.add_note(f"It could not be kept for a replay: {reason}")
        return error

    def draw(self) -> None:
        """The learning curve of the whole run, where there is a workdir."""
        if self._home is not None:
            plots.learning_curve(self.history, self._home / _CURVE)

    def _is_due(self, every: int | None) -> bool:
        return self.step % (every or self.log_every) == 0


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
            stacklevel=4,
        )
