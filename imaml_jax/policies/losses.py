"""Losses of a policy on experience: surrogates of the expected return, and a weighted regression.

All are means over the steps taken, and take the advantages as given.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from imaml_jax.policies.policy import Policy
from imaml_jax.policies.returns import Experience
from imaml_jax.policies.trajectories import Trajectories, masked_mean
from imaml_jax.types import Array, Params

Estimator = Literal["naive", "lvc", "loaded_dice", "emaml"]


def distributions(policy: Policy, params: Params, trajectories: Trajectories):
    """The policy's distributions at every observation, `[T n, ...]`."""
    observations = trajectories.observations
    return policy.apply(params, observations.reshape(-1, *observations.shape[2:]))


def log_probs(policy: Policy, params: Params, trajectories: Trajectories) -> Array:
    """Those of the actions taken, `[T, n]`."""
    return _log_probs(policy, distributions(policy, params, trajectories), trajectories)


def surrogate_loss(
    policy: Policy, estimator: Estimator, params: Params, experience: Experience
) -> Array:
    """Minus a surrogate of the expected return, whose gradient is the policy gradient.

    With `w_t` the ratio of `pi(a_t|s_t)` to its value under the policy that acted, and `w_{<=t}`
    that of the first `t` actions together, a step adds `A_t log pi` ("naive"), `A_t w_t` ("lvc") or
    `A_t (w_{<=t} - w_{<t})` ("loaded_dice"). At the policy that acted their gradients agree; the
    Hessian of the last is unbiased for that of the expected return.

    Args:
      policy: the policy.
      estimator: as above; "emaml" is "naive".
      params: the policy's parameters.
      experience: of one task.

    Returns:
      A scalar.
    """
    outputs = distributions(policy, params, experience.trajectories)
    return outputs_loss(policy, estimator, outputs, experience)


def outputs_loss(
    policy: Policy, estimator: Estimator, outputs: Any, experience: Experience
) -> Array:
    """`surrogate_loss` of the policy's distributions, as `distributions` gives them."""
    trajectories, advantages, _ = experience
    found = _log_probs(policy, outputs, trajectories)
    if estimator in ("naive", "emaml"):
        gains = found
    else:
        log_ratios = jnp.where(trajectories.mask > 0, found - trajectories.log_probs, 0)
        gains = jnp.exp(log_ratios)
        if estimator == "loaded_dice":
            up_to = jnp.exp(jnp.cumsum(log_ratios, axis=0))
            gains = up_to - jnp.concatenate([jnp.ones_like(up_to[:1]), up_to[:-1]])
    return -masked_mean(gains * advantages, trajectories.mask)


def weighted_regression(
    policy: Policy, temperature: float, params: Params, experience: Experience
) -> Array:
    """`-sum w log pi` with `w = softmax(A / temperature)` over the steps taken: no weight below 0.

    Args:
      policy: the policy.
      temperature: the lower, the more the best actions count.
      params: the policy's parameters.
      experience: of one task.

    Returns:
      A scalar.
    """
    trajectories, advantages, _ = experience
    logits = jnp.where(trajectories.mask > 0, advantages / temperature, -jnp.inf)
    weights = jax.nn.softmax(logits.reshape(-1)).reshape(logits.shape)
    return -jnp.sum(weights * log_probs(policy, params, trajectories))


def _log_probs(policy: Policy, outputs: Any, trajectories: Trajectories) -> Array:
    actions, mask = trajectories.actions, trajectories.mask
    found = policy.log_prob(outputs, actions.reshape(-1, *actions.shape[2:]))
    return jnp.where(mask > 0, found.reshape(mask.shape), 0)
