"""What the linear solvers share: a system of raveled vectors, and the report of its solution.

Arrays are raveled first: `jax.scipy.sparse.linalg.cg` on a tree fails under `vmap(grad(...))` of
convolutions, and one long vector means few kernels.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from imaml_jax.types import Array, LinearOperator, PyTree


class SolveInfo(NamedTuple):
    """What a solver met.

    Attributes:
      relative_residual: `||b - A x|| / ||b||`, 0 where both are 0.
      num_steps: iterations taken; None where the solver does not tell, or has none.
      min_curvature: smallest `p^T A p / p^T p` met; an upper bound of the smallest eigenvalue. None
        where the solver does not tell.
      converged: whether the relative residual is within the tolerance and `x` in the range of its
        dtype.
      condition: lower bound of the condition number, from the products that were taken anyway; None
        where the solver does not tell. A bound, for what the iterations see of the spectrum lies
        within it: Ritz values overestimate the smallest eigenvalue. The relative error of `x` is at
        most the true condition number times the relative residual.
    """

    relative_residual: Array
    num_steps: Array | None
    min_curvature: Array | None
    converged: Array
    condition: Array | None = None


dot = partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def ravel_system(
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


def raveled_damping(operator: LinearOperator, b: PyTree) -> Array:
    """What was added to the operator's diagonal."""
    flat = [ravel_pytree(broadcast_to_leaves(damping, b))[0] for damping in operator.dampings]
    return sum(flat, jnp.zeros_like(ravel_pytree(b)[0]))


def broadcast_to_leaves(prefix: PyTree, tree: PyTree) -> PyTree:
    """A tree like `tree` from a scalar or a tree prefix whose leaves broadcast to its leaves."""
    return jax.tree.map(
        lambda d, x: jnp.broadcast_to(d, x.shape).astype(x.dtype),
        jax.tree.broadcast(prefix, tree),
        tree,
    )


def relative_residual(residual: Array, b: Array) -> Array:
    """`||residual|| / ||b||`, 0 where both are 0. NaN stays NaN, also where `b` is 0."""
    squared = dot(residual, residual)
    return jnp.sqrt(squared / jnp.where(squared == 0, 1, dot(b, b)))


def report(
    unravel: Callable[[Array], PyTree],
    x: Array,
    relative: Array,
    tol: float | Array,
    num_steps: Array | None = None,
    min_curvature: Array | None = None,
    condition: Array | None = None,
) -> tuple[PyTree, SolveInfo]:
    """The solution of a raveled system as a tree, and what its solver met.

    Scaled back, the solution may leave the range; then it has not converged.
    """
    solution = unravel(x)
    converged = (relative <= tol) & in_range(solution, (x == 0).all())
    return solution, SolveInfo(relative, num_steps, min_curvature, converged, condition)


def in_range(solution: PyTree, is_zero: Array) -> Array:
    """Whether its largest entry neither left the range nor, unless it `is_zero`, lost digits."""
    flat = ravel_pytree(solution)[0]
    largest, limits = jnp.max(jnp.abs(flat), initial=0), jnp.finfo(flat.dtype)
    return (largest < jnp.inf) & ((largest > limits.tiny / limits.eps) | is_zero)


def confirmed(
    matvec: Callable[[Array], Array], b: Array, x: Array, residual: Array, tol: float | Array
) -> Array:
    """The relative residual of a recurrence, or the true one where it claims to be within `tol`.

    In rounding the recurrence goes to zero and the true residual does not. With a `tol` of 0.0 no
    solution of a system that is not zero is within it, so that the recurrence's is returned. A loop
    of at most one turn, for under `vmap` a `lax.cond` would always spend the product.
    """

    def measure(_):
        return relative_residual(b - matvec(x), b), False

    claimed = relative_residual(residual, b)
    if isinstance(tol, float) and tol == 0:  # nothing is within it, nor has to be compiled
        return jnp.where(dot(b, b) > 0, jnp.maximum(claimed, jnp.finfo(b.dtype).tiny), claimed)
    return lax.while_loop(lambda state: state[1], measure, (claimed, claimed <= tol))[0]


def condition_bound(max_stretch: Array, min_curvature: Array) -> Array:
    """From the largest `||A p|| / ||p||` and the smallest `p^T A p / p^T p`; else infinite."""
    return jnp.where(min_curvature > 0, jnp.maximum(max_stretch / min_curvature, 1), jnp.inf)
