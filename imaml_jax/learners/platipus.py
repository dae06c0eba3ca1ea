"""PLATIPUS: probabilistic MAML, which adapts samples of the initialisation."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from imaml_jax.learners.algorithm import SampleSettings
from imaml_jax.learners.base import (
    AverageOption,
    FastPredicate,
    LossFn,
    MetaInfo,
    Statistics,
    combine,
    fitting_average,
)
from imaml_jax.learners.maml import maml
from imaml_jax.learners.settings import Count, NotNegative, Positive, check_arguments
from imaml_jax.learners.supervised import supervised
from imaml_jax.types import Array, MetaLearner, Params, PyTree


class PlatipusParams(NamedTuple):
    """Meta-parameters of PLATIPUS; the distributions are diagonal Gaussians over the fast ones.

    Attributes:
      mean: mu, the network's parameters.
      log_prior_variance: log sigma^2, shaped like the adapted parameters.
      log_posterior_variance: log v_q, likewise.
      log_prior_rate: log gamma_p, a scalar.
      log_posterior_rate: log gamma_q, a scalar.
    """

    mean: Params
    log_prior_variance: PyTree
    log_posterior_variance: PyTree
    log_prior_rate: Array
    log_posterior_rate: Array


class Gaussian(NamedTuple):
    """A diagonal Gaussian over a pytree: its mean and the logarithm of its variance."""

    mean: PyTree
    log_variance: PyTree


def platipus(
    network: Any,
    loss_fn: LossFn,
    *,
    inner: optax.GradientTransformation,
    num_steps: int,
    eval_num_steps: int | None = None,
    num_samples: int = 2,
    eval_num_samples: int = 10,
    kl_weight: float = 1e-2,
    prior_rate: float = 0.01,
    posterior_rate: float = 0.01,
    prior_variance: float = 1e-3,
    posterior_variance: float = 1e-3,
    average: AverageOption = "auto",
    adaptation: Callable[..., MetaLearner] = maml,
    fast: FastPredicate | None = None,
    statistics: Statistics = "batch",
) -> MetaLearner:
    """MAML with a learned distribution of the initialisation: samples of it are adapted.

    In training the initialisations come from a posterior that sees the query set, which a prior
    that sees the support set only is drawn towards; at test they come from that prior::

        q = N(mu - gamma_q grad L^query(mu), v_q),  p = N(mu - gamma_p grad L^support(mu), sigma^2)
        loss = E_{theta ~ q} L^query(U(theta, support)) + kl_weight KL(q || p)

    The samples are reparameterised, and every second-order term is kept: those of `U`, and those of
    the two gradients at `mu`. The KL divergence is summed over the adapted parameters, while `L` is
    a mean over examples. Variances and rates are learned by their logarithms, see `PlatipusParams`.
    The key decides the samples.

    Args:
      network: `(init, apply)` pair, see `imaml_jax.networks.Network`.
      loss_fn: `(outputs, targets) -> scalar`, a mean over examples.
      inner: Optax transform of the inner loop.
      num_steps: inner steps in training.
      eval_num_steps: inner steps in `adapt`; default `num_steps`.
      num_samples: initialisations of a task in training.
      eval_num_samples: initialisations in `adapt`.
      kl_weight: of the summed KL divergence, at least 0.
      prior_rate: initial gamma_p, positive.
      posterior_rate: initial gamma_q, positive.
      prior_variance: initial sigma^2 of every parameter.
      posterior_variance: initial v_q of every parameter.
      average: the one prediction, `outputs [samples, n, ...] -> [n, ...]`; "auto" for
        `mixture_logits` with `cross_entropy` and `mean_outputs` with `mean_squared_error`. None
        makes `predict` return all samples' outputs.
      adaptation: `U`, a factory with the signature of `maml`, whose meta-parameters are the
        network's and whose `meta_grad` is a gradient, as `reptile`'s is not: `fomaml`, or
        `partial(imaml, reg_strength=2.0)` for the implicit variant, where
        `U(theta) = argmin_phi L^support(phi) + lambda/2 ||phi - theta||^2`; watch what it reports.
      fast: which parameters are adapted and random, by path; default all.
      statistics: batch-norm mode of the query examples, see `learners.supervised.supervised`.

    Returns:
      The `MetaLearner`. `adapted` holds the adapted parameters stacked `[samples, ...]`. In `info`,
      losses and residuals are means over samples, `min_curvature` is the smallest.

    Raises:
      ValueError: a setting out of its range.

    References:
      Finn, Xu, Levine, "Probabilistic Model-Agnostic Meta-Learning", NeurIPS 2018, Algorithms 1
      and 2.
    """
    check_arguments("platipus", PlatipusSettings, locals())
    one_prediction = lambda outputs: outputs  # noqa: E731
    if average is not None:
        one_prediction = fitting_average("platipus", average, loss_fn)
    problem = supervised(network, loss_fn, fast=fast, statistics=statistics)
    learner = adaptation(
        network,
        loss_fn,
        inner=inner,
        num_steps=num_steps,
        eval_num_steps=eval_num_steps,
        fast=fast,
        statistics=statistics,
    )

    def init(key, example_inputs):
        mean = problem.init(key, example_inputs)
        start = jax.eval_shape(learner.init, key, example_inputs)
        if jax.tree.structure(start) != jax.tree.structure(mean):
            raise ValueError(
                f"platipus: the meta-parameters of adaptation={adaptation} must be the network's; "
                "turn off what else it learns"
            )
        anchor, _ = problem.split(mean)
        dtype = jnp.result_type(*jax.tree.leaves(anchor))
        return PlatipusParams(
            mean,
            optax.tree.full_like(anchor, math.log(prior_variance)),
            optax.tree.full_like(anchor, math.log(posterior_variance)),
            jnp.asarray(math.log(prior_rate), dtype),
            jnp.asarray(math.log(posterior_rate), dtype),
        )

    def stepped(mean, log_rate, log_variance, loss):
        """`N(mu - rate grad loss(mu), variance)`, by the logarithms of rate and variance."""
        anchor, slow = problem.split(mean)
        step = jax.grad(loss)(anchor, slow)
        return Gaussian(optax.tree.add_scale(anchor, -jnp.exp(log_rate), step), log_variance)

    def prior_given(params, support):
        def loss(anchor, slow):
            return problem.support_loss(anchor, slow, support)

        return stepped(params.mean, params.log_prior_rate, params.log_prior_variance, loss)

    def posterior_given(params, task):
        def loss(anchor, slow):
            return problem.query_loss(anchor, slow, task)[0]

        return stepped(params.mean, params.log_posterior_rate, params.log_posterior_variance, loss)

    def draw(gaussian, mean, key, num):
        """Initialisations `[num, ...]`, as the network's parameters."""
        _, slow = problem.split(mean)
        keys = jax.random.split(key, num)
        return jax.vmap(lambda key: combine(_sample(gaussian, key), slow))(keys)

    def adapt(meta_params, support, key):
        draw_key, key = jax.random.split(key)
        prior = prior_given(meta_params, support)
        inits = draw(prior, meta_params.mean, draw_key, eval_num_samples)
        keys = jax.random.split(key, eval_num_samples)
        adapted, info = jax.vmap(learner.adapt, (0, None, 0))(inits, support, keys)
        return adapted, _over_samples(info)

    def predict(adapted, inputs):
        outputs = jax.vmap(learner.predict, (0, None))(adapted, inputs)
        return one_prediction(outputs)

    def meta_grad(meta_params, task, key, step):
        draw_key, key = jax.random.split(key)

        def inits_and_kl(meta_params):
            posterior = posterior_given(meta_params, task)
            kl = kl_divergence(posterior, prior_given(meta_params, task.support))
            return draw(posterior, meta_params.mean, draw_key, num_samples), kl

        (inits, kl), pullback = jax.vjp(inits_and_kl, meta_params)
        keys = jax.random.split(key, num_samples)
        grads, info = jax.vmap(learner.meta_grad, (0, None, 0, None))(inits, task, keys, step)
        cotangent = optax.tree.scale(1 / num_samples, grads), jnp.full_like(kl, kl_weight)
        (grads,) = pullback(cotangent)
        info = _over_samples(info)
        meta_loss = jnp.asarray(info.query_loss) + kl_weight * kl
        return grads, info._replace(kl_divergence=kl, meta_loss=meta_loss)

    return MetaLearner(init, adapt, predict, meta_grad)


def kl_divergence(q: Gaussian, p: Gaussian) -> Array:
    """`KL(q || p)` of two diagonal Gaussians over one pytree, summed over its entries."""

    def summed(q_mean, q_log_variance, p_mean, p_log_variance):
        log_ratio = q_log_variance - p_log_variance
        distance = jnp.square(q_mean - p_mean) * jnp.exp(-p_log_variance)
        return 0.5 * jnp.sum(jnp.expm1(log_ratio) - log_ratio + distance)

    terms = jax.tree.map(summed, q.mean, q.log_variance, p.mean, p.log_variance)
    return jnp.asarray(optax.tree.sum(terms))


def _sample(gaussian: Gaussian, key: Array) -> PyTree:
    noise = optax.tree.random_like(key, gaussian.mean)
    return jax.tree.map(
        lambda m, log_v, e: m + jnp.exp(0.5 * log_v) * e,
        gaussian.mean,
        gaussian.log_variance,
        noise,
    )


def _over_samples(infos: MetaInfo) -> MetaInfo:
    means = jax.tree.map(lambda x: x.mean(0), infos)
    worst = jax.tree.map(lambda x: x.min(0), infos.min_curvature)
    return means._replace(min_curvature=worst)


@dataclasses.dataclass(frozen=True)
class PlatipusSettings(SampleSettings):
    """Settings of `platipus`."""

    algorithm: ClassVar[str] = "platipus"
    title: ClassVar[str] = "PLATIPUS"
    factory: ClassVar = staticmethod(platipus)

    num_samples: Count = 2
    """Samples of the initialisation in training."""
    eval_num_samples: Count = 10
    """Samples at validation and test."""
    kl_weight: NotNegative = 1e-2
    """Weight of the divergence of the training samples' distribution from the prior."""
    prior_rate: Positive = 0.01
    """Initial gamma_p."""
    posterior_rate: Positive = 0.01
    """Initial gamma_q."""
    prior_variance: Positive = 1e-3
    """Initial sigma^2 of every parameter."""
    posterior_variance: Positive = 1e-3
    """Initial v_q of every parameter."""

    def before_adaptation(self, meta_params: PyTree) -> PyTree:
        """The mean, as the only sample."""
        return jax.tree.map(lambda x: x[None], meta_params.mean)
