"""Few-shot evaluation: scores and predictions over many test tasks, and ensembles."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from imaml_jax.learners.base import Average, mean_outputs
from imaml_jax.training import mapping, metrics
from imaml_jax.types import Array, MetaLearner, PyTree, Task


class Evaluation(NamedTuple):
    """What a set of test tasks says about some meta-parameters.

    Attributes:
      mean: the mean score.
      ci95: the half-width of its 95% confidence interval over tasks; NaN for a single task.
      per_task: `[num_tasks]` scores.
      info: the fields of `adapt`'s info, averaged over tasks (`min_*` and `max_*`: the extreme).
    """

    mean: float
    ci95: float
    per_task: np.ndarray
    info: dict[str, float]


class Predictions(NamedTuple):
    """The outputs for the query examples of test tasks.

    Attributes:
      outputs: `[num_tasks, ...]`, of each task what `predict` returns: `[n, classes]` logits, or
        `[samples, n, ...]` of a learner that leaves its samples stacked.
      targets: `[num_tasks, n, ...]`.
      info: as in `Evaluation`.
    """

    outputs: Any
    targets: Any
    info: dict[str, float]


def make_evaluate(
    learner: MetaLearner,
    sample: mapping.Sample,
    *,
    num_tasks: int,
    score_fn: Callable[[Any, Any], Array] = metrics.accuracy,
    map_tasks: mapping.MapTasks = None,
    devices: mapping.Devices = None,
) -> Callable[[PyTree, Array], Evaluation]:
    """Makes a compiled evaluation, to be called with many meta-parameters and keys.

    Each call of `sample` draws `m` tasks; as many calls are made as `num_tasks` takes, call `i`
    with a key that depends only on the evaluation's key and `i`, and what is too many is cropped.
    So one key and one `sample` give every learner the same tasks.

    Args:
      learner: the algorithm; its `adapt` runs with the evaluation settings.
      sample: `key -> Task` with a leading axis of `m` tasks, the same signature as in training.
      num_tasks: how many tasks to score.
      score_fn: `(outputs, targets) -> scalar` for the query examples of one task.
      map_tasks: how the `m` tasks of a call are mapped, see `mapping.map_over_tasks`.
      devices: devices over which those tasks are sharded; None (default) for no sharding.

    Returns:
      `(meta_params, key) -> Evaluation`, compiled at its first call.

    Raises:
      ValueError: if `num_tasks` is not a positive integer, `map_tasks` or `devices` is invalid, or
        a score, later, is no scalar.
    """
    score_all = _over_test_tasks(learner, sample, num_tasks, score_fn, map_tasks, devices)

    def evaluate_params(meta_params: PyTree, key: Array) -> Evaluation:
        per_task, info = score_all(meta_params, key)
        if per_task.ndim != 1:
            raise ValueError(f"score_fn must return a scalar; got {per_task.shape[1:]} for a task")
        mean, ci95 = metrics.mean_ci95(per_task)
        return Evaluation(mean, ci95, per_task, info)

    return evaluate_params


def evaluate(
    learner: MetaLearner,
    meta_params: PyTree,
    sample: mapping.Sample,
    key: Array,
    **settings: Any,
) -> Evaluation:
    """Scores `meta_params` once; `make_evaluate`, which see, compiles once for many calls.

    Args:
      learner: the algorithm.
      meta_params: what `learner.init` or training returned.
      sample: `key -> Task` with a leading task axis.
      key: decides the test tasks, whatever the learner.
      **settings: `num_tasks`, which must be given, `score_fn`, `map_tasks` and `devices`, as
        `make_evaluate` has them.

    Returns:
      The scores with their mean and confidence interval.

    Raises:
      ValueError: as `make_evaluate`.
    """
    return make_evaluate(learner, sample, **settings)(meta_params, key)


def make_predictions(
    learner: MetaLearner,
    sample: mapping.Sample,
    *,
    num_tasks: int,
    map_tasks: mapping.MapTasks = None,
    devices: mapping.Devices = None,
) -> Callable[[PyTree, Array], Predictions]:
    """Makes a compiled collection of outputs, for scores that pool the examples of all tasks.

    The tasks are those of `make_evaluate` for the same key, and so are the arguments.

    Args:
      learner: the algorithm.
      sample: `key -> Task` with a leading task axis.
      num_tasks: how many tasks.
      map_tasks: how tasks are mapped.
      devices: devices over which tasks are sharded.

    Returns:
      `(meta_params, key) -> Predictions` on the host, compiled at its first call.

    Raises:
      ValueError: as `make_evaluate`.

    Example:
      The calibration error of a classifier::

          collect = make_predictions(learner, sample, num_tasks=600)
          outputs, labels, _ = collect(meta_params, key)
          confidences, correct = metrics.confidence_and_correct(outputs, labels)
          metrics.calibration_error(confidences, correct).ece
    """
    predict_all = _over_test_tasks(
        learner, sample, num_tasks, lambda *both: both, map_tasks, devices
    )

    def collect(meta_params: PyTree, key: Array) -> Predictions:
        (outputs, targets), info = predict_all(meta_params, key)
        return Predictions(outputs, targets, info)

    return collect


def ensemble(learner: MetaLearner, *, average: Average = mean_outputs) -> MetaLearner:
    """A learner that adapts several meta-parameters and averages their outputs.

    Its meta-parameters are those of the members stacked to `[members, ...]`, as `stack_members`
    makes them, of the checkpoints with the best validation scores, say. Every member adapts with
    the same key. For evaluation: `init` and `meta_grad` remain those of a single member.

    Args:
      learner: the algorithm of every member.
      average: `[members, ...] -> [...]` of the outputs; the default averages logits, as MAML++
        does, `mixture_logits` probabilities.

    Returns:
      The `MetaLearner`. In `info`, means over members (`min_*` and `max_*`: the extreme).

    References:
      Antoniou, Edwards, Storkey, "How to train your MAML", ICLR 2019, section 5.
    """

    def adapt(meta_params: PyTree, support: Any, key: Array) -> tuple[PyTree, Any]:
        adapted, info = jax.vmap(learner.adapt, (0, None, None))(meta_params, support, key)
        return adapted, info._replace(**metrics.reduce_scalars(metrics.info_scalars(info)))

    def predict(adapted: PyTree, inputs: Any) -> Any:
        outputs = jax.vmap(learner.predict, (0, None))(adapted, inputs)
        return jax.tree.map(average, outputs)

    return learner._replace(adapt=adapt, predict=predict)


def stack_members(members: Sequence[PyTree]) -> PyTree:
    """The meta-parameters of an `ensemble`, from those of its members.

    Raises:
      ValueError: no member.
    """
    if not members:
        raise ValueError("members must hold the meta-parameters of at least one; got none")
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)


def _over_test_tasks(
    learner: MetaLearner,
    sample: mapping.Sample,
    num_tasks: int,
    score_fn: Callable[[Any, Any], Any],
    map_tasks: mapping.MapTasks,
    devices: mapping.Devices,
) -> Callable[[PyTree, Array], tuple[Any, dict[str, float]]]:
    """`(meta_params, key) -> (scores [num_tasks, ...], info)`, compiled, on the host."""
    if not isinstance(num_tasks, int) or num_tasks < 1:
        raise ValueError(f"num_tasks must be an integer of at least 1; got {num_tasks!r}")

    def score_task(meta_params: PyTree, task: Task, key: Array) -> tuple[Any, dict[str, Array]]:
        adapted, info = learner.adapt(meta_params, task.support, key)
        outputs = learner.predict(adapted, task.query.inputs)
        return score_fn(outputs, task.query.targets), metrics.info_scalars(info)

    score_tasks = mapping.map_over_tasks(score_task, map_tasks, devices)

    def crop(x: Array) -> Array:
        return x.reshape(-1, *x.shape[2:])[:num_tasks]

    def score_all(meta_params: PyTree, key: Array) -> tuple[Any, dict[str, Array]]:
        num_calls = -(-num_tasks // mapping.num_tasks_of(jax.eval_shape(sample, key)))

        def score_call(index: Array) -> tuple[Any, dict[str, Array]]:
            return score_tasks(meta_params, *mapping.draw_tasks(sample, key, index))

        scores, infos = jax.tree.map(crop, jax.lax.map(score_call, jnp.arange(num_calls)))
        return scores, metrics.reduce_scalars(infos)

    score_all = mapping.jit_lifted(score_all, devices=devices)

    def run(meta_params: PyTree, key: Array) -> tuple[Any, dict[str, float]]:
        if devices is not None:
            meta_params, key = mapping.replicate((meta_params, key), devices)
        elif jax.process_count() > 1:
            meta_params = jax.device_get(meta_params)
        scores, info = jax.device_get(score_all(meta_params, key))
        return scores, {name: float(value) for name, value in info.items()}

    return run
