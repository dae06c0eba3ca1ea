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
matrix close to it. Up to some hundred unknowns `solve_dense` is exact and quicker, which
`solve_auto` chooses by itself. Singular systems, and those with more equations than unknowns:
`solve_lstsq` if small, else `solve_lsmr`.

The solvers that are not here are in `dense.py`, `gmres.py`, `lsmr.py`, `minres.py` and
`low_rank.py`; preconditioners there and in `diagonal.py`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.scipy.sparse.linalg import cg

from imaml_jax.bilevel.dense import solve_dense
from imaml_jax.bilevel.gmres import solve_gmres
from imaml_jax.bilevel.linear_system import (
    Solve,
    SolveInfo,
    as_operator,
    dot,
    in_range,
    ravel,
    ravel_system,
    require_square,
    transpose,
)
from imaml_jax.types import Array, LinearOperator, Operator, PyTree

# `(operator, b, key) -> (r -> M^-1 r)` on raveled vectors.
Precondition = Callable[[Operator, PyTree, Array | None], Callable[[Array], Array]]


def solve_auto(
    operator: Operator,
    b: PyTree,
    *,
    key: Array | None = None,
    tol: float | Array | None = None,
    symmetric: bool = False,
    max_dense: int = 200,
) -> tuple[PyTree, SolveInfo]:
    """`solve_dense` for small systems; beyond, conjugate gradient or GMRES.

    What `custom_root` and `custom_argmin` solve with unless told otherwise.

    Args:
      operator: `A`.
      b: right-hand side.
      key: unused.
      tol: relative tolerance on the residual; None (default) for `eps ** (2/3)`.
      symmetric: whether `A` is symmetric positive definite, so that conjugate gradient serves where
        `solve_dense` does not.
      max_dense: most unknowns of `solve_dense`; complex ones count twice. On one core of a CPU it
        was as quick as the others up to here, and five times slower at 500.

    Returns:
      `(x, SolveInfo)`.
    """
    size = ravel_system(operator, b, tol).size
    if size <= max_dense:
        return solve_dense(operator, b, key=key, tol=tol)
    if symmetric:
        return solve_cg_steihaug(operator, b, key=key, tol=tol, max_steps=min(10 * size, 10_000))
    return solve_gmres(operator, b, key=key, tol=tol)


def solve_cg(
    operator: Operator,
    b: PyTree,
    *,
    key: Array | None = None,
    tol: float | Array | None = None,
    max_steps: int | None = None,
) -> tuple[PyTree, SolveInfo]:
    """Conjugate gradient of `jax.scipy.sparse.linalg.cg`; A symmetric positive definite.

    That function reports neither its steps nor the curvature it meets, so the residual is computed
    afterwards, at the price of one product.

    Args:
      operator: `A`.
      b: right-hand side.
      key: unused.
      tol: relative tolerance on the residual; None (default) for `eps ** (2/3)`.
      max_steps: most iterations; None for ten times the number of unknowns.

    Returns:
      `(x, SolveInfo)`, with `num_steps` and `min_curvature` None.
    """
    del key
    system = ravel_system(operator, b, tol)
    require_square(system, "solve_cg")
    x, _ = cg(
        system.matvec,
        system.b,
        tol=system.tol,  # pyright: ignore[reportArgumentType]
        maxiter=max_steps,
    )
    return system.report(x)


def solve_right_preconditioned(
    operator: Operator,
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
      inverse: `v -> M^-1 v`, linear, of trees shaped like `b`. For the transpose of `A`, as reverse
        mode solves with, it is transposed as well.
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
    operator, b = as_operator(operator, b)
    inverse = (
        transpose(inverse, b).matvec if operator.transposed else as_operator(inverse, b)[0].matvec
    )
    y, info = solve(LinearOperator(lambda v: operator.matvec(inverse(v))), b, key=key)
    x = inverse(y)
    largest, before = (jnp.max(jnp.abs(ravel(v)[0]), initial=0) for v in (x, y))
    kept = in_range(x, largest, before == 0)
    converged = info.converged & kept
    return x, info._replace(min_curvature=None, converged=converged, condition=None)


def solve_cg_steihaug(
    operator: Operator,
    b: PyTree,
    *,
    key: Array | None = None,
    tol: float | Array | None = None,
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
      tol: relative tolerance on the residual; None (default) for `eps ** (2/3)`.
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
    operator, b = as_operator(operator, b)
    inverse = precondition(operator, b, key) if precondition else lambda r: r
    return _descend(operator, b, tol, max_steps, inverse)


def solve_neumann(
    operator: Operator,
    b: PyTree,
    *,
    step_size: float,
    key: Array | None = None,
    tol: float | Array | None = None,
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
      tol: relative tolerance on the residual; None (default) for `eps ** (2/3)`.
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
    confirmed: Array  # whether the residual is the true one, of a claim to be within the tolerance


def _descend(
    operator: Operator,
    b: PyTree,
    tol: float | Array | None,
    max_steps: int | Array,
    inverse: Callable[[Array], Array] = lambda r: r,
    step_size: float | None = None,
) -> tuple[PyTree, SolveInfo]:
    """Conjugate gradient; with a step size, descent along the residuals, whatever the curvature."""
    system = ravel_system(operator, b, tol)
    require_square(system, "conjugate gradient" if step_size is None else "solve_neumann")
    squared_b = dot(system.b, system.b)
    first = inverse(system.b)

    goal = system.tol**2 * squared_b
    unattainable = isinstance(system.tol, float) and system.tol == 0

    def claims(state: _Descent) -> Array | bool:
        return False if unattainable else state.squared_residual <= goal

    def keep_going(state: _Descent) -> Array:
        unfinished = (state.squared_residual > goal) & (state.num_steps < max_steps)
        return ~state.confirmed & (claims(state) | (unfinished & state.positive))

    def step(state: _Descent) -> _Descent:
        """One of descent; where the residual claims to be within the tolerance, the true one."""
        claimed = claims(state)
        direction = state.residual if state.direction is None else state.direction
        image = system.matvec(jnp.where(claimed, state.x, direction))
        curvature = dot(direction, image)
        positive = (curvature > 0) | claimed if step_size is None else state.positive
        length = state.product / curvature if step_size is None else step_size
        length = jnp.where(positive & ~jnp.asarray(claimed), length, 0.0)
        residual = jnp.where(claimed, system.b - image, state.residual - length * image)
        product, next_direction = state.product, None
        if step_size is None:
            preconditioned = inverse(residual)
            product = dot(residual, preconditioned)
            next_direction = preconditioned + product / state.product * direction
        squared_direction = dot(direction, direction)
        stretch = jnp.sqrt(dot(image, image) / squared_direction)
        lowest = jnp.minimum(state.min_curvature, curvature / squared_direction)
        return _Descent(
            x=state.x + length * direction,
            residual=residual,
            direction=next_direction,
            squared_residual=dot(residual, residual),
            product=product,
            num_steps=state.num_steps + jnp.where(claimed, 0, 1),
            min_curvature=jnp.where(claimed, state.min_curvature, lowest),
            max_stretch=jnp.where(
                claimed, state.max_stretch, jnp.maximum(state.max_stretch, stretch)
            ),
            positive=positive,
            confirmed=state.confirmed | claimed,
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
        confirmed=jnp.array(False),
    )
    end = lax.while_loop(keep_going, step, system.carry(start))
    relative, curvature = system.relative(end.residual), end.min_curvature
    if unattainable:
        tiny = jnp.finfo(relative.dtype).tiny
        relative = jnp.where(squared_b > 0, jnp.maximum(relative, tiny), relative)
    bound = jnp.where(curvature > 0, jnp.maximum(end.max_stretch / curvature, 1), jnp.inf)
    return system.report(end.x, relative, end.num_steps, curvature, bound, norm=end.max_stretch)
