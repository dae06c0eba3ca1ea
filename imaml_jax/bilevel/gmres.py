"""GMRES, with the signature and the report of `imaml_jax.bilevel.linear_solve`."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular

from imaml_jax.bilevel.linear_system import (
    SolveInfo,
    System,
    dot,
    norm_of,
    ravel_system,
    require_square,
)
from imaml_jax.types import Array, Operator, PyTree

_STAGNATION = 0.9


class _Arnoldi(NamedTuple):
    basis: Array  # [restart + 1, P], orthonormal rows
    rotation: Array  # [restart + 1, restart + 1], makes the Hessenberg matrix triangular
    triangle: Array  # [restart, restart]
    step: Array
    invariant: Array  # whether the space holds its own image
    residual: Array  # norm
    stretch: Array  # largest `||A v||` of a basis vector


class _Restart(NamedTuple):
    x: Array
    residual: Array  # vector
    norm: Array
    last_norm: Array
    num_steps: Array
    num_restarts: Array
    stretch: Array
    condition: Array


def solve_gmres(
    operator: Operator,
    b: PyTree,
    *,
    key: Array | None = None,
    tol: float | Array | None = None,
    restart: int = 30,
    max_restarts: int | None = None,
) -> tuple[PyTree, SolveInfo]:
    """Restarted GMRES, for matrices that need not be symmetric.

    Stops when a restart reduces the residual by less than a tenth: a larger `restart` may help
    then, up to the number of unknowns, with which it ends in one. The new vectors are made
    orthogonal twice; the residual is the true one of the last restart.

    Args:
      operator: `A`.
      b: right-hand side.
      key: unused.
      tol: relative tolerance on the residual; None (default) for `eps ** (2/3)`.
      restart: most steps between restarts, one product each, at least 1; `[restart, P]` of memory.
      max_restarts: most restarts, at least 1; None (default) for as many as help.

    Returns:
      `(x, SolveInfo)`, with `min_curvature` None; `condition` is the ratio
      of the largest to the smallest diagonal entry of the triangular factor.

    Raises:
      ValueError: a setting out of its range.

    References:
      Saad and Schultz, "GMRES: a generalized minimal residual algorithm for solving nonsymmetric
      linear systems", 1986.
    """
    del key
    if restart < 1 or (max_restarts is not None and max_restarts < 1):
        raise ValueError(
            f"solve_gmres: restart={restart} and max_restarts={max_restarts} must be at least 1"
        )
    system = ravel_system(operator, b, tol)
    require_square(system, "solve_gmres")
    restart = max(1, min(restart, system.b.size))
    goal = system.tol * norm_of(system.b)

    def keep_going(state: _Restart) -> Array:
        helps = state.norm < _STAGNATION * state.last_norm
        allowed = True if max_restarts is None else state.num_restarts < max_restarts
        first = state.num_restarts == 0  # a product at least, of which NaN is told
        return first | ((state.norm > goal) & helps & allowed)

    def one_restart(state: _Restart) -> _Restart:
        change, end, condition = _cycle(system, state.residual, state.norm, goal, restart)
        x = state.x + change
        residual = system.b - system.matvec(x)
        norm = norm_of(residual)
        worse = norm >= state.norm
        return _Restart(
            x=jnp.where(worse, state.x, x),
            residual=jnp.where(worse, state.residual, residual),
            norm=jnp.where(worse, state.norm, norm),
            last_norm=state.norm,
            num_steps=state.num_steps + end.step,
            num_restarts=state.num_restarts + 1,
            stretch=jnp.maximum(state.stretch, end.stretch),
            condition=jnp.maximum(state.condition, condition),
        )

    norm = norm_of(system.b)
    start = _Restart(
        x=jnp.zeros_like(system.b),
        residual=system.b,
        norm=norm,
        last_norm=norm + jnp.inf,
        num_steps=jnp.zeros((), jnp.int32),
        num_restarts=jnp.zeros((), jnp.int32),
        stretch=jnp.zeros_like(norm),
        condition=jnp.ones_like(norm),
    )
    end = lax.while_loop(keep_going, one_restart, system.carry(start))
    relative = system.relative(end.residual)
    return system.report(end.x, relative, end.num_steps, condition=end.condition, norm=end.stretch)


def _cycle(
    system: System, residual: Array, norm: Array, goal: Array, restart: int
) -> tuple[Array, _Arnoldi, Array]:
    """What a Krylov space of at most `restart` vectors adds to `x`, and its condition number."""
    dtype = residual.dtype
    rows = jnp.arange(restart + 1)

    def keep_going(state: _Arnoldi) -> Array:
        return (state.step < restart) & (state.residual > goal) & ~state.invariant

    def step(state: _Arnoldi) -> _Arnoldi:
        k = state.step
        vector = system.matvec(state.basis[k])
        column = jnp.zeros(restart + 1, dtype)
        for _ in range(2):
            shares = dot(state.basis, vector)
            column, vector = column + shares, vector - dot(shares, state.basis)
        left = norm_of(vector)
        length = jnp.hypot(jnp.linalg.norm(column), left)
        invariant = left <= 10 * jnp.finfo(dtype).eps * length
        left = jnp.where(invariant, 0, left)
        column = dot(state.rotation, jnp.where(rows == k + 1, left, column))
        above, below = column[k], column[k + 1]
        diagonal = jnp.hypot(above, below)
        cosine = jnp.where(diagonal == 0, 1, above / jnp.where(diagonal == 0, 1, diagonal))
        sine = below / jnp.where(diagonal == 0, 1, diagonal)
        first, second = state.rotation[k], state.rotation[k + 1]
        rotation = state.rotation.at[k].set(cosine * first + sine * second)
        rotation = rotation.at[k + 1].set(cosine * second - sine * first)
        column = jnp.where(rows < k, column, jnp.where(rows == k, diagonal, 0))
        following = jnp.where(invariant, 0, vector / jnp.where(invariant, 1, left))
        return _Arnoldi(
            basis=state.basis.at[k + 1].set(following),
            rotation=rotation,
            triangle=state.triangle.at[:, k].set(column[:restart]),
            step=k + 1,
            invariant=invariant,
            residual=norm * jnp.abs(rotation[k + 1, 0]),
            stretch=jnp.maximum(state.stretch, length),
        )

    nonzero = norm > 0
    first = jnp.where(nonzero, residual / jnp.where(nonzero, norm, 1), 0)
    start = _Arnoldi(
        basis=jnp.zeros((restart + 1, residual.size), dtype).at[0].set(first),
        rotation=jnp.eye(restart + 1, dtype=dtype),
        triangle=jnp.eye(restart, dtype=dtype),
        step=jnp.zeros((), jnp.int32),
        invariant=jnp.zeros((), bool),
        residual=norm,
        stretch=jnp.zeros_like(norm),
    )
    end = lax.while_loop(keep_going, step, system.carry(start))
    diagonal = jnp.diagonal(end.triangle)
    # A vector that the matrix maps to nothing new has no share in the solution.
    nothing_new = diagonal <= 10 * jnp.finfo(dtype).eps * end.stretch
    triangle = end.triangle + jnp.diag(jnp.where(nothing_new, jnp.inf, 0))
    taken = rows[:restart] < end.step
    right = jnp.where(taken, norm * end.rotation[:restart, 0], 0)
    change = dot(solve_triangular(triangle, right), end.basis[:restart])
    most, least = (f(jnp.where(taken, diagonal, diagonal[0])) for f in (jnp.max, jnp.min))
    return change, end, jnp.where(least > 0, most / least, jnp.inf)
