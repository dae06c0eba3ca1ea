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


# `solve_*` with its settings bound: `(operator, b, *, key=None) -> (x, SolveInfo)`.
Solve = Callable[..., tuple[PyTree, SolveInfo]]

dot = partial(jnp.matmul, precision=lax.Precision.HIGHEST)


class System(NamedTuple):
    """`A x = b` on raveled vectors: what every solver makes of its arguments, and reports on.

    Attributes:
      matvec: `x -> A x`.
      b: `[P]`, scaled to largest entry 1, since squares of tiny or huge numbers leave the range.
        NaN everywhere where an entry is not finite.
      unravel: the tree of a vector, scaled back.
      tol: relative residual up to which the system counts as solved.
    """

    matvec: Callable[[Array], Array]
    b: Array
    unravel: Callable[[Array], PyTree]
    tol: float | Array

    def relative(self, residual: Array) -> Array:
        """`||residual|| / ||b||`, 0 where both are 0. NaN stays NaN, also where `b` is 0."""
        squared = dot(residual, residual)
        return jnp.sqrt(squared / jnp.where(squared == 0, 1, dot(self.b, self.b)))

    def confirmed(self, x: Array, residual: Array) -> Array:
        """A recurrence's relative residual, or the true one where it claims to be within `tol`.

        In rounding the recurrence goes to zero and the true residual does not. With a `tol` of 0.0
        no solution of a system that is not zero is within it, so that the recurrence's is returned.
        A loop of at most one turn, for under `vmap` a `lax.cond` would always spend the product.
        """

        def measure(_):
            return self.relative(self.b - self.matvec(x)), False

        claimed = self.relative(residual)
        if isinstance(self.tol, float) and self.tol == 0:  # nothing is within it: no product
            tiny = jnp.finfo(claimed.dtype).tiny
            return jnp.where(dot(self.b, self.b) > 0, jnp.maximum(claimed, tiny), claimed)
        start = claimed, claimed <= self.tol
        return lax.while_loop(lambda state: state[1], measure, start)[0]

    def report(
        self,
        x: Array,
        relative: Array | None = None,
        num_steps: Array | None = None,
        min_curvature: Array | None = None,
        condition: Array | None = None,
    ) -> tuple[PyTree, SolveInfo]:
        """The solution as a tree, and what its solver met; costs a product without the residual.

        Scaled back, the solution may leave the range; then it has not converged.
        """
        if relative is None:
            relative = self.relative(self.b - self.matvec(x))
        solution = self.unravel(x)
        converged = (relative <= self.tol) & in_range(solution, (x == 0).all())
        return solution, SolveInfo(relative, num_steps, min_curvature, converged, condition)


def ravel_system(operator: LinearOperator, b: PyTree, tol: float | Array) -> System:
    """The `System` of an operator and a right-hand side."""
    flat_b, unravel = ravel_pytree(b)
    largest = lax.stop_gradient(jnp.max(jnp.abs(flat_b), initial=0))
    scale = jnp.where(largest == 0, 1, jnp.where(jnp.isfinite(largest), largest, jnp.nan))
    return System(
        lambda flat: ravel_pytree(operator.matvec(unravel(flat)))[0],
        flat_b / scale,
        lambda flat: unravel(scale * flat),
        tol,
    )


def random_products(
    operator: LinearOperator, b: PyTree, key: Array | None, number: int, draw: Callable[..., Array]
) -> tuple[Array, Array]:
    """`Q [P, min(number, P)]`, drawn by `(key, shape, dtype)` and made orthonormal, and `A Q`."""
    system = ravel_system(operator, b, 0.0)
    size, key = system.b.size, jax.random.key(0) if key is None else key
    basis, _ = jnp.linalg.qr(draw(key, (size, min(number, size)), system.b.dtype))
    return basis, jax.vmap(system.matvec, 1, 1)(basis)


def raveled_damping(operator: LinearOperator, b: PyTree, *, needed_by: str | None = None) -> Array:
    """What was added to the operator's diagonal; ValueError where nothing was, but it is needed."""
    if needed_by and not operator.dampings:
        raise ValueError(f"{needed_by} needs damping > 0; wrap the operator in damped(...)")
    flat = [ravel_pytree(broadcast_to_leaves(damping, b))[0] for damping in operator.dampings]
    return sum(flat, jnp.zeros_like(ravel_pytree(b)[0]))


def broadcast_to_leaves(prefix: PyTree, tree: PyTree) -> PyTree:
    """A tree like `tree` from a scalar or a tree prefix whose leaves broadcast to its leaves."""
    return jax.tree.map(
        lambda d, x: jnp.broadcast_to(d, x.shape).astype(x.dtype),
        jax.tree.broadcast(prefix, tree),
        tree,
    )


def in_range(solution: PyTree, is_zero: Array) -> Array:
    """Whether its largest entry neither left the range nor, unless it `is_zero`, lost digits."""
    flat = ravel_pytree(solution)[0]
    largest, limits = jnp.max(jnp.abs(flat), initial=0), jnp.finfo(flat.dtype)
    return (largest < jnp.inf) & ((largest > limits.tiny / limits.eps) | is_zero)
