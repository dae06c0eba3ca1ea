"""MINRES on matrices that are indefinite or singular."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imaml_jax.bilevel.linear_solve import solve_cg_steihaug
from imaml_jax.bilevel.minres import solve_minres
from imaml_jax.types import LinearOperator
from tests.bilevel.systems import as_tree, matrix_operator, spectrum_matrix

pytestmark = pytest.mark.usefixtures("x64")

both_dtypes = pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["f64", "f32"])


def test_minres_stops_where_the_matrix_is_singular_and_says_so():
    diagonal = jnp.array([0.0, 2.0, -1.0])
    operator = LinearOperator(lambda v: diagonal * v)
    x, info = solve_minres(operator, jnp.array([0.0, 3.0, 1.0]))
    np.testing.assert_allclose(x, [0.0, 1.5, -1.0], atol=1e-12)
    assert info.converged and info.num_steps == 2
    x, info = solve_minres(operator, jnp.array([4.0, 0.0, 0.0]))
    np.testing.assert_array_equal(x, 0)
    assert not info.converged
    assert (info.relative_residual, info.num_steps, info.min_curvature) == (1, 1, 0)


@both_dtypes
def test_minres_tells_the_true_residual_where_no_solution_exists(dtype):
    rng = np.random.default_rng(6)
    matrix = spectrum_matrix(rng, np.append(0.0, np.linspace(-3, 10, 29))).astype(dtype)
    b = jnp.asarray(rng.normal(size=30), dtype)
    x, info = jax.jit(lambda m, b: solve_minres(LinearOperator(lambda v: m @ v), b))(matrix, b)
    x = np.asarray(x, np.float64)
    residual = np.linalg.norm(b - matrix.astype(np.float64) @ x) / np.linalg.norm(b)
    assert not info.converged
    assert info.relative_residual > 0.1
    # The solution has grown, so that only the order of the residual is certain.
    assert 0.1 < info.relative_residual / residual < 10


@pytest.mark.parametrize("smallest", [-1.0, -0.01])
def test_minres_meets_the_curvatures_that_cg_meets(smallest):
    matrix = spectrum_matrix(np.random.default_rng(7), np.append(smallest, np.linspace(1, 5, 8)))
    operator, b = matrix_operator(jnp.asarray(matrix)), as_tree(jnp.arange(1.0, 10.0))
    _, minres = solve_minres(operator, b, tol=1e-12)
    _, cg = solve_cg_steihaug(operator, b, tol=1e-12)
    assert cg.min_curvature <= 0 and minres.converged
    assert smallest - 1e-9 <= minres.min_curvature < 0


def test_the_residual_of_minres_never_grows():
    rng = np.random.default_rng(4)
    matrix, b = spectrum_matrix(rng, np.linspace(-2, 9, 30)), rng.normal(size=30)
    solve = jax.jit(lambda k: solve_minres(LinearOperator(lambda v: matrix @ v), b, max_steps=k))
    residuals = []
    for k in range(31):
        x, info = solve(k)
        residuals.append(np.linalg.norm(b - matrix @ x) / np.linalg.norm(b))
        np.testing.assert_allclose(info.relative_residual, residuals[-1], rtol=1e-6, atol=1e-12)
        if 1 <= k <= 4:
            images = np.stack([np.linalg.matrix_power(matrix, i + 1) @ b for i in range(k)], 1)
            best = images @ np.linalg.lstsq(images, b, rcond=None)[0]
            smallest = np.linalg.norm(b - best) / np.linalg.norm(b)
            np.testing.assert_allclose(residuals[-1], smallest, rtol=1e-8)
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(residuals))
