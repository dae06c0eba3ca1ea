"""Data hyper-cleaning: training examples with wrong labels are found by learning their weights.

    python -m experiments.hyper_cleaning
    python -m experiments.hyper_cleaning --stochastic

A share of the labels of handwritten digits is replaced by wrong ones. A linear classifier is
trained on all of them, each with a weight between 0 and 1; the weights are trained on the loss of
the classifier on a few examples with clean labels, differentiated through the classifier's
training. What is measured: how well the weights tell wrong labels from clean ones (AUROC), and the
accuracy on test examples beside classifiers of the same kind that were trained on all examples
alike, on the clean ones only, which nobody would know, and on the few clean examples themselves,
without and with the others. Writes OUTPUT.json and OUTPUT.png.

With --stochastic the classifier is a network of a million parameters, and stochastic bilevel
methods on mini-batches stand beside each other: ours, the published SOBA, AmIGO and stocBiO, and
ours with all examples in each batch. What is measured: the validation loss against the processor's
seconds and against evaluations of gradients and second-derivative products of one example, of which
all have the same number, the AUROC, and the test accuracy of networks trained from new parameters
with the weights that were found. The learning rates of each method are searched by the validation
loss, with the same number of tries, on a split that is not measured.

Franceschi et al., "Forward and reverse gradient-based hyperparameter optimization", ICML 2017.
"""

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.shared import bundled, common, linear_model, reports, stochastic_cleaning
from experiments.shared.stochastic_bilevel import Rates
from imaml_jax.learners.settings import Count, Positive, Range, Record, Seed
from imaml_jax.types import Batch

NUM_CLASSES = 10
LEARNED, ALL, CLEAN = "learned weights", "all examples alike", "clean examples only (oracle)"
VALIDATION, BOTH = "validation examples only", "all and validation examples"
WAYS = (LEARNED, ALL, CLEAN, VALIDATION, BOTH)
STOCHASTIC_REPEATS = 2
CERTAIN = 20.0  # logit of a weight of 1
# What has an effect only with --stochastic, and only without it.
STOCHASTIC_ONLY, LINEAR_ONLY = ("width", "evaluations"), ("steps", "outer_rate")


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
    repeats: Count | None = None
    """Random splits with random wrong labels, at least 1; default 5, with stochastic 2."""
    seed: Seed = 0
    """Seed of both, at least 0."""
    stochastic: bool = False
    """Mini-batch methods beside each other, on a network with two hidden layers."""
    width: Count = 1000
    """Units of each of these layers, at least 1; only with stochastic."""
    evaluations: Count = 30_000
    """Gradients and products of one example for each method and split; only with stochastic."""
    output: Path = Path("runs/hyper_cleaning")
    """Where to write, without an ending."""

    @property
    def num_repeats(self) -> int:
        """Random splits."""
        return self.repeats or (STOCHASTIC_REPEATS if self.stochastic else 5)

    @property
    def num_wrong(self) -> int:
        """Training examples whose label is wrong."""
        return round(self.corrupted * self.train_examples)

    def check_together(self) -> None:
        """Both right and wrong labels are needed, and no setting without an effect."""
        idle = LINEAR_ONLY if self.stochastic else STOCHASTIC_ONLY
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in idle and value != field.default:
                raise ValueError(
                    f"{field.name}={value} has no effect on stochastic={self.stochastic}; "
                    "leave it out"
                )
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
      residual of the classifier's training, and the weights of the last repeat. With `stochastic`
      what `measure_stochastic` returns.
    """
    reports.begin(config)
    data = bundled.load("digits")
    rng = np.random.default_rng(config.seed)
    problems = [corrupt(config, data, rng) for _ in range(config.num_repeats)]
    if config.stochastic:
        measured = measure_stochastic(config, problems, corrupt(config, data, rng))
        return reports.report(config, measured, stochastic_table, draw_stochastic)
    program = jax.jit(partial(_clean, config))
    found = [jax.device_get(program(problem)) for problem in problems]
    measured = {
        "repeats": config.num_repeats,
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


def measure_stochastic(config: Config, problems: list[Problem], other: Problem) -> dict[str, Any]:
    """Searches the rates on the other split, then runs all methods on every one.

    Returns:
      The number of parameters; over the repeats the test accuracies of networks trained on all
      examples alike and on the clean ones; and what is known of each method: its rates, all that
      were tried, its meta-steps, the seconds of its compilation, the evaluations at every point,
      and over the repeats the rest.
    """
    splits = [_in_float32(problem) for problem in problems]
    contest = stochastic_cleaning.make_contest(
        splits[0],
        sizes=(config.width, config.width, NUM_CLASSES),
        reg_strength=config.reg_strength,
        evaluations=config.evaluations,
    )
    tuning_key, *keys = jax.random.split(jax.random.key(config.seed), 1 + len(splits))
    tried = stochastic_cleaning.tune(contest, _in_float32(other), tuning_key)
    rates = {name: Rates(*rows[0][:2]) for name, rows in tried.items()}
    runs, trained = [], {ALL: [], CLEAN: []}
    for problem, split, key in zip(problems, splits, keys, strict=True):
        runs.append(stochastic_cleaning.measure(contest, split, rates, key))
        for track in runs[-1].values():
            logits = track.pop("logits")
            clean = problem.is_clean == 1
            track["auroc"] = None if logits is None else auroc(logits, clean)
        for way, weights in ((ALL, np.ones_like(problem.is_clean)), (CLEAN, problem.is_clean)):
            logits = jnp.asarray(np.where(weights == 1, CERTAIN, -CERTAIN), jnp.float32)
            trained[way].append(float(contest.retrained_accuracy(split, logits, key)))
    methods = {
        name: {
            "rates": rates[name]._asdict(),
            "tried": tried[name],
            "meta_steps": runner.num_steps,
            "compile_seconds": runner.compile_seconds,
            "evaluations": runs[0][name].pop("evaluations"),
            **{field: [run[name][field] for run in runs] for field in runs[0][name]},
        }
        for name, runner in contest.runners.items()
    }
    return {
        "repeats": config.num_repeats,
        "num_params": contest.num_params,
        "trained_accuracy": trained,
        "methods": methods,
    }


def _in_float32(problem: Problem) -> stochastic_cleaning.Split:
    parts = problem.train, problem.validation, problem.test
    return stochastic_cleaning.Split(
        *(Batch(jnp.asarray(p.inputs, jnp.float32), jnp.asarray(p.targets)) for p in parts)
    )


def stochastic_table(results: dict[str, Any]) -> str:
    """The results as text: means over the repeats at the end."""
    columns = {
        "": "",
        "inner rate": "g",
        "outer rate": "g",
        "validation loss": ".3f",
        "test accuracy": ".3f",
        "retrained": ".3f",
        "AUROC": ".3f",
        "meta-steps": "",
        "evaluations": ",",
        "CPU seconds": ".1f",
    }
    rows = []
    for name, found in results["methods"].items():
        last = [
            _mean_or_diverged([points[-1] for points in found[field]])
            for field in ("validation_loss", "test_accuracy")
        ]
        last += [_mean_or_diverged(found[field]) for field in ("retrained_accuracy", "auroc")]
        seconds = np.mean([points[-1] for points in found["seconds"]])
        cost = found["meta_steps"], found["evaluations"][-1], seconds
        rows.append((name, *found["rates"].values(), *last, *cost))
    known = results["trained_accuracy"]
    rows += [(way, *[None] * 4, np.mean(values), *[None] * 4) for way, values in known.items()]
    return "\n".join(
        [
            f"{results['num_params']:,} parameters, {results['corrupted']:.0%} of "
            f"{results['train_examples']} labels wrong, {results['validation_examples']} "
            f"validation examples: means over {results['repeats']} splits",
            reports.text_table(columns, rows),
        ]
    )


def _mean_or_diverged(values: list[float | None]) -> float | str:
    finite = [value for value in values if value is not None]
    return float(np.mean(finite)) if len(finite) == len(values) else "diverged"


def draw_stochastic(results: dict[str, Any], path: Path) -> None:
    """Validation loss against seconds and against evaluations, a line for each split."""
    with reports.panels(path, 2, (11, 4), ylabel="validation loss", yscale="log") as axes:
        for color, (name, found) in enumerate(results["methods"].items()):
            for repeat, losses in enumerate(found["validation_loss"]):
                label = None if repeat else name
                heights = [math.nan if loss is None else loss for loss in losses]
                for panel, places in zip(
                    axes, (found["seconds"][repeat], found["evaluations"]), strict=True
                ):
                    panel.plot(places, heights, f"C{color}.-", alpha=0.7, label=label)
        axes[0].set(xlabel="CPU seconds")
        axes[1].set(xlabel="gradients and products of one example")


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
