"""A trained few-shot classifier as a file, its accuracy measured as it is stored."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.shared import common, scores
from imaml_jax.data import episodes
from imaml_jax.data.images import check_image
from imaml_jax.protocols import Protocol, model_file
from imaml_jax.protocols.model_file import Description
from imaml_jax.training import processes
from imaml_jax.training.evaluation import Evaluation

_OF_RUN = ("command", "seed", "best_step", "trained_meta_steps", "seconds", "device", "machine")
_OF_RUN += ("versions", "date")
_SOME = 2000  # training images that tell their brightness


def check(path: Path, splits: episodes.Splits) -> None:
    """Refuses, before the training, what could not be saved after it, and says what will be lost.

    Raises:
      ValueError: the path is taken or cannot be written, or images that are not square, grey or
        RGB.
    """
    is_taken = model_file.check_place(path)
    height, width, channels = splits.train.images.shape[1:]
    if height != width:
        raise ValueError(f"model={path} needs square images, these are {height}x{width}")
    check_image(height, channels)
    if processes.is_first():
        common.check_folder(path.expanduser(), f"model={path}")
    if is_taken:
        common.say(
            f"model={path} holds a model already, which this run replaces at its end; to keep "
            "both, stop it and name another folder"
        )


def save(
    path: Path,
    config: Any,
    splits: episodes.Splits,
    dataset: str,
    meta_params: Any,
    results: dict[str, Any],
) -> tuple[Path, Description]:
    """Rounds the weights, measures what is left of them on the test tasks, and writes the model.

    Args:
      path: the model's folder.
      config: the run, a `few_shot.Config`.
      splits: its data.
      dataset: their name.
      meta_params: its weights.
      results: what is known of the run, with the accuracy before rounding.

    Returns:
      The path, and what the model is.
    """
    stored = model_file.rounded(meta_params)
    protocol = config.settings
    test = measure(config, protocol, splits, stored)
    alone = measure(config, model_file.independent(protocol), splits, stored)
    description = Description(
        dataset=dataset,
        ways=config.ways,
        shots=config.shots,
        image_size=splits.train.images.shape[1],
        channels=splits.train.images.shape[3],
        brightness=_brightness(splits.train, protocol.tasks.invert),
        protocol=protocol,
        test_tasks=protocol.tasks.test_tasks,
        test_accuracy=test.mean,
        test_ci95=_or_none(test.ci95),
        test_accuracy_unrounded=results["test_accuracy"],
        test_accuracy_alone=alone.mean,
        test_ci95_alone=_or_none(alone.ci95),
        run={name: results[name] for name in _OF_RUN if name in results},
    )
    if processes.is_first():
        model_file.save_model(path, stored, description)
    return path, description


def measure(
    config: Any, protocol: Protocol, splits: episodes.Splits, meta_params: Any
) -> Evaluation:
    """Accuracy on the test tasks of a run; `config` has its ways, shots, map_tasks and devices."""
    learner, tasks = protocol.build(config.ways), protocol.tasks
    on_test = (tasks, config, splits.test, tasks.test_tasks, common.TEST_KEY)
    return scores.accuracy_on(learner, *on_test)(meta_params)


def report(saved: tuple[Path, Description]) -> str:
    """The model in words."""
    path, found = saved
    return (
        f"model in {path}: test accuracy {percent(found.test_accuracy, found.test_ci95)} in "
        f"float16, {100 * found.test_accuracy_unrounded:.2f}% before; "
        f"{percent(found.test_accuracy_alone, found.test_ci95_alone)} where each query image is "
        "normalised without the others, as experiments.classify does"
    )


def percent(mean: float, ci95: float | None) -> str:
    """An accuracy with its interval, if it has one, in words."""
    return f"{100 * mean:.2f}" + ("%" if ci95 is None else f" ± {100 * ci95:.2f}%")


def _or_none(ci95: float) -> float | None:
    return None if np.isnan(ci95) else ci95


def _brightness(dataset: episodes.Dataset, invert: bool) -> float:
    total = dataset.images.shape[0]
    indices = jnp.linspace(0, total - 1, min(total, _SOME)).astype(jnp.int32)
    return float(episodes.to_unit(episodes.take(dataset, indices), invert).mean())
