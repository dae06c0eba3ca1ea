"""Data hyper-cleaning: training examples with wrong labels are found by learning their weights.

    python -m experiments.hyper_cleaning

A share of the labels of handwritten digits is replaced by wrong ones. A linear classifier is
trained on all of them, each with a weight between 0 and 1; the weights are trained on the loss of
the classifier on a few examples with clean labels, differentiated through the classifier's
training. What is measured: how well the weights tell wrong labels from clean ones (AUROC), and the
accuracy on test examples beside classifiers of the same kind that were trained on all examples
alike, on the clean ones only, which nobody would know, and on the few clean examples themselves,
without and with the others. Writes OUTPUT.json and OUTPUT.png.

Franceschi et al., "Forward and reverse gradient-based hyperparameter optimization", ICML 2017.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.shared import bundled, common, linear_model, reports
from imaml_jax.learners.settings import Count, Positive, Range, Record, Seed
from imaml_jax.types import Batch

NUM_CLASSES = 10
LEARNED, ALL, CLEAN = "learned weights", "all examples alike", "clean examples only (oracle)"
VALIDATION, BOTH = "validation examples only", "all and validation examples"
WAYS = (LEARNED, ALL, CLEAN, VALIDATION, BOTH)


@dataclasses.dataclass(frozen=True)
class Config(Record):
    """What is cleaned."""

    corrupted: Annotated[float, Range(above=0, below=1)] = 0.5
    """Share of the training labels that are wrong, between 0 and 1."""
    train_examples: Count = 800
    """Training examples, at least 1."""
    validation_examples: Count = 200
    """Examples with clean labels, at least 1."""
    reg_strength: Positive = 0.01
    """L2 regularisation of every classifier, above 0."""
    steps: Count = 200
    """Steps of Adam on the weights' logits, at least 1."""
    outer_rate: Positive = 0.1
    """Its rate, above 0."""
    repeats: Count = 5
    """Random splits with random wrong labels, at least 1."""
    seed: Seed = 0
    """Seed of both, at least 0."""
    output: Path = Path("runs/hyper_cleaning")
    """Where to write, without an ending."""

    @property
    def num_wrong(self) -> int:
        """Training examples whose label is wrong."""
        return round(self.corrupted * self.train_examples)

    def check_together(self) -> None:
        """Both right and wrong labels are needed."""
        if not 0 < self.num_wrong < self.train_examples:
            raise ValueError(
                f"corrupted={self.corrupted} must leave wrong and clean labels among the "
                f"{self.train_examples} training examples"
            )


class Problem(NamedTuple):
    """One split: `is_clean` is 1 where the label of a training example is right, else 0; all labels
    of the other parts are."""

    train: Batch
    is_clean: np.ndarray
    validation: Batch
    test: Batch


def main(config: Config) -> dict[str, Any]:
    """Trains, writes and prints.

    Returns:
      The settings, and over the repeats the AUROC, the test accuracies of every way, the largest
      residual of the classifier's training, and the weights of the last repeat.
    """
    reports.begin(config)
    data = bundled.load("digits")
    rng = np.random.default_rng(config.seed)
    problems = [corrupt(config, data, rng) for _ in range(config.repeats)]
    program = jax.jit(partial(_clean, config))
    found = [jax.device_get(program(problem)) for problem in problems]
    measured = {
        "auroc": [
            auroc(f["logits"], p.is_clean == 1) for f, p in zip(found, problems, strict=True)
        ],
        "test_accuracy": {way: [float(f["accuracy"][way]) for f in found] for way in WAYS},
        "largest_inner_residual": max(float(f["inner_residual"]) for f in found),
        "weights": (1 / (1 + np.exp(-found[-1]["logits"]))).tolist(),
        "is_clean": problems[-1].is_clean.tolist(),
    }
    return reports.report(config, measured, table, draw)


def corrupt(config: Config, data: Batch, rng: np.random.Generator) -> Problem:
    """A random split, with labels replaced by other classes at random."""
    sizes = [config.train_examples, config.validation_examples]
    train, validation, test = bundled.split(data, sizes, rng)
    wrong = np.zeros(config.train_examples, bool)
    wrong[rng.choice(config.train_examples, config.num_wrong, replace=False)] = True
    shifts = rng.integers(1, NUM_CLASSES, config.train_examples)
    labels = np.where(wrong, (train.targets + shifts) % NUM_CLASSES, train.targets)
    return Problem(train._replace(targets=labels), 1.0 - wrong, validation, test)


def _clean(config: Config, problem: Problem) -> dict[str, Any]:
    """Logits of the learned weights, and the accuracies of all ways."""
    train, is_clean, validation, test = problem
    zeros = linear_model.init(train.inputs.shape[1], NUM_CLASSES)

    def fit(examples, weights, init=zeros):
        return linear_model.fit(init, *examples, weights, config.reg_strength)

    def validation_loss(logits, init):
        params, info = fit(train, jax.nn.sigmoid(logits), init)
        return linear_model.loss(params, *validation), (params, info.relative_residual)

    start = jnp.zeros(len(train.targets))
    logits, params, residuals = linear_model.learn(
        validation_loss, start, zeros, rate=config.outer_rate, num_steps=config.steps
    )
    both = jax.tree.map(lambda *parts: jnp.concatenate(parts), train, validation)
    fitted = {
        LEARNED: fit(train, jax.nn.sigmoid(logits), params),
        ALL: fit(train, jnp.ones_like(is_clean)),
        CLEAN: fit(train, is_clean),
        VALIDATION: fit(validation, jnp.ones(len(validation.targets))),
        BOTH: fit(both, jnp.ones(len(both.targets))),
    }
    return {
        "logits": logits,
        "accuracy": {way: linear_model.accuracy(p, *test) for way, (p, _) in fitted.items()},
        "inner_residual": jnp.max(residuals[1:], initial=0.0),
    }


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Chance that a positive example's score is above a negative one's; half for a tie."""
    negatives = np.sort(scores[~positive])
    below = [np.searchsorted(negatives, scores[positive], side) for side in ("left", "right")]
    return float(np.mean(below) / len(negatives))


def table(results: dict[str, Any]) -> str:
    """The results as text: means and ranges over the repeats."""
    rows = {"AUROC of the weights": results["auroc"]}
    rows |= {f"accuracy, {way}": found for way, found in results["test_accuracy"].items()}
    lines = [
        f"{results['corrupted']:.0%} of {results['train_examples']} labels wrong, "
        f"{results['validation_examples']} validation examples, {results['repeats']} repeats: "
        "mean (range)"
    ]
    lines += [
        f"{name:40}{np.mean(values):.4f} ({min(values):.4f}-{max(values):.4f})"
        for name, values in rows.items()
    ]
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Weights of the last repeat, and the accuracies."""
    weights, clean = np.asarray(results["weights"]), np.asarray(results["is_clean"]) == 1
    groups = {"clean label": weights[clean], "wrong label": weights[~clean]}
    with reports.panels(path, 2, (10, 3.5)) as (left, right):
        left.hist(list(groups.values()), bins=20, range=(0, 1), label=list(groups))
        left.set(xlabel="learned weight", ylabel="training examples")
        for position, way in enumerate(WAYS):
            values = results["test_accuracy"][way]
            right.plot(values, [position] * len(values), "o", color="C0", alpha=0.5)
        right.set(xlabel="test accuracy", yticks=range(len(WAYS)), yticklabels=WAYS)
        right.invert_yaxis()


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
