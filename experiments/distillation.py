"""Data-set distillation: a few synthetic images a class that train a classifier as well as many.

    python -m experiments.distillation

A linear classifier with L2 regularisation is trained on synthetic images alone. Images and
regularisation strength are trained on its loss on all real training images, differentiated through
the classifier's training. Beside it stand the same classifier trained on as many real images, on
the class means and on all of them, each with the strength of a grid that is best by the same loss.
Writes OUTPUT.json and OUTPUT.png with the images.

Wang et al., "Dataset distillation", 2018, which differentiates through unrolled training.
"""

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.shared import bundled, common, linear_model, reports
from imaml_jax.learners.settings import Count, Positive, Record, Seed
from imaml_jax.training.plots import new_figure
from imaml_jax.types import Batch

NUM_CLASSES, SIDE = 10, 8
LOG_GRID = np.log(np.logspace(-5, 0, 11))
LOG_START = math.log(0.01)


@dataclasses.dataclass(frozen=True)
class Config(Record):
    """What is distilled."""

    per_class: Count = 1
    """Synthetic images a class, at least 1."""
    train_examples: Count = 1000
    """Real training images; the others are for the test; at least 1."""
    steps: Count = 400
    """Steps of Adam on the images and on the logarithm of the regularisation strength, at least
    1."""
    outer_rate: Positive = 0.01
    """Its rate, above 0."""
    draws: Count = 20
    """Random draws of real images to compare with, at least 1."""
    seed: Seed = 0
    """Seed of the split and of the draws; the synthetic images begin as a draw of their own; at
    least 0."""
    output: Path = Path("runs/distillation")
    """Where to write, without an ending."""


def main(config: Config) -> dict[str, Any]:
    """Distils, writes and prints.

    Returns:
      The settings, the test accuracies (of the random images one for each draw), losses on the
      training images, the strength learned and the synthetic images.

    Raises:
      ValueError: a class with fewer images than `per_class`.
    """
    reports.begin(config)
    rng = np.random.default_rng(config.seed)
    parts = bundled.split(bundled.load("digits"), [config.train_examples], rng)
    train, test = jax.tree.map(jnp.asarray, parts)
    draws = [_draw_images(train, config.per_class, rng) for _ in range(config.draws + 1)]
    best_of_grid = jax.jit(partial(_best_of_grid, train, test))
    start, labels = draws[0]
    distilled, history, found = jax.jit(partial(_distil, config, train, test))(start, labels)
    means = jnp.stack([train.inputs[train.targets == c].mean(0) for c in range(NUM_CLASSES)])
    fitted = {
        "distilled": found,
        "class means": best_of_grid(means, jnp.arange(NUM_CLASSES)),
        "all real images": best_of_grid(*train),
    }
    random = [best_of_grid(*draw) for draw in draws[1:]]
    measured = {
        "test_accuracy": {name: float(found["accuracy"]) for name, found in fitted.items()},
        "train_loss": {name: float(found["loss"]) for name, found in fitted.items()},
        "random_test_accuracy": [float(found["accuracy"]) for found in random],
        "largest_inner_residual": max(
            float(found["residual"]) for found in (*fitted.values(), *random)
        ),
        "reg_strength": math.exp(distilled["log_strength"]),
        "history": history.tolist(),
        "labels": labels.tolist(),
        "images": distilled["images"].tolist(),
        "random_images": draws[1][0].tolist(),
        "means": means.tolist(),
    }
    return reports.report(config, measured, table, draw)


def _draw_images(train: Batch, per_class: int, rng: np.random.Generator) -> Batch:
    """`per_class` real images of each class.

    Raises:
      ValueError: a class with fewer.
    """
    labels = np.asarray(train.targets)
    fewest = int(np.bincount(labels, minlength=NUM_CLASSES).min())
    if per_class > fewest:
        raise ValueError(
            f"per_class={per_class} must be at most {fewest}, the images of the smallest class: "
            "lower it or raise train_examples"
        )
    rows = [
        rng.choice(np.flatnonzero(labels == c), per_class, replace=False)
        for c in range(NUM_CLASSES)
    ]
    chosen = np.concatenate(rows)
    return Batch(train.inputs[chosen], train.targets[chosen])


def _fit(init: Any, learned: Any, labels: jax.Array) -> Any:
    """The classifier of these images, with the regularisation that goes with them."""
    strength, weights = jnp.exp(learned["log_strength"]), jnp.ones(len(labels))
    return linear_model.fit(init, learned["images"], labels, weights, strength)


def _judge(train: Batch, test: Batch, learned: Any, labels: jax.Array) -> Any:
    """Of the classifier trained on these images."""
    params, info = _fit(linear_model.init(SIDE * SIDE, NUM_CLASSES), learned, labels)
    return {
        "loss": linear_model.loss(params, *train),
        "accuracy": linear_model.accuracy(params, *test),
        "residual": info.relative_residual,
    }


def _best_of_grid(train: Batch, test: Batch, images: jax.Array, labels: jax.Array) -> Any:
    """The same with the strength of the grid whose loss on the training images is least."""

    def judge(log_strength):
        return _judge(train, test, {"images": images, "log_strength": log_strength}, labels)

    found = lax.map(judge, jnp.asarray(LOG_GRID))
    return jax.tree.map(lambda x: x[jnp.argmin(found["loss"])], found)


def _distil(config: Config, train: Batch, test: Batch, images: Any, labels: Any) -> Any:
    """Trained images with the logarithm of the strength, the losses of all steps and the end."""

    def outer_loss(learned, init):
        params, _ = _fit(init, learned, labels)
        loss = linear_model.loss(params, *train)
        return loss, (params, loss)

    start = {"images": images, "log_strength": jnp.asarray(LOG_START)}
    zeros = linear_model.init(SIDE * SIDE, NUM_CLASSES)
    learned, _, losses = linear_model.learn(
        outer_loss, start, zeros, rate=config.outer_rate, num_steps=config.steps
    )
    return learned, losses, _judge(train, test, learned, labels)


def table(results: dict[str, Any]) -> str:
    """The accuracies as text."""
    count, total = results["per_class"], results["train_examples"]
    random = results["random_test_accuracy"]
    accuracies = results["test_accuracy"]
    return "\n".join(
        [
            f"test accuracy of a linear classifier, {NUM_CLASSES} classes, trained on",
            f"{f'{count} distilled image(s) a class':36}{accuracies['distilled']:.4f}",
            f"{f'{count} random real image(s) a class':36}{np.mean(random):.4f}, mean of "
            f"{len(random)} draws ({min(random):.4f}-{max(random):.4f})",
            f"{'the class means':36}{accuracies['class means']:.4f}",
            f"{f'all {total} real images':36}{accuracies['all real images']:.4f}",
        ]
    )


def draw(results: dict[str, Any], path: Path) -> None:
    """Class means, real and distilled images, and these less their mean; one column a class."""
    distilled = np.asarray(results["images"])
    groups = {
        "class means": np.asarray(results["means"]),
        "real": np.asarray(results["random_images"]),
        "distilled": distilled,
        "less mean": distilled - distilled.mean(0),
    }
    rows = [
        (name, of_each_class)
        for name, images in groups.items()
        for of_each_class in images.reshape(NUM_CLASSES, -1, SIDE, SIDE).swapaxes(0, 1)
    ]
    figure = new_figure(NUM_CLASSES, len(rows) + 0.3)
    grid = figure.subplots(len(rows), NUM_CLASSES)
    for axes_row, (name, images) in zip(grid, rows, strict=True):
        for axes, image in zip(axes_row, images, strict=True):
            axes.imshow(image, cmap="gray")
            axes.set(xticks=[], yticks=[])
        axes_row[0].set(ylabel=name)
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
