"""Curvature-vector products: the Hessian, the Gauss-Newton matrix, and damping.

Nothing here knows of few-shot learning: `fun` is any scalar function of any pytree.

References:
  Pearlmutter, "Fast exact multiplication by the Hessian", 1994.
  Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent", 2002.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from imaml_jax.bilevel.linear_system import as_operator, vary_like
from imaml_jax.types import Array, LinearOperator, LowRank, Operator, PyTree


def steepest_ascent(fun: Callable[..., Array]) -> Callable[..., PyTree]:
    """`jax.grad`, whose conjugate it is in complex parameters.

    The direction in which `fun` grows fastest, so that its derivative is symmetric as a map of real
    and imaginary parts.
    """

    @wraps(fun)
    def gradient(params: PyTree, *args: Any, **kwargs: Any) -> PyTree:
        grads = jax.grad(fun)(params, *args, **kwargs)
        return jax.tree.map(lambda g: g.conj() if jnp.iscomplexobj(g) else g, grads)

    return gradient


def hvp(fun: Callable[[PyTree], Array], params: PyTree, v: PyTree) -> PyTree:
    """Hessian-vector product, forward over reverse; recomputed at each call, least memory.

    Args:
      fun: `params -> scalar`.
      params: the point.
      v: the vector, shaped like `params`.

    Returns:
      `H v`, shaped like `params`.
    """
    return jax.jvp(steepest_ascent(fun), (params,), (v,))[1]


def hvp_fn(fun: Callable[[PyTree], Array], params: PyTree) -> Callable[[PyTree], PyTree]:
    """Hessian-vector products at one point: the gradient is linearised once and its residuals kept.

    Faster than `hvp` from the second product on, at the memory of one backward pass.

    Args:
      fun: `params -> scalar`.
      params: the point.

    Returns:
      `v -> H v`.
    """
    return jax.linearize(steepest_ascent(fun), params)[1]


def ggnvp(
    apply_fn: Callable[[PyTree], PyTree],
    loss_fn: Callable[[PyTree], Array],
    params: PyTree,
    v: PyTree,
) -> PyTree:
    """Product with the generalised Gauss-Newton matrix `J^T S J`.

    `J` is the Jacobian of `apply_fn`, `S` the Hessian of `loss_fn` in the outputs. Positive
    semi-definite wherever `loss_fn` is convex.

    Args:
      apply_fn: `params -> outputs`.
      loss_fn: `outputs -> scalar`.
      params: the point.
      v: the vector, shaped like `params`.

    Returns:
      `J^T S J v`, shaped like `params`.
    """
    return ggnvp_fn(apply_fn, loss_fn, params)(v)


def ggnvp_fn(
    apply_fn: Callable[[PyTree], PyTree], loss_fn: Callable[[PyTree], Array], params: PyTree
) -> Callable[[PyTree], PyTree]:
    """Gauss-Newton products at one point, linearised once. See `ggnvp`.

    Returns:
      `v -> J^T S J v`.
    """
    outputs, pushforward = jax.linearize(apply_fn, params)
    pullback = jax.linear_transpose(pushforward, params)
    output_hvp = hvp_fn(loss_fn, outputs)
    return lambda v: pullback(output_hvp(pushforward(v)))[0]


def hessian(fun: Callable[[PyTree], Array], params: PyTree) -> LinearOperator:
    """The Hessian of `fun` at `params` as an operator."""
    return LinearOperator(hvp_fn(fun, params))


def gauss_newton(
    apply_fn: Callable[[PyTree], PyTree], loss_fn: Callable[[PyTree], Array], params: PyTree
) -> LinearOperator:
    """The Gauss-Newton matrix at `params` as an operator that also carries its low-rank factor.

    The factor costs one backward pass per output and `[outputs, parameters]` of memory, and only
    if a solver such as `solve_woodbury` asks for it. On the CPU these passes run one by one, since
    one stays in the caches and was three times as fast as 25 at once; elsewhere 64 at once.

    Args:
      apply_fn: `params -> outputs`.
      loss_fn: `outputs -> scalar`.
      params: the point.

    Returns:
      `J^T S J` with its factor, see `ggnvp`.
    """

    def factor() -> LowRank:
        outputs, pullback = jax.vjp(apply_fn, params)
        flat_outputs, unravel = ravel_pytree(outputs)

        def jacobian_row(cotangent: Array) -> Array:
            return ravel_pytree(pullback(unravel(cotangent))[0])[0]

        basis = vary_like(jnp.eye(flat_outputs.size, dtype=flat_outputs.dtype), flat_outputs)
        output_hessian = jax.hessian(lambda flat: loss_fn(unravel(flat)))(flat_outputs)
        rows_at_once = 1 if jax.default_backend() == "cpu" else 64
        jacobian = jax.lax.map(jacobian_row, basis, batch_size=rows_at_once)
        return LowRank(jacobian, output_hessian)

    return LinearOperator(ggnvp_fn(apply_fn, loss_fn, params), factor)


def damped(operator: Operator, damping: PyTree) -> LinearOperator:
    """`A + diag(damping)`.

    Args:
      operator: `A`, or a function `v -> A v`.
      damping: a scalar, or a tree prefix of the parameters whose leaves broadcast to theirs.

    Returns:
      The damped operator; it keeps the low-rank factor of `A`, if there is one, and knows what was
      added.
    """
    if not isinstance(operator, LinearOperator):
        operator, _ = as_operator(operator, jnp.zeros(getattr(operator, "shape", ())[:1]))
    undamped = operator.matvec

    def matvec(v: PyTree) -> PyTree:
        return jax.tree.map(
            lambda av, d, x: av + jnp.asarray(d, x.dtype) * x,
            undamped(v),
            jax.tree.broadcast(damping, v),
            v,
        )

    return operator._replace(matvec=matvec, dampings=(*operator.dampings, damping))
