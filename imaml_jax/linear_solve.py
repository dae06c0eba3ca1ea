"""Linear solvers of one signature: `solve_*(operator, b, *, key=None, ...) -> (x, SolveInfo)`.

Each solves `A x = b` for pytrees `b` shaped like the parameters and reports what it met. Settings
are bound with `functools.partial`. Arrays are raveled first: `jax.scipy.sparse.linalg.cg` on a tree
fails under `vmap(grad(...))` of convolutions, and one long vector means few kernels.

Which to use for a meta-gradient: `solve_cg_steihaug` in general (it stops where the curvature turns
negative and says so); `solve_woodbury` with the Gauss-Newton matrix when the support set has few
outputs; `solve_cg` is the plain path of the original description. `solve_neumann` and
`solve_nystrom` are what other bilevel methods use.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.scipy.sparse.linalg import cg, gmres

from imaml_jax.types import Array, LinearOperator, PyTree


class SolveInfo(NamedTuple):
    """What a solver met.

    Attributes:
      relative_residual: `||b - A x|| / ||b||`, 0 where `b` is 0.
      num_steps: iterations taken; None where the solver does not tell, or has none.
      min_curvature: smallest `p^T A p / p^T p` met; an upper bound of the smallest eigenvalue. None
        where the solver does not tell.
      converged: whether the relative residual is within the tolerance.
    """

    relative_residual: Array
    num_steps: Array | None
    min_curvature: Array | None
    converged: Array


_dot = partial(jnp.matmul, precision=lax.Precision.HIGHEST)


class _CGState(NamedTuple):
    x: Array
    residual: Array
    direction: Array
    squared_residual: Array
    num_steps: Array
    min_curvature: Array
    positive: Array


def solve_cg(
    operator: LinearOperator,
    b: PyTree,
    *,
    key: Array | None = None,
    tol: float = 1e-5,
    max_steps: int | None = None,
) -> tuple[PyTree, SolveInfo]:
    """Conjugate gradient of `jax.scipy.sparse.linalg.cg`; A symmetric positive definite.

    That function reports neither its steps nor the curvature it meets, so the residual is computed
    afterwards, at the price of one product.

    Args:
      operator: `A`.
      b: right-hand side.
      key: unused.
      tol: relative tolerance on the residual.
      max_steps: most iterations; None for ten times the number of unknowns.

    Returns:
      `(x, SolveInfo)`, with `num_steps` and `min_curvature` None.
    """
    del key
    return _solve_with(cg, operator, b, tol=tol, maxiter=max_steps)


def solve_gmres(
    operator: LinearOperator,
    b: PyTree,
    *,
    key: Array | None = None,
    tol: float = 1e-5,
    restart: int = 20,
    max_restarts: int | None = None,
) -> tuple[PyTree, SolveInfo]:
    """GMRES of `jax.scipy.sparse.linalg.gmres`, for non-symmetric `A`.

    Args:
      operator: `A`.
      b: right-hand side.
      key: unused.
      tol: relative tolerance on the residual.
      restart: size of the Krylov space.
      max_restarts: most restarts; None for ten times the number of unknowns.

    Returns:
      `(x, SolveInfo)`, with `num_steps` and `min_curvature` None.
    """
    del key
    return _solve_with(gmres, operator, b, tol=tol, restart=restart, maxiter=max_restarts)


def solve_cg_steihaug(
    operator: LinearOperator,
    b: PyTree,
    *,
    key: Array | None = None,
    tol: float = 1e-5,
    max_steps: int = 100,
) -> tuple[PyTree, SolveInfo]:
    """Conjugate gradient that counts its steps, reports curvature and stops where `p^T A p <= 0`.

    Where the first direction already has no positive curvature, `x = 0`. Starts at zero without
    spending a product on it. The residual reported is the one of the recurrence.

    Args:
      operator: symmetric `A`.
      b: right-hand side.
      key: unused.
      tol: relative tolerance on the residual.
      max_steps: most iterations, one product each.

    Returns:
      `(x, SolveInfo)`; `converged` is False after a stop at non-positive curvature.

    References:
      Steihaug, "The conjugate gradient method and trust regions in large scale optimization", 1983.
    """
    del key
    flat_b, matvec, unravel = _ravel(operator, b)
    squared_b = _dot(flat_b, flat_b)
    threshold = tol**2 * squared_b

    def keep_going(state: _CGState) -> Array:
        unfinished = (state.squared_residual > threshold) & (state.num_steps < max_steps)
        return unfinished & state.positive

    def step(state: _CGState) -> _CGState:
        product = matvec(state.direction)
        curvature = _dot(state.direction, product)
        positive = curvature > 0
        length = jnp.where(positive, state.squared_residual / curvature, 0.0)
        residual = state.residual - length * product
        squared_residual = _dot(residual, residual)
        direction = residual + squared_residual / state.squared_residual * state.direction
        rayleigh = curvature / _dot(state.direction, state.direction)
        return _CGState(
            x=state.x + length * state.direction,
            residual=residual,
            direction=direction,
            squared_residual=squared_residual,
            num_steps=state.num_steps + 1,
            min_curvature=jnp.minimum(state.min_curvature, rayleigh),
            positive=positive,
        )

    state = lax.while_loop(
        keep_going,
        step,
        _CGState(
            x=jnp.zeros_like(flat_b),
            residual=flat_b,
            direction=flat_b,
            squared_residual=squared_b,
            num_steps=jnp.zeros((), jnp.int32),
            min_curvature=jnp.full((), jnp.inf, flat_b.dtype),
            positive=jnp.array(True),
        ),
    )
    relative = jnp.sqrt(_safe_ratio(state.squared_residual, squared_b))
    info = SolveInfo(relative, state.num_steps, state.min_curvature, relative <= tol)
    return unravel(state.x), info


def solve_dense(
    operator: LinearOperator, b: PyTree, *, key: Array | None = None, tol: float = 1e-5
) -> tuple[PyTree, SolveInfo]:
    """LU on the assembled matrix, for small problems and as the reference of the others.

    Args:
      operator: any invertible `A`; `P` products and `[P, P]` of memory.
      b: right-hand side.
      key: unused.
      tol: relative residual up to which the solve counts as converged.

    Returns:
      `(x, SolveInfo)`; `min_curvature` is the smallest eigenvalue of the symmetric part of `A`.
    """
    del key
    flat_b, matvec, unravel = _ravel(operator, b)
    matrix = jax.vmap(matvec, out_axes=1)(jnp.eye(flat_b.size, dtype=flat_b.dtype))
    x = jnp.linalg.solve(matrix, flat_b)
    relative = _relative_residual(flat_b - _dot(matrix, x), flat_b)
    min_curvature = jnp.linalg.eigvalsh((matrix + matrix.T) / 2)[0]
    return unravel(x), SolveInfo(relative, None, min_curvature, relative <= tol)


def solve_woodbury(
    operator: LinearOperator, b: PyTree, *, key: Array | None = None, tol: float = 1e-5
) -> tuple[PyTree, SolveInfo]:
    """Exact solve with a damped Gauss-Newton matrix `J^T S J + D` by an `m x m` system.

    `x = D^-1 (b - J^T (I + S J D^-1 J^T)^-1 S J D^-1 b)`, with `m` the number of outputs: `N^2 K`
    for N-way K-shot classification, so it is small for small support sets. Needs
    positive damping; `S` may be singular.

    Args:
      operator: `damped(gauss_newton(...), damping)`.
      b: right-hand side.
      key: unused.
      tol: relative residual up to which the solve counts as converged.

    Returns:
      `(x, SolveInfo)` with `num_steps` and `min_curvature` None.

    Raises:
      ValueError: the operator carries no low-rank factor, or no damping.

    References:
      Ren and Goldfarb, "Efficient subsampled Gauss-Newton and natural gradient methods", 2019.
    """
    del key
    if operator.factor is None:
        raise ValueError(
            "solve_woodbury needs an operator with a low-rank factor, such as "
            "damped(gauss_newton(...), damping); for a Hessian use solve_cg_steihaug"
        )
    jacobian, output_hessian = operator.factor()
    flat_b, _, unravel = _ravel(operator, b)
    diagonal = _diagonal("solve_woodbury", operator, b)
    gram = _dot(jacobian / diagonal[None, :], jacobian.T)
    small_matrix = jnp.eye(gram.shape[0], dtype=gram.dtype) + _dot(output_hessian, gram)
    right = _dot(output_hessian, _dot(jacobian, flat_b / diagonal))
    x = (flat_b - _dot(jnp.linalg.solve(small_matrix, right), jacobian)) / diagonal
    product = diagonal * x + _dot(_dot(output_hessian, _dot(jacobian, x)), jacobian)
    relative = _relative_residual(flat_b - product, flat_b)
    return unravel(x), SolveInfo(relative, None, None, relative <= tol)


def solve_neumann(
    operator: LinearOperator,
    b: PyTree,
    *,
    step_size: float,
    key: Array | None = None,
    tol: float = 1e-5,
    max_steps: int = 100,
) -> tuple[PyTree, SolveInfo]:
    """Truncated Neumann series `step_size * sum_k (I - step_size A)^k b`.

    The same as gradient descent on `x^T A x / 2 - b^T x`; CG with as many products is closer. Needs
    `0 < step_size < 2 / (largest eigenvalue)`, beyond which it diverges and says so.

    Args:
      operator: symmetric positive definite `A`.
      b: right-hand side.
      step_size: the factor above.
      key: unused.
      tol: relative tolerance on the residual.
      max_steps: most terms, one product each.

    Returns:
      `(x, SolveInfo)`.

    References:
      Lorraine, Vicol, Duvenaud, "Optimizing millions of hyperparameters by implicit
      differentiation", AISTATS 2020, Algorithm 3.
    """
    del key
    flat_b, matvec, unravel = _ravel(operator, b)
    squared_b = _dot(flat_b, flat_b)

    def keep_going(state) -> Array:
        _, residual, num_steps, _ = state
        return (_dot(residual, residual) > tol**2 * squared_b) & (num_steps < max_steps)

    def step(state):
        x, residual, num_steps, min_curvature = state
        product = matvec(residual)
        rayleigh = _dot(residual, product) / _dot(residual, residual)
        return (
            x + step_size * residual,
            residual - step_size * product,
            num_steps + 1,
            jnp.minimum(min_curvature, rayleigh),
        )

    start = (
        jnp.zeros_like(flat_b),
        flat_b,
        jnp.zeros((), jnp.int32),
        jnp.full((), jnp.inf, flat_b.dtype),
    )
    x, residual, num_steps, min_curvature = lax.while_loop(keep_going, step, start)
    relative = _relative_residual(residual, flat_b)
    return unravel(x), SolveInfo(relative, num_steps, min_curvature, relative <= tol)


def solve_nystrom(
    operator: LinearOperator,
    b: PyTree,
    *,
    rank: int,
    key: Array | None = None,
    tol: float = 1e-5,
) -> tuple[PyTree, SolveInfo]:
    """Direct solve with a random low-rank approximation of the undamped matrix.

    With `A = B + D` and `Y = B Q` for an orthonormal basis `Q [P, rank]` of random directions, `B`
    is replaced by `Y (Q^T Y)^+ Y^T` and the sum inverted by Woodbury's formula. Exact where the
    rank of `B` is not above `rank`, up to rounding; else watch the residual, which is that of `A`.
    `B` should be positive semi-definite, as the Gauss-Newton matrix is; negative directions are
    left out.

    Args:
      operator: `damped(..., damping)` with positive damping.
      b: right-hand side.
      rank: random directions, at least 1; as many products, taken at once, and `[P, rank]` of
        memory.
      key: of the directions; default a fixed one.
      tol: relative residual up to which the solve counts as converged.

    Returns:
      `(x, SolveInfo)` with `num_steps` and `min_curvature` None.

    Raises:
      ValueError: a rank below 1, or an operator without damping.

    References:
      Hataya and Yamada, "Nyström method for accurate and scalable implicit differentiation",
      AISTATS 2023.
      Frangella, Tropp, Udell, "Randomized Nyström preconditioning", 2021.
    """
    if rank < 1:
        raise ValueError(f"solve_nystrom: rank={rank} must be at least 1")
    flat_b, matvec, unravel = _ravel(operator, b)
    diagonal = _diagonal("solve_nystrom", operator, b)
    shape = (flat_b.size, min(rank, flat_b.size))
    key = jax.random.key(0) if key is None else key
    basis, _ = jnp.linalg.qr(jax.random.normal(key, shape, flat_b.dtype))
    image = jax.vmap(matvec, 1, 1)(basis) - diagonal[:, None] * basis
    core = _dot(basis.T, image)
    values, vectors = jnp.linalg.eigh((core + core.T) / 2)
    positive = values > shape[1] * jnp.finfo(values.dtype).eps * jnp.abs(values).max()
    scales = jnp.where(positive, lax.rsqrt(jnp.where(positive, values, 1)), 0)
    root = _dot(image, vectors) * scales[None, :]
    scaled = root / diagonal[:, None]
    small_matrix = jnp.eye(shape[1], dtype=flat_b.dtype) + _dot(root.T, scaled)
    x = flat_b / diagonal - _dot(scaled, jnp.linalg.solve(small_matrix, _dot(scaled.T, flat_b)))
    relative = _relative_residual(flat_b - matvec(x), flat_b)
    return unravel(x), SolveInfo(relative, None, None, relative <= tol)


def _diagonal(name: str, operator: LinearOperator, b: PyTree) -> Array:
    """What was added to the operator's diagonal, raveled.

    Raises:
      ValueError: nothing was.
    """
    if not operator.dampings:
        raise ValueError(f"{name} needs damping > 0; wrap the operator in damped(...)")
    diagonals = [ravel_pytree(_broadcast_to_leaves(d, b))[0] for d in operator.dampings]
    return sum(diagonals[1:], diagonals[0])


def _broadcast_to_leaves(prefix: PyTree, tree: PyTree) -> PyTree:
    return jax.tree.map(
        lambda d, x: jnp.broadcast_to(d, x.shape).astype(x.dtype),
        jax.tree.broadcast(prefix, tree),
        tree,
    )


def _ravel(
    operator: LinearOperator, b: PyTree
) -> tuple[Array, Callable[[Array], Array], Callable[[Array], PyTree]]:
    """Right-hand side scaled to largest entry 1, the matrix, and back to a tree and its scale.

    Squares of tiny or huge numbers leave the range. What is not finite becomes NaN everywhere.
    """
    flat_b, unravel = ravel_pytree(b)
    largest = lax.stop_gradient(jnp.max(jnp.abs(flat_b), initial=0))
    scale = jnp.where(largest == 0, 1, jnp.where(jnp.isfinite(largest), largest, jnp.nan))
    return (
        flat_b / scale,
        lambda flat: ravel_pytree(operator.matvec(unravel(flat)))[0],
        lambda flat: unravel(scale * flat),
    )


def _solve_with(solver, operator: LinearOperator, b: PyTree, *, tol: float, **settings):
    flat_b, matvec, unravel = _ravel(operator, b)
    x, _ = solver(matvec, flat_b, tol=tol, **settings)
    relative = _relative_residual(flat_b - matvec(x), flat_b)
    return unravel(x), SolveInfo(relative, None, None, relative <= tol)


def _relative_residual(residual: Array, b: Array) -> Array:
    return jnp.sqrt(_safe_ratio(_dot(residual, residual), _dot(b, b)))


def _safe_ratio(numerator: Array, denominator: Array) -> Array:
    zero = denominator == 0  # and not `denominator > 0`, which would take NaN for solved
    return jnp.where(zero, 0.0, numerator / jnp.where(zero, 1, denominator))
