"""Stochastic policies: a network, and the distribution of actions that its outputs stand for."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from imaml_jax.types import Array, Params


class Policy(NamedTuple):
    """A policy as pure functions; a distribution is a pytree of arrays `[n, ...]`.

    Attributes:
      init: `(key, observations [n, ...]) -> params`.
      apply: `(params, observations [n, ...]) -> distribution`.
      sample: `(distribution, key) -> actions [n, ...]`.
      log_prob: `(distribution, actions) -> [n]`.
      kl: `(distribution, other) -> [n]`, the divergence of `other` from `distribution`.
    """

    init: Callable[[Array, Array], Params]
    apply: Callable[[Params, Array], Any]
    sample: Callable[[Any, Array], Array]
    log_prob: Callable[[Any, Array], Array]
    kl: Callable[[Any, Any], Array]


class Gaussian(NamedTuple):
    """Independent normal actions: `mean` and `log_std`, both `[n, d]`."""

    mean: Array
    log_std: Array


class GaussianParams(NamedTuple):
    """The network's parameters, and `log_std [d]`, which does not depend on the state."""

    network: Params
    log_std: Array


def gaussian_policy(network: Any, *, init_log_std: float = 0.0) -> Policy:
    """Normal actions of `d` entries, whose standard deviation is a parameter like any other.

    Args:
      network: `(init, apply)` pair of outputs `[n, d]`, the means.
      init_log_std: where its logarithm starts; at 0 the deviation is 1.

    Returns:
      The `Policy`; its parameters are `GaussianParams`, its distributions `Gaussian`.
    """

    def init(key, observations):
        params = network.init(key, observations)
        means = jax.eval_shape(network.apply, params, observations)
        return GaussianParams(params, jnp.full(means.shape[1:], init_log_std, means.dtype))

    def apply(params, observations):
        mean = network.apply(params.network, observations)
        return Gaussian(mean, jnp.broadcast_to(params.log_std[None], mean.shape))

    def sample(distribution, key):
        mean, log_std = distribution
        return mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape, mean.dtype)

    def log_prob(distribution, actions):
        mean, log_std = distribution
        squares = jnp.square((actions - mean) * jnp.exp(-log_std))
        return -0.5 * jnp.sum(squares + 2 * log_std + jnp.log(2 * jnp.pi), axis=-1)

    def kl(distribution, other):
        mean, log_std = distribution
        squares = jnp.square(jnp.exp(log_std)) + jnp.square(mean - other.mean)
        scaled = squares * jnp.exp(-2 * other.log_std)
        return jnp.sum(other.log_std - log_std + 0.5 * scaled - 0.5, axis=-1)

    return Policy(init, apply, sample, log_prob, kl)


def categorical_policy(network: Any) -> Policy:
    """One of `k` actions, by the softmax of the network's outputs.

    Args:
      network: `(init, apply)` pair of outputs `[n, k]`, the logits.

    Returns:
      The `Policy`; its parameters are the network's, its distributions normalised log-probabilities
      `[n, k]`, its actions int32 `[n]`.
    """

    def apply(params, observations):
        return jax.nn.log_softmax(network.apply(params, observations))

    def sample(distribution, key):
        return jax.random.categorical(key, distribution)

    def log_prob(distribution, actions):
        return jnp.take_along_axis(distribution, actions[:, None], axis=-1)[:, 0]

    def kl(distribution, other):
        return jnp.sum(jnp.exp(distribution) * (distribution - other), axis=-1)

    return Policy(network.init, apply, sample, log_prob, kl)
