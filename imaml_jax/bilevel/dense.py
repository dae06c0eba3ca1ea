"""Solvers on the assembled matrix, with the signature and the report of `linear_solve`.

One product with `A` for each unknown and `[m, n]` of memory: for small problems, and as the
reference of the others.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import lu_factor, lu_solve

from imaml_jax.bilevel.linear_system import SolveInfo, System, dot, ravel_system, require_square
from imaml_jax.types import Array, Operator, PyTree

_PROBES = 4


def solve_dense(
    operator: Operator,
    b: PyTree,
    *,
    key: Array | None = None,
    tol: float | Array | None = None,
    diagnose: bool = False,
) -> tuple[PyTree, SolveInfo]:
    """LU factorisation with partial pivoting, for any invertible matrix.

    A matrix that is singular to working precision has not `converged`: see `solve_lstsq`.

    Args:
      operator: `A`; `P` products and `[P, P]` of memory.
      b: right-hand side.
      key: unused.
      tol: relative residual up to which the solve counts as converged; None (default) for
        `eps ** (2/3)`. What rounding leaves counts as well, see `SolveInfo`.
      diagnose: whether to compute the smallest eigenvalue and the exact condition number, at 5 to
        10 times the cost.

    Returns:
      `(x, SolveInfo)`; `condition` is that of the Frobenius norm, at least the spectral one, with
      the norm of the inverse estimated from 4 random vectors. With `diagnose`, `condition` is the
      spectral one and `min_curvature` the smallest eigenvalue of the symmetric part of `A`.
    """
    del key
    system = ravel_system(operator, b, tol, scaled=False)
    require_square(system, "solve_dense")
    size, dtype = system.b.size, system.b.dtype
    matrix = assemble(system)
    norm, curvature = jnp.linalg.norm(matrix), None
    if size == 1:
        solutions = jnp.stack([system.b, jnp.ones(1, dtype)], 1) / matrix
    else:
        probes = np.random.default_rng(0).normal(size=(size, _PROBES)).astype(dtype)
        solutions = lu_solve(lu_factor(matrix), jnp.column_stack([system.b, probes]))
    x = solutions[:, 0]
    # One pass over all vectors: every reduction costs kernels to compile.
    vectors = jnp.column_stack([system.b, system.b - dot(matrix, x), solutions])
    largest = jnp.max(jnp.abs(vectors), axis=0, initial=0)
    scale = jnp.where(largest > 0, largest, 1)
    squares = jnp.sum((vectors / scale[None, :]) ** 2, axis=0)
    norms = largest * jnp.sqrt(squares)
    norm_b, residual, inverse_norm = norms[0], norms[1], jnp.sqrt(jnp.mean(norms[3:] ** 2))
    singular = jnp.isfinite(norm) & ~jnp.isfinite(inverse_norm)
    condition = jnp.where(singular, jnp.inf, norm * inverse_norm)
    if diagnose:
        curvature = jnp.linalg.eigvalsh((matrix + matrix.T) / 2)[0]
        condition = jnp.linalg.cond(matrix)
    return system.report(
        jnp.where(jnp.isfinite(norm_b), x, jnp.nan),
        residual / jnp.where(residual == 0, 1, norm_b),
        min_curvature=curvature,
        condition=condition,
        norm=norm,
        sizes=(largest[2], norm_b),
    )


def solve_lstsq(
    operator: Operator,
    b: PyTree,
    *,
    key: Array | None = None,
    tol: float | Array | None = None,
    rcond: float | None = None,
) -> tuple[PyTree, SolveInfo]:
    """Minimum-norm least-squares solution `A^+ b` by singular values, for any matrix.

    For systems with more equations than unknowns, or fewer, and for singular ones.

    Args:
      operator: `A`, with its `domain` where it is not square; `n` products, `[m, n]` of memory.
      b: right-hand side.
      key: unused.
      tol: relative residual up to which the solve counts as converged; None (default) for
        `eps ** (2/3)`. A residual orthogonal to the range of `A` within it counts as well.
      rcond: singular values below this share of the largest count as zero; None (default) for
        `max(m, n) eps`.

    Returns:
      `(x, SolveInfo)`; `condition` is the ratio of the largest singular value to the smallest that
      is kept, and `relative_residual` need not be small.
    """
    del key
    system = ravel_system(operator, b, tol)
    matrix = assemble(system)
    u, values, vh = jnp.linalg.svd(matrix, full_matrices=False)
    if rcond is None:
        rcond = max(matrix.shape) * system.eps
    kept = values > rcond * jnp.max(values, initial=0)
    inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)
    x = dot(vh.T, inverse * dot(u.T, system.b))
    condition = jnp.max(values, initial=0) * jnp.max(inverse, initial=0)
    residual = system.b - dot(matrix, x)
    optimal = system.relative(jnp.where(kept, dot(u.T, residual), 0)) <= system.tol
    return system.report(
        x,
        system.relative(residual),
        condition=condition,
        norm=jnp.max(values, initial=0),
        optimal=optimal,
    )


def assemble(system: System) -> Array:
    """The matrix `[m, n]` of a system, by a product with every unit vector at once."""
    basis = system.carry(jnp.eye(system.size, dtype=system.b.dtype))
    return jax.vmap(system.matvec, out_axes=1)(basis)
