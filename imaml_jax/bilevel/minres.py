"""MINRES, with the signature and the report of `imaml_jax.bilevel.linear_solve`."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from imaml_jax.bilevel.linear_system import (
    SolveInfo,
    dot,
    norm_of,
    ravel_system,
    require_square,
    safe_ratio,
)
from imaml_jax.types import Array, Operator, PyTree


class _MinresState(NamedTuple):
    x: Array
    basis: Array  # Lanczos vectors
    last_basis: Array
    direction: Array
    last_direction: Array
    off_diagonal: Array  # of the tridiagonal matrix
    above: Array  # of its triangular factor: first and second superdiagonal
    twice_above: Array
    cosine: Array
    sine: Array
    residual: Array
    num_steps: Array
    min_curvature: Array
    min_length: Array  # of the diagonal of the triangular factor
    max_length: Array


def solve_minres(
    operator: Operator,
    b: PyTree,
    *,
    key: Array | None = None,
    tol: float | Array | None = None,
    max_steps: int = 100,
) -> tuple[PyTree, SolveInfo]:
    """MINRES, for symmetric matrices that may be indefinite, as Hessians with batch norm are.

    The residual falls from step to step; on a positive definite matrix CG's error is the smaller
    one. On a singular matrix whose range does not hold `b` the solution grows without bound: the
    residual reported, which is computed afterwards at the price of one product, says so.

    Args:
      operator: symmetric `A`.
      b: right-hand side.
      key: unused.
      tol: relative tolerance on the residual; None (default) for `eps ** (2/3)`.
      max_steps: most iterations, one product each.

    Returns:
      `(x, SolveInfo)`.

    References:
      Paige and Saunders, "Solution of sparse indefinite systems of linear equations", 1975.
    """
    del key
    system = ravel_system(operator, b, tol)
    require_square(system, "solve_minres")
    norm = norm_of(system.b)
    zero = jnp.zeros_like(norm)

    def keep_going(state: _MinresState) -> Array:
        unfinished = (state.residual > system.tol * norm) & (state.num_steps < max_steps)
        return unfinished & (state.off_diagonal > 0)

    def step(state: _MinresState) -> _MinresState:
        product = system.matvec(state.basis)
        curvature = dot(state.basis, product)
        product = product - curvature * state.basis - state.off_diagonal * state.last_basis
        off_diagonal = norm_of(product)
        # The reflections of the two steps before, applied to the new column of the tridiagonal.
        above = state.cosine * state.above + state.sine * curvature
        diagonal = state.sine * state.above - state.cosine * curvature
        length = jnp.hypot(diagonal, off_diagonal)
        cosine, sine = safe_ratio(diagonal, length), safe_ratio(off_diagonal, length)
        known = above * state.direction + state.twice_above * state.last_direction
        direction = safe_ratio(state.basis - known, length)
        return _MinresState(
            x=state.x + cosine * state.residual * direction,
            basis=safe_ratio(product, off_diagonal),
            last_basis=state.basis,
            direction=direction,
            last_direction=state.direction,
            off_diagonal=off_diagonal,
            above=-state.cosine * off_diagonal,
            twice_above=state.sine * off_diagonal,
            cosine=cosine,
            sine=sine,
            residual=jnp.where(length == 0, state.residual, sine * state.residual),
            num_steps=state.num_steps + 1,
            # That of the residual before this step.
            min_curvature=jnp.minimum(state.min_curvature, -state.cosine * diagonal),
            min_length=jnp.minimum(state.min_length, length),
            max_length=jnp.maximum(state.max_length, length),
        )

    nothing = jnp.zeros_like(system.b)
    start = _MinresState(
        x=nothing,
        basis=safe_ratio(system.b, norm),
        last_basis=nothing,
        direction=nothing,
        last_direction=nothing,
        off_diagonal=norm,
        above=zero,
        twice_above=zero,
        cosine=zero - 1,
        sine=zero,
        residual=norm,
        num_steps=jnp.zeros((), jnp.int32),
        min_curvature=zero + jnp.inf,
        min_length=zero + jnp.inf,
        max_length=zero,
    )
    state = lax.while_loop(keep_going, step, system.carry(start))
    product = system.matvec(state.x)
    relative = system.relative(system.b - product)
    shrinkage = safe_ratio(jnp.linalg.norm(state.x), jnp.linalg.norm(product))
    condition = state.max_length * jnp.maximum(shrinkage, 1 / state.min_length)
    condition = jnp.where(state.min_length == 0, jnp.inf, jnp.maximum(condition, 1))
    return system.report(
        state.x,
        relative,
        state.num_steps,
        state.min_curvature,
        condition,
        norm=state.max_length,
    )
