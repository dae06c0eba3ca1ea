"""Stein variational gradient descent: particles that move towards samples of a density.

References:
  Liu and Wang, "Stein Variational Gradient Descent", NeurIPS 2016, Algorithm 1.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NoReturn, get_args

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.core import Tracer
from jax.flatten_util import ravel_pytree

from imaml_jax.bilevel.linear_system import dot
from imaml_jax.types import Array, PyTree

Kernel = Literal["exact", "official"]


def svgd_direction(
    scores: PyTree,
    particles: PyTree,
    *,
    bandwidth: float | Array | None = None,
    kernel: Kernel = "exact",
) -> PyTree:
    """The direction in which SVGD moves particles.

    `phi_i = 1/M sum_j [k_ij grad log p(x_j) + grad_{x_j} k_ij]` with the kernel
    `k_ij = exp(-||x_i - x_j||^2 / h)`, distances over all leaves together. One particle's direction
    is `grad log p`, whatever `h`.

    Args:
      scores: `grad log p` of each particle, shaped like `particles`.
      particles: tree of arrays `[M, ...]`.
      bandwidth: `h`, positive; None for `median_bandwidth`, whose derivative is taken as zero.
      kernel: "exact", or "official": BMAML's published code, which has half the repulsion
        `grad_{x_j} k_ij`, and a bandwidth of its own.

    Returns:
      Shaped like `particles`.

    Raises:
      ValueError: a bandwidth that is not positive, none for one particle, or an unknown kernel.

    Example:
      >>> import jax.numpy as jnp
      >>> from imaml_jax.learners.svgd import svgd_direction
      >>> print(svgd_direction(jnp.zeros(2), jnp.array([-1.0, 1.0]), bandwidth=4.0))  # they part
      [-0.18393971  0.18393971]
    """
    check_kernel("svgd_direction", _number(particles), bandwidth, kernel)
    x, unravel = _ravel(particles)
    if bandwidth is None:
        bandwidth = lax.stop_gradient(median_bandwidth(particles, kernel=kernel))
    k = jnp.exp(-_squared_distances(x) / bandwidth)
    centred = _centred(x)
    repulsion = (k.sum(1, keepdims=True) * centred - dot(k, centred)) / bandwidth
    factor = 1 if kernel == "official" else 2
    return unravel((dot(k, _ravel(scores)[0]) + factor * repulsion) / x.shape[0])


def median_bandwidth(particles: PyTree, *, kernel: Kernel = "exact") -> Array:
    """`h = median ||x_i - x_j||^2 / log M`, with which a particle counts as much as all others.

    Args:
      particles: tree of arrays `[M, ...]`, two or more.
      kernel: "exact" takes the median over pairs; "official" over all `M^2`, zeros included.

    Returns:
      `h`; 1 where it would be 0, as for particles that coincide.

    Raises:
      ValueError: one particle, or an unknown kernel.
    """
    number = _number(particles)
    check_kernel("median_bandwidth", number, None, kernel)
    squares = _squared_distances(_ravel(particles)[0])
    if kernel == "exact":
        squares = squares[jnp.triu_indices(number, 1)]
    h = jnp.median(squares) / math.log(number)
    return jnp.where(h > 0, h, 1)


def svgd_objective(
    log_densities: Callable[..., Array],
    *,
    bandwidth: float | None = None,
    kernel: Kernel = "exact",
) -> Callable[..., Array]:
    """SVGD as an objective for `minimize`: its gradient in the particles is minus the direction.

    There is no such function, but gradient-based transforms never ask for it. Those that do, such
    as line searches, cannot serve; `by_gradients` refuses them.

    Args:
      log_densities: `(particles, *args) -> [M]`, entry `m` a function of particle `m` alone.
      bandwidth: see `svgd_direction`.
      kernel: see `svgd_direction`.

    Returns:
      `(particles, *args) -> -mean log-density`. Its derivative in `args` is zero by definition;
      the direction's is exact, but for the median bandwidth's.
    """

    @jax.custom_jvp
    def objective(particles, *args):
        return -log_densities(particles, *args).mean()

    @objective.defjvp
    def rule(primals, tangents):
        particles, *args = primals
        values, pullback = jax.vjp(lambda p: log_densities(p, *args), particles)
        (scores,) = pullback(jnp.ones_like(values))
        direction = svgd_direction(scores, particles, bandwidth=bandwidth, kernel=kernel)
        return -values.mean(), -jnp.asarray(optax.tree.vdot(direction, tangents[0]))

    return objective


def by_gradients(name: str, tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """The transform, which raises ValueError where it asks for a function to evaluate."""
    update = optax.with_extra_args_support(tx).update

    def refuse(params: PyTree) -> NoReturn:
        del params
        raise ValueError(
            f"{name}: inner and leader must need gradients alone, as SVGD descends no function "
            "that newton_cg or a line search could evaluate; use optax.sgd or optax.adam"
        )

    def refusing_update(updates: PyTree, state: Any, params: Any = None, **extra: Any) -> Any:
        return update(updates, state, params, **(extra | {"value_fn": refuse}))

    return optax.GradientTransformationExtraArgs(tx.init, refusing_update)


def check_kernel(name: str, number: int, bandwidth: float | Array | None, kernel: str) -> None:
    """Raises ValueError where the kernel of `number` particles is not defined."""
    if kernel not in get_args(Kernel):
        raise ValueError(f"{name}: kernel={kernel!r} must be one of {get_args(Kernel)}")
    if bandwidth is None and number == 1:
        raise ValueError(
            f"{name}: the median kernel needs distances, and one particle has none: give more "
            "particles, or a bandwidth, such as bandwidth=1.0, with which SVGD is gradient ascent"
        )
    if (
        bandwidth is not None
        and not isinstance(bandwidth, Tracer)
        and not (jnp.finfo(jnp.float32).tiny <= bandwidth < math.inf)
    ):
        raise ValueError(
            f"{name}: bandwidth={bandwidth} must be positive, at least float32's smallest normal "
            "number, and finite, or None for the median"
        )


def _number(particles: PyTree) -> int:
    return jax.tree.leaves(particles)[0].shape[0]


def _ravel(particles: PyTree) -> tuple[Array, Callable[[Array], PyTree]]:
    """`[M, P]`, and back."""
    unravel = ravel_pytree(jax.tree.map(lambda p: p[0], particles))[1]
    return jax.vmap(lambda p: ravel_pytree(p)[0])(particles), jax.vmap(unravel)


@jax.custom_jvp
def _squared_distances(x: Array) -> Array:
    """By differences: particles that coincide are at distance 0 exactly."""
    return jnp.square(x[:, None] - x[None]).sum(-1)


@_squared_distances.defjvp
def _squared_distances_rule(primals, tangents):
    """By matrix products, which are several times faster than differences in reverse mode."""
    (x,), (dx,) = primals, tangents
    products = dot(_centred(x), dx.T)
    own = jnp.diagonal(products)
    both = own[:, None] + own[None]
    return _squared_distances(x), 2 * (both - products - products.T)


def _centred(x: Array) -> Array:
    return x - x.mean(0, keepdims=True)
