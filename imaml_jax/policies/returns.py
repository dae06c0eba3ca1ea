"""Returns and advantages of trajectories."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from imaml_jax.learners.settings import Share, check_value
from imaml_jax.policies.trajectories import Trajectories, masked_mean
from imaml_jax.types import Array

_RIDGE = 1e-5


class Experience(NamedTuple):
    """Trajectories of one policy in one task, with their advantages.

    Attributes:
      trajectories: `[T, n, ...]`.
      advantages: `[T, n]`.
      scale: scalar that the advantages were multiplied by, 1 unless standardised.
    """

    trajectories: Trajectories
    advantages: Array
    scale: Array


def discounted_sums(values: Array, factor: float | Array) -> Array:
    """`y_t = x_t + factor y_{t+1}` along the first axis.

    Args:
      values: `[T, ...]`.
      factor: a scalar, such as the discount.

    Returns:
      `[T, ...]`.
    """

    def step(following, value):
        total = value + factor * following
        return total, total

    return lax.scan(step, jnp.zeros_like(values[0]), values, reverse=True)[1]


def generalised_advantages(
    rewards: Array, values: Array, mask: Array, *, discount: float, gae_lambda: float
) -> Array:
    """Generalised advantage estimates, `A_t = sum_k (gamma lambda)^k delta_{t+k}`.

    `delta_t = r_t + gamma V_{t+1} - V_t`, where V is 0 once the trajectory has ended, be it at the
    horizon. With `gae_lambda=1` that is the discounted return minus V.

    Args:
      rewards: `[T, n]`.
      values: `[T, n]`, the baseline V.
      mask: `[T, n]`.
      discount: gamma.
      gae_lambda: lambda.

    Returns:
      `[T, n]`, 0 where the mask is.

    References:
      Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage Estimation",
      ICLR 2016, Eq. 16.
    """
    taken = mask > 0
    rewards, values = jnp.where(taken, rewards, 0), jnp.where(taken, values, 0)
    following = jnp.concatenate([values[1:], jnp.zeros_like(values[:1])])
    return discounted_sums(rewards + discount * following - values, discount * gae_lambda)


def fit_linear_baseline(trajectories: Trajectories, *, discount: float) -> Array:
    """Predicts discounted returns by ridge regression on the very trajectories.

    The features are the observation, clipped to [-10, 10], its square, the time in hundreds of
    steps, its square and cube, and 1; the ridge is 1e-5. In-sample: its prediction depends on the
    actions that it is a baseline of, a bias that vanishes with many trajectories.

    Args:
      trajectories: of one task, with observations `[T, n, d]`.
      discount: gamma.

    Returns:
      `[T, n]`, the predictions.

    References:
      Duan et al., "Benchmarking Deep Reinforcement Learning for Continuous Control", ICML 2016.
    """
    taken = trajectories.mask > 0
    returns = discounted_sums(jnp.where(taken, trajectories.rewards, 0), discount)
    observations = jnp.clip(trajectories.observations, -10, 10)
    horizon, num_trajectories, _ = observations.shape
    time = jnp.arange(horizon, dtype=observations.dtype)[:, None] / 100
    clock = jnp.stack([time, time**2, time**3, jnp.ones_like(time)], axis=-1)
    clock = jnp.broadcast_to(clock, (horizon, num_trajectories, 4))
    features = jnp.concatenate([observations, observations**2, clock], axis=-1)
    rows = jnp.where(taken[..., None], features, 0).reshape(-1, features.shape[-1])
    # Least squares with rows for the ridge: the normal equations would square the condition.
    ridge = jnp.sqrt(_RIDGE) * jnp.eye(rows.shape[1], dtype=rows.dtype)
    q, r = jnp.linalg.qr(jnp.concatenate([rows, ridge]))
    targets = jnp.where(taken, returns, 0).reshape(-1)
    product = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    weights = jax.scipy.linalg.solve_triangular(r, product(q[: targets.size].T, targets))
    return product(features, weights)


def estimate_advantages(
    trajectories: Trajectories,
    *,
    discount: float = 0.99,
    gae_lambda: float = 1.0,
    linear_baseline: bool = True,
    standardise: bool = True,
) -> Experience:
    """The advantages of one task's trajectories, by default as in MAML's experiments.

    Args:
      trajectories: of one task.
      discount: gamma.
      gae_lambda: lambda of `generalised_advantages`.
      linear_baseline: subtract the prediction of `fit_linear_baseline`; else nothing.
      standardise: shift and scale to mean 0 and standard deviation 1 over the steps taken.

    Returns:
      The `Experience`.

    Raises:
      ValueError: a discount or lambda outside [0, 1].
    """
    check_value("discount", discount, Share, "estimate_advantages: ")
    check_value("gae_lambda", gae_lambda, Share, "estimate_advantages: ")
    rewards, mask = trajectories.rewards, trajectories.mask
    values = jnp.zeros_like(rewards)
    if linear_baseline:
        values = fit_linear_baseline(trajectories, discount=discount)
    advantages = generalised_advantages(
        rewards, values, mask, discount=discount, gae_lambda=gae_lambda
    )
    if not standardise:
        return Experience(trajectories, advantages, jnp.ones((), advantages.dtype))
    mean = masked_mean(advantages, mask)
    scale = 1 / (jnp.sqrt(masked_mean(jnp.square(advantages - mean), mask)) + 1e-8)
    return Experience(trajectories, jnp.where(mask > 0, (advantages - mean) * scale, 0), scale)
