"""Error of the meta-gradient against the number of inner steps, where the exact one is known.

    python -m experiments.meta_gradient_accuracy

Questions 1 and 2 and figure 2a of Rajeswaran et al., NeurIPS 2019: regression tasks whose inner
problem has a closed-form solution. The second panel, which the paper does not have, is a tanh
network with a reference solved to machine precision and a dense Hessian. Both in float64. Writes
OUTPUT.json and OUTPUT.png.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import imaml_jax
from experiments.shared import common, reports
from imaml_jax.data import sinusoid
from imaml_jax.learners.settings import Count, Range, Record, Seed
from imaml_jax.networks import Network, mlp
from imaml_jax.types import Batch, Task

NUM_PARAMS, NUM_POINTS, REG_STRENGTH = 50, 100, 1.0
CG_STEPS = (1, 2, 5, 10, 20, 50)
# Of every way: its marker and its colour.
_STYLES = {
    **{f"iMAML, {k} CG": ("o", f"C{i}") for i, k in enumerate(CG_STEPS)},
    "iMAML, dense solve": ("s", "C6"),
    "iMAML, Nesterov": ("^", "C8"),
    "iMAML, Hessian-free": ("v", "C9"),
    "MAML, regularised": ("x", "black"),
    "MAML, plain": ("+", "gray"),
}


@dataclass(frozen=True)
class Config(Record):
    """What is measured."""

    # Beyond 1e12, float64 cannot hold the regression's curvatures.
    condition: Annotated[float, Range(above=1, most=1e12)] = 50.0
    """Condition number of the regularised inner problem of the regression, above 1 and at most
    1e12."""
    num_steps: tuple[Count, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
    """Inner steps, each at least 1."""
    num_tasks: Count = 10
    """Random tasks of each kind; medians and ranges are over them; at least 1."""
    seed: Seed = 0
    """Seed of the tasks, at least 0."""
    output: Path = Path("runs/meta_gradient_accuracy")
    """Where to write, without an ending."""

    def check_together(self) -> None:
        reports.check_not_empty(self, "num_steps")


class Problem(NamedTuple):
    """Tasks with what is known of them.

    Attributes:
      network: its parameters are adapted in all.
      params: the meta-parameters.
      tasks: stacked.
      exact: their meta-gradients.
      plain_limit: what plain MAML tends to, where that is known.
      smallest, largest: curvature of the regularised inner problem.
    """

    network: Network
    params: Any
    tasks: Task
    exact: Any
    plain_limit: Any | None
    smallest: float
    largest: float


def half_squared_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Half the mean squared error, so that its Hessian is the second moment of the inputs."""
    return 0.5 * imaml_jax.mean_squared_error(outputs, targets)


def main(config: Config) -> dict[str, Any]:
    """Measures the errors, writes and prints them.

    Returns:
      For each problem the curves `{name: {"median": [...], "low": [...], "high": [...]}}` over
      `num_steps`, relative errors in the Euclidean norm, and the theoretical rates.
    """
    reports.begin(config)
    with jax.enable_x64(True):
        problems = {
            "regression": regression(config.condition, config.num_tasks, config.seed),
            "tanh network": tanh_network(config.num_tasks, config.seed),
        }
        curves = {name: measure(problem, config.num_steps) for name, problem in problems.items()}
        limits = {name: _plain_limit_error(problem) for name, problem in problems.items()}
    rates = {name: (p.smallest, p.largest) for name, p in problems.items()}
    measured = {
        "condition_number": {
            name: largest / smallest for name, (smallest, largest) in rates.items()
        },
        "descent_rate": {name: descent_rate(*ends) for name, ends in rates.items()},
        "nesterov_rate": {name: nesterov_rate(*ends) for name, ends in rates.items()},
        "cg_bound": {k: cg_bound(config.condition, k) for k in CG_STEPS},
        "plain_limit": limits,
        "curves": curves,
    }
    return reports.report(config, measured, table, draw)


def descent_rate(smallest: float, largest: float) -> float:
    """Factor of the error in one step of gradient descent at its best rate, `2 / (mu + L)`."""
    return (largest - smallest) / (largest + smallest)


def nesterov_rate(smallest: float, largest: float) -> float:
    """That of Nesterov's method with constant momentum, in the long run, `1 - sqrt(mu / L)`."""
    return 1 - math.sqrt(smallest / largest)


def cg_bound(condition: float, num_steps: int) -> float:
    """Bound on CG's relative error in the Euclidean norm.

    `2 sqrt(k) ((sqrt(k) - 1) / (sqrt(k) + 1))^K` with `k` the condition number, `K` the steps.
    """
    root = math.sqrt(condition)
    return 2 * root * ((root - 1) / (root + 1)) ** num_steps


def regression(condition: float, num_tasks: int, seed: int) -> Problem:
    """Linear regression tasks; the regularised Hessian has the given condition number.

    Its eigenvalues are spaced evenly in their logarithm from lambda, so that one direction is flat
    in the support loss (there the inner problem starts at its solution), up to
    `condition * lambda`. Plain MAML tends to the query gradient at the nearest minimiser of the
    support loss, projected on that direction.
    """
    rng = np.random.default_rng(seed)
    eigenvalues = REG_STRENGTH * np.geomspace(1.0, condition, NUM_PARAMS)
    params = rng.normal(size=NUM_PARAMS)
    tasks, exact, plain_limits = [], [], []
    for _ in range(num_tasks):
        right, _ = np.linalg.qr(rng.normal(size=(NUM_PARAMS, NUM_PARAMS)))
        left, _ = np.linalg.qr(rng.normal(size=(NUM_POINTS, NUM_PARAMS)))
        moments = np.sqrt(NUM_POINTS * (eigenvalues - REG_STRENGTH))
        x, z = left * moments @ right.T, rng.normal(size=(NUM_POINTS, NUM_PARAMS))
        weights = rng.normal(size=NUM_PARAMS)
        y, u = (a @ weights + 0.1 * rng.normal(size=NUM_POINTS) for a in (x, z))
        system = x.T @ x / NUM_POINTS + REG_STRENGTH * np.eye(NUM_PARAMS)
        minimizer = np.linalg.solve(system, x.T @ y / NUM_POINTS + REG_STRENGTH * params)
        query_grad = z.T @ (z @ minimizer - u) / NUM_POINTS
        tasks.append(Task(*(Batch(*map(jnp.asarray, pair)) for pair in ((x, y), (z, u)))))
        exact.append(REG_STRENGTH * np.linalg.solve(system, query_grad))
        flat = np.outer(right[:, 0], right[:, 0])
        nearest = np.linalg.pinv(x, 1e-10) @ y + flat @ params
        plain_limits.append(flat @ (z.T @ (z @ nearest - u)) / NUM_POINTS)
    network = Network(lambda key, inputs: jnp.asarray(params), lambda w, inputs: inputs @ w)
    return Problem(
        network,
        jnp.asarray(params),
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *tasks),
        jnp.asarray(np.stack(exact)),
        jnp.asarray(np.stack(plain_limits)),
        float(eigenvalues[0]),
        float(eigenvalues[-1]),
    )


def tanh_network(num_tasks: int, seed: int) -> Problem:
    """Sinusoid tasks and a small network; the reference is Newton's method with dense Hessians.

    Raises:
      ValueError: the reference did not reach a minimum to machine precision.
    """
    network = mlp([8, 8, 1], activation=jnp.tanh, kernel_init=jax.nn.initializers.normal(0.5))
    tasks = sinusoid.sample_tasks(
        jax.random.key(seed), num_tasks=num_tasks, shots=10, queries=10, amplitude=(0.5, 2.0)
    )
    params = network.init(jax.random.key(seed + 1), jnp.zeros((1, 1)))
    start, unravel = ravel_pytree(params)

    def inner(flat, task):
        proximal = 0.5 * REG_STRENGTH * jnp.sum((flat - start) ** 2)
        return _loss(network, unravel(flat), task.support) + proximal

    hessian, gradient = jax.jit(jax.hessian(inner)), jax.jit(jax.grad(inner))
    query_gradient = jax.jit(jax.grad(lambda flat, task: _loss(network, unravel(flat), task.query)))
    exact, ends = [], []
    for i in range(num_tasks):
        task = jax.tree.map(lambda x, i=i: x[i], tasks)
        flat = np.asarray(start)
        for _ in range(200):
            matrix, slope = np.asarray(hessian(flat, task)), np.asarray(gradient(flat, task))
            curvatures = np.linalg.eigvalsh(matrix)
            ends.append(curvatures[-1])
            # Gradient descent until the minimum is near, then Newton's method.
            near = curvatures[0] > 0 and np.linalg.norm(slope) < 0.1
            flat = flat - (np.linalg.solve(matrix, slope) if near else slope / curvatures[-1])
            if np.linalg.norm(slope) < 1e-14:
                break
        if not (np.linalg.norm(slope) < 1e-12 and curvatures[0] > 0):
            raise ValueError(
                f"seed={seed}: the reference of task {i} is no minimum (gradient "
                f"{np.linalg.norm(slope):.1e}, smallest curvature {curvatures[0]:.1e}): choose "
                "another"
            )
        ends.append(curvatures[0])
        query_grad = np.asarray(query_gradient(flat, task))
        exact.append(REG_STRENGTH * np.linalg.solve(np.asarray(hessian(flat, task)), query_grad))
    stacked = jax.vmap(unravel)(jnp.asarray(np.stack(exact)))
    return Problem(network, params, tasks, stacked, None, float(min(ends)), float(max(ends)))


def measure(problem: Problem, num_steps: Sequence[int]) -> dict[str, dict[str, list[float]]]:
    """Relative errors of every way to the meta-gradient, over the inner steps."""
    rows = [jax.device_get(_errors(problem, steps)) for steps in num_steps]
    return {
        name: {
            "median": [float(np.median(row[name])) for row in rows],
            "low": [float(row[name].min()) for row in rows],
            "high": [float(row[name].max()) for row in rows],
        }
        for name in _STYLES
    }


def _errors(problem: Problem, steps: int) -> dict[str, jax.Array]:
    descent = optax.sgd(2 / (problem.smallest + problem.largest))
    root = math.sqrt(problem.largest / problem.smallest)
    nesterov = optax.sgd(1 / problem.largest, momentum=(root - 1) / (root + 1), nesterov=True)

    def implicit(inner, solve):
        learner = imaml_jax.imaml(
            problem.network,
            half_squared_error,
            inner=inner,
            num_steps=steps,
            reg_strength=REG_STRENGTH,
            solve=solve,
        )
        return partial(common.meta_gradient, learner)

    def unrolled_loss(params, task):
        loss = partial(_loss, problem.network)
        adapted, _ = imaml_jax.minimize(
            imaml_jax.proximal_objective(loss),
            params,
            params,
            REG_STRENGTH,
            task.support,
            tx=descent,
            num_steps=steps,
        )
        return loss(adapted, task.query)

    dense = imaml_jax.solve_dense
    plain = imaml_jax.maml(problem.network, half_squared_error, inner=descent, num_steps=steps)
    ways = {
        f"iMAML, {k} CG": implicit(
            descent, partial(imaml_jax.solve_cg_steihaug, tol=0.0, max_steps=k)
        )
        for k in CG_STEPS
    } | {
        "iMAML, dense solve": implicit(descent, dense),
        "iMAML, Nesterov": implicit(nesterov, dense),
        "iMAML, Hessian-free": implicit(imaml_jax.newton_cg(max_cg_steps=5), dense),
        "MAML, regularised": jax.grad(unrolled_loss),
        "MAML, plain": partial(common.meta_gradient, plain),
    }

    def errors(task, exact):
        found = {name: way(problem.params, task) for name, way in ways.items()}
        return {name: _relative_error(grads, exact) for name, grads in found.items()}

    # Not vmapped: batched LAPACK calls side by side can wait for each other on a one-thread device.
    mapped = reports.jit_small(lambda *args: jax.lax.map(lambda x: errors(*x), args))
    return mapped(problem.tasks, problem.exact)


def _relative_error(grads: Any, exact: Any) -> jax.Array:
    return optax.tree.norm(optax.tree.sub(grads, exact)) / optax.tree.norm(exact)


def _plain_limit_error(problem: Problem) -> float | None:
    """Median error of the limit of plain MAML; None where it is not known."""
    if problem.plain_limit is None:
        return None
    return float(jnp.median(jax.vmap(_relative_error)(problem.plain_limit, problem.exact)))


def _loss(network: Network, params: Any, batch: Batch) -> jax.Array:
    return half_squared_error(network.apply(params, batch.inputs), batch.targets)


def table(results: dict[str, Any]) -> str:
    """The medians as text."""
    lines = []
    for name, curves in results["curves"].items():
        lines.append(
            f"{name}: condition number {results['condition_number'][name]:.1f}, gradient descent "
            f"contracts by {results['descent_rate'][name]:.4f} a step, Nesterov's method by "
            f"{results['nesterov_rate'][name]:.4f}"
        )
        steps = [(str(count), ".0e") for count in results["num_steps"]]
        rows = [[way, *curve["median"]] for way, curve in curves.items()]
        lines.append(reports.text_table([("relative error after steps", ""), *steps], rows))
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """The curves and their range over tasks; dots for theory, for the network near its minima."""
    steps = np.asarray(results["num_steps"])
    log: dict[str, Any] = dict(xscale="log", yscale="log", ylim=(1e-16, 30))
    with reports.panels(path, 2, (13, 5), True, xlabel="inner steps", **log) as both:
        for axes, (name, curves) in zip(both, results["curves"].items(), strict=True):
            axes.set(title=name)
            for way, curve in curves.items():
                marker, color = _STYLES[way]
                axes.plot(steps, curve["median"], marker, ls="-", color=color, ms=4, label=way)
                axes.fill_between(steps, curve["low"], curve["high"], alpha=0.12, color=color)
            for method, color in (("descent", "C6"), ("nesterov", "C8")):
                decay = results[f"{method}_rate"][name] ** steps.astype(float)
                style = dict(color=color, ls=":", lw=2, label=f"theory: {method}")
                axes.plot(steps, np.maximum(decay, 1e-17), **style)
            if results["plain_limit"][name]:
                axes.axhline(results["plain_limit"][name], color="gray", ls=":", lw=2)
        both[0].set(ylabel="relative error of the meta-gradient")
        for k, bound in results["cg_bound"].items():
            if bound < 1:
                both[0].axhline(bound, color=_STYLES[f"iMAML, {k} CG"][1], ls="--", lw=0.8)
                both[0].annotate(f"bound, {k} CG", (steps[0], bound), fontsize=7)


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
