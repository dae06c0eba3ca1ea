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

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import imaml_jax
from experiments.shared import common, reports
from experiments.shared.inner_problems import Kind, Problem, make_problem
from imaml_jax.learners.settings import Count, Range, Record, Seed

NEWTON_STEPS, MOST_ROUNDS = 15, 200
QUANTILES = (0.01, 0.05, 0.5, 0.95, 0.99)
EXACT, ACCURACIES = 1e-9, (1e-1, 1e-2, 1e-4, 1e-6)
INNER_STEPS = 5


@dataclass(frozen=True)
class Config(Record):
    """What is measured."""

    kinds: tuple[Kind, ...] = get_args(Kind)
    """Kinds of inner problems."""
    problems: Annotated[int, Range(least=2)] = 50
    """Problems of each kind, at least 2."""
    rounds: Count = 20
    """Rounds of which each is measured, at least 1."""
    cg_steps: Count = 10
    """CG steps of each linear solve, at least 1."""
    seed: Seed = 0
    """Seed of the problems, at least 0."""
    output: Path = Path("runs/error_estimate")
    """Where to write, without an ending."""


def main(config: Config) -> dict[str, Any]:
    """Measures, writes and prints.

    Returns:
      For each kind the coverage, quantiles of estimate over error, all pairs of the two, and for
      each accuracy what adaptive and fixed step counts took.
    """
    reports.begin(config)
    with jax.enable_x64(True):
        rows = {kind: measure(config, make_problem(kind)) for kind in config.kinds}
    return reports.report(config, {"kinds": rows}, table, draw)


def measure(config: Config, make: Callable[[jax.Array], Problem]) -> dict[str, Any]:
    """The row of one kind."""
    solve = partial(imaml_jax.solve_cg_steihaug, tol=0.0, max_steps=config.cg_steps)
    keys = jax.random.split(jax.random.key(config.seed), config.problems)
    run = jax.jit(partial(lax.map, lambda key: _one(make(key), config.rounds, solve)))
    found = jax.device_get(run(keys))
    solved = found["residual"] < EXACT
    unsolved = int((~solved).sum())
    if unsolved == config.problems:
        return {"problems": 0, "unsolved": unsolved}
    found = {name: values[solved] for name, values in found.items()}
    errors, estimates = found["errors"], found["estimates"]
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
                "rounds": float(found["adaptive_rounds"][:, i].mean()),
                "most_rounds": int(found["adaptive_rounds"][:, i].max()),
                "largest_error": float(found["adaptive_error"][:, i].max()),
                "converged": int(found["converged"][:, i].sum()),
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


def _one(problem: Problem, rounds: int, solve: Any) -> dict[str, Any]:
    """Errors and estimates of one problem, relative to the gradient's norm."""
    outer, objective, curvature, start, args, strong_convexity = problem

    def dense(x):
        return jax.vmap(curvature(x, args).matvec, 1, 1)(jnp.eye(start.size))

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

    adaptive_rounds, adaptive_error, converged = lax.map(ask, jnp.asarray(ACCURACIES))
    return {
        "residual": residual,
        "errors": errors,
        "estimates": estimates,
        "adaptive_rounds": adaptive_rounds,
        "adaptive_error": adaptive_error,
        "converged": converged,
    }


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
        columns = {"accuracy asked": ".0e", "rounds, mean": ".1f", "and most": ""}
        columns |= {"largest error": ".1e", "fixed rounds": ""}
        asked = []
        for each in row["asked"]:
            fixed = each["fixed_rounds"]
            taken = [each[key] for key in ("accuracy", "rounds", "most_rounds", "largest_error")]
            asked.append([*taken, fixed if fixed <= results["rounds"] else f">{fixed - 1}"])
        lines.append(reports.text_table(columns, asked))
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Estimate against error."""
    solved = {name: row for name, row in results["kinds"].items() if row["problems"]}
    labels: dict[str, Any] = dict(xlabel="true relative error", xscale="log", yscale="log")
    with reports.panels(path, len(solved), (4 * len(solved), 4), **labels) as panels:
        panels[0].set(ylabel="estimate")
        for axes, (name, row) in zip(panels, solved.items(), strict=True):
            errors, estimates = np.asarray(row["errors_and_estimates"]).T
            axes.plot(errors, estimates, ".", ms=3, alpha=0.5)
            ends = np.array([errors.min(), errors.max()])
            axes.plot(ends, ends, "k", lw=0.8, label="error")
            axes.plot(ends, 10 * ends, "k:", lw=0.8, label="10 times the error")
            axes.set(title=name)


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
