"""A solve that did not converge is never silent, whatever the solver and the system."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imaml_jax.bilevel.curvature import damped
from imaml_jax.bilevel.dense import solve_dense
from imaml_jax.bilevel.gmres import solve_gmres
from imaml_jax.bilevel.linear_solve import solve_cg, solve_cg_steihaug, solve_neumann
from imaml_jax.bilevel.minres import solve_minres
from imaml_jax.types import LinearOperator, LowRank
from tests.bilevel.systems import make_solvers

SIZE, TOL = 4, 1e-5
SOLVERS = make_solvers(SIZE, preconditioner_rank=2, step_size=0.4)
DIAGONAL = np.array([1.0, 2.0, 4.0, 0.5], np.float32)
SINGULAR = np.array([0.0, 2.0, 4.0, 0.5], np.float32)
ONES = np.ones(SIZE, np.float32)


@cache
def program(name):
    """`(diagonal, b) -> (x, info)`, compiled once for a solver; the last entry is damping."""

    def solve(diagonal, b):
        undamped = diagonal - diagonal[-1]

        def factor():
            return LowRank(jnp.eye(SIZE, dtype=b.dtype), jnp.diag(undamped))

        operator = damped(LinearOperator(lambda v: undamped * v, factor), diagonal[-1])
        return SOLVERS[name](operator, b, tol=TOL)

    return jax.jit(solve)


def is_told(x, info, diagonal, b):
    """Whether it did not converge, or is right in float64."""
    right = b.astype(np.float64)
    residual = right - diagonal.astype(np.float64) * np.asarray(x, np.float64)
    return not info.converged or np.linalg.norm(residual) <= 1.1 * TOL * np.linalg.norm(right)


def with_second(value):
    return np.array([1.0, value, 4.0, 0.5], np.float32)


SINGULAR_RANGE = np.array([0, 1, 1, 1], np.float32)
UNSOLVABLE = {
    "NaN": (with_second(np.nan), ONES),
    "infinite": (with_second(np.inf), ONES),
    "singular": (SINGULAR, ONES),
    "zero": (0 * ONES, ONES),
    "the solution overflows": (1e-20 * DIAGONAL, 1e30 * ONES),
    "the solution underflows": (1e20 * DIAGONAL, 1e-30 * ONES),
}
# Those a solver may solve or not.
HARD = {
    "NaN, nothing": (with_second(np.nan), 0 * ONES),
    "singular, nothing": (SINGULAR, 0 * ONES),
    "singular, in its range": (SINGULAR, SINGULAR_RANGE),
    "products overflow": (8e37 * DIAGONAL, ONES),
    "indefinite": (with_second(-2), ONES),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_no_solver_is_silent_on_a_system_that_it_cannot_solve(name):
    for system, (diagonal, b) in UNSOLVABLE.items():
        assert not program(name)(diagonal, b)[1].converged, system
    for system, (diagonal, b) in HARD.items():
        x, info = program(name)(diagonal, b)
        assert is_told(x, info, diagonal, b), system


@pytest.mark.parametrize("name", SOLVERS)
def test_the_same_system_is_solved_where_it_can_be(name):
    for diagonal, b in ((DIAGONAL, ONES), (DIAGONAL, 0 * ONES), (1e15 * DIAGONAL, ONES)):
        if name != "neumann" or diagonal is DIAGONAL:  # its step is for this one
            x, info = program(name)(diagonal, b)
            assert info.converged and is_told(x, info, diagonal, b)


@pytest.fixture(scope="module")
def ill_conditioned():
    """`float32 factors of a matrix with condition number 1e8`, definite also when rounded."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(40, 40)))[0].astype(np.float32)
    return basis, np.geomspace(1e-8, 1, 40).astype(np.float32), rng.normal(size=40)


@pytest.mark.parametrize("name", ["cg_steihaug", "minres", "neumann"])
def test_recurrences_are_not_believed_where_rounding_parts_them_from_the_truth(
    name, ill_conditioned
):
    basis, values, b = ill_conditioned
    settings = {"step_size": 1.0} if name == "neumann" else {}
    solve = partial(SOLVERS[name], tol=1e-2, max_steps=20000, **settings)
    operator = LinearOperator(lambda v: basis @ (values * (basis.T @ v)))
    x, info = jax.jit(partial(solve, operator))(jnp.asarray(b, jnp.float32))
    exact = basis.astype(np.float64)
    product = exact @ (values.astype(np.float64) * (exact.T @ np.asarray(x, np.float64)))
    residual = np.linalg.norm(b - product) / np.linalg.norm(b)
    assert residual > 1e-2
    assert not info.converged
    if info.num_steps < 20000:  # it claimed to have converged, or broke down
        np.testing.assert_allclose(info.relative_residual, residual, rtol=0.5)


@pytest.mark.parametrize("claims", [False, True])
def test_under_vmap_a_claim_alone_costs_a_product(claims):
    counter = []

    def solve(b):
        def matvec(v):
            jax.debug.callback(lambda: counter.append(1))
            return DIAGONAL * v

        return solve_cg_steihaug(LinearOperator(matvec), b, max_steps=10 if claims else 2)[1]

    info = jax.jit(jax.vmap(solve))(jnp.stack([ONES, jnp.arange(1.0, 5.0)]))
    jax.effects_barrier()
    assert (info.converged == claims).all()
    assert len(counter) == info.num_steps.max() + claims  # a callback for both lanes


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("condition", [1e2, 1e4])
def test_the_condition_estimate_is_a_lower_bound_and_not_far_below(condition):
    rng = np.random.default_rng(1)
    basis = np.linalg.qr(rng.normal(size=(40, 40)))[0]
    matrix = (basis * np.geomspace(1, condition, 40)) @ basis.T
    operator, b = LinearOperator(lambda v: matrix @ v), jnp.asarray(rng.normal(size=40))
    for solve in (
        partial(solve_cg_steihaug, tol=1e-8, max_steps=2000),
        partial(solve_minres, tol=1e-8, max_steps=2000),
        partial(solve_neumann, step_size=1 / condition, tol=1e-2, max_steps=10**5),
    ):
        _, info = jax.jit(partial(solve, operator))(b)
        assert condition / 30 < info.condition <= condition * (1 + 1e-6)
    exact = solve_dense(operator, b, diagnose=True)[1].condition
    np.testing.assert_allclose(exact, condition, rtol=1e-6)
    frobenius = np.linalg.norm(matrix) * np.linalg.norm(np.linalg.inv(matrix))
    np.testing.assert_allclose(solve_dense(operator, b)[1].condition, frobenius, rtol=0.5)


def test_condition_is_infinite_where_the_curvature_is_not_positive():
    diagonal = jnp.array([-1.0, 2.0])
    _, info = solve_cg_steihaug(LinearOperator(lambda v: diagonal * v), jnp.ones(2))
    assert info.condition == np.inf and not info.converged
    # MINRES is for such matrices.
    _, info = solve_minres(LinearOperator(lambda v: diagonal * v), jnp.ones(2))
    assert 1 < info.condition <= 2.001 and info.converged


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize(
    "solve",
    [
        solve_cg,
        solve_cg_steihaug,
        solve_gmres,
        solve_dense,
        partial(solve_neumann, step_size=0.4, tol=1e-6),
    ],
)
def test_right_hand_sides_whose_squares_leave_the_range_are_solved(solve, scale):
    b = jnp.array([1.0, -2.0, 3.0], jnp.float32) * scale
    diagonal = jnp.array([1.0, 2.0, 4.0], jnp.float32)
    x, info = solve(LinearOperator(lambda v: diagonal * v), b)
    np.testing.assert_allclose(x / scale, np.array([1.0, -1.0, 0.75]), rtol=1e-5)
    assert bool(info.converged)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "solve",
    [solve_cg, solve_cg_steihaug, solve_gmres, solve_dense, partial(solve_neumann, step_size=0.1)],
)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_right_hand_side_that_is_not_finite_is_never_solved(solve, bad):
    x, info = solve(LinearOperator(lambda v: 2 * v), jnp.array([bad, 1.0]))
    assert not np.isfinite(x).any()
    assert not bool(info.converged)


@pytest.mark.usefixtures("x64")
def test_gmres_says_that_it_did_not_solve_a_singular_system():
    diagonal = jnp.array([1.0, 2.0, 0.0, 3.0])
    x, info = solve_gmres(LinearOperator(lambda v: diagonal * v), jnp.ones(4))
    assert np.isfinite(x).all()
    assert info.relative_residual < 0.6
    assert not info.converged


@pytest.mark.usefixtures("x64")
def test_steihaug_does_not_hide_a_product_that_is_not_finite():
    _, info = solve_cg_steihaug(LinearOperator(lambda v: v * jnp.nan), jnp.ones(3))
    assert not info.converged
    assert not np.isfinite(info.relative_residual)
