"""One regularisation weight a feature, learned on validation loss by implicit gradients.

    python -m experiments.feature_weights

Ridge regression on scikit-learn's diabetes set and logistic regression on its breast cancer set,

    min_w  L_train(w) + 1/2 sum_i exp(a_i) w_i^2,

alone and with probes beside the features: shuffled copies of them, which carry no information.
Training of `a` begins at the best common weight of a grid for the same validation examples. So many
weights can be fitted to them too well: besides the end of a training on all of them, the step that
is best for one half of them is taken from a training on the other half. What either is worth is
told by test examples, on several random splits into thirds. The gradient in `a` is compared with
central differences. All in float64. Writes OUTPUT.json and OUTPUT.png.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from experiments.shared import bundled, common, reports
from experiments.shared.linear_model import learn, predict
from imaml_jax import custom_argmin, mean_squared_error, minimize, newton_cg, solve_cg_steihaug
from imaml_jax.learners.settings import Count, Positive, Range, Record, Seed
from imaml_jax.types import Batch

GRID = np.log(np.logspace(-4, 2, 25))
NEWTON_STEPS, NEWTON_TOLERANCE = 10, 1e-4
CG_STEPS, TOLERANCE, DIFFERENCE = 200, 1e-12, 1e-4
WAYS = {
    "common": "common weight",
    "stopped": "a feature, stopped",
    "learned": "a feature, to the end",
}


def logistic_loss(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean cross-entropy of the outputs' sigmoids with targets of 0 and 1."""
    return jnp.mean(optax.sigmoid_binary_cross_entropy(outputs, targets))


LOSSES = {"breast_cancer": logistic_loss, "diabetes": mean_squared_error}


@dataclasses.dataclass(frozen=True)
class Config(Record):
    """What is trained."""

    datasets: tuple[Literal["breast_cancer", "diabetes"], ...] = ("diabetes", "breast_cancer")
    """Data sets."""
    probes: tuple[Annotated[int, Range(least=0)], ...] = (0, 40)
    """Numbers of features without information to put beside those of the data set, each at least
    0."""
    splits: Count = 10
    """Random splits into training, validation and test examples; at least 1."""
    steps: Count = 100
    """Steps of Adam on the logarithms of the weights, at least 1."""
    outer_rate: Positive = 0.1
    """Its rate, above 0."""
    seed: Seed = 0
    """Seed of the splits and of the probes, at least 0."""
    output: Path = Path("runs/feature_weights")
    """Where to write, without an ending."""

    def check_together(self) -> None:
        """There is something to train."""
        reports.check_not_empty(self, "datasets", "probes")


class Split(NamedTuple):
    """Standardised by the training examples."""

    train: Batch
    validation: Batch
    test: Batch


def main(config: Config) -> dict[str, Any]:
    """Trains, writes and prints.

    Returns:
      The settings and, for each data set and number of probes, a row of what each split gave: the
      losses and weights of every way and the relative error of the hypergradient at the common
      weight.
    """
    reports.begin(config)
    with jax.enable_x64(True):
        rows = [measure(config, *case) for case in product(config.datasets, config.probes)]
    return reports.report(config, {"rows": rows}, table, draw)


def make_fit(loss: Callable[..., jax.Array]) -> Callable[..., Any]:
    """`(init, log_weights, batch) -> (params, MinimizeInfo)`, differentiable in the weights."""

    def objective(params, log_weights, batch):
        penalty = 0.5 * jnp.sum(jnp.exp(log_weights) * params["kernel"] ** 2)
        return loss(predict(params, batch.inputs), batch.targets) + penalty

    solve = partial(solve_cg_steihaug, tol=TOLERANCE, max_steps=CG_STEPS)
    tx = newton_cg(max_cg_steps=CG_STEPS, cg_tol=NEWTON_TOLERANCE)
    newton = partial(minimize, objective, tx=tx, num_steps=NEWTON_STEPS)
    return custom_argmin(objective, solve, has_aux=True)(newton)


def measure(config: Config, name: bundled.Name, probes: int) -> dict[str, Any]:
    """The row of one data set."""
    data = bundled.load(name)
    rng = np.random.default_rng(config.seed)
    fit_split = jax.jit(partial(_fit_split, config, LOSSES[name]))
    found = [
        jax.device_get(fit_split(_prepare(name, data, probes, rng))) for _ in range(config.splits)
    ]
    columns = {key: [f[key].tolist() for f in found] for key in found[0]}
    gains = {
        way: np.subtract(columns["test_common"], columns[f"test_{way}"])
        for way in ("stopped", "learned")
    }
    return {
        "dataset": name,
        "features": data.inputs.shape[1],
        "probes": probes,
        **columns,
        "mean_test_gain": {way: float(gain.mean()) for way, gain in gains.items()},
        "splits_gained": {way: int((gain > 0).sum()) for way, gain in gains.items()},
    }


def _prepare(name: str, data: Batch, probes: int, rng: np.random.Generator) -> Split:
    """A random split into thirds."""
    columns = rng.integers(data.inputs.shape[1], size=probes)
    shuffled = [rng.permutation(data.inputs[:, column]) for column in columns]
    data = data._replace(inputs=np.column_stack([data.inputs, *shuffled]))
    third = len(data.targets) // 3
    parts = bundled.split(data, [third, third], rng)
    mean, scale = parts[0].inputs.mean(0), parts[0].inputs.std(0)
    middle, spread = 0.0, 1.0
    if name == "diabetes":
        middle, spread = parts[0].targets.mean(), parts[0].targets.std()
    return Split(*(Batch((p.inputs - mean) / scale, (p.targets - middle) / spread) for p in parts))


def _fit_split(config: Config, loss: Callable[..., Any], split: Split) -> dict[str, jax.Array]:
    """All ways on one split, and the check of a hypergradient."""
    fit, num_features = make_fit(loss), split.train.inputs.shape[1]
    zeros = {"kernel": jnp.zeros(num_features), "bias": jnp.zeros(())}

    def score(params, batch):
        return loss(predict(params, batch.inputs), batch.targets)

    def validation(log_weights):
        return score(fit(zeros, log_weights, split.train)[0], split.validation)

    def train(seen, unseen):
        """The last weights, and those that were best for `unseen`."""

        def seen_loss(log_weights, init):
            params, _ = fit(init, log_weights, split.train)
            return score(params, seen), (params, (score(params, unseen), log_weights))

        last, _, (scores, weights) = learn(
            seen_loss, start, zeros, rate=config.outer_rate, num_steps=config.steps
        )
        return last, weights[jnp.nanargmin(scores)]

    grid = jnp.asarray(GRID)
    grid_losses = lax.map(lambda a: validation(jnp.full(num_features, a)), grid)
    start = jnp.full(num_features, grid[jnp.argmin(grid_losses)])
    half = len(split.validation.targets) // 2
    first = Batch(*(x[:half] for x in split.validation))
    second = Batch(*(x[half:] for x in split.validation))
    weights = {
        "common": start,
        "stopped": train(first, second)[1],
        "learned": train(split.validation, split.validation)[0],
    }
    numeric = lax.map(
        lambda e: (validation(start + e) - validation(start - e)) / (2 * DIFFERENCE),
        DIFFERENCE * jnp.eye(num_features),
    )
    error = optax.tree.norm(jax.grad(validation)(start) - numeric) / optax.tree.norm(numeric)
    found: dict[str, Any] = {"gradient_error": error}
    for way, log_weights in weights.items():
        params, info = fit(zeros, log_weights, split.train)
        found[f"log_weights_{way}"] = log_weights
        found[f"validation_{way}"] = score(params, split.validation)
        found[f"test_{way}"] = score(params, split.test)
        found[f"inner_residual_{way}"] = info.relative_residual
    return found


def table(results: dict[str, Any]) -> str:
    """The rows as text: means over splits."""
    head = (
        f"losses on validation and test examples, means of {results['splits']} splits; of how many "
        "lower than by the common weight on test examples"
    )
    columns = {"": "", **dict.fromkeys(WAYS.values(), ""), "gradient error": ".0e"}
    rows = []
    for row in results["rows"]:
        cells = [f"{row['dataset']}, {row['features']} features, {row['probes']} probes"]
        for way in WAYS:
            cell = f"{np.mean(row[f'validation_{way}']):.4f}  {np.mean(row[f'test_{way}']):.4f}"
            if way in row["splits_gained"]:
                cell += f"{row['splits_gained'][way]:4} of {results['splits']}"
            cells.append(cell)
        rows.append((*cells, max(row["gradient_error"])))
    return f"{head}\n{reports.text_table(columns, rows)}"


def draw(results: dict[str, Any], path: Path) -> None:
    """Learned weights of every split; features, then probes."""
    rows = results["rows"]
    size = (5 * len(rows), 3.5)
    with reports.panels(path, len(rows), size, shared_legend=True, xlabel="column") as all_axes:
        for axes, row in zip(all_axes, rows, strict=True):
            weights = np.asarray(row["log_weights_learned"]) / math.log(10)
            for columns, color, label in (
                (np.arange(row["features"]), "C0", "features"),
                (np.arange(row["features"], weights.shape[1]), "C1", "probes"),
            ):
                if len(columns):
                    own = weights[:, columns]
                    axes.plot(columns, own.T, ".", color=color, ms=3, alpha=0.4)
                    axes.plot(columns, np.median(own, 0), "_", color=color, label=label)
            common_weight = np.median(row["log_weights_common"]) / math.log(10)
            axes.axhline(common_weight, color="gray", ls=":", label="common weight")
            axes.set(title=f"{row['dataset']}, {row['probes']} probes")
        all_axes[0].set(ylabel="log10 of the weight")


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
