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
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from experiments.shared import bundled, common
from experiments.shared.bundled import Examples
from imaml_jax import custom_argmin, mean_squared_error, minimize, newton_cg, solve_cg_steihaug
from imaml_jax.training.plots import new_figure

GRID = np.log(np.logspace(-4, 2, 25))
NEWTON_STEPS, NEWTON_TOLERANCE = 10, 1e-4
CG_STEPS, TOLERANCE, DIFFERENCE = 200, 1e-12, 1e-4
WAYS = ("common", "stopped", "learned")


def logistic_loss(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean cross-entropy of the outputs' sigmoids with targets of 0 and 1."""
    return jnp.mean(optax.sigmoid_binary_cross_entropy(outputs, targets))


LOSSES = {"breast_cancer": logistic_loss, "diabetes": mean_squared_error}


@dataclasses.dataclass(frozen=True)
class Config:
    """What is trained."""

    datasets: tuple[Literal["breast_cancer", "diabetes"], ...] = ("diabetes", "breast_cancer")
    """Data sets."""
    probes: tuple[int, ...] = (0, 40)
    """Numbers of features without information to put beside those of the data set, each at least
    0."""
    splits: int = 10
    """Random splits into training, validation and test examples; at least 1."""
    steps: int = 100
    """Steps of Adam on the logarithms of the weights, at least 1."""
    outer_rate: float = 0.1
    """Its rate, above 0."""
    seed: int = 0
    """Seed of the splits and of the probes, at least 0."""
    output: Path = Path("runs/feature_weights")
    """Where to write, without an ending."""


class Split(NamedTuple):
    """Standardised by the training examples."""

    train: Examples
    validation: Examples
    test: Examples


def main(config: Config) -> dict[str, Any]:
    """Trains, writes and prints.

    Returns:
      The settings and, for each data set and number of probes, a row of what each split gave: the
      losses and weights of every way and the relative error of the hypergradient at the common
      weight.

    Raises:
      ValueError: a setting out of its range.
    """
    _check(config)
    common.check_output(config.output)
    data = {name: bundled.load(name) for name in config.datasets}
    common.cache_compilations()
    with jax.enable_x64(True):
        rows = [
            measure(config, name, data[name], probes)
            for name in config.datasets
            for probes in config.probes
        ]
    results = {**dataclasses.asdict(config), "rows": rows, **common.provenance()}
    common.write_report(config.output, results, table, draw)
    return results


def make_fit(loss: Callable[..., jax.Array]) -> Callable[..., Any]:
    """`(init, log_weights, batch) -> (params, MinimizeInfo)`, differentiable in the weights."""

    def objective(params, log_weights, batch):
        penalty = 0.5 * jnp.sum(jnp.exp(log_weights) * params["kernel"] ** 2)
        return loss(predict(params, batch.inputs), batch.targets) + penalty

    @custom_argmin(
        objective, partial(solve_cg_steihaug, tol=TOLERANCE, max_steps=CG_STEPS), has_aux=True
    )
    def fit(init, log_weights, batch):
        tx = newton_cg(max_cg_steps=CG_STEPS, cg_tol=NEWTON_TOLERANCE)
        return minimize(objective, init, log_weights, batch, tx=tx, num_steps=NEWTON_STEPS)

    return fit


def predict(params: Any, inputs: jax.Array) -> jax.Array:
    """Outputs of the linear model."""
    return inputs @ params["kernel"] + params["bias"]


def measure(config: Config, name: str, data: Examples, probes: int) -> dict[str, Any]:
    """The row of one data set."""
    rng = np.random.default_rng(config.seed)
    fit_split = jax.jit(partial(_fit_split, config, LOSSES[name]))
    found = [
        jax.device_get(fit_split(_prepare(name, data, probes, rng))) for _ in range(config.splits)
    ]
    columns = {key: [f[key].tolist() for f in found] for key in found[0]}
    gains = {way: np.subtract(columns["test_common"], columns[f"test_{way}"]) for way in WAYS[1:]}
    return {
        "dataset": name,
        "features": data.inputs.shape[1],
        "probes": probes,
        **columns,
        "mean_test_gain": {way: float(gain.mean()) for way, gain in gains.items()},
        "splits_gained": {way: int((gain > 0).sum()) for way, gain in gains.items()},
    }


def _prepare(name: str, data: Examples, probes: int, rng: np.random.Generator) -> Split:
    """A random split into thirds."""
    columns = rng.integers(data.inputs.shape[1], size=probes)
    shuffled = [rng.permutation(data.inputs[:, column]) for column in columns]
    data = Examples(np.column_stack([data.inputs, *shuffled]), data.targets)
    third = len(data.targets) // 3
    parts = bundled.split(data, [third, third], rng)
    mean, scale = parts[0].inputs.mean(0), parts[0].inputs.std(0)
    middle, spread = 0.0, 1.0
    if name == "diabetes":
        middle, spread = parts[0].targets.mean(), parts[0].targets.std()
    return Split(
        *(Examples((p.inputs - mean) / scale, (p.targets - middle) / spread) for p in parts)
    )


def _fit_split(config: Config, loss: Callable[..., Any], split: Split) -> dict[str, jax.Array]:
    """All ways on one split, and the check of a hypergradient."""
    fit, num_features = make_fit(loss), split.train.inputs.shape[1]
    zeros = {"kernel": jnp.zeros(num_features), "bias": jnp.zeros(())}
    half = len(split.validation.targets) // 2
    first, second = (
        jax.tree.map(lambda x, rows=rows: x[rows], split.validation)
        for rows in (slice(half), slice(half, None))
    )

    def score(params, batch):
        return loss(predict(params, batch.inputs), batch.targets)

    def held_out_loss(log_weights, init, seen):
        params, info = fit(init, log_weights, split.train)
        return score(params, seen), (params, info)

    def validation(log_weights):
        return held_out_loss(log_weights, zeros, split.validation)[0]

    def train(seen, unseen):
        """The last weights, and those that were best for `unseen`."""
        tx = optax.adam(config.outer_rate)

        def step(carry, _):
            log_weights, init, opt_state, best = carry
            grads, (params, _) = jax.grad(held_out_loss, has_aux=True)(log_weights, init, seen)
            now = (score(params, unseen), log_weights)
            best = jax.tree.map(lambda new, old: jnp.where(now[0] < best[0], new, old), now, best)
            updates, opt_state = tx.update(grads, opt_state)
            return (optax.apply_updates(log_weights, updates), params, opt_state, best), None

        carry = (start, zeros, tx.init(start), (jnp.inf, start))
        (last, *_, best), _ = lax.scan(step, carry, length=config.steps)
        return last, best[1]

    grid = jnp.asarray(GRID)
    grid_losses = lax.map(lambda a: validation(jnp.full(num_features, a)), grid)
    start = jnp.full(num_features, grid[jnp.argmin(grid_losses)])
    weights = dict(
        zip(
            WAYS,
            (start, train(first, second)[1], train(split.validation, split.validation)[0]),
            strict=True,
        )
    )
    numeric = lax.map(
        lambda e: (validation(start + e) - validation(start - e)) / (2 * DIFFERENCE),
        DIFFERENCE * jnp.eye(num_features),
    )
    exact = jax.grad(validation)(start)
    error = optax.tree.norm(exact - numeric) / optax.tree.norm(numeric)
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
    lines = [
        f"losses on validation and test examples, means of {results['splits']} splits; of how many "
        "lower than by the common weight on test examples",
        f"{'':38}{'common weight':>15}{'a feature, stopped':>28}{'a feature, to the end':>28}"
        f"{'gradient error':>16}",
    ]
    for row in results["rows"]:
        line = f"{row['dataset']}, {row['features']} features, {row['probes']} probes"
        line = f"{line:38}"
        for way in WAYS:
            losses = (float(np.mean(row[f"{part}_{way}"])) for part in ("validation", "test"))
            line += "".join(f"{loss:8.4f}" for loss in losses)
            if way != "common":
                line += f"{row['splits_gained'][way]:6} of {results['splits']}"
        lines.append(f"{line}{max(row['gradient_error']):12.0e}")
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Learned weights of every split; features, then probes."""
    rows = results["rows"]
    figure = new_figure(5 * len(rows), 3.5)
    for axes, row in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
        weights = np.asarray(row["log_weights_learned"]) / math.log(10)
        for columns, color, label in (
            (np.arange(row["features"]), "C0", "features"),
            (np.arange(row["features"], weights.shape[1]), "C1", "probes"),
        ):
            if len(columns):
                axes.plot(columns, weights[:, columns].T, ".", color=color, ms=3, alpha=0.4)
                axes.plot(columns, np.median(weights[:, columns], 0), "_", color=color, label=label)
        common_weight = np.median(row["log_weights_common"]) / math.log(10)
        axes.axhline(common_weight, color="gray", ls=":", label="common weight")
        axes.set(xlabel="column", title=f"{row['dataset']}, {row['probes']} probes")
    figure.axes[0].set(ylabel="log10 of the weight")
    handles, labels = figure.axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")
    figure.savefig(path, dpi=120)


def _check(config: Config) -> None:
    if not config.datasets or not config.probes:
        raise ValueError(
            f"datasets={config.datasets} and probes={config.probes} leave nothing to train: name "
            "at least one of each"
        )
    if min(config.probes) < 0:
        raise ValueError(f"probes={config.probes} must be at least 0")
    common.check_least(config, splits=1, steps=1)
    common.check_positive(config, "outer_rate")
    common.check_seed(config.seed)


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
