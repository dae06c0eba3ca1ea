"""How far an implicit gradient is from the exact one: an estimate from its residuals, and a bound.

At a point `x` the inner gradient `s = grad objective(x)` should be zero, and so should the residual
`r(x) = grad outer(x) - A(x) u` of the adjoint `u`. A Newton step for each gives to first order what
is missing, with `H` the objective's Hessian, which `A` is too where no other matrix is chosen::

    x* - x = -d,    H d = s;        u* - u = e,    A e = r(x) - Dr(x) d;

and the derivative of the gradient along `(-d, e)` is its error. What the solver leaves of the two
systems counts by its norm over the strong convexity, and what is of second order by the length of a
second Newton step over that of the first. That is an estimate; `implicit_gradient_bound` gives a
bound where the constants are known.

References:
  Pedregosa, "Hyperparameter optimization with approximate gradient", ICML 2016 (the error from both
  residuals).
  Becker and Rannacher, "An optimal control approach to a posteriori error estimation", 2001.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from imaml_jax.bilevel.curvature import hessian
from imaml_jax.bilevel.linear_system import Solve
from imaml_jax.types import Array, LinearOperator, PyTree

_SAFETY, _MOST_LEFT = 3.0, 0.9


class GradientError(NamedTuple):
    """The error of an implicit gradient.

    Attributes:
      estimate: of its norm: `3 (||correction|| + unresolved) / (1 - l)`, where `l` is the length
        of a second Newton step over that of the first, at most 0.9. Infinite where a step or the
        adjoint shows that a matrix curves downwards: there is no minimum at hand.
      unresolved: what the linear solves left open; where it outweighs the correction, more steps
        for `solve` give a sharper estimate.
      correction: to add to the gradient: its error to first order, one tree for each of `args`.
    """

    estimate: Array
    unresolved: Array
    correction: tuple[PyTree, ...]


def implicit_gradient_error(
    outer_fn: Callable[..., Array],
    objective: Callable[..., Array],
    params: PyTree,
    args: Sequence[PyTree],
    adjoint: PyTree,
    *,
    solve: Solve,
    strong_convexity: float | Array,
    curvature: Callable[..., LinearOperator] | None = None,
    key: Array | None = None,
) -> GradientError:
    """Estimates the error of `d outer_fn(x*(args), *args) / d args` as computed at `params`.

    The gradient is that of `outer_fn` in `args` less `adjoint^T d2 objective / dx dargs`. Costs
    three linear solves and three products with derivatives of second and third order. Not itself
    differentiable.

    Args:
      outer_fn: `(params, *args) -> scalar`.
      objective: `(params, *args) -> scalar`, minimised in `params`.
      params: an approximate minimiser.
      args: the other arguments, trees of floating-point arrays.
      adjoint: an approximate solution of `A u = grad outer_fn`, shaped like `params`.
      solve: a solver of `bilevel.linear_solve` that serves both `A` and the Hessian; the better it
        solves, the sharper the estimate.
      strong_convexity: lower bound of the eigenvalues of `A`, positive: lambda, where the loss is
        convex or `curvature` is the Gauss-Newton matrix.
      curvature: `(params, *args) -> LinearOperator`, the matrix of the adjoint's system; default
        the objective's Hessian. With another one the error is that of the gradient which this
        matrix has in the limit, not of the exact one.
      key: passed to the solver.

    Returns:
      The `GradientError`.

    Raises:
      ValueError: `strong_convexity` not positive.
    """
    _check("implicit_gradient_error", strong_convexity)
    args = tuple(args)
    inner_grad = jax.grad(objective)
    full, matrix = (curvature_of(objective, args, c) for c in (None, curvature))

    def adjoint_residual(x: PyTree) -> PyTree:
        return optax.tree.sub(jax.grad(outer_fn)(x, *args), matrix(x).matvec(adjoint))

    def gradient(x: PyTree, u: PyTree) -> tuple[PyTree, ...]:
        return implicit_gradient(outer_fn, objective, x, args, u)

    slope = inner_grad(params, *args)
    step, step_info = solve(full(params), slope, key=key)
    residual, turn = jax.jvp(adjoint_residual, (params,), (step,))
    missing = optax.tree.sub(residual, turn)
    change, change_info = solve(matrix(params), missing, key=key)
    ahead = optax.tree.sub(params, step)
    second, _ = solve(full(ahead), inner_grad(ahead, *args), key=key)

    zeros = optax.tree.zeros_like(params)
    by_params = jax.jvp(gradient, (params, adjoint), (optax.tree.scale(-1, step), zeros))[1]
    by_adjoint = jax.jvp(gradient, (params, adjoint), (zeros, change))[1]
    correction = optax.tree.add(by_params, by_adjoint)

    norm = optax.tree.norm
    open_step = step_info.relative_residual * norm(slope) / strong_convexity
    open_turn = _scaled(open_step, norm(turn), norm(step))
    open_change = (change_info.relative_residual * norm(missing) + open_turn) / strong_convexity
    unresolved = _scaled(open_step, norm(by_params), norm(step))
    unresolved += _scaled(open_change, norm(by_adjoint), norm(change))
    left = share_of(norm(second), norm(step))
    pairs = (step, slope), (adjoint, jax.grad(outer_fn)(params, *args))  # A^-1 b and b
    upwards = jnp.all(jnp.stack([jnp.asarray(optax.tree.vdot(*pair)) for pair in pairs]) >= 0)
    if step_info.min_curvature is not None:
        upwards &= step_info.min_curvature > 0
    estimate = _SAFETY * (norm(correction) + unresolved) / (1 - jnp.minimum(left, _MOST_LEFT))
    estimate = jnp.where(upwards, estimate, jnp.inf)
    return GradientError(estimate, unresolved, correction)


def implicit_gradient_bound(
    inner_residual: Array | float,
    adjoint_residual: Array | float,
    adjoint_norm: Array | float,
    *,
    strong_convexity: float,
    hessian_lipschitz: float,
    outer_lipschitz: float,
) -> Array:
    """A bound on the error of the adjoint, which holds where the constants do.

    With `s`, `r` the norms of the two residuals and `m` the strong convexity, `||x - x*|| <= s / m`
    and::

        ||u - u*|| <= (r + (outer_lipschitz + hessian_lipschitz ||u||) s / m) / m.

    The error of the gradient in an argument `a` is at most that times `||d2 objective / da dx||`
    (lambda, for iMAML's anchor) where that derivative and the outer function's own in `a` do not
    depend on `x`.

    Args:
      inner_residual: `||grad objective(x)||`.
      adjoint_residual: `||grad outer(x) - A(x) u||`.
      adjoint_norm: `||u||`.
      strong_convexity: positive lower bound of the Hessian's eigenvalues, at `x`, at `x*` and
        between them.
      hessian_lipschitz: of the objective's Hessian, in the spectral norm.
      outer_lipschitz: of the outer function's gradient in `x`.

    Returns:
      The bound, a scalar.

    Raises:
      ValueError: a constant out of its range.
    """
    _check("implicit_gradient_bound", strong_convexity)
    for name, value in (
        ("hessian_lipschitz", hessian_lipschitz),
        ("outer_lipschitz", outer_lipschitz),
    ):
        if not isinstance(value, jax.Array) and not value >= 0:
            raise ValueError(f"implicit_gradient_bound: {name}={value} must be at least 0")
    distance = inner_residual / strong_convexity
    moved = (outer_lipschitz + hessian_lipschitz * adjoint_norm) * distance
    return jnp.asarray((adjoint_residual + moved) / strong_convexity)


def implicit_gradient(
    outer_fn: Callable[..., Array],
    objective: Callable[..., Array],
    params: PyTree,
    args: tuple[PyTree, ...],
    adjoint: PyTree,
) -> tuple[PyTree, ...]:
    """Derivative of `outer_fn` in `args` less `adjoint^T d2 objective / dx dargs`, at `params`."""
    direct = jax.grad(outer_fn, argnums=tuple(range(1, len(args) + 1)))(params, *args)
    _, pullback = jax.vjp(lambda *a: jax.grad(objective)(params, *a), *args)
    return optax.tree.sub(direct, pullback(adjoint))


def curvature_of(
    objective: Callable[..., Array],
    args: tuple[PyTree, ...],
    curvature: Callable[..., LinearOperator] | None,
) -> Callable[[PyTree], LinearOperator]:
    """`params -> LinearOperator`, by default of the objective's Hessian."""
    if curvature is not None:
        return lambda x: curvature(x, *args)
    return lambda x: hessian(lambda p: objective(p, *args), x)


def share_of(part: Array, whole: Array) -> Array:
    """`part / whole`, and 0 where nothing is left of nothing."""
    return jnp.where(part == 0, 0.0, part / whole)


def _scaled(size: Array, image: Array, preimage: Array) -> Array:
    """`size` by what the map did to another vector; infinite where that was 0 and says nothing."""
    known = preimage > 0
    scaled = size * image / jnp.where(known, preimage, 1)
    return jnp.where(size == 0, 0.0, jnp.where(known, scaled, jnp.inf))


def _check(name: str, strong_convexity: float | Array) -> None:
    if not isinstance(strong_convexity, jax.Array) and not strong_convexity > 0:
        raise ValueError(f"{name}: strong_convexity={strong_convexity} must be positive")
