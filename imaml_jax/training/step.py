"""One meta-step as a pure function."""

from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from imaml_jax.training import mapping, metrics
from imaml_jax.training.non_finite import NonFinite, is_sound, without
from imaml_jax.types import Array, MetaLearner, PyTree, Task

_INIT_INDEX = 2**32 - 1  # No meta-step has this number, so no batch shares the key of `init`.


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


TrainStep = Callable[[TrainState, Array], tuple[TrainState, dict[str, Array]]]


def init_state(tx: optax.GradientTransformation, meta_params: PyTree) -> TrainState:
    """The state before the first meta-step; copies `meta_params`, so that it may be donated."""
    state = TrainState(jnp.int32(0), meta_params, tx.init(meta_params), jnp.int32(-1))
    # A weak type would become strong in the first step and compile the second one anew.
    return jax.tree.map(lambda x: jnp.array(x, jnp.asarray(x).dtype, copy=True), state)


def init_meta_params(learner: MetaLearner, key: Array, example_inputs: Any) -> PyTree:
    """The meta-parameters from which `train` starts with this key."""
    return jax.jit(learner.init)(jax.random.fold_in(key, _INIT_INDEX), example_inputs)


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
            sound = jax.vmap(is_sound)(grads, infos)
            grads, infos = without(~sound, (grads, infos))
            skipped = {"skipped_tasks": jnp.sum(~sound)}
        grads = jax.tree.map(lambda g: jnp.mean(g, axis=0), grads)
        norm = {"gradient_norm": optax.tree.norm(grads)}
        scalars = metrics.reduce_scalars(infos) | norm | skipped
        updates, opt_state = tx.update(grads, state.opt_state, state.meta_params)
        meta_params = optax.apply_updates(state.meta_params, updates)
        return Update(meta_params, opt_state, grads, scalars)

    return latched(update)


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
        good = is_sound((grads, meta_params), scalars) & (state.failed_step < 0)
        new = TrainState(state.step + 1, meta_params, opt_state, state.failed_step)
        # A frozen state meets the same batch again, so `failed_step` keeps its first value.
        failed = state._replace(failed_step=state.step)
        return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, failed), scalars

    return train_step
