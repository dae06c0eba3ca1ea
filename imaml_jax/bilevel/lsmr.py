"""LSMR, with the signature and the report of `imaml_jax.bilevel.linear_solve`."""

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from imaml_jax.bilevel.linear_system import (
    SolveInfo,
    norm_of,
    ravel_system,
    safe_ratio,
    transposed,
)
from imaml_jax.types import Array, Operator, PyTree

_ORTHOGONAL = 5.0  # ||A^T r|| <= 5 eps ||A|| ||r|| ends the iteration


class _State(NamedTuple):
    x: Array
    residual: Array  # b - A x
    left: Array  # vectors of the bidiagonalisation
    right: Array
    direction: Array
    direction_bar: Array
    image: Array  # of the directions
    image_bar: Array
    alpha: Array
    share: Array  # of the last direction in the next
    rotated: Array  # of the first QR factorisation: the diagonal entry to come, and the last
    rho: Array
    rho_bar: Array  # of the second
    cosine_bar: Array
    sine_bar: Array
    gradient: Array  # of size ||A^T residual||
    squared_norm: Array  # of A, in Frobenius' norm, as far as seen
    min_length: Array
    max_length: Array
    condition: Array
    num_steps: Array


def solve_lsmr(
    operator: Operator,
    b: PyTree,
    *,
    key: Array | None = None,
    tol: float | Array | None = None,
    max_steps: int | None = None,
) -> tuple[PyTree, SolveInfo]:
    """LSMR: the minimum-norm least-squares solution from products with `A` and `A^T`.

    For systems with more equations than unknowns, or fewer, and for singular ones. Equivalent to
    MINRES on the normal equations; the number of steps grows with the condition number of `A`, not
    with its root. Ends where the residual is small, or orthogonal to the range of `A`.

    Args:
      operator: `A`, with its `domain` where it is not square.
      b: right-hand side.
      key: unused.
      tol: relative tolerance on the residual; None (default) for `eps ** (2/3)`.
      max_steps: most iterations, one product each with `A` and `A^T`; None (default) for four
        times the number of unknowns, at least 100.

    Returns:
      `(x, SolveInfo)`, with `min_curvature` None; `relative_residual` need not be small.

    References:
      Fong and Saunders, "LSMR: an iterative algorithm for sparse least-squares problems", 2011.
    """
    del key
    system = ravel_system(operator, b, tol)
    left, beta = _normalise(system.b)
    nothing = jnp.zeros(system.size, system.b.dtype)
    size = jnp.max(jnp.abs(transposed(system.matvec, nothing, left)), initial=0)
    scale = jnp.where((size > 0) & jnp.isfinite(size), size, 1)  # squares of it may overflow

    def push(v: Array) -> Array:
        return system.matvec(v) / scale

    pull = partial(transposed, push, nothing)
    max_steps = max(100, 4 * system.size) if max_steps is None else max_steps
    eps = jnp.finfo(system.b.dtype).eps
    goal = system.tol * norm_of(system.b)

    def keep_going(state: _State) -> Array:
        residual = norm_of(state.residual)
        orthogonal = _ORTHOGONAL * eps * jnp.sqrt(state.squared_norm) * residual
        unfinished = (residual > goal) & (jnp.abs(state.gradient) > orthogonal)
        return unfinished & (state.num_steps < max_steps)

    def step(state: _State) -> _State:
        product = push(state.right)
        image = product - state.share * state.image
        left, beta = _normalise(product - state.alpha * state.left)
        right, alpha = _normalise(pull(left) - beta * state.right)
        rho = jnp.hypot(state.rotated, beta)
        cosine, sine = safe_ratio(state.rotated, rho), safe_ratio(beta, rho)
        theta = sine * alpha
        theta_bar, diagonal = state.sine_bar * rho, state.cosine_bar * rho
        rho_bar = jnp.hypot(diagonal, theta)
        cosine_bar, sine_bar = safe_ratio(diagonal, rho_bar), safe_ratio(theta, rho_bar)
        back = safe_ratio(theta_bar * rho, state.rho * state.rho_bar)
        direction_bar = state.direction - back * state.direction_bar
        image_bar = image - back * state.image_bar
        length = safe_ratio(cosine_bar * state.gradient, rho * rho_bar)
        share = safe_ratio(theta, rho)
        later = state.num_steps > 0
        max_length = jnp.where(later, jnp.maximum(state.max_length, state.rho_bar), 0)
        min_length = jnp.where(later, jnp.minimum(state.min_length, state.rho_bar), jnp.inf)
        return _State(
            x=state.x + length * direction_bar,
            residual=state.residual - length * image_bar,
            left=left,
            right=right,
            direction=right - share * state.direction,
            direction_bar=direction_bar,
            image=image,
            image_bar=image_bar,
            alpha=alpha,
            share=share,
            rotated=cosine * alpha,
            rho=rho,
            rho_bar=rho_bar,
            cosine_bar=cosine_bar,
            sine_bar=sine_bar,
            gradient=-sine_bar * state.gradient,
            squared_norm=state.squared_norm + state.alpha**2 + beta**2,
            min_length=min_length,
            max_length=max_length,
            condition=jnp.maximum(max_length, diagonal) / jnp.minimum(min_length, diagonal),
            num_steps=state.num_steps + 1,
        )

    right, alpha = _normalise(pull(left))
    one, nothing = jnp.ones_like(beta), jnp.zeros_like(right)
    start = _State(
        x=nothing,
        residual=system.b,
        left=left,
        right=right,
        direction=right,
        direction_bar=nothing,
        image=jnp.zeros_like(left),
        image_bar=jnp.zeros_like(left),
        alpha=alpha,
        share=0 * one,
        rotated=alpha,
        rho=one,
        rho_bar=one,
        cosine_bar=one,
        sine_bar=0 * one,
        gradient=alpha * beta,
        squared_norm=alpha**2,
        min_length=jnp.inf * one,
        max_length=0 * one,
        condition=one,
        num_steps=jnp.zeros((), jnp.int32),
    )
    end = lax.while_loop(keep_going, step, system.carry(start))
    residual = system.b - push(end.x)
    norm = jnp.sqrt(end.squared_norm)
    slope = norm_of(pull(residual))
    optimal = slope <= 2 * _ORTHOGONAL * eps * norm * norm_of(residual)
    relative = system.relative(residual)
    return system.report(
        end.x / scale,
        relative,
        end.num_steps,
        condition=end.condition,
        norm=norm * scale,
        optimal=optimal,
    )


def _normalise(vector: Array) -> tuple[Array, Array]:
    norm = norm_of(vector)
    return safe_ratio(vector, norm), norm
