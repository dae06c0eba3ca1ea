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
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.scipy.sparse.linalg import cg, gmres

from imaml_jax.bilevel.linear_system import Solve, SolveInfo, dot, in_range, ravel_system
from imaml_jax.types import Array, LinearOperator, PyTree

# `(operator, b, key) -> (r -> M^-1 r)` on raveled vectors.
Precondition = Callable[[LinearOperator, PyTree, Array | None], Callable[[Array], Array]]


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
    system = ravel_system(operator, b, tol)
    x, _ = cg(system.matvec, system.b, tol=tol, maxiter=max_steps)
    return system.report(x)


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
    system = ravel_system(operator, b, tol)
    settings = {"restart": restart, "maxiter": max_restarts, "solve_method": "incremental"}
    x, _ = gmres(system.matvec, system.b, tol=tol, **settings)
    return system.report(x)


def solve_right_preconditioned(
    operator: LinearOperator,
    b: PyTree,
    *,
    solve: Solve,
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
    inverse = precondition(operator, b, key) if precondition else lambda r: r
    return _descend(operator, b, tol, max_steps, inverse)


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
    system = ravel_system(operator, b, tol)
    matrix = jax.vmap(system.matvec, out_axes=1)(jnp.eye(system.b.size, dtype=system.b.dtype))
    x = jnp.linalg.solve(matrix, system.b)
    return system.report(
        x,
        system.relative(system.b - dot(matrix, x)),
        min_curvature=jnp.linalg.eigvalsh((matrix + matrix.T) / 2)[0],
        condition=jnp.linalg.cond(matrix),
    )


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
    return _descend(operator, b, tol, max_steps, step_size=step_size)


class _Descent(NamedTuple):
    x: Array
    residual: Array
    direction: Array | None  # None for the residual
    squared_residual: Array
    product: Array  # of the residual and the preconditioned one
    num_steps: Array
    min_curvature: Array
    max_stretch: Array  # largest `||A p|| / ||p||`
    positive: Array


def _descend(
    operator: LinearOperator,
    b: PyTree,
    tol: float | Array,
    max_steps: int | Array,
    inverse: Callable[[Array], Array] = lambda r: r,
    step_size: float | None = None,
) -> tuple[PyTree, SolveInfo]:
    """Conjugate gradient; with a step size, descent along the residuals, whatever the curvature."""
    system = ravel_system(operator, b, tol)
    squared_b = dot(system.b, system.b)
    first = inverse(system.b)

    def keep_going(state: _Descent) -> Array:
        unfinished = (state.squared_residual > tol**2 * squared_b) & (state.num_steps < max_steps)
        return unfinished & state.positive

    def step(state: _Descent) -> _Descent:
        direction = state.residual if state.direction is None else state.direction
        image = system.matvec(direction)
        curvature = dot(direction, image)
        if step_size is None:
            positive = curvature > 0
            length = jnp.where(positive, state.product / curvature, 0.0)
        else:
            positive, length = state.positive, step_size
        residual = state.residual - length * image
        product, next_direction = state.product, None
        if step_size is None:
            preconditioned = inverse(residual)
            product = dot(residual, preconditioned)
            next_direction = preconditioned + product / state.product * direction
        squared_direction = dot(direction, direction)
        stretch = jnp.sqrt(dot(image, image) / squared_direction)
        return _Descent(
            x=state.x + length * direction,
            residual=residual,
            direction=next_direction,
            squared_residual=dot(residual, residual),
            product=product,
            num_steps=state.num_steps + 1,
            min_curvature=jnp.minimum(state.min_curvature, curvature / squared_direction),
            max_stretch=jnp.maximum(state.max_stretch, stretch),
            positive=positive,
        )

    start = _Descent(
        x=jnp.zeros_like(system.b),
        residual=system.b,
        direction=first if step_size is None else None,
        squared_residual=squared_b,
        product=dot(system.b, first),
        num_steps=jnp.zeros((), jnp.int32),
        min_curvature=jnp.full((), jnp.inf, system.b.dtype),
        max_stretch=jnp.zeros((), system.b.dtype),
        positive=jnp.array(True),
    )
    end = lax.while_loop(keep_going, step, start)
    relative, curvature = system.confirmed(end.x, end.residual), end.min_curvature
    bound = jnp.where(curvature > 0, jnp.maximum(end.max_stretch / curvature, 1), jnp.inf)
    return system.report(end.x, relative, end.num_steps, curvature, bound)
