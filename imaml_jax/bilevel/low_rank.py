"""Linear solvers for a matrix of low rank plus a diagonal, and the preconditioner of that form.

Their signature and report are those of `imaml_jax.bilevel.linear_solve`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import lu_factor, lu_solve

from imaml_jax.bilevel.linear_system import (
    SolveInfo,
    as_operator,
    dot,
    random_products,
    ravel_system,
    raveled_damping,
)
from imaml_jax.types import Array, Operator, PyTree


def solve_woodbury(
    operator: Operator,
    b: PyTree,
    *,
    key: Array | None = None,
    tol: float | Array | None = None,
) -> tuple[PyTree, SolveInfo]:
    """Exact solve with a damped Gauss-Newton matrix `J^T S J + D` by an `m x m` system.

    `x = D^-1 (b - J^T (I + S J D^-1 J^T)^-1 S J D^-1 b)`, with `m` the number of outputs: `N^2 K`
    for N-way K-shot classification, so it is small for small support sets. Needs positive damping;
    `S` may be singular.

    Args:
      operator: `damped(gauss_newton(...), damping)`.
      b: right-hand side.
      key: unused.
      tol: relative residual up to which the solve counts as converged; None (default) for
        `eps ** (2/3)`.

    Returns:
      `(x, SolveInfo)` with `num_steps` and `min_curvature` None.

    Raises:
      ValueError: the operator carries no low-rank factor, or no damping.
      TypeError: complex entries.

    References:
      Ren and Goldfarb, "Efficient subsampled Gauss-Newton and natural gradient methods", 2019.
    """
    del key
    operator, b = as_operator(operator, b)
    if any(jnp.iscomplexobj(leaf) for leaf in jax.tree.leaves(b)):
        raise TypeError("solve_woodbury takes real parameters only; use solve_dense or a CG")
    if operator.factor is None:
        raise ValueError(
            "solve_woodbury needs an operator with a low-rank factor, such as "
            "damped(gauss_newton(...), damping); for a Hessian use solve_cg_steihaug"
        )
    jacobian, output_hessian = operator.factor()
    system = ravel_system(operator, b, tol)
    diagonal = raveled_damping(operator, b, needed_by="solve_woodbury")
    x = _woodbury(jacobian, output_hessian, diagonal)(system.b)
    product = diagonal * x + dot(dot(output_hessian, dot(jacobian, x)), jacobian)
    return system.report(x, system.relative(system.b - product))


def solve_nystrom(
    operator: Operator,
    b: PyTree,
    *,
    rank: int,
    key: Array | None = None,
    tol: float | Array | None = None,
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
      tol: relative residual up to which the solve counts as converged; None (default) for
        `eps ** (2/3)`.

    Returns:
      `(x, SolveInfo)` with `num_steps` and `min_curvature` None.

    Raises:
      ValueError: a rank below 1, or an operator without damping.

    References:
      Hataya and Yamada, "Nyström method for accurate and scalable implicit differentiation",
      AISTATS 2023.
      Frangella, Tropp, Udell, "Randomized Nyström preconditioning", 2021.
    """
    operator, b = as_operator(operator, b)
    system = ravel_system(operator, b, tol)
    x = nystrom_preconditioner(operator, b, key, rank=rank)(system.b)
    return system.report(x)


def nystrom_preconditioner(
    operator: Operator, b: PyTree, key: Array | None = None, *, rank: int
) -> Callable[[Array], Array]:
    """`r -> M^-1 r` with the Nyström approximation `M = Y (Q^T Y)^+ Y^T + D` of `solve_nystrom`.

    For `solve_cg_steihaug(..., precondition=partial(nystrom_preconditioner, rank=20))`: few CG
    steps are left where the eigenvalues of `B` beyond the rank are small beside the damping.

    Args:
      operator: `damped(..., damping)` with positive damping.
      b: right-hand side; only its structure matters.
      key: of the directions; default a fixed one.
      rank: random directions, at least 1.

    Returns:
      `r -> M^-1 r` for raveled vectors.

    Raises:
      ValueError: a rank below 1, or an operator without damping.
    """
    if rank < 1:
        raise ValueError(f"nystrom_preconditioner: rank={rank} must be at least 1")
    operator, b = as_operator(operator, b)
    diagonal = raveled_damping(operator, b, needed_by="nystrom_preconditioner")
    basis, image = random_products(operator, b, key, rank, jax.random.normal)
    image = image - diagonal[:, None] * basis
    core = dot(basis.T, image)
    values, vectors = jnp.linalg.eigh((core + core.T) / 2)
    positive = values > values.size * jnp.finfo(values.dtype).eps * jnp.abs(values).max()
    scales = jnp.where(positive, lax.rsqrt(jnp.where(positive, values, 1)), 0)
    root = dot(image, vectors) * scales[None, :]
    return _woodbury(root.T, jnp.eye(values.size, dtype=root.dtype), diagonal)


def _woodbury(jacobian: Array, output_hessian: Array, diagonal: Array) -> Callable[[Array], Array]:
    """`b -> (J^T S J + D)^-1 b` by a system of the size of `S`, factorised once."""
    gram = dot(jacobian / diagonal[None, :], jacobian.T)
    small_matrix = jnp.eye(gram.shape[0], dtype=gram.dtype) + dot(output_hessian, gram)
    factors = lu_factor(small_matrix)

    def apply(b: Array) -> Array:
        right = dot(output_hessian, dot(jacobian, b / diagonal))
        return (b - dot(lu_solve(factors, right), jacobian)) / diagonal

    return apply
