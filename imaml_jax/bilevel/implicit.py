"""Derivatives of solutions: the implicit function theorem as JAX transformations.

If `F(x*, *args) = 0` and `A = dF/dx` is invertible there, then `A dx* = -dF/dargs dargs`. A solver
of any kind becomes differentiable in every argument by solving that linear system; its iterations
are never differentiated. The derivative is as accurate as the root.

References:
  Rajeswaran et al., "Meta-Learning with Implicit Gradients", NeurIPS 2019, Lemma 1 and
  Eq. 6, whose lambda and query gradient `learners.imaml` supplies.
  Blondel et al., "Efficient and Modular Implicit Differentiation", NeurIPS 2022.
"""

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero, zero_from_primal
from jax.flatten_util import ravel_pytree

from imaml_jax.bilevel.linear_solve import solve_cg, solve_gmres
from imaml_jax.bilevel.linear_system import Solve, SolveInfo
from imaml_jax.types import LinearOperator, PyTree


def root_jvp(
    optimality_fn: Callable[..., PyTree],
    root: PyTree,
    args: Sequence[PyTree],
    tangents: Sequence[PyTree],
    solve: Solve,
    *,
    symmetric: bool = False,
) -> PyTree:
    """Tangent of a root: solves `A dx = -dF`, differentiable to any order in both modes.

    Args:
      optimality_fn: `F(x, *args)`, shaped like `x`; zero at the root.
      root: `x*`.
      args: the other arguments of `F`.
      tangents: one for each of `args`.
      solve: a solver of `imaml_jax.bilevel.linear_solve`.
      symmetric: whether `A` is symmetric; else reverse mode solves with its transpose.

    Returns:
      `dx*`, shaped like `root`.
    """
    flat_root, unravel = ravel_pytree(root)

    def flat_optimality(x, *call_args):
        return ravel_pytree(optimality_fn(unravel(x), *call_args))[0]

    right = jax.jvp(partial(flat_optimality, flat_root), tuple(args), tuple(tangents))[1]
    matvec = jax.linearize(lambda x: flat_optimality(x, *args), flat_root)[1]

    def solve_flat(operator, b):
        return solve(LinearOperator(operator), b)[0]

    tangent = lax.custom_linear_solve(
        matvec, -right, solve_flat, transpose_solve=solve_flat, symmetric=symmetric
    )
    return unravel(tangent)


def root_vjp(
    optimality_fn: Callable[..., PyTree],
    root: PyTree,
    args: Sequence[PyTree],
    cotangent: PyTree,
    operator: LinearOperator,
    solve: Solve,
    *,
    key: jax.Array | None = None,
) -> tuple[tuple[PyTree, ...], SolveInfo]:
    """Cotangents of the arguments of a root, with the report of the linear solve.

    `u = A^-T v` and `-(dF/dargs)^T u`. The operator is given, so that an approximation of `A` (the
    Gauss-Newton matrix, a truncated solve) can stand in for it. Not itself differentiable past the
    approximation; for exact higher orders use `custom_root`.

    Args:
      optimality_fn: `F(x, *args)`.
      root: `x*`.
      args: the other arguments of `F`, all of floating dtype.
      cotangent: `v`, shaped like `root`.
      operator: `A^T`, the transposed Jacobian of `F` in `x`, or what stands in for it.
      solve: a solver of `imaml_jax.bilevel.linear_solve`.
      key: passed to the solver.

    Returns:
      `(cotangents, info)`, one cotangent for each of `args`.
    """
    adjoint, info = solve(operator, cotangent, key=key)
    _, pullback = jax.vjp(partial(optimality_fn, root), *args)
    return jax.tree.map(jnp.negative, pullback(adjoint)), info


def custom_root(
    optimality_fn: Callable[..., PyTree],
    solve: Solve = solve_gmres,
    *,
    symmetric: bool = False,
    has_aux: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator that makes `solver(init, *args) -> x*` differentiable in every one of `args`.

    The derivative in `init` is zero, as a root does not depend on where the search began.

    Args:
      optimality_fn: `F(x, *args)`, shaped like `x`; zero at the root.
      solve: a solver of `imaml_jax.bilevel.linear_solve` for the tangent system.
      symmetric: whether `dF/dx` is symmetric, as for a minimum.
      has_aux: whether the solver returns `(x*, aux)`; `aux` is not differentiated.

    Returns:
      The decorator.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from imaml_jax import custom_root
      >>> @custom_root(lambda x, a: x**2 - a)
      ... def square_root(init, a):
      ...     return jnp.sqrt(a)  # any solver; here the answer itself
      >>> print(jax.grad(square_root, argnums=1)(1.0, 4.0))
      0.25
    """

    def decorate(solver):
        @jax.custom_jvp
        def find_root(init, *args):
            return solver(init, *args)

        @partial(find_root.defjvp, symbolic_zeros=True)
        def rule(primals, tangents):
            (_, *args), (_, *tangents) = primals, tangents
            result = find_root(*primals)
            root, aux = result if has_aux else (result, None)

            def moving(tree):  # with None for what has no tangent, as integers
                return jax.tree.map(
                    lambda _, t, x: None if isinstance(t, SymbolicZero) else x, args, tangents, tree
                )

            def optimality(x, *new_args):
                all_args = jax.tree.map(
                    lambda new, x: x if new is None else new,
                    list(new_args),
                    args,
                    is_leaf=lambda new: new is None,
                )
                return optimality_fn(x, *all_args)

            tangent = root_jvp(
                optimality, root, moving(args), moving(tangents), solve, symmetric=symmetric
            )
            return result, (tangent, zero_from_primal(aux)) if has_aux else tangent

        @wraps(solver, updated=())  # a solver that is itself a custom_jvp keeps its rule to itself
        def differentiable(init, *args):
            return find_root(init, *args)

        return differentiable

    return decorate


def custom_argmin(
    objective: Callable[..., jax.Array], solve: Solve = solve_cg, *, has_aux: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator that makes a minimiser `solver(init, *args) -> x*` differentiable in its `args`.

    `custom_root` of the gradient, with a symmetric solve.

    Args:
      objective: `(x, *args) -> scalar`, minimised by the solver in `x`.
      solve: a solver of `imaml_jax.bilevel.linear_solve` for systems with the Hessian.
      has_aux: whether the solver returns `(x*, aux)`; `aux` is not differentiated.

    Returns:
      The decorator.

    Example:
      The derivative of a ridge regression in its regularisation strength:

      >>> import jax, jax.numpy as jnp
      >>> from imaml_jax import custom_argmin
      >>> inputs, targets = jnp.eye(2), jnp.ones(2)
      >>> def objective(w, strength):
      ...     return 0.5 * jnp.sum((inputs @ w - targets) ** 2) + 0.5 * strength * jnp.sum(w**2)
      >>> @custom_argmin(objective)
      ... def ridge(init, strength):
      ...     return jnp.linalg.solve(inputs.T @ inputs + strength * jnp.eye(2), inputs.T @ targets)
      >>> print(jax.jacobian(ridge, argnums=1)(jnp.zeros(2), 1.0))  # -1 / (1 + strength)^2
      [-0.25 -0.25]
    """
    return custom_root(jax.grad(objective), solve, symmetric=True, has_aux=has_aux)
