"""Implicit gradients to a requested accuracy, in place of step counts."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from imaml_jax.bilevel.gradient_error import (
    curvature_of,
    implicit_gradient,
    implicit_gradient_error,
    share_of,
)
from imaml_jax.bilevel.inner import minimize
from imaml_jax.bilevel.linear_system import Solve, vary_like
from imaml_jax.types import Array, LinearOperator, PyTree


class AdaptiveInfo(NamedTuple):
    """What an adaptive gradient cost, and how far it is to be trusted; scalars.

    Attributes:
      error: estimated error of the gradient relative to its norm.
      num_rounds: rounds made.
      inner_residual: norm of the objective's gradient at the end relative to the start.
      solve_residual: relative residual of the adjoint.
      solve_steps: iterations of its last solve.
      min_curvature: smallest curvature that one met.
      converged: whether `error` is within the accuracy.
    """

    error: Array
    num_rounds: Array
    inner_residual: Array
    solve_residual: Array
    solve_steps: Array | None
    min_curvature: Array | None
    converged: Array


class _State(NamedTuple):
    params: PyTree
    adjoint: PyTree
    value: Array
    grads: tuple[PyTree, ...]
    info: AdaptiveInfo


def adaptive_gradient(
    outer_fn: Callable[..., Array],
    objective: Callable[..., Array],
    init_params: PyTree,
    args: Sequence[PyTree],
    *,
    accuracy: float | Array,
    strong_convexity: float | Array,
    inner: optax.GradientTransformation,
    num_steps: int,
    solve: Solve,
    curvature: Callable[..., LinearOperator] | None = None,
    max_rounds: int | Array = 50,
    key: Array | None = None,
) -> tuple[Array, tuple[PyTree, ...], PyTree, AdaptiveInfo]:
    """Value and derivatives of `outer_fn(x*, *args)`, `x*(args) = argmin_x objective(x, *args)`.

    A round takes some steps of the inner solver from where it stood, goes on with the adjoint at
    the new point, and estimates the error of the gradient, see `implicit_gradient_error`; rounds
    follow one another until that is within `accuracy`. The gradient returned has the correction
    that the estimate is made of. Under `vmap` all wait for the slowest. Not itself differentiable;
    `custom_argmin` is.

    Args:
      outer_fn: `(params, *args) -> scalar`.
      objective: `(params, *args) -> scalar`.
      init_params: where the minimisation starts.
      args: the other arguments, trees of floating-point arrays.
      accuracy: relative error of the gradient, in the Euclidean norm over all `args`, positive.
      strong_convexity: see `implicit_gradient_error`.
      inner: Optax transform of the minimisation; it starts afresh in each round.
      num_steps: its steps a round, at least 1.
      solve: a solver of `imaml_jax.bilevel.linear_solve`, four times a round; it need not converge:
        `partial(solve_cg_steihaug, max_steps=10)`. Not `solve_woodbury`: two of the systems have
        the objective's Hessian.
      curvature: `(params, *args) -> LinearOperator`, in place of the objective's Hessian.
      max_rounds: most rounds, at least 1; may be traced.
      key: passed to the solver.

    Returns:
      `(value, grads, params, info)` with one gradient for each of `args`.

    Raises:
      ValueError: a setting out of its range.

    Example:
      >>> from functools import partial
      >>> import jax, jax.numpy as jnp, optax
      >>> from imaml_jax import adaptive_gradient, solve_cg_steihaug
      >>> value, (grad,), x, info = adaptive_gradient(
      ...     lambda x, a: jnp.sum(x**2),
      ...     lambda x, a: 0.5 * jnp.sum((x - a) ** 2) + 0.5 * jnp.sum(x**2),  # x* = a / 2
      ...     jnp.zeros(3),
      ...     (jnp.arange(3.0),),
      ...     accuracy=1e-3,
      ...     strong_convexity=2.0,
      ...     inner=optax.sgd(0.1),
      ...     num_steps=5,
      ...     solve=partial(solve_cg_steihaug, max_steps=3),
      ... )
      >>> bool(jnp.allclose(grad, jnp.arange(3.0) / 2, rtol=1e-3) and info.converged)
      True
    """
    if not isinstance(accuracy, jax.Array) and not 0 < accuracy < math.inf:
        raise ValueError(f"adaptive_gradient: accuracy={accuracy} must be positive and finite")
    if not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"adaptive_gradient: num_steps={num_steps} must be an integer >= 1")
    if not isinstance(max_rounds, jax.Array) and not max_rounds >= 1:
        raise ValueError(f"adaptive_gradient: max_rounds={max_rounds} must be at least 1")
    args = tuple(args)
    if not args:
        raise ValueError("adaptive_gradient: args=() leaves nothing to differentiate in")
    matrix = curvature_of(objective, args, curvature)
    norm = optax.tree.norm
    start = norm(jax.grad(objective)(init_params, *args))

    def one_round(params: PyTree, adjoint: PyTree, num_rounds: Array) -> _State:
        params, _ = minimize(
            objective, params, *args, tx=inner, num_steps=num_steps, curvature=curvature
        )
        value, right = jax.value_and_grad(outer_fn)(params, *args)
        operator = matrix(params)
        left = optax.tree.sub(right, operator.matvec(adjoint))
        change, solved = solve(operator, left, key=key)
        adjoint = optax.tree.add(adjoint, change)
        found = implicit_gradient_error(
            outer_fn,
            objective,
            params,
            args,
            adjoint,
            solve=solve,
            strong_convexity=strong_convexity,
            curvature=curvature,
            key=key,
        )
        grads = implicit_gradient(outer_fn, objective, params, args, adjoint)
        grads = optax.tree.add(grads, found.correction)
        error = share_of(found.estimate, norm(grads))
        info = AdaptiveInfo(
            error,
            num_rounds + 1,
            share_of(norm(jax.grad(objective)(params, *args)), start),
            share_of(solved.relative_residual * norm(left), norm(right)),
            solved.num_steps,
            solved.min_curvature,
            error <= accuracy,
        )
        return _State(params, adjoint, value, grads, info)

    shapes = jax.eval_shape(one_round, init_params, init_params, jnp.int32(0))
    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    unknown = empty.info._replace(error=jnp.full_like(empty.info.error, jnp.inf))

    def same(state: _State) -> _State:  # over the devices of a `shard_map`, in every round
        return vary_like(state, jax.tree.leaves(init_params)[0])

    state = lax.while_loop(
        lambda s: ~s.info.converged & (s.info.num_rounds < max_rounds),
        lambda s: same(one_round(s.params, s.adjoint, s.info.num_rounds)),
        same(empty._replace(params=jax.tree.map(jnp.asarray, init_params), info=unknown)),
    )
    return state.value, state.grads, state.params, state.info
