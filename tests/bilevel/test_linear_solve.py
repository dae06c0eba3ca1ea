"""Linear solvers against dense solves in numpy, and the truth of what they report."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from imaml_jax.bilevel.curvature import damped, gauss_newton, ggnvp_fn
from imaml_jax.bilevel.gmres import solve_gmres
from imaml_jax.bilevel.linear_solve import (
    solve_cg,
    solve_cg_steihaug,
    solve_neumann,
    solve_right_preconditioned,
)
from imaml_jax.bilevel.low_rank import solve_woodbury
from imaml_jax.networks import conv4
from imaml_jax.types import LinearOperator
from tests.bilevel.systems import (
    SIZE,
    as_tree,
    flatten,
    make_operator,
    make_solvers,
    make_system,
    matrix_operator,
    spectrum_matrix,
)

pytestmark = pytest.mark.usefixtures("x64")

SOLVERS = make_solvers(SIZE, preconditioner_rank=3, step_size=2 / 11, max_steps=1000)

COUNTING = ("cg_steihaug", "minres", "neumann", "preconditioned")
DAMPED_ONLY = ("nystrom", "woodbury", "preconditioned")
# Every solver with every kind of operator that it is for. A new solver is one more row or two.
CASES = [
    ("cg", "spd", np.float32),
    ("cg", "low_rank", np.float64),
    ("cg_steihaug", "spd", np.float32),
    ("cg_steihaug", "low_rank", np.float64),
    ("gmres", "spd", np.float32),
    ("gmres", "nonsymmetric", np.float64),
    ("dense", "spd", np.float32),
    ("dense", "indefinite", np.float64),
    ("dense", "nonsymmetric", np.float64),
    ("minres", "spd", np.float32),
    ("minres", "indefinite", np.float64),
    ("neumann", "spd", np.float32),
    ("neumann", "spd", np.float64),
    ("nystrom", "low_rank", np.float64),
    ("woodbury", "low_rank", np.float32),
    ("woodbury", "low_rank", np.float64),
    ("preconditioned", "low_rank", np.float32),
    ("preconditioned", "low_rank", np.float64),
]
cases = pytest.mark.parametrize(
    "name, kind, dtype", CASES, ids=[f"{n}-{k}-{d.__name__}" for n, k, d in CASES]
)
both_dtypes = pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["f64", "f32"])


def solve_many(name, kind, dtype, tol, count=3):
    """`count` systems solved by one compiled, vmapped call: matrices, right-hand sides, results."""
    rng = np.random.default_rng(0)
    systems = [make_system(kind, rng, dtype) for _ in range(count)]
    pieces = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(pieces for pieces, _ in systems))
    right = jnp.asarray(rng.normal(size=(count, SIZE)), dtype)

    def solve_one(pieces, b):
        key = jax.random.key(0)
        return SOLVERS[name](make_operator(kind, pieces), as_tree(b), key=key, tol=tol)

    found, info = jax.jit(jax.vmap(solve_one))(pieces, right)
    return [matrix for _, matrix in systems], right, found, info


@cases
def test_solvers_equal_dense_solves(name, kind, dtype):
    tol = 1e-12 if dtype == np.float64 else 1e-5
    matrices, right, found, info = solve_many(name, kind, dtype, tol)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(found))
    for lane, (matrix, b) in enumerate(zip(matrices, right, strict=True)):
        x = flatten({"a": found["a"][lane], "b": found["b"][0][lane], "c": found["c"][lane]})
        np.testing.assert_allclose(x, np.linalg.solve(matrix, b), rtol=0, atol=20 * tol)
        report = jax.tree.map(lambda leaf, lane=lane: leaf[lane], info)
        residual = np.linalg.norm(b - matrix @ x) / np.linalg.norm(b)
        np.testing.assert_allclose(report.relative_residual, residual, rtol=0, atol=tol)
        assert report.converged
        if name in COUNTING:
            assert 0 < report.num_steps <= (1000 if name == "neumann" else SIZE + 1)
        elif name != "gmres":
            assert report.num_steps is None
        if name in (*COUNTING, "dense"):
            symmetric = np.linalg.eigvalsh((matrix + matrix.T) / 2)
            assert symmetric[0] - 10 * tol <= report.min_curvature <= symmetric[-1]
        else:
            assert report.min_curvature is None


@pytest.mark.parametrize(
    "name, settings",
    [
        ("cg", {"max_steps": 2}),
        ("cg_steihaug", {"max_steps": 2}),
        ("gmres", {"restart": 2, "max_restarts": 1}),
        ("minres", {"max_steps": 2}),
        ("neumann", {"step_size": 0.02, "max_steps": 2}),
    ],
)
def test_a_truncated_solve_reports_its_own_residual(name, settings):
    rng = np.random.default_rng(1)
    matrix, b = spectrum_matrix(rng, np.geomspace(1, 100, SIZE)), rng.normal(size=SIZE)
    solve = jax.jit(
        lambda m, b, tol: SOLVERS[name](matrix_operator(m), as_tree(b), tol=tol, **settings)
    )
    x, info = solve(matrix, b, 1e-6)
    residual = np.linalg.norm(b - matrix @ flatten(x)) / np.linalg.norm(b)
    assert residual > 1e-2
    np.testing.assert_allclose(info.relative_residual, residual, rtol=1e-10)
    assert not info.converged
    if name in COUNTING:
        assert info.num_steps == 2
    _, info = solve(matrix, b, float(residual) * 1.01)
    assert info.converged


@pytest.mark.parametrize("name", SOLVERS)
def test_a_zero_right_hand_side_gives_zero(name):
    kind = "low_rank" if name in DAMPED_ONLY else "spd"
    pieces, _ = make_system(kind, np.random.default_rng(0))
    solve = jax.jit(lambda pieces, b: SOLVERS[name](make_operator(kind, pieces), as_tree(b)))
    x, info = solve(pieces, np.zeros(SIZE))
    np.testing.assert_array_equal(flatten(x), 0)
    assert info.relative_residual == 0
    assert info.converged
    if name in COUNTING:  # no direction was met, so that nothing bounds the curvature
        assert info.num_steps == 0
        assert info.min_curvature == np.inf
    if name == "dense":
        np.testing.assert_allclose(info.min_curvature, 1)


@both_dtypes
def test_steihaug_stops_and_says_so_where_the_curvature_is_negative(dtype):
    rng = np.random.default_rng(2)
    smallest = np.concatenate([np.linspace(-5, -0.1, 8), np.zeros(8)])
    matrices = np.stack(
        [spectrum_matrix(rng, np.append(s, rng.uniform(0.5, 5, SIZE - 1))) for s in smallest]
    )
    right = rng.normal(size=(len(smallest), SIZE))
    right[8:] = 0  # the last eight: singular, with b in the null space, where p^T A p = 0
    for i in range(8, 16):
        matrices[i] = np.diag(np.append(0.0, np.ones(SIZE - 1)))
        right[i, 0] = 1 + i
    solve = jax.vmap(lambda m, b: solve_cg_steihaug(matrix_operator(m), as_tree(b), tol=1e-6))
    matrices, right = matrices.astype(dtype), right.astype(dtype)
    x, info = jax.jit(solve)(matrices, right)
    found = x, info.relative_residual, info.min_curvature
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    assert not info.converged.any() and np.isposinf(info.condition).all()
    assert (info.num_steps <= SIZE).all()
    lowest = np.linalg.eigvalsh(matrices.astype(np.float64))[:, 0]
    assert (info.min_curvature <= 0).all()
    assert (info.min_curvature >= lowest - 1e-5).all()
    flat = np.stack([flatten(jax.tree.map(lambda leaf, i=i: leaf[i], x)) for i in range(16)])
    residuals = np.linalg.norm(right - np.einsum("nij,nj->ni", matrices, flat), axis=1)
    norms = np.linalg.norm(right, axis=1)
    np.testing.assert_allclose(info.relative_residual, residuals / norms, rtol=1e-4)
    # Up to the stop the quadratic model only falls, so that -x still descends.
    assert (np.einsum("ni,ni->n", flat, right) >= 0).all()


def test_steihaug_returns_zero_where_the_first_direction_curves_down():
    x, info = solve_cg_steihaug(LinearOperator(lambda v: -2 * v), jnp.ones(3))
    np.testing.assert_array_equal(x, 0)
    assert (info.num_steps, info.min_curvature, info.relative_residual) == (1, -2, 1)
    assert not info.converged


@pytest.mark.parametrize("max_steps", [0, 3, 100])
def test_steihaug_spends_one_product_a_step_and_one_where_it_claims_to_converge(max_steps):
    counter = []

    def matvec(v):
        jax.debug.callback(lambda: counter.append(1))
        return jnp.linspace(1, 10, SIZE) * v

    @jax.jit
    def solve(b):
        return solve_cg_steihaug(LinearOperator(matvec), b, tol=1e-10, max_steps=max_steps)

    _, info = solve(jnp.ones(SIZE))
    jax.effects_barrier()
    assert len(counter) == info.num_steps + info.converged
    assert info.num_steps == min(max_steps, SIZE)
    assert info.converged == (max_steps == 100)


def test_the_error_after_k_steps_is_below_the_bound():
    """`2 ((sqrt(kappa) - 1) / (sqrt(kappa) + 1))^K` in the norm of `A`, for both kinds of CG."""
    kappa, size = 100.0, 40
    rng = np.random.default_rng(3)
    matrix = spectrum_matrix(rng, np.linspace(1, kappa, size))
    b = rng.normal(size=size)
    exact = np.linalg.solve(matrix, b)
    rate = (np.sqrt(kappa) - 1) / (np.sqrt(kappa) + 1)

    @jax.jit
    def solve(matrix, b, max_steps):
        operator = LinearOperator(lambda v: matrix @ v)
        both = (solve_cg, solve_cg_steihaug)
        return [one(operator, b, tol=1e-14, max_steps=max_steps)[0] for one in both]

    errors = []
    for k in range(13):
        x, same = solve(matrix, b, k)
        np.testing.assert_allclose(x, same, rtol=0, atol=1e-10)
        error = exact - x
        errors.append(np.sqrt(error @ matrix @ error / (exact @ matrix @ exact)))
        assert errors[-1] <= 2 * rate**k
    assert errors[0] == pytest.approx(1)
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))


def test_neumann_equals_its_series_and_says_that_it_diverges():
    rng = np.random.default_rng(8)
    matrix, b = spectrum_matrix(rng, np.linspace(1, 10, SIZE)), rng.normal(size=SIZE)
    operator = LinearOperator(lambda v: matrix @ v)
    x, _ = solve_neumann(operator, jnp.asarray(b), step_size=0.1, tol=0.0, max_steps=7)
    power = np.eye(SIZE) - 0.1 * matrix
    series = 0.1 * sum(np.linalg.matrix_power(power, k) @ b for k in range(7))
    np.testing.assert_allclose(x, series, rtol=1e-12)
    _, info = solve_neumann(operator, jnp.asarray(b), step_size=0.3)
    assert info.relative_residual > 1 and not info.converged


def conv_problem():
    """Two tasks with weights of their own on a smooth conv net: `(apply_fn, fun, points)`."""
    network = conv4(3, filters=4, num_blocks=1, activation=jnp.tanh)
    rng = np.random.default_rng(6)
    inputs = jnp.asarray(rng.normal(size=(4, 8, 8, 1)))
    shapes = jax.eval_shape(network.init, jax.random.key(0), inputs)
    points = jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.5, (2, *s.shape))), shapes)

    def loss_fn(logits):
        return -jax.nn.log_softmax(logits)[jnp.arange(4), jnp.array([0, 1, 2, 0])].mean()

    def apply_fn(params):
        return network.apply(params, inputs)

    return apply_fn, loss_fn, lambda params: loss_fn(apply_fn(params)), points


def test_solvers_on_a_conv_net_with_weights_of_its_own_for_each_task():
    apply_fn, loss_fn, fun, points = conv_problem()
    strength = 0.3

    @jax.jit
    @jax.vmap
    def solve_all(params):
        operator = damped(gauss_newton(apply_fn, loss_fn, params), strength)
        b = jax.grad(fun)(params)
        found = [
            solve(operator, b)
            for solve in (
                partial(solve_cg, tol=1e-12),
                partial(solve_cg_steihaug, tol=1e-12),
                solve_woodbury,
            )
        ]
        residuals = [operator.matvec(x) for x, _ in found]
        return b, found, residuals

    b, found, products = solve_all(points)
    for (_, info), product in zip(found, products, strict=True):
        jax.tree.map(lambda p, e: np.testing.assert_allclose(p, e, atol=1e-10), product, b)
        assert info.converged.all()


def test_cg_is_differentiable_under_vmap_on_a_conv_net():
    """`vmap(grad(...))` through a solve with the Hessian, in the weights and in the damping.

    On trees, `jax.scipy.sparse.linalg.cg` fails here; `solve_cg` ravels.
    """
    apply_fn, loss_fn, fun, points = conv_problem()
    rng = np.random.default_rng(7)
    direction = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), points)

    def squared_solution(params, strength):
        curvature = ggnvp_fn(apply_fn, loss_fn, params)
        operator = damped(LinearOperator(curvature), strength)
        x, _ = solve_cg(operator, jax.grad(fun)(params), tol=1e-13)
        return ravel_pytree(x)[0] @ ravel_pytree(x)[0]

    evaluate = jax.jit(jax.vmap(jax.value_and_grad(squared_solution, (0, 1)), (0, None)))
    step, strength = 1e-5, 0.3

    def at(size):
        return evaluate(jax.tree.map(lambda p, d: p + size * d, points, direction), strength + size)

    _, (in_weights, in_strength) = at(0.0)
    slopes = sum(
        (g * d).sum(tuple(range(1, g.ndim)))
        for g, d in zip(jax.tree.leaves(in_weights), jax.tree.leaves(direction), strict=True)
    )
    expected = (at(step)[0] - at(-step)[0]) / (2 * step)
    np.testing.assert_allclose(slopes + in_strength, expected, rtol=1e-6)


def test_a_right_preconditioner_leaves_the_solution_and_the_residual(x64):
    rng = np.random.default_rng(0)
    scales = np.geomspace(1e-3, 1e3, 40)
    a = jnp.asarray((np.eye(40) + 0.02 * rng.normal(size=(40, 40))) * scales)
    b, unravel = rng.normal(size=40), lambda v: {"x": v[:30].reshape(6, 5), "y": v[30:]}
    operator = LinearOperator(lambda v: unravel(a @ ravel_pytree(v)[0]))
    few = partial(solve_gmres, tol=1e-12, restart=8, max_restarts=1)
    inverse = unravel(jnp.asarray(1 / scales))

    def solve(b):
        return solve_right_preconditioned(
            operator, b, solve=few, inverse=lambda v: jax.tree.map(jnp.multiply, inverse, v)
        )

    x, info = jax.jit(solve)(unravel(jnp.asarray(b)))
    x, expected = ravel_pytree(x)[0], np.linalg.solve(a, b)
    assert few(operator, unravel(jnp.asarray(b)))[1].relative_residual > 0.1
    assert info.relative_residual < 1e-4
    np.testing.assert_allclose(x * scales, expected * scales, atol=1e-4)
    left = np.linalg.norm(b - a @ x) / np.linalg.norm(b)
    np.testing.assert_allclose(info.relative_residual, left, rtol=1e-6)


@pytest.mark.parametrize("entry, right", [(1e-30, 1e12), (1e30, 1e-12)])
def test_a_right_preconditioned_solution_that_leaves_the_range_has_not_converged(entry, right):
    a = jnp.full(3, entry, jnp.float32)
    _, info = solve_right_preconditioned(
        LinearOperator(lambda v: a * v),
        jnp.full(3, right, jnp.float32),
        solve=solve_gmres,
        inverse=lambda v: v / a,
    )
    assert not info.converged
