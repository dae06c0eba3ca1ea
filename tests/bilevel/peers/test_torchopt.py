"""What torchopt tests of implicit gradients, asked of the toolbox.

Peer: metaopt/torchopt 0.7.3, commit 960fb0aa53f27bad1af0bdf018b5ad4be077949a,
`tests/test_implicit.py`.

Counting rule: theirs, one case for each combination of parameters: implicit MAML by conjugate
gradient on the normal equations (24; `solve_lsmr`) and by the inverse or the Neumann series (48;
`solve_dense`, `solve_neumann`), and a ridge regression whose own solver is conjugate gradient (4;
`solve_cg`) or the inverse or the series (8). As pytest counts: 84 cases. Their reference is
jaxopt; ours is the assembled Jacobian.

Left out on purpose:

- `test_imaml_module` (24) and `test_module_*` (3): classes of PyTorch modules; a solver of ours is
  a function.
- `test_linalg.py`: a helper for lists of matrices.

Two of their 8 ridge regressions they skip (the Neumann series in float64); they hold here.
"""

from functools import cache, partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from imaml_jax import (
    custom_argmin,
    custom_root,
    solve_cg,
    solve_dense,
    solve_lsmr,
    solve_neumann,
)

pytestmark = pytest.mark.usefixtures("x64")

BATCHES, BATCH_SIZE, FEATURES, CLASSES = 3, 8, 3, 4
DTYPES, RATES = ("float64", "float32"), (1e-3, 1e-4)
INNER_RATES, INNER_STEPS = (2e-2, 2e-3), (20, 50, 100)
IMAML = list(product(DTYPES, RATES, INNER_RATES, INNER_STEPS))
SERIES = (False, True)

rng = np.random.default_rng(0)
INPUTS = rng.normal(size=(BATCHES, BATCH_SIZE, FEATURES))
LABELS = rng.integers(CLASSES, size=(BATCHES, BATCH_SIZE))
TARGETS = rng.normal(size=(BATCHES, BATCH_SIZE))
QUERY_INPUTS, QUERY_TARGETS = rng.normal(size=INPUTS.shape), rng.normal(size=TARGETS.shape)
TOLERANCE = {"float64": 1e-9, "float32": 2e-6}
AUX = (0, {"a": 1, "b": 2})


def model(params, inputs):
    return inputs @ params["weight"] + params["bias"][None]


def proximal_loss(params, meta_params, inputs, labels):
    loss = optax.softmax_cross_entropy_with_integer_labels(model(params, inputs), labels).mean()
    gaps = jax.tree.map(lambda p, m: jnp.sum((p - m) ** 2) / 2, params, meta_params)
    return loss + sum(jax.tree.leaves(gaps))


def descend(params, meta_params, inputs, labels, rate, steps):
    """Gradient descent, whose steps need not reach the minimum."""

    def step(_, params):
        grads = jax.grad(proximal_loss)(params, meta_params, inputs, labels)
        return jax.tree.map(lambda p, g: p - rate.astype(p.dtype) * g, params, grads)

    return jax.lax.fori_loop(0, steps, step, params)


def with_settings(fun):
    """A function of the loss's arguments that ignores the settings of the solver."""
    return lambda params, meta_params, inputs, labels, rate, steps: fun(
        params, meta_params, inputs, labels
    )


def solver_by_normal_equations(dtype):
    solve = partial(solve_lsmr, tol=1e-12 if dtype == "float64" else None)

    @custom_root(with_settings(jax.grad(proximal_loss)), solve, has_aux=True)
    def solver(*args):
        return descend(*args), AUX

    return solver


def solver_by_inverse(series, dtype):
    solve = solve_dense
    if series:
        tol = 1e-12 if dtype == "float64" else 1e-6
        solve = partial(solve_neumann, step_size=0.4, tol=tol, max_steps=200)
    return custom_argmin(with_settings(proximal_loss), solve)(descend)


def initial_params(dtype):
    shape = (FEATURES, CLASSES)
    return {"weight": jnp.ones(shape, dtype), "bias": jnp.zeros(CLASSES, dtype)}


@cache
def meta_gradients(kind, dtype):
    """`(params, inputs, labels, rate, steps) -> (gradient, (aux, solution))`."""
    solver = {
        "normal equations": lambda: solver_by_normal_equations(dtype),
        "inverse": lambda: solver_by_inverse(False, dtype),
        "series": lambda: solver_by_inverse(True, dtype),
    }[kind]()

    def outer(meta_params, inputs, *rest):
        result = solver(meta_params, meta_params, inputs, *rest)
        params, aux = result if kind == "normal equations" else (result, AUX)
        return model(params, inputs).mean(), (aux, params)

    return jax.jit(jax.grad(outer, has_aux=True))


@cache
def jacobians(dtype):
    """Of the optimality conditions in both raveled arguments, and of the mean output."""
    _, unravel = ravel_pytree(initial_params(dtype))

    def optimality(params, meta_params, inputs, labels):
        grads = jax.grad(proximal_loss)(unravel(params), unravel(meta_params), inputs, labels)
        return ravel_pytree(grads)[0]

    @jax.jit
    def all_three(*args):
        of_mean = jax.grad(lambda flat: model(unravel(flat), args[2]).mean())(args[0])
        return *jax.jacobian(optimality, (0, 1))(*args), of_mean

    return all_three


def meta_gradient_assembled(solution, params, inputs, labels):
    (flat, _), (meta, unravel) = ravel_pytree(solution), ravel_pytree(params)
    pieces = jacobians(str(flat.dtype))(flat, meta, inputs, labels)
    in_params, in_meta, of_mean = (np.asarray(piece, "float64") for piece in pieces)
    return unravel(jnp.asarray(-in_meta.T @ np.linalg.solve(in_params.T, of_mean), flat.dtype))


def check_imaml(kind, dtype, rate, inner_rate, inner_steps):
    """Three meta-steps, with the same gradients by both."""
    params = expected = initial_params(dtype)

    def update(params, grads):
        return jax.tree.map(lambda p, g: p - np.asarray(rate, dtype) * g, params, grads)

    for inputs, labels in zip(INPUTS.astype(dtype), LABELS, strict=True):
        grads, (aux, solution) = meta_gradients(kind, dtype)(
            params, inputs, labels, np.asarray(inner_rate), inner_steps
        )
        exact = meta_gradient_assembled(solution, params, inputs, labels)
        assert jax.tree.map(int, aux) == AUX
        for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(exact), strict=True):
            assert one.dtype == dtype
            np.testing.assert_allclose(one, other, rtol=0, atol=TOLERANCE[dtype])
        params, expected = update(params, grads), update(expected, exact)
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype, rate, inner_rate, inner_steps", IMAML)
def test_imaml_by_normal_equations(dtype, rate, inner_rate, inner_steps):
    check_imaml("normal equations", dtype, rate, inner_rate, inner_steps)


@pytest.mark.parametrize("series", SERIES)
@pytest.mark.parametrize("dtype, rate, inner_rate, inner_steps", IMAML)
def test_imaml_by_inverse(dtype, rate, inner_rate, inner_steps, series):
    check_imaml("series" if series else "inverse", dtype, rate, inner_rate, inner_steps)


def ridge_loss(weights, strength, inputs, targets):
    residuals = inputs @ weights - targets
    return jnp.mean(residuals**2) / 2 + strength * jnp.sum(weights**2) / 2


@cache
def ridge_gradients(name):
    """`(strength, task) -> (gradient of the query loss, that of the closed form)`."""
    solve = {
        "cg": partial(solve_cg, max_steps=20),
        "inverse": solve_dense,
        "series": partial(solve_neumann, step_size=0.02, max_steps=2000),
    }[name]

    @custom_root(jax.grad(ridge_loss))
    def ridge(init, strength, inputs, targets):
        def matvec(v):
            return inputs.T @ (inputs @ v) + len(targets) * strength * v

        return solve(matvec, inputs.T @ targets)[0]

    def closed_form(strength, inputs, targets):
        gram = inputs.T @ inputs + len(targets) * strength * jnp.eye(FEATURES, dtype=inputs.dtype)
        return jnp.linalg.solve(gram, inputs.T @ targets)

    def query_loss(solver, strength, inputs, targets, query_inputs, query_targets):
        return jnp.mean((query_inputs @ solver(strength, inputs, targets) - query_targets) ** 2)

    def ours(strength, inputs, targets):
        return ridge(jnp.zeros(FEATURES, inputs.dtype), strength, inputs, targets)

    return jax.jit(
        lambda *args: [
            jax.grad(partial(query_loss, solver))(*args) for solver in (ours, closed_form)
        ]
    )


def check_ridge(name, dtype, rate):
    """A meta-step for each batch, from a strength of 0.6."""
    strength = np.asarray(0.6, dtype)
    for task in zip(INPUTS, TARGETS, QUERY_INPUTS, QUERY_TARGETS, strict=True):
        found, expected = ridge_gradients(name)(strength, *(a.astype(dtype) for a in task))
        assert found.dtype == dtype
        np.testing.assert_allclose(found, expected, rtol=1e-7 if dtype == "float64" else 2e-3)
        strength = strength - np.asarray(rate, dtype) * np.asarray(found)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ridge_by_conjugate_gradient(dtype, rate):
    check_ridge("cg", dtype, rate)


@pytest.mark.parametrize("series", SERIES)
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ridge_by_inverse(dtype, rate, series):
    check_ridge("series" if series else "inverse", dtype, rate)
