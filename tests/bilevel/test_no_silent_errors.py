"""No derivative is finite and wrong: every solver behind `custom_root`, on matrices of every kind.

A derivative is either NaN, which the solver's report says, or its error is at most ten times the
condition number times the reported relative residual, with the rounding of the dtype added to the
latter. The condition number is the reported one of the solvers that factorise the matrix, and the
true one of those that iterate: what `b` shows of it is all that these can know.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import imaml_jax
from imaml_jax import LinearOperator, custom_root

pytestmark = pytest.mark.usefixtures("x64")

SOLVERS = {
    "auto": imaml_jax.solve_auto,
    "dense": imaml_jax.solve_dense,
    "gmres": imaml_jax.solve_gmres,
    "lstsq": imaml_jax.solve_lstsq,
    "lsmr": imaml_jax.solve_lsmr,
    "cg": imaml_jax.solve_cg,
    "cg_steihaug": partial(imaml_jax.solve_cg_steihaug, max_steps=1000),
    "jacobi": partial(
        imaml_jax.solve_cg_steihaug,
        max_steps=1000,
        precondition=partial(imaml_jax.jacobi_preconditioner, diagonal=1.5),
    ),
    "minres": partial(imaml_jax.solve_minres, max_steps=1000),
    "neumann": partial(imaml_jax.solve_neumann, step_size=0.9, max_steps=1000),
    "right_preconditioned": partial(
        imaml_jax.solve_right_preconditioned,
        solve=imaml_jax.solve_gmres,
        inverse=lambda v: jnp.cumsum(v),  # far from symmetric
    ),
}
LEAST_SQUARES, MEASURING = ("lstsq", "lsmr"), ("auto", "dense", "lstsq")
SQUARE = ("definite", "indefinite", "normal", "far from normal", "permutation", "singular")
EPS = {"float32": 2.0**-23, "float64": 2.0**-52, "complex64": 2.0**-23, "bfloat16": 2.0**-7}


def optimality(x, matrix, right):
    return matrix @ x - right


@cache
def program(name, symmetric=False):
    """`(matrix, root, t, v) -> tangent, cotangent, reports`; `right` moves by `t`."""
    solve = SOLVERS[name]

    def find(root, matrix, right):
        return root

    root_of = custom_root(optimality, solve, symmetric=symmetric, on_failure="nan")(find)

    def derivatives(matrix, root, t, v):
        def of_right(right):
            return root_of(root, matrix, right)

        tangent = jax.jvp(of_right, (jnp.zeros_like(t),), (t,))[1]
        (cotangent,) = jax.vjp(of_right, jnp.zeros_like(t))[1](v)
        n = LinearOperator(lambda x: matrix @ x, domain=root)
        transposed = imaml_jax.transpose(n, t)
        if matrix.shape[0] == matrix.shape[1]:
            n, transposed = n._replace(domain=None), transposed._replace(domain=None)
        reports = solve(n, t)[1], solve(transposed, v)[1]
        return tangent, cotangent, reports

    return jax.jit(derivatives)


def spectrum(rng, kind, size, condition):
    """A random matrix whose singular values spread over the condition number."""
    values = np.geomspace(1 / condition, 1, size) if size > 1 else np.ones(1)
    left, right = (np.linalg.qr(rng.normal(size=(size, size)))[0] for _ in range(2))
    if kind == "definite":
        return (left * values) @ left.T
    if kind == "indefinite":
        return (left * values * rng.choice([-1, 1], size)) @ left.T
    if kind == "normal":
        turns = np.exp(1j * rng.uniform(0, 2 * np.pi, size))
        basis = np.linalg.qr(left + 1j * right)[0]
        return (basis * values * turns) @ basis.conj().T
    if kind == "far from normal":
        return (left * values) @ right
    if kind == "permutation":
        return np.roll(np.eye(size), 1, 0)
    values[: size // 2 + 1] = 0  # singular
    return (left * values) @ right


def check(name, x, matrix, right, info, eps):
    """One derivative: NaN and said so, or as close as said."""
    x, matrix, right = (np.asarray(a).astype(np.complex128) for a in (x, matrix, right))
    if not np.isfinite(x).all():
        return  # the report is of a solve that rounds differently
    if not right.any():
        np.testing.assert_array_equal(x, 0)  # without a solve
        return
    tol = eps ** (2 / 3)
    assert info.converged or info.relative_residual < 1.1 * tol
    size, rank_eps = max(matrix.shape), min(eps, EPS["float32"])  # bfloat16 is solved in float32
    values = np.linalg.svd(matrix, compute_uv=False)
    cutoff = size * 4 * rank_eps * values.max()
    unclear = (values > cutoff) & (values < 1000 * rank_eps * values.max())
    if name in LEAST_SQUARES and unclear.any():
        return  # the rank is a matter of rounding
    expected = np.linalg.pinv(matrix, rcond=size * rank_eps) @ right
    residual = np.linalg.norm(right - matrix @ x) / np.linalg.norm(right)
    condition = values.max() / values[values > cutoff].min(initial=values.max() or 1)
    if name in MEASURING and size <= 500:
        condition = max(1.0, float(info.condition))
    allowed = tol if name in LEAST_SQUARES else float(info.relative_residual)
    if values.min() <= cutoff and name not in LEAST_SQUARES:
        # One of the solutions, which differ by what the derivative does not depend on.
        assert residual <= max(tol, 10 * eps * condition) * 10
        return
    if not expected.any():
        np.testing.assert_array_equal(x, 0)
        return
    error = np.linalg.norm(x - expected) / np.linalg.norm(expected)
    assert error <= 10 * condition * (allowed + 10 * eps)


def draw(rng, kind, shape, condition, dtype, consistent):
    m, n = shape
    if m == n:
        matrix = spectrum(rng, kind, n, condition)
    else:
        matrix = spectrum(rng, "far from normal", max(shape), condition)[:m, :n]
    if not dtype.startswith("complex"):
        matrix = matrix.real
    matrix = jnp.asarray(matrix).astype(dtype)
    exact = np.asarray(matrix).astype(np.complex128)
    t, v = rng.normal(size=m), rng.normal(size=n)
    if consistent:
        t, v = exact @ rng.normal(size=n), exact.conj().T @ rng.normal(size=m)
    if not dtype.startswith("complex"):
        t, v = t.real, v.real
    root = jnp.zeros(n, dtype)
    return matrix, root, jnp.asarray(t).astype(dtype), jnp.asarray(v).astype(dtype)


def judge(name, kind, shape, log_condition, dtype, consistent, seed):
    rng = np.random.default_rng(seed)
    data = draw(rng, kind, shape, 10.0**log_condition, dtype, consistent)
    matrix, _, t, v = data
    tangent, cotangent, reports = program(name)(*data)
    adjoint = np.asarray(matrix).astype(np.complex128).conj().T
    check(name, tangent, matrix, t, reports[0], EPS[dtype])
    # JAX's cotangents of complex numbers are conjugate.
    check(name, np.conj(cotangent), adjoint, np.conj(v), reports[1], EPS[dtype])


def cases(sizes, dtypes):
    return {
        "kind": st.sampled_from(SQUARE),
        "size": st.sampled_from(sizes),
        "log_condition": st.floats(0, 10),
        "dtype": st.sampled_from(dtypes),
        "consistent": st.booleans(),
        "seed": st.integers(0, 2**32 - 1),
    }


few = partial(settings, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("name", SOLVERS)
@few(max_examples=20)
@given(**cases([6], ["float32", "float64"]))
def test_small_systems(name, kind, size, log_condition, dtype, consistent, seed):
    judge(name, kind, (size, size), log_condition, dtype, consistent, seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", SOLVERS)
@few(max_examples=300)
@given(**cases([1, 2, 3, 7, 40, 300], list(EPS)))
def test_systems_of_every_size_and_dtype(name, kind, size, log_condition, dtype, consistent, seed):
    judge(name, kind, (size, size), log_condition, dtype, consistent, seed)
