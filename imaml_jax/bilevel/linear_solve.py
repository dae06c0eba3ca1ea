"""Linear solvers of one signature: `solve_*(operator, b, *, key=None, ...) -> (x, SolveInfo)`.

Each solves `A x = b` for pytrees `b` shaped like the parameters and reports what it met. Settings
are bound with `functools.partial`.

Which to use for a meta-gradient, by `python -m experiments.solvers` on conv4 (relative errors of
the solution with the solver's own matrix):

- `solve_cg_steihaug` with the Gauss-Newton matrix in general. For lambda = 2, 8 steps err by 2e-3
  or less from 5-way 1-shot to 20-way 5-shot; for lambda = 0.03 by 3e-3 at 5-way 1-shot, 1e-2 at
  5-way 5-shot and 0.15 at 20-way 1-shot. 20 steps: 2e-6 or less, but 7e-3 in the last of these.
- `solve_woodbury`, exact, up to some 25 support outputs (5-way 1-shot), where it costs as much as
  20 CG steps; at 125 outputs it costs as much as 80, at 400 as 300.
- `solve_minres` where the Hessian itself is wanted: with batch norm it was indefinite even with
  lambda = 2 added, but for 20-way 5-shot, and CG stops there and says so.
- `solve_cg` is the plain path of the original description; `solve_neumann` and `solve_nystrom` are
  what other bilevel methods use. As a preconditioner, Nystrom's matrix made the error of 8 CG steps
  3 to 1,000 times smaller, at the price of a product a rank.

Where the matrix is not symmetric: `solve_gmres`, behind `solve_right_preconditioned` if there is a
matrix close to it.

`solve_minres`, and those that need a low rank, are in `minres.py` and `low_rank.py`;
preconditioners there and in `diagonal.py`.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.scipy.sparse.linalg import cg, gmres

from imaml_jax.bilevel.linear_system import (
    SolveInfo,
    condition_bound,
    confirmed,
    dot,
    in_range,
    ravel_system,
    relative_residual,
    report,
)
from imaml_jax.types import Array, LinearOperator, PyTree

# `(operator, b, key) -> (r -> M^-1 r)` on raveled vectors.
Precondition = Callable[[LinearOperator, PyTree, Array | None], Callable[[Array], Array]]


class _CGState(NamedTuple):
    x: Array
    residual: Array
    direction: Array
    squared_residual: Array
    product: Array  # of the residual and the preconditioned one
    num_steps: Array
    min_curvature: Array
    max_stretch: Array  # largest `||A p|| / ||p||`
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

    Its QR factorisation is built step by step; the normal equations, its default and quicker on
    GPUs, square the condition and give NaN on systems that are hard in float32. A singular system
    may give a huge result, or one that is not finite: see `converged`.

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
    by_rotations = partial(gmres, solve_method="incremental")
    return _solve_with(by_rotations, operator, b, tol=tol, restart=restart, maxiter=max_restarts)


def solve_right_preconditioned(
    operator: LinearOperator,
    b: PyTree,
    *,
    solve: Callable[..., tuple[PyTree, SolveInfo]],
    inverse: Callable[[PyTree], PyTree],
    key: Array | None = None,
) -> tuple[PyTree, SolveInfo]:
    """`A M^-1 y = b`, `x = M^-1 y`, by a solver for non-symmetric matrices.

    The residual is that of `A x = b`, unlike a left preconditioner's.

    Args:
      operator: `A`.
      b: right-hand side.
      solve: such as `solve_gmres`; `A M^-1` is not symmetric even where `A` and `M` are.
      inverse: `v -> M^-1 v`, linear, of trees shaped like `b`.
      key: passed to `solve`.

    Returns:
      `(x, SolveInfo)` with `min_curvature` and `condition` None, which would be those of `A M^-1`.

    Example:
      >>> import jax.numpy as jnp
      >>> from imaml_jax import LinearOperator, solve_gmres, solve_right_preconditioned
      >>> a = jnp.array([[100.0, 1.0], [0.0, 2.0]])
      >>> x, info = solve_right_preconditioned(
      ...     LinearOperator(lambda v: a @ v),
      ...     jnp.array([101.0, 2.0]),
      ...     solve=solve_gmres,
      ...     inverse=lambda v: v / jnp.diagonal(a),
      ... )
      >>> print(jnp.round(x, 3))
      [1. 1.]

    References:
      Saad, "Iterative Methods for Sparse Linear Systems", 2nd ed., 2003, section 9.3.2.
    """
    y, info = solve(LinearOperator(lambda v: operator.matvec(inverse(v))), b, key=key)
    x = inverse(y)
    kept = in_range(x, (ravel_pytree(y)[0] == 0).all())
    converged = info.converged & kept
    return x, info._replace(min_curvature=None, converged=converged, condition=None)


def solve_cg_steihaug(
    operator: LinearOperator,
    b: PyTree,
    *,
    key: Array | None = None,
    tol: float = 1e-5,
    max_steps: int = 100,
    precondition: Precondition | None = None,
) -> tuple[PyTree, SolveInfo]:
    """Conjugate gradient that counts its steps, reports curvature and stops where `p^T A p <= 0`.

    Where the first direction already has no positive curvature, `x = 0`. Starts at zero without
    spending a product on it. The residual is that of the recurrence, and where this claims to be
    within the tolerance the true one, at the price of one product. A `tol` of 0.0 claims nothing.

    Args:
      operator: symmetric `A`.
      b: right-hand side.
      key: of the preconditioner.
      tol: relative tolerance on the residual.
      max_steps: most iterations, one product each.
      precondition: `(operator, b, key) -> (r -> M^-1 r)`, on raveled vectors, with a positive
        definite `M` close to `A`: `partial(nystrom_preconditioner, rank=20)`, or
        `jacobi_preconditioner`. None (default) for none.

    Returns:
      `(x, SolveInfo)`; `converged` is False and `condition` infinite after a stop at non-positive
      curvature.

    References:
      Steihaug, "The conjugate gradient method and trust regions in large scale optimization", 1983.
    """
    flat_b, matvec, unravel = ravel_system(operator, b)
    squared_b = dot(flat_b, flat_b)
    threshold = tol**2 * squared_b
    inverse = precondition(operator, b, key) if precondition else lambda r: r
    first = inverse(flat_b)

    def keep_going(state: _CGState) -> Array:
        unfinished = (state.squared_residual > threshold) & (state.num_steps < max_steps)
        return unfinished & state.positive

    def step(state: _CGState) -> _CGState:
        image = matvec(state.direction)
        curvature = dot(state.direction, image)
        positive = curvature > 0
        length = jnp.where(positive, state.product / curvature, 0.0)
        residual = state.residual - length * image
        preconditioned = inverse(residual)
        product = dot(residual, preconditioned)
        squared_direction = dot(state.direction, state.direction)
        stretch = jnp.sqrt(dot(image, image) / squared_direction)
        return _CGState(
            x=state.x + length * state.direction,
            residual=residual,
            direction=preconditioned + product / state.product * state.direction,
            squared_residual=dot(residual, residual),
            product=product,
            num_steps=state.num_steps + 1,
            min_curvature=jnp.minimum(state.min_curvature, curvature / squared_direction),
            max_stretch=jnp.maximum(state.max_stretch, stretch),
            positive=positive,
        )

    state = lax.while_loop(
        keep_going,
        step,
        _CGState(
            x=jnp.zeros_like(flat_b),
            residual=flat_b,
            direction=first,
            squared_residual=squared_b,
            product=dot(flat_b, first),
            num_steps=jnp.zeros((), jnp.int32),
            min_curvature=jnp.full((), jnp.inf, flat_b.dtype),
            max_stretch=jnp.zeros((), flat_b.dtype),
            positive=jnp.array(True),
        ),
    )
    relative = confirmed(matvec, flat_b, state.x, state.residual, tol)
    condition = condition_bound(state.max_stretch, state.min_curvature)
    return report(unravel, state.x, relative, tol, state.num_steps, state.min_curvature, condition)


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
      `(x, SolveInfo)`; `min_curvature` is the smallest eigenvalue of the symmetric part of `A`,
      `condition` the condition number itself.
    """
    del key
    flat_b, matvec, unravel = ravel_system(operator, b)
    matrix = jax.vmap(matvec, out_axes=1)(jnp.eye(flat_b.size, dtype=flat_b.dtype))
    x = jnp.linalg.solve(matrix, flat_b)
    relative = relative_residual(flat_b - dot(matrix, x), flat_b)
    min_curvature = jnp.linalg.eigvalsh((matrix + matrix.T) / 2)[0]
    condition = jnp.linalg.cond(matrix)
    return report(unravel, x, relative, tol, min_curvature=min_curvature, condition=condition)


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
    flat_b, matvec, unravel = ravel_system(operator, b)
    squared_b = dot(flat_b, flat_b)

    def keep_going(state) -> Array:
        _, residual, num_steps, _, _ = state
        return (dot(residual, residual) > tol**2 * squared_b) & (num_steps < max_steps)

    def step(state):
        x, residual, num_steps, min_curvature, max_stretch = state
        product = matvec(residual)
        squared_residual = dot(residual, residual)
        return (
            x + step_size * residual,
            residual - step_size * product,
            num_steps + 1,
            jnp.minimum(min_curvature, dot(residual, product) / squared_residual),
            jnp.maximum(max_stretch, jnp.sqrt(dot(product, product) / squared_residual)),
        )

    start = (
        jnp.zeros_like(flat_b),
        flat_b,
        jnp.zeros((), jnp.int32),
        jnp.full((), jnp.inf, flat_b.dtype),
        jnp.zeros((), flat_b.dtype),
    )
    x, residual, num_steps, min_curvature, max_stretch = lax.while_loop(keep_going, step, start)
    relative = confirmed(matvec, flat_b, x, residual, tol)
    condition = condition_bound(max_stretch, min_curvature)
    return report(unravel, x, relative, tol, num_steps, min_curvature, condition)


def _solve_with(solver, operator: LinearOperator, b: PyTree, *, tol: float, **settings):
    flat_b, matvec, unravel = ravel_system(operator, b)
    x, _ = solver(matvec, flat_b, tol=tol, **settings)
    return report(unravel, x, relative_residual(flat_b - matvec(x), flat_b), tol)
