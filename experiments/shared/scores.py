"""Scores of few-shot classifiers on tasks that a key and the data decide."""

from collections.abc import Callable
from typing import Any

import jax

from experiments.shared import common
from imaml_jax.data import episodes
from imaml_jax.learners import cross_entropy
from imaml_jax.protocols.protocol import ImageTasks
from imaml_jax.training import metrics
from imaml_jax.training.evaluation import Evaluation, Predictions, make_evaluate, make_predictions
from imaml_jax.types import MetaLearner

_TASKS_A_CALL = 40  # whatever the number of devices, so that all runs meet the same tasks


def accuracy_on(learner: MetaLearner, *tasks: Any) -> Callable[[Any], Evaluation]:
    """Accuracy on tasks; arguments as those of `_over_tasks`."""
    return _over_tasks(make_evaluate, learner, *tasks)


def predictions_on(learner: MetaLearner, *tasks: Any) -> Callable[[Any], Predictions]:
    """The outputs on tasks; arguments as those of `_over_tasks`."""
    return _over_tasks(make_predictions, learner, *tasks)


def _over_tasks(
    make: Callable[..., Any],
    learner: MetaLearner,
    tasks: ImageTasks,
    config: Any,
    dataset: episodes.Dataset,
    num_tasks: int,
    seed: tuple[int, int],
) -> Callable[[Any], Any]:
    """A function of meta-parameters, on `num_tasks` tasks that only the seed and data decide."""
    tasks_a_call = min(num_tasks, _TASKS_A_CALL)
    shared = tasks_a_call % jax.process_count() == 0  # else each process scores all for itself

    def sample(key):
        return episodes.sample_tasks(
            key,
            dataset,
            num_tasks=tasks_a_call,
            ways=config.ways,
            shots=config.shots,
            queries=tasks.test_queries,
            rotations=tasks.test_rotations,
            invert=tasks.invert,
        )

    run = make(
        learner,
        sample,
        num_tasks=num_tasks,
        map_tasks=config.map_tasks,
        devices=common.task_devices(config.devices, tasks_a_call) if shared else None,
    )
    return lambda meta_params: run(meta_params, common.fixed_key(seed))


def scores(predictions: Predictions) -> dict[str, float]:
    """Accuracy over tasks, and how well its probabilities are calibrated over all examples."""
    outputs, labels, _ = predictions
    mean, ci95 = metrics.mean_ci95(metrics.is_right(outputs, labels).mean(-1))
    names = ("test_nll", "test_brier", "test_ece", "test_mce")
    values = map(float, _over_examples(outputs, labels))
    return {"test_accuracy": mean, "test_ci95": ci95, **dict(zip(names, values, strict=True))}


@jax.jit
def calibration(predictions: Predictions) -> metrics.Calibration:
    """Over the examples of all tasks."""
    confidences, correct = metrics.confidence_and_correct(predictions.outputs, predictions.targets)
    return metrics.calibration_error(confidences, correct)


@jax.jit
def _over_examples(outputs: jax.Array, labels: jax.Array) -> tuple[jax.Array, ...]:
    """NLL, Brier score, ECE and MCE."""
    errors = calibration(Predictions(outputs, labels, {}))
    proper = cross_entropy(outputs, labels), metrics.brier(outputs, labels)
    return *proper, errors.ece, errors.mce
