"""Log-densities that Bayesian learners adapt particles to."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.special import gammaln

from imaml_jax.learners.base import FastPredicate, LossFn
from imaml_jax.types import Array, Params


class InitApply(NamedTuple):
    """A network as pure functions, as `imaml_jax.networks.Network`."""

    init: Callable[[Array, Any], Params]
    apply: Callable[..., Any]


class Posterior(NamedTuple):
    """What adaptation takes for the density of the parameters, given a batch.

    Attributes:
      log_density: `(params, outputs, targets) -> scalar`, up to a constant; `params` are the
        adapted ones, with None for the others. A sum over examples, not a mean.
      wrap: `network -> network`, with what the density has as parameters of its own.
      compared: which parameters of the wrapped network the chaser loss compares, by path.
    """

    log_density: Callable[[Params, Any, Any], Array]
    wrap: Callable[[Any], Any] = lambda network: network
    compared: FastPredicate = lambda path: True


class Precisions(NamedTuple):
    """A regressor's parameters together with those of its density.

    Attributes:
      params: the network's.
      log_noise_precision: log gamma, the inverse variance of the targets.
      log_weight_precision: log lambda, the inverse variance of the network's parameters.
    """

    params: Params
    log_noise_precision: Array
    log_weight_precision: Array


PosteriorName = Literal["learned_precisions", "likelihood"]


def posterior_of(name: PosteriorName) -> Posterior | None:
    """The posterior of that name; None for the learners' default, the likelihood of their loss."""
    return learned_precisions() if name == "learned_precisions" else None


def likelihood(loss_fn: LossFn, *, prior_precision: float = 0.0) -> Posterior:
    """`log p = -n L(outputs, targets) - prior_precision/2 ||params||^2`, with `n` examples.

    The cross-entropy's is the categorical likelihood, the mean squared error's that of Gaussians of
    variance `d/2`, with `d` the entries of a target.

    Args:
      loss_fn: `(outputs, targets) -> scalar`, a mean over examples.
      prior_precision: inverse variance of a Gaussian prior around 0; 0 for a flat one.

    Returns:
      The `Posterior`.

    Raises:
      ValueError: a negative precision.
    """
    if not 0 <= prior_precision < math.inf:
        raise ValueError(
            f"likelihood: prior_precision={prior_precision} must be at least 0 and finite"
        )

    def log_density(params, outputs, targets):
        data = -targets.shape[0] * loss_fn(outputs, targets)
        if not prior_precision:
            return data
        return data - 0.5 * prior_precision * optax.tree.norm(params, squared=True)

    return Posterior(log_density)


def learned_precisions(
    *,
    noise_precision: float = 100.0,
    weight_precision: float = 1.0,
    noise_prior: tuple[float, float] = (2.0, 0.2),
    weight_prior: tuple[float, float] = (2.0, 2.0),
) -> Posterior:
    """Regression with the precisions of noise and weights among the parameters, as in BMAML.

    `log p = log N(targets; outputs, 1/gamma) + log N(params; 0, 1/lambda)
    + log Gamma(gamma; a, b) + log Gamma(lambda; a', b')`, the last two as densities of the
    logarithms. Parameters are a `Precisions`, so that paths begin with "params/"; a `fast`
    predicate must be true for the precisions.

    Args:
      noise_precision: gamma at initialisation.
      weight_precision: lambda at initialisation.
      noise_prior: shape `a` and rate `b` of gamma's prior.
      weight_prior: those of lambda's.

    Returns:
      The `Posterior`; the chaser loss does not compare the precisions.

    Raises:
      ValueError: a value that is not positive, or a prior that is no pair.

    References:
      github.com/jsikyoon/bmaml, whose constants are the defaults.
    """
    named = dict(noise_precision=noise_precision, weight_precision=weight_precision)
    for name, value in named.items():
        if not 0 < value < math.inf:
            raise ValueError(f"learned_precisions: {name}={value} must be positive and finite")
    for name, pair in (("noise_prior", noise_prior), ("weight_prior", weight_prior)):
        if np.shape(pair) != (2,) or not all(0 < number < math.inf for number in pair):
            raise ValueError(
                f"learned_precisions: {name}={pair} must be a shape and a rate, both positive and "
                "finite"
            )

    def wrap(network):
        def init(key, example_inputs):
            params = network.init(key, example_inputs)
            dtype = jnp.result_type(*jax.tree.leaves(params))
            initial = (jnp.asarray(math.log(value), dtype) for value in named.values())
            return Precisions(params, *initial)

        return InitApply(init, lambda p, *args, **kwargs: network.apply(p.params, *args, **kwargs))

    def log_density(params, outputs, targets):
        log_gamma, log_lambda = params.log_noise_precision, params.log_weight_precision
        if log_gamma is None or log_lambda is None:
            raise ValueError(
                "learned_precisions: fast must be true for the paths log_noise_precision and "
                "log_weight_precision"
            )
        if outputs.shape != targets.shape:
            raise ValueError(
                "learned_precisions: outputs and targets must have one shape; got "
                f"{outputs.shape} and {targets.shape}"
            )
        weights = jax.tree.leaves(params.params)
        return (
            log_normal(targets - outputs, log_gamma)
            + sum(log_normal(weight, log_lambda) for weight in weights)
            + log_gamma_of_log(log_gamma, *noise_prior)
            + log_gamma_of_log(log_lambda, *weight_prior)
        )

    return Posterior(log_density, wrap, lambda path: path.startswith("params"))


def log_normal(x: Array, log_precision: Array) -> Array:
    """Log-density at the array `x` of independent `N(0, exp(-log_precision))`."""
    square = jnp.sum(jnp.square(x))
    return 0.5 * (
        x.size * (log_precision - math.log(2 * math.pi)) - jnp.exp(log_precision) * square
    )


def log_gamma_of_log(log_x: Array, shape: float, rate: float) -> Array:
    """Log-density of `log x` where `x` is Gamma(shape, rate): `log p(x) + log x`."""
    constant = shape * math.log(rate) - gammaln(shape)
    return constant + shape * log_x - rate * jnp.exp(log_x)
