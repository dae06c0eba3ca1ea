"""Rollouts of a policy in an environment, on the device."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from imaml_jax.learners.settings import Count, check_value
from imaml_jax.policies.policy import Policy
from imaml_jax.types import Array, Environment, Params, PyTree


class Trajectories(NamedTuple):
    """What a policy did and what came of it, time first; `n` trajectories of at most `T` steps.

    Attributes:
      observations: `[T, n, ...]`, what the policy saw before it acted.
      actions: `[T, n, ...]`.
      log_probs: `[T, n]`, of the actions under the policy that took them.
      rewards: `[T, n]`.
      mask: `[T, n]`, 1 where the trajectory had not ended before the step, else 0.
    """

    observations: Array
    actions: Array
    log_probs: Array
    rewards: Array
    mask: Array


def rollout(
    environment: Environment,
    policy: Policy,
    params: Params,
    task: PyTree,
    key: Array,
    num_trajectories: int,
) -> Trajectories:
    """Samples trajectories in one `lax.scan` over time; not differentiated in `params`.

    Args:
      environment: where to act.
      policy: how to act.
      params: the policy's.
      task: what the environment's functions take for the task.
      key: random key.
      num_trajectories: trajectories, side by side.

    Returns:
      The `Trajectories`, `environment.horizon` steps long.

    Raises:
      ValueError: fewer than one trajectory.
    """
    check_value("num_trajectories", num_trajectories, Count, "rollout: ")
    params = lax.stop_gradient(params)
    reset_key, action_key = jax.random.split(key)
    reset_keys = jax.random.split(reset_key, num_trajectories)
    states, observations = jax.vmap(environment.reset, in_axes=(0, None))(reset_keys, task)
    step_all = jax.vmap(environment.step, in_axes=(0, 0, None))

    def step(carry, key):
        states, observations, running = carry
        distribution = policy.apply(params, observations)
        actions = policy.sample(distribution, key)
        log_probs = policy.log_prob(distribution, actions)
        states, following, rewards, done = step_all(states, actions, task)
        mask = running.astype(rewards.dtype)
        seen = Trajectories(observations, actions, log_probs, rewards, mask)
        return (states, following, running & ~done), seen

    start = (states, observations, jnp.ones(num_trajectories, bool))
    keys = jax.random.split(action_key, environment.horizon)
    return lax.stop_gradient(lax.scan(step, start, keys)[1])


def mean_return(trajectories: Trajectories) -> Array:
    """The undiscounted sum of rewards of a trajectory, on average."""
    rewards = jnp.where(trajectories.mask > 0, trajectories.rewards, 0)  # not NaN times 0
    return jnp.sum(trajectories.mask * rewards, axis=0).mean()


def masked_mean(values: Array, mask: Array) -> Array:
    """The mean over the steps that were taken; a mask of weights gives the weighted mean."""
    return jnp.sum(mask * jnp.where(mask > 0, values, 0)) / jnp.sum(mask)
