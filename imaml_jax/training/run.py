"""What makes a run last: one writer, checkpoints, signals that wait, a log, and when it ends."""

import contextlib
import dataclasses
import functools
import math
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
    """A training that lasts: a context, made of the arguments of `train` that say how it does.

    From `resume` on, its folder has no other writer, and SIGTERM and SIGINT wait for `keep`. Every
    process calls every method, and the first one writes.

    Attributes:
      folder: the workdir; without one nothing is written.
      step: finished meta-steps.
      last: whether no chunk follows.
      best: the best validated meta-parameters, best first.
      history: the rows of the log.

    Raises:
      ValueError: an argument out of its range.
    """

    folder: Path | None
    config: Mapping[str, Any]
    num_steps: int
    log_every: int
    validate_every: int
    checkpoint_every: int
    keep_best: int
    max_seconds: float | None
    progress: bool
    log: plots.Listener | None
    step: int = 0
    last: bool = False
    best: list[Scored] = dataclasses.field(default_factory=list)
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        super().__init__()
        self._started, self._last_checkpoint = time.perf_counter(), None
        self._listeners: list[plots.Listener] = []
        self._home = self.folder if processes.is_first() else None  # where this process writes
        for name in ("log_every", "num_steps", "validate_every", "checkpoint_every"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1; got {value!r}")
            if value % self.log_every:
                raise ValueError(
                    f"{name} must be a multiple of log_every, {self.log_every}; got {value}"
                )
        check_steps("train", keep_best=self.keep_best)
        if self.keep_best != 1:
            self.config = {**self.config, "keep_best": self.keep_best}
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise ValueError(f"max_seconds must be None or positive; got {self.max_seconds!r}")

    def resume(self, state: TrainState, accept_changes: bool) -> TrainState:
        """The newest state in the folder, which becomes this run's; `state` where there is none.

        Raises:
          ValueError: the folder is in use, or holds a run of another config or model.
        """
        if self._home is not None:
            self.enter_context(workdirs.lock(self._home))
            if checkpoint.steps(self._home / _CHECKPOINTS):
                workdirs.check(self._home, self.config, accept_changes, fixed=("keep_best",))
        if self.folder is not None:
            self._interrupted = self.enter_context(workdirs.deferred_signals())
            like = (state, (state.meta_params,) * self.keep_best)
            found = checkpoint.restore(self.folder / _CHECKPOINTS, like)
            if found:
                (state, kept), notes = found
                self.best = [Scored(*each) for each in zip(kept, *notes["best"], strict=False)]
                self._started -= notes["seconds"]
                self._last_checkpoint = notes["path"]
                _warn_of_other_versions(notes["versions"])
        self.step = int(state.step)
        processes.check_same(f"the meta-step to resume from in workdir {self.folder}", self.step)
        if self.step % self.log_every:
            raise ValueError(
                "log_every must divide the meta-step to resume from; got "
                f"{self.log_every} and {self.step}"
            )
        if self._home is not None:
            workdirs.claim(self._home, self.config)
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

    def validate(
        self, validate: Callable[[PyTree], Evaluation], meta_params: PyTree
    ) -> dict[str, float]:
        """Validates where it is due, and ranks what is scored; what to log of it."""
        is_due = self.step % self.validate_every == 0 or self.step == self.num_steps
        if not is_due and not self.last:
            return {}
        found = validate(meta_params)
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
        if self.folder is None:
            return
        signal_name = self._interrupted()
        leaves = processes.any_of(signal_name is not None)
        is_due = self.step % self.checkpoint_every == 0 or self.last or leaves
        if is_due and self._home is not None:
            notes = {
                "best": [[each.step for each in self.best], [each.score for each in self.best]],
                "seconds": self.seconds(),
                "config": self.config,
                "versions": _versions(),
            }
            kept = [each.meta_params for each in self.best]
            kept += [state.meta_params] * (self.keep_best - len(kept))
            place, tree = self._home / _CHECKPOINTS, (state, tuple(kept))
            self._last_checkpoint = checkpoint.save(place, self.step, tree, notes)
        if leaves:
            name = signal_name or "a signal to another process"
            raise workdirs.InterruptedRunError(name, self.step, self.folder)

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
        """The learning curve of the whole run, where there is a folder."""
        if self._home is not None:
            plots.learning_curve(self.history, self._home / _CURVE)


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
