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
import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from experiments.shared import bundled, common, softmax_regression
from experiments.shared.bundled import Examples
from imaml_jax import cross_entropy
from imaml_jax.training.plots import new_figure

NUM_CLASSES = 10
LEARNED, ALL, CLEAN = "learned weights", "all examples alike", "clean examples only (oracle)"
VALIDATION, BOTH = "validation examples only", "all and validation examples"
WAYS = (LEARNED, ALL, CLEAN, VALIDATION, BOTH)


@dataclasses.dataclass(frozen=True)
class Config:
    """What is cleaned."""

    corrupted: float = 0.5
    """Share of the training labels that are wrong, between 0 and 1."""
    train_examples: int = 800
    """Training examples, at least 1."""
    validation_examples: int = 200
    """Examples with clean labels, at least 1."""
    reg_strength: float = 0.01
    """L2 regularisation of every classifier, above 0."""
    steps: int = 200
    """Steps of Adam on the weights' logits, at least 1."""
    outer_rate: float = 0.1
    """Its rate, above 0."""
    repeats: int = 5
    """Random splits with random wrong labels, at least 1."""
    seed: int = 0
    """Seed of both, at least 0."""
    output: Path = Path("runs/hyper_cleaning")
    """Where to write, without an ending."""


class Problem(NamedTuple):
    """One split.

    Attributes:
      train: examples some of whose labels are wrong.
      is_clean: 1 for those that are right, else 0.
      validation, test: examples with clean labels.
    """

    train: Examples
    is_clean: Any
    validation: Examples
    test: Examples


def main(config: Config) -> dict[str, Any]:
    """Trains, writes and prints.

    Returns:
      The settings, and over the repeats the AUROC, the test accuracies of every way, the largest
      residual of the classifier's training, and the weights of the last repeat.

    Raises:
      ValueError: a setting out of its range.
    """
    _check(config)
    common.check_output(config.output)
    data = bundled.load("digits")
    rng = np.random.default_rng(config.seed)
    problems = [corrupt(config, data, rng) for _ in range(config.repeats)]
    common.cache_compilations()
    program = jax.jit(partial(_clean, config))
    found = [jax.device_get(program(problem)) for problem in problems]
    results = {
        **dataclasses.asdict(config),
        "auroc": [
            auroc(f["logits"], p.is_clean == 1) for f, p in zip(found, problems, strict=True)
        ],
        "test_accuracy": {way: [float(f["accuracy"][way]) for f in found] for way in WAYS},
        "largest_inner_residual": max(float(f["inner_residual"]) for f in found),
        "weights": (1 / (1 + np.exp(-found[-1]["logits"]))).tolist(),
        "is_clean": problems[-1].is_clean.tolist(),
        **common.provenance(),
    }
    common.write_report(config.output, results, table, draw)
    return results


def corrupt(config: Config, data: Examples, rng: np.random.Generator) -> Problem:
    """A random split, with labels replaced by other classes at random."""
    sizes = [config.train_examples, config.validation_examples]
    train, *others = bundled.split(data, sizes, rng)
    wrong = np.zeros(config.train_examples, bool)
    count = round(config.corrupted * config.train_examples)
    wrong[rng.choice(config.train_examples, count, replace=False)] = True
    shifts = rng.integers(1, NUM_CLASSES, config.train_examples)
    labels = np.where(wrong, (train.targets + shifts) % NUM_CLASSES, train.targets)
    is_clean = (~wrong).astype(np.float32)
    parts = [
        Examples(part.inputs.astype(np.float32), part.targets)
        for part in (Examples(train.inputs, labels), *others)
    ]
    return Problem(parts[0], is_clean, parts[1], parts[2])


def _clean(config: Config, problem: Problem) -> dict[str, Any]:
    """Logits of the learned weights, and the accuracies of all ways."""
    train, is_clean, validation, test = problem
    zeros = softmax_regression.init(train.inputs.shape[1], NUM_CLASSES)

    def fit(examples, weights, init=zeros):
        return softmax_regression.fit(init, *examples, weights, config.reg_strength)

    def validation_loss(logits, init):
        params, info = fit(train, jax.nn.sigmoid(logits), init)
        loss = cross_entropy(softmax_regression.predict(params, validation.inputs), validation[1])
        return loss, (params, info)

    tx = optax.adam(config.outer_rate)

    def step(carry, _):
        logits, params, opt_state = carry
        grads, (params, info) = jax.grad(validation_loss, has_aux=True)(logits, params)
        updates, opt_state = tx.update(grads, opt_state)
        return (optax.apply_updates(logits, updates), params, opt_state), info.relative_residual

    start = jnp.zeros(len(train.targets))
    carry = (start, zeros, tx.init(start))
    trained, residuals = lax.scan(step, carry, length=config.steps)
    logits: Any = trained[0]
    both = jax.tree.map(lambda *parts: jnp.concatenate(parts), train, validation)
    fitted = {
        LEARNED: fit(train, jax.nn.sigmoid(logits), trained[1]),
        ALL: fit(train, jnp.ones_like(is_clean)),
        CLEAN: fit(train, is_clean),
        VALIDATION: fit(validation, jnp.ones(len(validation.targets))),
        BOTH: fit(both, jnp.ones(len(both.targets))),
    }
    return {
        "logits": logits,
        "accuracy": {way: softmax_regression.accuracy(p, *test) for way, (p, _) in fitted.items()},
        "inner_residual": jnp.max(residuals[1:], initial=0.0),
    }


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Chance that a positive example's score is above a negative one's; half for a tie."""
    negatives = np.sort(scores[~positive])
    below = [np.searchsorted(negatives, scores[positive], side) for side in ("left", "right")]
    return float(np.mean(below) / len(negatives))


def table(results: dict[str, Any]) -> str:
    """The results as text: means and ranges over the repeats."""
    lines = [
        f"{results['corrupted']:.0%} of {results['train_examples']} labels wrong, "
        f"{results['validation_examples']} validation examples, {results['repeats']} repeats: "
        "mean (range)",
        f"{'AUROC of the weights':40}{_shown(results['auroc'])}",
    ]
    lines += [f"accuracy, {way:30}{_shown(results['test_accuracy'][way])}" for way in WAYS]
    return "\n".join(lines)


def _shown(values: list[float]) -> str:
    return f"{np.mean(values):.4f} ({min(values):.4f}-{max(values):.4f})"


def draw(results: dict[str, Any], path: Path) -> None:
    """Weights of the last repeat, and the accuracies."""
    figure = new_figure(10, 3.5)
    left, right = figure.subplots(1, 2)
    weights, clean = np.asarray(results["weights"]), np.asarray(results["is_clean"]) == 1
    groups = {"clean label": weights[clean], "wrong label": weights[~clean]}
    left.hist(list(groups.values()), bins=20, range=(0, 1), label=list(groups))
    left.set(xlabel="learned weight", ylabel="training examples")
    left.legend()
    for position, way in enumerate(WAYS):
        values = results["test_accuracy"][way]
        right.plot(values, [position] * len(values), "o", color="C0", alpha=0.5)
    right.set(xlabel="test accuracy", yticks=range(len(WAYS)), yticklabels=WAYS)
    right.invert_yaxis()
    figure.savefig(path, dpi=120)


def _check(config: Config) -> None:
    common.check_least(config, train_examples=1, validation_examples=1, steps=1, repeats=1)
    wrong = round(config.corrupted * config.train_examples) if config.corrupted < math.inf else 0
    if not 0 < wrong < config.train_examples:
        raise ValueError(
            f"corrupted={config.corrupted} must lie between 0 and 1 and leave wrong and clean "
            f"labels among the {config.train_examples} training examples"
        )
    common.check_positive(config, "reg_strength", "outer_rate")
    common.check_seed(config.seed)


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
