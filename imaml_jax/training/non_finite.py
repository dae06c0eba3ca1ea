"""What to do about losses and gradients that are not finite."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp

from imaml_jax.training import checkpoint, mapping, metrics
from imaml_jax.types import Array, MetaLearner, PyTree, Task

NonFinite = Literal["stop", "skip"]
_FAILURE = "failure"


class NonFiniteError(FloatingPointError):
    """A meta-step met a loss or gradient that is not finite.

    Attributes:
      step: the number of the meta-step.
      task: the number of the first such task in its batch; None where all tasks are finite and the
        optimiser's update is not.
      checkpoint: the last good checkpoint, or None.
    """

    def __init__(self, step: int, task: int | None, key: Array, last_checkpoint: Path | None):
        where = "the optimiser's update" if task is None else f"task {task}"
        super().__init__(
            f"non-finite loss or gradient in {where} of meta-step {step}. Its tasks and their keys "
            f"are imaml_jax.training.mapping.draw_tasks(sample, key, {step}), drawn from the key "
            f"fold_in(key, {step}) = {key_data(jax.random.fold_in(key, step))}, where "
            f"key = {key_data(key)}; imaml_jax.training.non_finite.replay repeats it by single "
            f"operations. Last good checkpoint: {last_checkpoint}. A lower inner or outer learning "
            "rate or gradient clipping may help."
        )
        self.step = step
        self.task = task
        self.checkpoint = last_checkpoint


def is_sound(tree: PyTree, scalars: Mapping[str, Array]) -> Array:
    """Whether a tree, such as of gradients, and the scalars that end in `loss` are finite."""
    losses = [value for name, value in scalars.items() if name.endswith("loss")]
    watched = [*jax.tree.leaves(tree), *losses]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in watched]))


def without(bad: Array, per_task: PyTree) -> PyTree:
    """With the mean over the other tasks in the place of bad ones; NaN where there is no other."""

    def fill(x: Array) -> Array:
        mask = bad.reshape(-1, *[1] * (x.ndim - 1))
        mean = jnp.sum(jnp.where(mask, 0, x), axis=0) / jnp.sum(~bad)
        return jnp.where(mask, mean, x)

    return jax.tree.map(fill, per_task)


def failing_task(
    learner: MetaLearner, sample: mapping.Sample, key: Array, meta_params: PyTree, step: Array | int
) -> int | None:
    """The number of the first task of batch `step` whose loss or gradient is not finite."""

    @jax.jit
    def sound(meta_params: PyTree, task: Task, key: Array, step: Array) -> Array:
        grads, info = learner.meta_grad(meta_params, task, key, step)
        return is_sound(grads, metrics.info_scalars(info))

    tasks, keys = mapping.draw_tasks(sample, key, step)
    for i in range(len(keys)):
        task = jax.tree.map(lambda x, i=i: x[i], tasks)
        if not sound(meta_params, task, keys[i], step):
            return i
    return None


def keep(workdir: str | os.PathLike, meta_params: PyTree, step: int, task: int, key: Array) -> None:
    """Writes down what `replay` needs; `forget` an earlier failure first."""
    failure = (meta_params, jnp.int32(step), jnp.int32(task))
    notes = {"root_key": key_data(key)}
    checkpoint.save(Path(workdir) / _FAILURE, step, failure, notes, keep=1)


def forget(workdir: str | os.PathLike) -> None:
    """Removes what `keep` wrote, where there is something."""
    shutil.rmtree(Path(workdir) / _FAILURE, ignore_errors=True)


def replay(
    learner: MetaLearner,
    sample: mapping.Sample,
    *,
    key: Array,
    workdir: str | os.PathLike,
    example_inputs: PyTree = None,
) -> None:
    """Repeats the task that made the run in `workdir` fail, operation by operation.

    Returns where nothing gave NaN, which is so where infinity did.

    Args:
      learner: the algorithm.
      sample: as in training.
      key: the root key of the training.
      workdir: of the failed run.
      example_inputs: what `learner.init` takes; None (default) for the inputs of a support set.

    Raises:
      FloatingPointError: at the first operation whose result is NaN.
      ValueError: if no run failed there, or one of another model or key.
    """
    if example_inputs is None:
        inputs = jax.eval_shape(sample, key).support.inputs
        example_inputs = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), inputs)
    like = (learner.init(key, example_inputs), jnp.int32(0), jnp.int32(0))
    found = checkpoint.restore(Path(workdir) / _FAILURE, like)
    if found is None:
        raise ValueError(f"workdir {workdir} holds no failed run")
    (meta_params, step, number), notes = found
    if notes["root_key"] != key_data(key):
        raise ValueError(
            f"key={key_data(key)} is not {notes['root_key']}, that of the failed run in {workdir}"
        )
    tasks, keys = mapping.draw_tasks(sample, key, step)
    task = jax.tree.map(lambda x: x[number], tasks)
    with jax.debug_nans(True), jax.disable_jit():
        learner.meta_grad(meta_params, task, keys[number], step)


def key_data(key: Array) -> list[int]:
    """The words of a typed or a raw key."""
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return (jax.random.key_data(key) if typed else key).tolist()
