"""Jacobi's preconditioner: the diagonal of the matrix, given or estimated from products."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from imaml_jax.bilevel.linear_system import (
    as_operator,
    broadcast_to_leaves,
    random_products,
    ravel,
    raveled_damping,
)
from imaml_jax.types import Array, Operator, PyTree


def jacobi_preconditioner(
    operator: Operator,
    b: PyTree,
    key: Array | None = None,
    *,
    diagonal: PyTree | None = None,
    num_probes: int = 10,
) -> Callable[[Array], Array]:
    """`r -> r / d` with the diagonal `d` of the matrix, or what stands in for it.

    For `solve_cg_steihaug(..., precondition=partial(jacobi_preconditioner, diagonal=d))`: saves
    steps where the parameters have scales of their own. `d` may be the square root of Adam's second
    moment. Entries that are not positive are replaced by the smallest that is.

    Args:
      operator: `A`.
      b: right-hand side; only its structure matters.
      key: of the probes; default a fixed one.
      diagonal: `d`, a scalar or a tree prefix of the parameters whose leaves broadcast to theirs;
        None (default) to estimate it, see `estimate_diagonal`.
      num_probes: of the estimate, at least 1.

    Returns:
      `r -> r / d` for raveled vectors.

    Raises:
      ValueError: fewer than one probe.
    """
    if diagonal is None:
        diagonal = estimate_diagonal(operator, b, key, num_probes=num_probes)
    flat = ravel(broadcast_to_leaves(diagonal, b))[0]
    smallest = jnp.min(jnp.where(flat > 0, flat, jnp.inf), initial=jnp.inf)
    smallest = jnp.where(smallest < jnp.inf, smallest, 1)
    safe = jnp.where(flat <= 0, smallest, flat)  # NaN stays, so that the solve tells
    return lambda r: r / safe


def estimate_diagonal(
    operator: Operator, b: PyTree, key: Array | None = None, *, num_probes: int = 10
) -> PyTree:
    """The diagonal of `A` from products with orthonormal random directions `q`.

    `d = sum_q (q * A q) / sum_q (q * q)`, and no less than what `damped` added: `A` without it
    should be positive semi-definite. Exact for a diagonal matrix, and where there are as many
    probes as unknowns; else the error of an entry falls with the root of their number and grows
    with the other entries of its row. Where these outweigh the diagonal, a preconditioner made of
    it costs steps.

    Args:
      operator: `A`.
      b: anything shaped like the parameters; only its structure matters.
      key: of the probes; default a fixed one.
      num_probes: at least 1; as many products, taken at once, and `[P, num_probes]` of memory.

    Returns:
      `d`, shaped like `b`.

    Raises:
      ValueError: fewer than one probe.

    References:
      Bekas, Kokiopoulou, Saad, "An estimator for the diagonal of a matrix", 2007.
    """
    if num_probes < 1:
        raise ValueError(f"estimate_diagonal: num_probes={num_probes} must be at least 1")
    operator, b = as_operator(operator, b)
    basis, image = random_products(operator, b, key, num_probes, jax.random.rademacher)
    estimate = (basis * image).sum(1) / (basis**2).sum(1)
    return ravel(b)[1](jnp.maximum(estimate, raveled_damping(operator, b)))
