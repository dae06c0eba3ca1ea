"""Jacobi's preconditioner against the diagonal itself, and the steps that it saves."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imaml_jax.bilevel.curvature import damped
from imaml_jax.bilevel.diagonal import estimate_diagonal, jacobi_preconditioner
from imaml_jax.bilevel.linear_solve import solve_cg_steihaug
from imaml_jax.types import LinearOperator

pytestmark = pytest.mark.usefixtures("x64")

SIZE = 60


@pytest.fixture(scope="module")
def badly_scaled():
    """A well-conditioned matrix whose rows and columns are scaled from 1 to 1000."""
    rng = np.random.default_rng(0)
    factor = np.eye(SIZE) + 0.02 * rng.normal(size=(SIZE, SIZE))
    scales = np.geomspace(1, 1000, SIZE)
    return scales[:, None] * (factor @ factor.T) * scales[None, :]


@pytest.mark.parametrize("num_probes", [1, 10, SIZE, 1000])
def test_the_estimate_is_exact_for_a_diagonal_matrix_and_with_all_probes(badly_scaled, num_probes):
    diagonal = np.linspace(1, 2, SIZE)
    operator = LinearOperator(lambda v: {"a": diagonal[:50] * v["a"], "b": diagonal[50:] * v["b"]})
    like = {"a": jnp.zeros(50), "b": jnp.zeros(10)}
    found = estimate_diagonal(operator, like, num_probes=num_probes)
    np.testing.assert_allclose(found["b"], diagonal[50:], rtol=1e-12)
    if num_probes >= SIZE:
        found = estimate_diagonal(
            LinearOperator(lambda v: badly_scaled @ v), jnp.zeros(SIZE), num_probes=num_probes
        )
        np.testing.assert_allclose(found, np.diag(badly_scaled), rtol=1e-9)


def test_the_error_of_the_estimate_falls_with_the_root_of_the_probes():
    rng = np.random.default_rng(1)
    root = rng.normal(size=(300, 300)) / 300**0.5
    matrix = root @ root.T
    errors = []
    for num_probes in (5, 20, 80):
        found = jax.jit(
            partial(
                estimate_diagonal,
                LinearOperator(lambda v: matrix @ v),
                jnp.zeros(300),
                num_probes=num_probes,
            )
        )(jax.random.key(3))
        errors.append(np.sqrt(np.mean((found - np.diag(matrix)) ** 2)))
    assert 1.5 < errors[0] / errors[1] < 2.7 and 1.5 < errors[1] / errors[2] < 2.7


def test_the_estimate_is_no_less_than_the_damping():
    operator = damped(LinearOperator(lambda v: jnp.array([-3.0, 1.0]) * v), 0.5)
    np.testing.assert_allclose(estimate_diagonal(operator, jnp.zeros(2)), [0.5, 1.5])


def test_jacobi_saves_steps_on_a_badly_scaled_system(badly_scaled):
    rng = np.random.default_rng(2)
    b = jnp.asarray(rng.normal(size=SIZE))
    expected = np.linalg.solve(badly_scaled, b)
    operator = LinearOperator(lambda v: badly_scaled @ v)
    ways = {
        "none": None,
        "given": partial(jacobi_preconditioner, diagonal=np.diag(badly_scaled)),
        "estimated": partial(jacobi_preconditioner, num_probes=20),
        # What Adam would have: the root of a noisy second moment of gradients.
        "noisy": partial(
            jacobi_preconditioner,
            diagonal=np.diag(badly_scaled) * rng.uniform(0.5, 2, SIZE),
        ),
    }
    steps = {}
    for name, precondition in ways.items():
        solve = partial(
            solve_cg_steihaug, operator, tol=1e-10, max_steps=1000, precondition=precondition
        )
        x, info = jax.jit(solve)(b)
        assert info.converged
        np.testing.assert_allclose(x, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
        steps[name] = int(info.num_steps)
    assert steps["given"] < steps["noisy"] < steps["none"] / 3, steps
    assert steps["given"] < steps["estimated"] < steps["none"] / 2, steps


def test_entries_that_are_not_positive_are_replaced_and_nan_is_not_hidden():
    operator, r = LinearOperator(lambda v: v), jnp.ones(3)
    given = partial(jacobi_preconditioner, operator, r)
    np.testing.assert_allclose(given(diagonal=jnp.array([0.0, 4.0, -2.0]))(r), [0.25, 0.25, 0.25])
    np.testing.assert_allclose(given(diagonal=0.0)(r), 1)
    np.testing.assert_allclose(given(diagonal=4)(r), 0.25)
    broken = partial(jacobi_preconditioner, diagonal=jnp.array([np.nan, 1.0, 1.0]))
    assert not solve_cg_steihaug(operator, r, precondition=broken)[1].converged


def test_too_few_probes_are_refused():
    with pytest.raises(ValueError, match="num_probes=0 must be at least 1"):
        jacobi_preconditioner(LinearOperator(lambda v: v), jnp.ones(3), num_probes=0)
