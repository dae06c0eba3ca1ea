"""What lineax tests of its linear solves, asked of the toolbox's solvers, in float64.

Peer: patrick-kidger/lineax 0.1.1, commit 2f0e083d9f0a3ae3329648410ed32e29f8cc9fb4, `tests/`.

Counting rule: a case is one property x one solver of ours, or x one kind of matrix, operator or
dtype where the property is about these. Solvers of theirs that ours covers by one are counted once:
LU and Cholesky by `solve_dense`; QR and SVD by `solve_lstsq`; LSMR and the normal equations by
`solve_lsmr`; GMRES and BiCGStab by `solve_gmres`; CG on definite matrices of either sign by
`solve_cg`, `solve_cg_steihaug` and `solve_minres`. Runs with and without a stored factorisation,
and with the matrix as an array or as a Jacobian, are one case; one batch axis within another stands
for the single ones. As pytest counts: 141 cases.

How a linear solve is differentiated here: `solve_*` is decorated by `custom_root`, and a
least-squares problem with its multipliers (`least_squares_conditions`).

Left out on purpose:

- tags and what follows from them (`test_is_symmetric`, `test_is_diagonal`, `test_diagonal`,
  `test_tridiagonal`, the Triangular, Diagonal and Tridiagonal solvers,
  `test_mixed_dtypes_*triangular`): an operator of ours is a function and no structure is declared;
  that structured matrices are solved by the general solvers is tested.
- operator classes (`test_operator.py`: `test_structures_*`, `test_materialise*`, `test_linearise`,
  `test_tangent_as_matrix`, `test_identity_with_different_structures*`, the conjugate of
  `test_adjoint.py`): sums, products and conjugates of functions are written in JAX itself.
- `options`, `state`, `throw` and result codes (`test_solver_init_not_differentiated`): there is
  `SolveInfo` instead; that failures are reported is tested.
- `test_norm.py`, `test_inexact_asarray_*`: private helpers of lineax.
- damped LSMR (`test_damp*`): skipped by lineax too.
"""

from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imaml_jax import (
    LinearOperator,
    custom_root,
    jacobi_preconditioner,
    solve_auto,
    solve_cg,
    solve_cg_steihaug,
    solve_dense,
    solve_gmres,
    solve_lsmr,
    solve_lstsq,
    solve_minres,
    solve_right_preconditioned,
)

pytestmark = pytest.mark.usefixtures("x64")

SIZE, TIGHT = 5, 1e-12
DTYPES = ("real", "complex")

# Ours, by the matrices that it is for.
SOLVERS: dict[str, tuple[str, Any]] = {
    "auto": ("general", solve_auto),
    "dense": ("general", solve_dense),
    "lstsq": ("general", solve_lstsq),
    "lsmr": ("general", partial(solve_lsmr, tol=TIGHT)),
    "gmres": ("general", partial(solve_gmres, tol=TIGHT)),
    "cg": ("positive definite", partial(solve_cg, tol=TIGHT)),
    "cg_steihaug": ("positive definite", partial(solve_cg_steihaug, tol=TIGHT)),
    "minres": ("negative definite", partial(solve_minres, tol=TIGHT)),
}
LEAST_SQUARES = {"lstsq": solve_lstsq, "lsmr": partial(solve_lsmr, tol=TIGHT)}
SINGULAR = ("a row of zeros", "fewer rows", "fewer columns")
RECTANGULAR = ("tall", "wide", "tall, rank 2", "wide, rank 2")
OPERATORS = (
    "matrix",
    "linearised",
    "pulled back",
    "transposed",
    "negated",
    "sum",
    "scaled",
    "composed",
    "identity",
    "diagonal",
    "tridiagonal",
    "lower triangular",
    "upper triangular",
)
REFUSED = ("auto", "dense", "gmres", "cg", "cg_steihaug", "minres")
MIXED = [
    ("float32 and float64", "auto"),
    ("float32 and float64", "dense"),
    ("float32 and float64", "lstsq"),
    ("complex64 and complex128", "auto"),
    ("complex64 and complex128", "dense"),
    ("complex64 and complex128", "lstsq"),
    ("float64 and complex128", "lstsq"),
    ("float64 and complex128", "lsmr"),
]
TWO_STEPS = {
    "cg": partial(solve_cg, tol=0.0, max_steps=2),
    "cg_steihaug": partial(solve_cg_steihaug, tol=0.0, max_steps=2),
    "minres": partial(solve_minres, tol=0.0, max_steps=2),
    "gmres": partial(solve_gmres, tol=0.0, restart=2, max_restarts=1),
    "lsmr": partial(solve_lsmr, tol=0.0, max_steps=2),
}

close = partial(np.testing.assert_allclose, rtol=0, atol=1e-9)


class System(NamedTuple):
    """`matrix @ x = b`, two directions of its derivatives, and weights of the solution."""

    matrix: np.ndarray
    b: np.ndarray
    first: tuple[np.ndarray, np.ndarray]
    second: tuple[np.ndarray, np.ndarray]
    weights: np.ndarray


def normal(dtype, *shape, seed=0):
    real, imaginary = np.random.default_rng(seed).normal(size=(2, *shape))
    return real + 1j * imaginary if dtype == "complex" else real


@cache
def system(kind, dtype):
    if kind == "general":
        matrix = 3 * np.eye(SIZE) + normal(dtype, SIZE, SIZE) / 2
    else:
        basis = np.linalg.qr(normal(dtype, SIZE, SIZE))[0]
        sign = -1 if kind == "negative definite" else 1
        matrix = sign * (basis * np.linspace(1, 4, SIZE)) @ basis.conj().T
    square = [normal(dtype, SIZE, SIZE, seed=seed) for seed in (1, 2)]
    b, first, second, weights = normal(dtype, 4, SIZE, seed=3)
    return System(matrix, b, (square[0], first), (square[1], second), weights)


def differentiable(name):
    """`(matrix, b) -> (x, info)` with the derivatives of `x`."""
    kind, solve = SOLVERS[name]

    @custom_root(
        lambda x, matrix, b: matrix @ x - b, solve, symmetric=kind != "general", has_aux=True
    )
    def run(init, matrix, b):
        return solve(lambda v: matrix @ v, b)

    return partial(run, None)


@cache
def solution(name, dtype):
    """`x`, its report, its tangents of the matrix and of `b`, and their cotangents."""
    matrix, b, (d_matrix, d_b), _, weights = system(SOLVERS[name][0], dtype)

    @jax.jit
    def program(*tangents):
        x, push, info = jax.linearize(differentiable(name), matrix, b, has_aux=True)
        return x, info, push(*tangents), jax.linear_transpose(push, matrix, b)(weights)

    of_matrix = program(d_matrix, np.zeros_like(d_b))
    of_b = program(np.zeros_like(d_matrix), d_b)
    x, info, *_ = of_matrix
    return x, info, (of_matrix[2], of_b[2]), of_b[3]


@cache
def batches(name):
    """Solutions and tangents for every pair of 2 matrices and 3 right-hand sides."""
    matrix, _, (d_matrix, _), *_ = system(SOLVERS[name][0], "real")
    primals = np.stack([matrix, 2 * matrix]), normal("real", 3, SIZE, seed=4)
    tangents = np.stack([d_matrix, d_matrix / 2]), normal("real", 3, SIZE, seed=5)
    nested = jax.vmap(jax.vmap(differentiable(name), (None, 0)), (0, None))
    found = jax.jit(lambda *args: jax.jvp(nested, *args, has_aux=True)[:2])(primals, tangents)
    return found, primals, tangents


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SOLVERS)
def test_well_posed(name, dtype):
    matrix, b, *_ = system(SOLVERS[name][0], dtype)
    x, info, *_ = solution(name, dtype)
    assert info.converged and x.dtype == b.dtype
    close(x, np.linalg.solve(matrix, b))


@pytest.mark.parametrize("name", SOLVERS)
def test_forward_derivative(name):
    """In the matrix and in the right-hand side, of real and of complex systems."""
    for dtype in DTYPES:
        matrix, b, (d_matrix, d_b), *_ = system(SOLVERS[name][0], dtype)
        of_matrix, of_b = solution(name, dtype)[2]
        close(of_matrix, -np.linalg.solve(matrix, d_matrix @ np.linalg.solve(matrix, b)))
        close(of_b, np.linalg.solve(matrix, d_b))


@pytest.mark.parametrize("name", SOLVERS)
def test_transposed(name):
    """The cotangents solve with the transposed matrix, not its conjugate."""
    for dtype in DTYPES:
        matrix, b, *_, weights = system(SOLVERS[name][0], dtype)
        found, of_b = solution(name, dtype)[3], np.linalg.solve(matrix.T, weights)
        close(found[1], of_b)
        close(found[0], -np.outer(of_b, np.linalg.solve(matrix, b)))


@pytest.mark.slow
@pytest.mark.parametrize("name", SOLVERS)
def test_second_derivative(name):
    matrix, b, first, second, _ = system(SOLVERS[name][0], "real")

    def tangent(*primals):
        return jax.jvp(lambda *p: differentiable(name)(*p)[0], primals, first)[1]

    found = jax.jit(lambda *p: jax.jvp(tangent, p, second)[1])(matrix, b)
    x = np.linalg.solve(matrix, b)
    along = [np.linalg.solve(matrix, d_b - d_matrix @ x) for d_matrix, d_b in (first, second)]
    close(found, -np.linalg.solve(matrix, second[0] @ along[0] + first[0] @ along[1]))


@pytest.mark.slow
@pytest.mark.parametrize("name", SOLVERS)
def test_batched(name):
    """Over right-hand sides within a batch of matrices."""
    (found, _), (matrices, vectors), _ = batches(name)
    close(found, np.einsum("mij,vj->mvi", np.linalg.inv(matrices), vectors))


@pytest.mark.slow
@pytest.mark.parametrize("name", SOLVERS)
def test_batched_derivative(name):
    (_, found), (matrices, vectors), (d_matrices, d_vectors) = batches(name)
    inverses = np.linalg.inv(matrices)
    x = np.einsum("mij,vj->mvi", inverses, vectors)
    right = d_vectors - np.einsum("mij,mvj->mvi", d_matrices, x)
    close(found, np.einsum("mij,mvj->mvi", inverses, right))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", SINGULAR)
@pytest.mark.parametrize("name", LEAST_SQUARES)
def test_singular(name, kind, dtype):
    """Of all solutions, the smallest."""
    matrix = normal(dtype, 4, 4)
    if kind == "a row of zeros":
        matrix[1] = 0
    else:
        matrix = matrix[1:] if kind == "fewer rows" else matrix[:, 1:]
    b = matrix @ normal(dtype, matrix.shape[1], seed=1)
    x, info = jax.jit(lambda matrix, b: LEAST_SQUARES[name](matrix, b))(matrix, b)
    assert info.converged
    close(x, np.linalg.pinv(matrix) @ b, atol=1e-8)


def factors(kind, seed):
    """Two matrices whose product is of this kind."""
    rows, columns = (5, 3) if kind.startswith("tall") else (3, 5)
    rank = 2 if "rank" in kind else 3
    left = normal("real", rows, rank, seed=seed)
    right = normal("real", rank, columns, seed=seed + 1)
    return left, right


def least_squares_conditions(solution, matrix, b):
    """`x` in the range of the transpose, and the residual orthogonal to that of the matrix."""
    x, multiplier = solution
    return x - matrix.T @ multiplier, matrix.T @ (matrix @ x - b)


@pytest.mark.parametrize("kind", RECTANGULAR)
@pytest.mark.parametrize("name", LEAST_SQUARES)
def test_least_squares(name, kind):
    """And its derivative, whose system is singular where the rank is not full; the rank stays."""
    (left, right), (d_left, d_right) = factors(kind, 10), factors(kind, 20)
    matrix, d_matrix = left @ right, d_left @ right + left @ d_right
    b, d_b = normal("real", 2, matrix.shape[0])

    inverse = np.linalg.pinv(matrix, rcond=1e-12)
    x = inverse @ b

    @custom_root(least_squares_conditions, LEAST_SQUARES[name])
    def run(init, matrix, b):
        return LEAST_SQUARES[name](matrix, b)[0], inverse.T @ x

    found = jax.jit(lambda *t: jax.jvp(lambda *p: run(None, *p)[0], (matrix, b), t))(d_matrix, d_b)
    expected = inverse @ (d_b - d_matrix @ x) + inverse @ inverse.T @ d_matrix.T @ (b - matrix @ x)
    expected += (np.eye(x.size) - inverse @ matrix) @ d_matrix.T @ inverse.T @ x
    close(found[0], x, atol=1e-7)
    close(found[1], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", REFUSED)
def test_singular_systems_are_refused(name):
    kind, solve = SOLVERS[name]
    matrix = system("general", "real").matrix.copy() if kind == "general" else np.eye(SIZE)
    matrix[0] = 0
    _, info = jax.jit(lambda b: solve(lambda v: matrix @ v, b))(np.ones(SIZE))
    assert not info.converged


def make_operator(kind, matrix):
    """An operator of a kind, of this matrix or of a part of it."""
    if kind == "matrix":
        return matrix
    if kind == "linearised":
        return jax.linearize(lambda x: matrix @ x + x**2, jnp.zeros(SIZE))[1]
    if kind == "pulled back":

        @jax.custom_vjp
        def only_backwards(x):
            return matrix.T @ x

        only_backwards.defvjp(lambda x: (matrix.T @ x, None), lambda _, w: (matrix @ w,))
        pullback = jax.vjp(only_backwards, jnp.zeros(SIZE))[1]
        return lambda v: pullback(v)[0]
    if kind == "transposed":
        back = jax.linear_transpose(lambda v: matrix.T @ v, jnp.zeros(SIZE))
        return lambda v: back(v)[0]
    if kind == "negated":
        return lambda v: -(-matrix @ v)
    if kind == "sum":
        return lambda v: 0.3 * (matrix @ v) + make_operator("linearised", 0.7 * matrix)(v)
    if kind == "scaled":
        return lambda v: make_operator("linearised", 0.5 * matrix)(v) / 0.5
    if kind == "composed":
        scale = np.linspace(1, 2, SIZE)
        return lambda v: (matrix / scale[None]) @ (scale * v)
    return lambda v: matrix @ v


def structured(kind):
    """The matrix of an operator of a kind."""
    matrix = system("general", "real").matrix
    ones = np.tri(SIZE, k=1, dtype=bool)
    return {
        "identity": np.eye(SIZE),
        "diagonal": np.diag(np.diag(matrix)),
        "tridiagonal": np.where(ones & ones.T, matrix, 0),
        "lower triangular": np.tril(matrix),
        "upper triangular": np.triu(matrix),
    }.get(kind, matrix)


@pytest.mark.parametrize("kind", OPERATORS)
def test_kinds_of_operators(kind):
    matrix, b = structured(kind), system("general", "real").b
    x, info = jax.jit(lambda matrix, b: solve_auto(make_operator(kind, matrix), b))(matrix, b)
    assert info.converged
    close(x, np.linalg.solve(matrix, b))


@pytest.mark.parametrize("name", ["auto", "dense", "lstsq", "lsmr", "gmres"])
def test_trees(name):
    """Blocks of a complex matrix act on a list of a matrix and a vector."""
    true = [normal("complex", 2, 2, seed=1), normal("complex", 3, seed=2)]
    whole = 4 * np.eye(7) + normal("complex", 7, 7)

    def matvec(tree):
        flat = whole @ jnp.concatenate([tree[0].ravel(), tree[1]])
        return [flat[:4].reshape(2, 2), flat[4:]]

    x, info = jax.jit(partial(SOLVERS[name][1], matvec))(matvec(true))
    assert info.converged
    for found, expected in zip(x, true, strict=True):
        close(found, expected)


@pytest.mark.parametrize("shape", ["wide", "tall"])
@pytest.mark.parametrize("name", LEAST_SQUARES)
def test_rectangular_operators_of_trees(name, shape):
    """Integers among them."""
    columns = [[1, -2], [5.0, -2.0], [-1.0, 3.0]]
    matrix = np.array(columns) if shape == "tall" else np.array(columns).T
    b = [3.0, 4, 5.0][: len(matrix)]
    domain = [jax.ShapeDtypeStruct((), jnp.float64)] * matrix.shape[1]

    def matvec(v):
        return [sum(a * w for a, w in zip(row, v, strict=True)) for row in matrix.tolist()]

    x, _ = jax.jit(partial(LEAST_SQUARES[name], LinearOperator(matvec, domain=domain)))(b)
    close(x, np.linalg.pinv(matrix) @ np.array(b))


@pytest.mark.parametrize("kind", ["integers", "a diagonal of trees"])
def test_integers_become_floats(kind):
    if kind == "integers":
        x, _ = jax.jit(partial(solve_auto, lambda v: [v[0] + 5 * v[1], -2 * v[0] - 2 * v[1]]))(
            [3, 4]
        )
        close(x, [-3.25, 1.25])
    else:
        diagonal = (8.0, np.array([1, 2, 3]), {"a": np.array([4, 5]), "b": 6})
        b = (4.0, np.array([7, 8, 9]), {"a": np.array([2, 10]), "b": 12})
        x, _ = jax.jit(partial(solve_auto, lambda v: jax.tree.map(jnp.multiply, diagonal, v)))(b)
        for found, expected in zip(
            jax.tree.leaves(x), (0.5, [7.0, 4.0, 3.0], [0.5, 2.0], 2.0), strict=True
        ):
            close(found, expected)


@pytest.mark.parametrize("dtypes, name", MIXED)
def test_mixed_dtypes(dtypes, name):
    """Each unknown keeps its own; the right-hand side has the wider one."""
    narrow, wide = (jnp.dtype(word) for word in dtypes.split(" and "))
    matrix, true = {
        "float32 and float64": ([[1, 5], [-2, -2]], (-3.25, 1.25)),
        "complex64 and complex128": ([[1, 5j], [2j, -2]], (-0.75 - 2.5j, 0.5 - 0.75j)),
        "float64 and complex128": ([[1, -5j], [2, -2j]], (1.75, 0.25j)),
    }[dtypes]
    domain = (jax.ShapeDtypeStruct((), narrow), jax.ShapeDtypeStruct((), wide))

    def matvec(v):
        x, y = (leaf.astype(wide) for leaf in v)
        return tuple(a * x + b * y for a, b in matrix)

    b = (jnp.array(3, wide), jnp.array(4, wide))
    x, _ = jax.jit(partial(SOLVERS[name][1], LinearOperator(matvec, domain=domain)))(b)
    for found, expected, dtype in zip(x, true, (narrow, wide), strict=True):
        assert found.dtype == dtype
        close(found, expected, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_matrix_of_zeros(dtype):
    b = np.array([1.0, 2.0], "complex128" if dtype == "complex" else "float64")
    x, _ = jax.jit(partial(solve_lstsq, np.zeros((2, 2), b.dtype)))(b)
    np.testing.assert_array_equal(x, 0)


@pytest.mark.parametrize("diagonal", [(1e8, 1e4, 1), (2, 5, 10), (0, 5, 10)])
def test_lsmr_of_nothing_is_nothing(diagonal):
    """And of what lies in the null space."""
    diagonal = np.array(diagonal, np.float64)
    solve = jax.jit(lambda b: solve_lsmr(lambda v: diagonal * v, b)[0])
    np.testing.assert_array_equal(solve(np.zeros(3)), 0)
    if diagonal[0] == 0:
        np.testing.assert_array_equal(solve(np.array([1.0, 0.0, 0.0])), 0)


def test_lsmr_on_an_ill_conditioned_system_solves_it_or_says_so():
    diagonal = np.array([1e8, 1e6, 1e4, 1e2, 1])
    x, info = jax.jit(lambda b: solve_lsmr(lambda v: diagonal * v, b))(np.ones(5))
    assert not info.converged or np.allclose(x, 1 / diagonal, rtol=1e-3)


def test_gmres_on_a_large_system():
    matrix, true = normal("real", 100, 100), normal("real", 100, seed=1)
    x, info = jax.jit(lambda b: solve_gmres(matrix, b, restart=100, tol=TIGHT))(matrix @ true)
    assert info.converged
    close(x, true, atol=1e-8)


@pytest.mark.parametrize("kind", ["stagnates", "is too slow"])
def test_gmres_says_that_it(kind):
    """A cyclic shift keeps every short Krylov space orthogonal to the solution."""
    shift = np.roll(np.eye(6), 1, axis=0)
    matrix = shift if kind == "stagnates" else normal("real", 40, 40)
    b = np.eye(len(matrix))[0]
    _, info = jax.jit(lambda b: solve_gmres(matrix, b, restart=2, max_restarts=50))(b)
    assert not info.converged


@pytest.mark.parametrize("name", TWO_STEPS)
def test_a_number_of_steps_alone(name):
    """On the Laplacian of 20 points, with no tolerance."""
    laplacian = 2 * np.eye(20) - np.eye(20, k=1) - np.eye(20, k=-1)
    b = normal("real", 20)
    x, info = jax.jit(lambda b: TWO_STEPS[name](lambda v: laplacian @ v, b))(b)
    assert not info.converged
    true = np.linalg.solve(laplacian, b)
    error = true - x  # smaller after each step in the norm of the matrix
    assert 0 < error @ laplacian @ error < true @ b


@pytest.mark.parametrize("b", [(1.0, np.inf), (1.0, np.nan), (np.nan, np.inf)], ids=str)
def test_right_hand_sides_that_are_not_finite(b):
    _, info = jax.jit(partial(solve_auto, lambda v: v))(b)
    assert not info.converged


@pytest.mark.parametrize("name", ["gmres", "cg_steihaug"])
def test_preconditioned_derivatives(name):
    """With an inverse that few steps suffice for, transposed where the system is."""
    matrix = normal("real", 6, 6) + np.diag(10.0 ** np.arange(6))
    if name == "gmres":
        inverse, few = np.linalg.inv(matrix), partial(solve_gmres, restart=2, max_restarts=2)
        solve = partial(solve_right_preconditioned, solve=few, inverse=lambda v: inverse @ v)
    else:
        matrix = np.diag(10.0 ** np.arange(6)) + 0.1
        solve = partial(
            solve_cg_steihaug, max_steps=12, tol=1e-10, precondition=jacobi_preconditioner
        )

    @custom_root(lambda x, b: matrix @ x - b, solve, symmetric=name != "gmres")
    def run(init, b):
        return solve(LinearOperator(lambda v: matrix @ v), b)[0]

    @jax.jit
    def both(b):
        _, push = jax.linearize(partial(run, None), b)
        return jax.vmap(push)(np.eye(6)), jax.vmap(jax.linear_transpose(push, b))(np.eye(6))[0]

    pushed, pulled = both(np.ones(6))
    for found in (pushed.T, pulled):
        np.testing.assert_allclose(found, np.linalg.inv(matrix), rtol=1e-6, atol=1e-9)


def test_operators_that_close_over_an_argument():
    scale, z = np.array([0.7, -2.0, 1.5]), np.array([1.0, 2.0, 3.0])

    def solution(scale):
        @custom_root(lambda x, z: scale * x - z)
        def run(init, z):
            return solve_auto(lambda v: scale * v, z)[0]

        return run(None, z)

    for mode in (jax.jacfwd, jax.jacrev):
        close(jax.jit(mode(solution))(scale), np.diag(-z / scale**2))


def test_gradient_of_a_batch_in_part_of_the_solution():
    """The cotangent of the other part is a symbolic zero."""

    @custom_root(lambda x, b: jax.tree.map(lambda u, v: 2 * u - v, x, b))
    def run(init, b):
        return solve_auto(lambda v: jax.tree.map(lambda u: 2 * u, v), b)[0]

    def total(b):
        return jax.vmap(lambda b: run(None, b)[0])(b).sum()

    found = jax.jit(jax.grad(total))((jnp.arange(3.0), jnp.arange(3.0)))
    close(found, [[0.5] * 3, [0] * 3])


@pytest.mark.parametrize("axes", ["right-hand sides", "blocks of both"])
def test_gradient_of_batched_least_squares(axes):
    """A block of the matrix and a block of the right-hand sides have the batch's axis."""
    first, second = normal("real", 2, 3), normal("real", 3, 3, 4, seed=1)
    b_first, b_second = normal("real", 2, 4, seed=2), normal("real", 3, seed=3)

    @custom_root(lambda x, matrix, b: matrix.T @ (matrix @ x - b), symmetric=True)
    def run(init, matrix, b):
        return solve_lstsq(matrix, b)[0]

    def one(first, second, b_first, b_second):
        matrix, b = jnp.concatenate([first, second]), jnp.concatenate([b_first, b_second])
        return run(jnp.zeros(3), matrix, b)

    def normal_equations(first, second, b_first, b_second):
        matrix, b = jnp.concatenate([first, second]), jnp.concatenate([b_first, b_second])
        return jnp.linalg.solve(matrix.T @ matrix, matrix.T @ b)

    def mean(solve, first, second):
        if axes == "right-hand sides":
            second, batched = second[..., 0], (None, None, 1, None)
        else:
            batched = (None, 2, 1, None)
        return jax.vmap(solve, batched)(first, second, b_first, b_second).mean()

    found = jax.jit(jax.grad(partial(mean, one), (0, 1)))(first, second)
    expected = jax.jit(jax.grad(partial(mean, normal_equations), (0, 1)))(first, second)
    for one_found, one_expected in zip(found, expected, strict=True):
        close(one_found, one_expected)


def test_the_inverse_of_an_inverse():
    matrix, b, *_ = system("general", "real")

    def inverse(v):
        return solve_dense(matrix, v)[0]

    close(jax.jit(lambda b: solve_dense(inverse, b)[0])(b), matrix @ b)


@pytest.mark.parametrize("name", ["auto", "lstsq", "cg"])
def test_no_unknowns(name):
    x, info = jax.jit(partial(SOLVERS[name][1], lambda v: v))(np.zeros((2, 0)))
    assert x.shape == (2, 0) and info.converged
