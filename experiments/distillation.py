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
import optax
from jax import lax

from experiments.shared import bundled, common, softmax_regression
from experiments.shared.bundled import Examples
from imaml_jax import cross_entropy
from imaml_jax.training.plots import new_figure

NUM_CLASSES, SIDE = 10, 8
LOG_GRID = np.log(np.logspace(-5, 0, 11))
LOG_START = math.log(0.01)


@dataclasses.dataclass(frozen=True)
class Config:
    """What is distilled."""

    per_class: int = 1
    """Synthetic images a class, at least 1."""
    train_examples: int = 1000
    """Real training images; the others are for the test; at least 1."""
    steps: int = 400
    """Steps of Adam on the images and on the logarithm of the regularisation strength, at least
    1."""
    outer_rate: float = 0.01
    """Its rate, above 0."""
    draws: int = 20
    """Random draws of real images to compare with, at least 1."""
    seed: int = 0
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
      ValueError: a setting out of its range.
    """
    _check(config)
    common.check_output(config.output)
    data = bundled.load("digits")
    rng = np.random.default_rng(config.seed)
    train, test = (
        Examples(jnp.asarray(part.inputs, jnp.float32), jnp.asarray(part.targets))
        for part in bundled.split(data, [config.train_examples], rng)
    )
    draws = [_draw_images(train, config.per_class, rng) for _ in range(config.draws + 1)]
    common.cache_compilations()
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
    results = {
        **dataclasses.asdict(config),
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
        **common.provenance(),
    }
    common.write_report(config.output, results, table, draw)
    return results


def _draw_images(train: Examples, per_class: int, rng: np.random.Generator) -> Examples:
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
    return Examples(train.inputs[chosen], train.targets[chosen])


def _fit(images: jax.Array, labels: jax.Array, log_strength: jax.Array, init: Any) -> Any:
    strength, weights = jnp.exp(log_strength), jnp.ones(len(labels))
    return softmax_regression.fit(init, images, labels, weights, strength)


def _zeros() -> Any:
    return softmax_regression.init(SIDE * SIDE, NUM_CLASSES)


def _loss(params: Any, batch: Examples) -> jax.Array:
    return cross_entropy(softmax_regression.predict(params, batch.inputs), batch.targets)


def _judge(train: Examples, test: Examples, images: Any, labels: Any, log_strength: Any) -> Any:
    """Of the classifier trained on these images."""
    params, info = _fit(images, labels, log_strength, _zeros())
    return {
        "loss": _loss(params, train),
        "accuracy": softmax_regression.accuracy(params, *test),
        "residual": info.relative_residual,
    }


def _best_of_grid(train: Examples, test: Examples, images: jax.Array, labels: jax.Array) -> Any:
    """The same with the strength of the grid whose loss on the training images is least."""
    found = lax.map(partial(_judge, train, test, images, labels), jnp.asarray(LOG_GRID))
    return jax.tree.map(lambda x: x[jnp.argmin(found["loss"])], found)


def _distil(config: Config, train: Examples, test: Examples, images: Any, labels: Any) -> Any:
    """Trained images with the logarithm of the strength, the losses of all steps and the end."""
    tx = optax.adam(config.outer_rate)

    def outer_loss(learned, init):
        params, _ = _fit(learned["images"], labels, learned["log_strength"], init)
        return _loss(params, train), params

    def step(carry, _):
        learned, params, opt_state = carry
        (loss, params), grads = jax.value_and_grad(outer_loss, has_aux=True)(learned, params)
        updates, opt_state = tx.update(grads, opt_state)
        return (optax.apply_updates(learned, updates), params, opt_state), loss

    learned = {"images": images, "log_strength": jnp.asarray(LOG_START)}
    carry = (learned, _zeros(), tx.init(learned))
    trained, losses = lax.scan(step, carry, length=config.steps)
    learned: Any = trained[0]
    return learned, losses, _judge(train, test, learned["images"], labels, learned["log_strength"])


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
    count = results["per_class"]
    rows = [("class means", np.asarray(results["means"]))]
    distilled = np.asarray(results["images"])
    for name, images in (
        ("real", np.asarray(results["random_images"])),
        ("distilled", distilled),
        ("less mean", distilled - distilled.mean(0)),
    ):
        by_class = images.reshape(NUM_CLASSES, count, -1)
        rows += [(name, by_class[:, i]) for i in range(count)]
    figure = new_figure(NUM_CLASSES, len(rows) + 0.3)
    grid = figure.subplots(len(rows), NUM_CLASSES)
    for axes_row, (name, images) in zip(grid, rows, strict=True):
        for axes, image in zip(axes_row, images, strict=True):
            axes.imshow(image.reshape(SIDE, SIDE), cmap="gray")
            axes.set(xticks=[], yticks=[])
        axes_row[0].set(ylabel=name)
    figure.savefig(path, dpi=80)


def _check(config: Config) -> None:
    common.check_least(config, per_class=1, train_examples=1, steps=1, draws=1)
    common.check_positive(config, "outer_rate")
    common.check_seed(config.seed)


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
