"""Woodbury and Nyström solves against dense ones, and the steps that a preconditioner saves."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from imaml_jax.bilevel.curvature import damped, gauss_newton, hessian
from imaml_jax.bilevel.linear_solve import solve_cg_steihaug
from imaml_jax.bilevel.low_rank import nystrom_preconditioner, solve_nystrom, solve_woodbury
from imaml_jax.types import LinearOperator
from tests.bilevel.systems import SIZE, as_tree, flatten, spectrum_matrix

pytestmark = pytest.mark.usefixtures("x64")


def test_woodbury_wants_a_factor_and_damping():
    params = jnp.ones(3)
    with pytest.raises(ValueError, match="low-rank factor"):
        solve_woodbury(damped(hessian(jnp.sum, params), 1.0), params)
    with pytest.raises(ValueError, match="solve_woodbury needs damping > 0"):
        solve_woodbury(gauss_newton(jnp.sin, jnp.sum, params), params)
    with pytest.raises(ValueError, match="nystrom_preconditioner needs damping > 0"):
        solve_nystrom(hessian(jnp.sum, params), params, rank=2)
    with pytest.raises(ValueError, match="rank=0"):
        solve_nystrom(damped(hessian(jnp.sum, params), 1.0), params, rank=0)


def test_nystrom_is_exact_from_the_rank_of_the_matrix_on():
    rng = np.random.default_rng(7)
    root, b = rng.normal(size=(4, SIZE)), rng.normal(size=SIZE)
    operator = damped(LinearOperator(lambda v: root.T @ (root @ v)), 0.1)
    expected = np.linalg.solve(root.T @ root + 0.1 * np.eye(SIZE), b)
    errors, residuals = [], []
    for rank in (2, 4, 6, 2 * SIZE):
        x, info = solve_nystrom(operator, jnp.asarray(b), rank=rank, key=jax.random.key(1))
        errors.append(np.linalg.norm(x - expected))
        residuals.append(info.relative_residual)
        assert info.converged == (rank >= 4)
    assert errors[0] > 0.01
    assert max(errors[1:]) < 1e-9 and max(residuals[1:]) < 1e-9


def test_a_nystrom_preconditioner_saves_steps_where_eigenvalues_decay():
    rng = np.random.default_rng(9)
    matrix = spectrum_matrix(rng, np.geomspace(1e4, 1e-2, 60))
    operator = damped(LinearOperator(lambda v: matrix @ v), 0.1)
    b = jnp.asarray(rng.normal(size=60))
    expected = np.linalg.solve(matrix + 0.1 * np.eye(60), b)
    steps = {}
    for rank in (None, 10, 40):
        precondition = rank and partial(nystrom_preconditioner, rank=rank)
        x, info = solve_cg_steihaug(
            operator, b, key=jax.random.key(0), tol=1e-10, precondition=precondition, max_steps=500
        )
        np.testing.assert_allclose(x, expected, rtol=0, atol=1e-8)
        steps[rank] = int(info.num_steps)
    assert 2 * steps[40] < steps[10] < steps[None]


def test_nystrom_leaves_negative_directions_out():
    diagonal = jnp.array([-2.0, 3.0, 0.0])
    operator = damped(LinearOperator(lambda v: diagonal * v), 1.0)
    x, info = solve_nystrom(operator, jnp.ones(3), rank=3)
    np.testing.assert_allclose(x, [1.0, 0.25, 1.0], atol=1e-12)
    assert not info.converged


def test_woodbury_takes_every_kind_of_damping():
    """Where `S` is rank-deficient, and where there are more outputs than parameters."""
    rng = np.random.default_rng(5)
    jacobian, b = rng.normal(size=(2 * SIZE, SIZE)), rng.normal(size=SIZE)
    kinds = {
        "integer": (2,),
        "nested, a number for each part": (0.5, {"a": 1.0, "b": 0.1, "c": 0.0}),
        "nested, broadcast in a leaf": (
            {"a": np.array([[1.0, 2.0]]), "b": (0.5, None), "c": 3.0},
            0.25,
        ),
    }

    def apply_fn(params):
        return jacobian @ ravel_pytree(params)[0]

    def loss_fn(outputs):
        return 0.5 * jnp.sum(outputs[:4]) ** 2

    @jax.jit
    def solve_all(b):
        solutions = {}
        for kind, dampings in kinds.items():
            operator = gauss_newton(apply_fn, loss_fn, b)
            for damping in dampings:
                operator = damped(operator, damping)
            x, info = solve_woodbury(operator, b)
            solutions[kind] = info.converged, operator.matvec(x)
        return solutions

    for kind, (converged, product) in solve_all(as_tree(b)).items():
        np.testing.assert_allclose(flatten(product), b, atol=1e-10, err_msg=kind)
        assert converged
