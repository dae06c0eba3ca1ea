"""How well the estimated error of an implicit gradient tells the true one.

    python -m experiments.error_estimate

Four kinds of inner problems: random logistic regressions with a regularisation weight a feature,
and iMAML's problem with networks that first-order MAML has meta-trained: sinusoids with tanh, and
5-way 1-shot glyphs with a small conv4 and batch norm, with SiLU and with ReLU.
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
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import imaml_jax
from experiments.shared import common
from experiments.shared.inner_problems import Kind, Problem, make_problem
from imaml_jax.training.plots import new_figure

NEWTON_STEPS, MOST_ROUNDS = 15, 200
QUANTILES = (0.01, 0.05, 0.5, 0.95, 0.99)
EXACT, ACCURACIES = 1e-9, (1e-1, 1e-2, 1e-4, 1e-6)
INNER_STEPS = 5


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    kinds: tuple[Kind, ...] = get_args(Kind)
    """Kinds of inner problems."""
    problems: int = 50
    """Problems of each kind, at least 2."""
    rounds: int = 20
    """Rounds of which each is measured, at least 1."""
    cg_steps: int = 10
    """CG steps of each linear solve, at least 1."""
    seed: int = 0
    """Seed of the problems, at least 0."""
    output: Path = Path("runs/error_estimate")
    """Where to write, without an ending."""


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
        rows = {kind: measure(config, make_problem(kind)) for kind in config.kinds}
    results = {**dataclasses.asdict(config), "kinds": rows, **common.provenance()}
    common.write_report(config.output, results, table, draw)
    return results


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
    unsolved = int((~solved).sum())
    if unsolved == config.problems:
        return {"problems": 0, "unsolved": unsolved}
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
        "unsolved": unsolved,
        "coverage": float((ratios >= 1).mean()),
        "within_10": float(((ratios >= 1) & (ratios <= 10)).mean()),
        "unknown": float(np.isinf(ratios).mean()),
        "ratio_quantiles": np.quantile(ratios[np.isfinite(ratios)], QUANTILES).tolist(),
        "errors_and_estimates": pairs[np.isfinite(ratios)].tolist(),
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
    close, _ = imaml_jax.minimize(
        objective, close, args, tx=imaml_jax.newton_cg(), num_steps=50, curvature=curvature
    )

    def newton(_, x):
        return x - jnp.linalg.solve(jax.hessian(objective)(x, args), jax.grad(objective)(x, args))

    root = lax.fori_loop(0, NEWTON_STEPS, newton, close)
    exact = gradient(root, jnp.linalg.solve(dense(root), jax.grad(outer)(root, args)))
    norm = jnp.linalg.norm(exact)
    residual = jnp.linalg.norm(jax.grad(objective)(root, args))

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
            max_rounds=jnp.where(residual < EXACT, MOST_ROUNDS, 1),
        )
        return info.num_rounds, jnp.linalg.norm(grads - exact) / norm, info.converged

    adaptive_rounds, adaptive_error, converged = lax.map(ask, accuracies)
    return {
        "residual": residual,
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
        if row["unsolved"]:
            lines.append(f"{name}: no minimum found of {row['unsolved']} problems")
        if not row["problems"]:
            continue
        low, *_, high = row["ratio_quantiles"]
        lines.append(
            f"{name}, {row['problems']} problems: error at most the estimate in "
            f"{100 * row['coverage']:.2f}% of the rounds, and at least a tenth of it in "
            f"{100 * row['within_10']:.1f}%; estimate / error: 1% {low:.2f}, median "
            f"{row['ratio_quantiles'][2]:.2f}, 99% {high:.1f}; infinite in "
            f"{100 * row['unknown']:.1f}%"
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
    solved = {name: row for name, row in results["kinds"].items() if row["problems"]}
    figure = new_figure(4 * len(solved), 4)
    panels = figure.subplots(1, len(solved), squeeze=False)[0]
    for axes, (name, row) in zip(panels, solved.items(), strict=True):
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
