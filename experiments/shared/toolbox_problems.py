"""The bilevel problems on which `toolbox_comparison` measures libraries, with exact gradients.

All are in float64, which must be enabled. Each has an inner problem with a solver, and an outer
loss of its solution; the gradient that NumPy gives in closed form is that of the loss in the first
of the arguments.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from imaml_jax.types import Batch

MOST_STEPS, PRECISION = 5000, 1e-14
SOURCES, SINKS, REGULARISATION = 30, 20, 0.1
ORBITS = 1000
RIDGE_STRENGTHS, LOGISTIC_STRENGTHS = 200, 500
STATES, WIDTH, FEATURES, CONTRACTION = 20, 50, 10, 0.9

# `(init, *args) -> x`.
Solver = Callable[..., jax.Array]


class Problem(NamedTuple):
    """A bilevel problem.

    Attributes:
      kind: whether the inner solution minimises `fun`, is equal to it, or makes it zero.
      fun: `(x, *args)`.
      solver: of the inner problem.
      loss: `(solver, *args) -> scalar`, with any solver in place of the one above.
      args: arrays or trees of arrays.
      exact: the gradient of the loss in `args[0]`.
    """

    kind: Literal["minimum", "fixed point", "root"]
    fun: Callable[..., jax.Array]
    solver: Solver
    loss: Callable[..., jax.Array]
    args: tuple[Any, ...]
    exact: Any

    @property
    def residual(self) -> Callable[..., jax.Array]:
        """What is zero at the inner solution."""
        if self.kind == "minimum":
            return jax.grad(self.fun)
        if self.kind == "root":
            return self.fun
        return lambda x, *args: self.fun(x, *args) - x


def _repeated(step: Callable[..., jax.Array]) -> Solver:
    """Applies `(x, *args) -> x` until nothing changes."""

    def solver(init, *args):
        def unfinished(carry):
            _, change, count = carry
            return (change > PRECISION) & (count < MOST_STEPS)

        def again(carry):
            x, _, count = carry
            new = step(x, *args)
            return new, jnp.max(jnp.abs(new - x)), count + 1

        return lax.while_loop(unfinished, again, (init, jnp.inf, 0))[0]

    return solver


def sinkhorn(rng: np.random.Generator) -> Problem:
    """Entropic transport; the loss is a weighted sum of the plan, the gradient in the costs.

    The potentials of the sinks have mean zero, so that the solution is unique.
    """
    places = rng.uniform(size=(SOURCES, 1, 2)), rng.uniform(size=(1, SINKS, 2))
    costs = jnp.asarray(np.sum((places[0] - places[1]) ** 2, -1))
    masses = tuple(jnp.asarray(rng.dirichlet(np.full(n, 5.0))) for n in (SOURCES, SINKS))
    weights = jnp.asarray(rng.normal(size=costs.shape))

    def fun(potentials, costs, sources, sinks):
        def other(potential, costs, masses):
            scaled = (potential - costs) / REGULARISATION
            return REGULARISATION * (jnp.log(masses) - jax.nn.logsumexp(scaled, axis=1))

        of_sources = other(potentials[None, SOURCES:], costs, sources)
        of_sinks = other(of_sources[None], costs.T, sinks)
        return jnp.concatenate([of_sources, of_sinks - jnp.mean(of_sinks)])

    def loss(solver, costs, *masses):
        x = solver(jnp.zeros(SOURCES + SINKS), costs, *masses)
        return jnp.sum(weights * _plan(x, costs, jnp))

    solver = _repeated(fun)
    plan = _plan(np.asarray(jax.jit(solver)(jnp.zeros(SOURCES + SINKS), costs, *masses)), costs, np)
    exact = _sinkhorn_gradient(plan, np.asarray(weights))
    return Problem("fixed point", fun, solver, loss, (costs, *masses), exact)


def _plan(potentials: Any, costs: Any, xp: Any) -> Any:
    exponents = potentials[:SOURCES, None] + potentials[None, SOURCES:] - costs
    return xp.exp(exponents / REGULARISATION)


def _sinkhorn_gradient(plan: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """By the sums of the plan, which do not change with the costs: a singular linear system."""
    rows, columns = np.diag(plan.sum(1)), np.diag(plan.sum(0))
    outer = weights * plan / REGULARISATION
    right = np.concatenate([outer.sum(1), outer.sum(0)])
    adjoint = np.linalg.lstsq(np.block([[rows, plan], [plan.T, columns]]), right)[0]
    return plan * (adjoint[:SOURCES, None] + adjoint[None, SOURCES:]) - outer


def kepler(rng: np.random.Generator) -> Problem:
    """Kepler's equation of many orbits, each on its own; the gradient in the eccentricities."""
    eccentricities = rng.uniform(0, 0.9, ORBITS)
    anomalies = rng.uniform(0, 2 * np.pi, ORBITS)

    def fun(x, eccentricity, anomaly):
        return x - eccentricity * jnp.sin(x) - anomaly

    def newton(x, eccentricity, anomaly):
        return x - fun(x, eccentricity, anomaly) / (1 - eccentricity * jnp.cos(x))

    def loss(solver, eccentricities, anomalies):
        start = anomalies + eccentricities * jnp.sin(anomalies)
        return jnp.sum(jax.vmap(solver)(start, eccentricities, anomalies))

    x = anomalies
    for _ in range(50):
        slope = 1 - eccentricities * np.cos(x)
        x = x - np.clip((x - eccentricities * np.sin(x) - anomalies) / slope, -1, 1)
    exact = np.sin(x) / (1 - eccentricities * np.cos(x))
    args = jnp.asarray(eccentricities), jnp.asarray(anomalies)
    return Problem("root", fun, _repeated(newton), loss, args, exact)


def ridge(rng: np.random.Generator) -> Problem:
    """A ridge regression with a strength for each feature; the gradient in them.

    It is `-x * A^-1 g` with `A x = X^T y / n` and the gradient `g` of the held-out loss at `x`.
    """
    weight = rng.normal(size=RIDGE_STRENGTHS)
    train, held_out = (
        _examples(rng, weight, lambda outputs: outputs + rng.normal(size=outputs.shape))
        for _ in range(2)
    )
    strength = rng.uniform(0.1, 0.4, RIDGE_STRENGTHS)

    def fun(x, strength, train):
        residual = train.inputs @ x - train.targets
        return jnp.mean(residual**2) / 2 + jnp.sum(strength * x**2) / 2

    def solver(init, *args):
        hessian, gradient = (f(fun)(init, *args) for f in (jax.hessian, jax.grad))
        return init - jnp.linalg.solve(hessian, gradient)

    def loss(solver, strength, train, held_out):
        x = solver(jnp.zeros_like(strength), strength, train)
        return jnp.mean((held_out.inputs @ x - held_out.targets) ** 2)

    matrix = train.inputs.T @ train.inputs / len(train.inputs) + np.diag(strength)
    x = np.linalg.solve(matrix, train.inputs.T @ train.targets / len(train.inputs))
    residual = held_out.inputs @ x - held_out.targets
    outer = 2 / len(residual) * held_out.inputs.T @ residual
    exact = -x * np.linalg.solve(matrix, outer)
    args = jax.tree.map(jnp.asarray, (strength, train, held_out))
    return Problem("minimum", fun, solver, loss, args, exact)


def logistic(rng: np.random.Generator) -> Problem:
    """A logistic regression with a strength for each feature; the gradient in them."""
    weight = rng.normal(size=LOGISTIC_STRENGTHS)
    train, held_out = (
        _examples(rng, weight, lambda outputs: np.sign(outputs + rng.logistic(size=outputs.shape)))
        for _ in range(2)
    )
    strength = rng.uniform(0.1, 0.4, LOGISTIC_STRENGTHS)

    def mean_loss(x, batch):
        return jnp.mean(jax.nn.softplus(-batch.targets * (batch.inputs @ x)))

    def fun(x, strength, train):
        return mean_loss(x, train) + jnp.sum(strength * x**2) / 2

    def solver(init, strength, train):
        def newton(_, x):
            share = jax.nn.sigmoid(train.targets * (train.inputs @ x))
            weighted = train.inputs * (share * (1 - share))[:, None]
            hessian = train.inputs.T @ weighted / len(share) + jnp.diag(strength)
            gradient = jax.grad(fun)(x, strength, train)
            return x - jax.scipy.linalg.solve(hessian, gradient, assume_a="pos")

        return lax.fori_loop(0, 6, newton, init)

    def loss(solver, strength, train, held_out):
        return mean_loss(solver(jnp.zeros_like(strength), strength, train), held_out)

    exact = _logistic_gradient(strength, train, held_out)
    args = jax.tree.map(jnp.asarray, (strength, train, held_out))
    return Problem("minimum", fun, solver, loss, args, exact)


def _logistic_gradient(strength: np.ndarray, train: Batch, held_out: Batch) -> np.ndarray:
    """`-x * H^-1 g` with the Hessian `H` of the inner and the gradient `g` of the outer loss."""
    x = np.zeros_like(strength)
    hessian = np.diag(strength)
    for _ in range(20):
        inner, hessian = _mean_loss_derivatives(x, train)
        hessian += np.diag(strength)
        x = x - np.linalg.solve(hessian, inner + strength * x)
    return -x * np.linalg.solve(hessian, _mean_loss_derivatives(x, held_out)[0])


def _mean_loss_derivatives(x: np.ndarray, batch: Batch) -> tuple[Any, Any]:
    """Gradient and Hessian of the mean logistic loss."""
    wrong = 1 / (1 + np.exp(batch.targets * (batch.inputs @ x)))
    weighted = batch.inputs * (wrong * (1 - wrong))[:, None]
    count = len(wrong)
    return -(batch.targets * wrong) @ batch.inputs / count, batch.inputs.T @ weighted / count


def _examples(
    rng: np.random.Generator, weight: np.ndarray, target: Callable[[np.ndarray], Any]
) -> Batch:
    """Twice as many as there are features, of unit variance."""
    inputs: Any = rng.normal(size=(2 * len(weight), len(weight)))
    return Batch(inputs, target(inputs @ weight))


def equilibrium(rng: np.random.Generator) -> Problem:
    """A deep equilibrium layer with a squared loss; the gradient in its weights."""
    params = {
        "recurrent": CONTRACTION * np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0],
        "input": rng.normal(size=(FEATURES, WIDTH)) / np.sqrt(FEATURES),
        "bias": 0.1 * rng.normal(size=(1, WIDTH)),
    }
    inputs, targets = rng.normal(size=(STATES, FEATURES)), rng.normal(size=(STATES, WIDTH))

    def fun(x, params, inputs):
        return jnp.tanh(x @ params["recurrent"] + inputs @ params["input"] + params["bias"])

    def loss(solver, params, inputs, targets):
        return jnp.mean((solver(jnp.zeros((STATES, WIDTH)), params, inputs) - targets) ** 2)

    exact = _equilibrium_gradient(params, inputs, targets)
    args = jax.tree.map(jnp.asarray, (params, inputs, targets))
    return Problem("fixed point", fun, _repeated(fun), loss, args, exact)


def _equilibrium_gradient(
    params: dict[str, np.ndarray], inputs: np.ndarray, targets: np.ndarray
) -> dict[str, np.ndarray]:
    """By a dense system of equations for each state."""
    drive = inputs @ params["input"] + params["bias"]
    x = np.zeros_like(drive)
    for _ in range(1000):
        x = np.tanh(x @ params["recurrent"] + drive)
    slopes = 1 - x**2
    matrices = np.eye(WIDTH) - params["recurrent"][None] * slopes[:, None, :]
    outer = 2 * (x - targets) / x.size
    moved = np.linalg.solve(matrices, outer[..., None])[..., 0] * slopes
    return {"recurrent": x.T @ moved, "input": inputs.T @ moved, "bias": moved.sum(0)[None]}


PROBLEMS: dict[str, Callable[[np.random.Generator], Problem]] = {
    "sinkhorn": sinkhorn,
    "kepler": kepler,
    "ridge": ridge,
    "logistic": logistic,
    "equilibrium": equilibrium,
}
