"""How well the estimated error of an implicit gradient tells the true one.

    python -m experiments.error_estimate

Two kinds of inner problems: random logistic regressions with a regularisation weight a feature,
and iMAML's problem on sinusoid tasks with a tanh network that first-order MAML has meta-trained.
Round after round, some inner steps and some CG steps are taken, and the estimate is compared with
the true error, which dense solves give. Coverage is the share of the rounds whose error is at most
the estimate. Then `adaptive_gradient` is asked for an accuracy, and what it took stands beside what
fixed step counts need for the same accuracy on all problems. All in float64. Writes OUTPUT.json and
OUTPUT.png.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.flatten_util import ravel_pytree

import imaml_jax
from experiments import common
from imaml_jax.data import sinusoid
from imaml_jax.networks import mlp
from imaml_jax.plots import new_figure
from imaml_jax.training import train

FEATURES, EXAMPLES = 12, (25, 15)
SHOTS, STRENGTH, META_STEPS = 10, 0.5, 200
NETWORK = mlp([20, 1], activation=jnp.tanh, kernel_init=jax.nn.initializers.normal(0.5))
NEWTON_STEPS, MOST_ROUNDS = 50, 200
EXACT, ACCURACIES = 1e-9, (1e-1, 1e-2, 1e-4, 1e-6)
INNER_STEPS = 5


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    problems: int = 50
    """Problems of each kind, at least 2."""
    rounds: int = 20
    """Rounds of which each is measured."""
    cg_steps: int = 10
    """CG steps of each linear solve."""
    seed: int = 0
    """Seed of the problems."""
    output: Path = Path("runs/error_estimate")
    """Where to write, without an ending."""


class Problem(NamedTuple):
    """A bilevel problem of raveled parameters.

    Attributes:
      outer: `(x, args) -> scalar`.
      objective: `(x, args) -> scalar`.
      curvature: `(x, args) -> LinearOperator`.
      start: where the minimisation begins.
      args: one array.
      strong_convexity: smallest possible eigenvalue of the curvature.
    """

    outer: Callable[..., jax.Array]
    objective: Callable[..., jax.Array]
    curvature: Callable[..., Any]
    start: jax.Array
    args: jax.Array
    strong_convexity: jax.Array


def main(config: Config) -> dict[str, Any]:
    """Measures, writes and prints.

    Returns:
      For each kind the coverage, quantiles of estimate over error, all pairs of the two, and for
      each accuracy what adaptive and fixed step counts took.

    Raises:
      ValueError: a setting out of its range.
    """
    common.check_least(config, problems=2, rounds=1, cg_steps=1)
    common.check_seed(config.seed)
    common.check_output(config.output)
    common.cache_compilations()
    with jax.enable_x64(True):
        kinds = {"logistic": logistic, "sinusoid": partial(sinusoid_problem, _meta_train())}
        rows = {name: measure(config, make) for name, make in kinds.items()}
    results = {**dataclasses.asdict(config), "kinds": rows, **common.provenance()}
    common.write_report(config.output, results, table, draw)
    return results


def logistic(key: jax.Array) -> Problem:
    """A random logistic regression whose features have scales of their own."""
    keys = jax.random.split(key, 6)
    spread, level = jax.random.uniform(keys[0], (2,))
    scales = jnp.logspace(0, -2 * spread, FEATURES)
    basis = jnp.linalg.qr(jax.random.normal(keys[1], (FEATURES, FEATURES)))[0]
    inputs = (jax.random.normal(keys[2], (sum(EXAMPLES), FEATURES)) * scales) @ basis
    margins = inputs @ (basis.T @ (3 * jax.random.normal(keys[3], (FEATURES,)) / scales))
    labels = jnp.sign(margins + jax.random.normal(keys[4], margins.shape))
    strength = 10 ** (-3 + 2 * level)

    def loss(x, rows):
        return jnp.mean(jax.nn.softplus(-labels[rows] * (inputs[rows] @ x)))

    def objective(x, log_weights):
        return loss(x, slice(EXAMPLES[0])) + 0.5 * jnp.sum(jnp.exp(log_weights) * x**2)

    return Problem(
        lambda x, args: loss(x, slice(EXAMPLES[0], None)),
        objective,
        lambda x, args: imaml_jax.hessian(lambda p: objective(p, args), x),
        jnp.zeros(FEATURES),
        jnp.full(FEATURES, jnp.log(strength)),
        strength,
    )


def sinusoid_problem(meta_params: Any, key: jax.Array) -> Problem:
    """iMAML's inner problem on a sinusoid task, with the Gauss-Newton matrix."""
    tasks = sinusoid.sample_tasks(key, num_tasks=1, shots=SHOTS, queries=SHOTS)
    task = jax.tree.map(lambda x: x[0].astype(jnp.float64), tasks)
    start, unravel = ravel_pytree(meta_params)

    def outputs(x, batch):
        return NETWORK.apply(unravel(x), batch.inputs)

    def loss(x, batch):
        return imaml_jax.mean_squared_error(outputs(x, batch), batch.targets)

    def objective(x, anchor):
        return loss(x, task.support) + 0.5 * STRENGTH * jnp.sum((x - anchor) ** 2)

    def curvature(x, anchor):
        del anchor
        matrix = imaml_jax.gauss_newton(
            lambda p: outputs(p, task.support),
            lambda y: imaml_jax.mean_squared_error(y, task.support.targets),
            x,
        )
        return imaml_jax.damped(matrix, STRENGTH)

    return Problem(
        lambda x, anchor: loss(x, task.query),
        objective,
        curvature,
        start,
        start,
        jnp.asarray(STRENGTH),
    )


def _meta_train() -> Any:
    learner = imaml_jax.fomaml(
        NETWORK, imaml_jax.mean_squared_error, inner=optax.sgd(0.05), num_steps=5
    )
    sample = partial(sinusoid.sample_tasks, num_tasks=8, shots=SHOTS, queries=SHOTS)
    trained = train(
        learner,
        optax.adam(1e-2),
        sample,
        key=jax.random.key(0),
        num_steps=META_STEPS,
        example_inputs=jnp.zeros((1, 1), jnp.float32),
        log_every=META_STEPS,
        progress=False,
    )
    return jax.tree.map(lambda x: x.astype(jnp.float64), trained.meta_params)


def measure(config: Config, make: Callable[[jax.Array], Problem]) -> dict[str, Any]:
    """The row of one kind."""
    solve = partial(imaml_jax.solve_cg_steihaug, tol=0.0, max_steps=config.cg_steps)
    keys = jax.random.split(jax.random.key(config.seed), config.problems)
    accuracies = jnp.asarray(ACCURACIES)

    @jax.jit
    def run(keys):
        return lax.map(lambda key: _one(make(key), config.rounds, solve, accuracies), keys)

    found = jax.device_get(run(keys))
    solved = found["residual"] < EXACT
    errors, estimates = (found[name][solved] for name in ("errors", "estimates"))
    measurable = errors > EXACT
    pairs = np.column_stack([errors[measurable], estimates[measurable]])
    ratios = pairs[:, 1] / pairs[:, 0]
    asked = []
    for i, accuracy in enumerate(ACCURACIES):
        reached = errors <= accuracy
        lasting = np.logical_and.accumulate(reached[:, ::-1], 1)[:, ::-1]
        asked.append(
            {
                "accuracy": accuracy,
                "rounds": float(found["adaptive_rounds"][solved, i].mean()),
                "most_rounds": int(found["adaptive_rounds"][solved, i].max()),
                "largest_error": float(found["adaptive_error"][solved, i].max()),
                "converged": int(found["converged"][solved, i].sum()),
                # The number of rounds from which on every problem is as exact as that.
                "fixed_rounds": int(config.rounds - lasting.all(0).sum() + 1),
            }
        )
    return {
        "problems": int(solved.sum()),
        "coverage": float((ratios >= 1).mean()),
        "within_10": float(((ratios >= 1) & (ratios <= 10)).mean()),
        "ratio_quantiles": np.quantile(ratios, [0.01, 0.05, 0.5, 0.95, 0.99]).tolist(),
        "errors_and_estimates": pairs.tolist(),
        "asked": asked,
    }


def _one(problem: Problem, rounds: int, solve: Any, accuracies: jax.Array) -> dict[str, Any]:
    """Errors and estimates of one problem, relative to the gradient's norm."""
    outer, objective, curvature, start, args, strong_convexity = problem
    dense = partial(_dense, curvature, args, size=start.size)

    def gradient(x, adjoint):
        pullback = jax.vjp(lambda a: jax.grad(objective)(x, a), args)[1]
        return jax.grad(outer, 1)(x, args) - pullback(adjoint)[0]

    inner = imaml_jax.adaptive_gd(0.05)
    close, _ = imaml_jax.minimize(objective, start, args, tx=inner, num_steps=500)

    def newton(_, x):
        return x - jnp.linalg.solve(jax.hessian(objective)(x, args), jax.grad(objective)(x, args))

    root = lax.fori_loop(0, NEWTON_STEPS, newton, close)
    exact = gradient(root, jnp.linalg.solve(dense(root), jax.grad(outer)(root, args)))
    norm = jnp.linalg.norm(exact)

    def one_round(carry, _):
        x, adjoint = carry
        x, _ = imaml_jax.minimize(objective, x, args, tx=inner, num_steps=INNER_STEPS)
        operator = curvature(x, args)
        left = jax.grad(outer)(x, args) - operator.matvec(adjoint)
        adjoint = adjoint + solve(operator, left)[0]
        found = imaml_jax.implicit_gradient_error(
            outer,
            objective,
            x,
            (args,),
            adjoint,
            solve=solve,
            strong_convexity=strong_convexity,
            curvature=curvature,
        )
        error = jnp.linalg.norm(gradient(x, adjoint) - exact)
        return (x, adjoint), (error / norm, found.estimate / norm)

    _, (errors, estimates) = lax.scan(one_round, (start, jnp.zeros_like(start)), length=rounds)

    def ask(accuracy):
        _, (grads,), _, info = imaml_jax.adaptive_gradient(
            outer,
            objective,
            start,
            (args,),
            accuracy=accuracy,
            strong_convexity=strong_convexity,
            inner=inner,
            num_steps=INNER_STEPS,
            solve=solve,
            curvature=curvature,
            max_rounds=MOST_ROUNDS,
        )
        return info.num_rounds, jnp.linalg.norm(grads - exact) / norm, info.converged

    adaptive_rounds, adaptive_error, converged = lax.map(ask, accuracies)
    return {
        "residual": jnp.linalg.norm(jax.grad(objective)(root, args)),
        "errors": errors,
        "estimates": estimates,
        "adaptive_rounds": adaptive_rounds,
        "adaptive_error": adaptive_error,
        "converged": converged,
    }


def _dense(curvature: Any, args: jax.Array, x: jax.Array, *, size: int) -> jax.Array:
    return jax.vmap(curvature(x, args).matvec, 1, 1)(jnp.eye(size))


def table(results: dict[str, Any]) -> str:
    """Coverage and cost as text."""
    lines = []
    for name, row in results["kinds"].items():
        low, *_, high = row["ratio_quantiles"]
        lines.append(
            f"{name}, {row['problems']} problems: error at most the estimate in "
            f"{100 * row['coverage']:.2f}% of the rounds, and at least a tenth of it in "
            f"{100 * row['within_10']:.1f}%; estimate / error: 1% {low:.2f}, median "
            f"{row['ratio_quantiles'][2]:.2f}, 99% {high:.1f}"
        )
        lines.append(
            f"{'accuracy asked':>16}{'rounds, mean and most':>24}{'largest error':>16}"
            f"{'fixed rounds':>14}"
        )
        for asked in row["asked"]:
            fixed = asked["fixed_rounds"]
            lines.append(
                f"{asked['accuracy']:16.0e}{asked['rounds']:17.1f}{asked['most_rounds']:7}"
                f"{asked['largest_error']:16.1e}"
                + (f"{fixed:14}" if fixed <= results["rounds"] else f"{'>' + str(fixed - 1):>14}")
            )
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Estimate against error."""
    figure = new_figure(9, 4)
    for axes, (name, row) in zip(figure.subplots(1, 2), results["kinds"].items(), strict=True):
        errors, estimates = np.asarray(row["errors_and_estimates"]).T
        axes.loglog(errors, estimates, ".", ms=3, alpha=0.5)
        ends = np.array([errors.min(), errors.max()])
        axes.loglog(ends, ends, "k", lw=0.8, label="error")
        axes.loglog(ends, 10 * ends, "k:", lw=0.8, label="10 times the error")
        axes.set(xlabel="true relative error", title=name)
        axes.grid(alpha=0.3)
    figure.axes[0].set(ylabel="estimate")
    figure.axes[0].legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
