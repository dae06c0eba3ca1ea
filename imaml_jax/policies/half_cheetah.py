"""The half-cheetah that has to learn its speed or direction, in Brax or in MuJoCo.

Returns are not comparable between the two: their physics differ.
"""

import math
import threading
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from imaml_jax.learners.settings import Count, check_value
from imaml_jax.types import Array, Environment, Task

Goal = Literal["velocity", "direction"]
_CONTROL_COST, _RESET_NOISE = 0.05, 0.1


def reward(goal: Goal, velocity: Array, action: Array, target: Array) -> Array:
    """`-|v - target|` for "velocity", `v target` for "direction", minus `0.05 ||action||^2`.

    Args:
      goal: which of the two.
      velocity: forward, a scalar.
      action: `[d]`, each entry clipped to [-1, 1].
      target: a scalar; for "direction" 1 or -1.
    """
    check_value("goal", goal, Goal, "reward: ")
    gain = -jnp.abs(velocity - target) if goal == "velocity" else velocity * target
    return gain - _CONTROL_COST * jnp.sum(jnp.square(action))


def sample_tasks(key: Array, goal: Goal, *, num_tasks: int, max_velocity: float = 2.0) -> Task:
    """Draws targets: velocities uniform in `[0, max_velocity]`, or directions 1 and -1.

    Args:
      key: PRNG key.
      goal: "velocity" or "direction".
      num_tasks: size of the leading axis.
      max_velocity: 2 as published; 3 in ProMP.

    Returns:
      A `Task` of targets `[num_tasks]`, the same for support and query.

    Raises:
      ValueError: a value is out of range.
    """
    check_value("goal", goal, Goal, "sample_tasks: ")
    if num_tasks < 1 or not 0 < max_velocity < math.inf:
        raise ValueError(
            f"num_tasks={num_tasks} must be at least 1 and max_velocity={max_velocity} above 0 and "
            "finite"
        )
    targets = jax.random.uniform(key, (num_tasks,), maxval=max_velocity)
    if goal == "direction":
        targets = jax.random.rademacher(key, (num_tasks,)).astype(targets.dtype)
    return Task(support=targets, query=targets)


def brax_half_cheetah(goal: Goal, *, horizon: int = 200) -> Environment:
    """Brax's half-cheetah, on the device; needs `pip install imaml_jax[brax]`.

    Of its physics the one called "spring", which is the fastest to compile.

    Args:
      goal: "velocity" or "direction".
      horizon: steps of a trajectory.

    Returns:
      The `Environment`; a task is a target of `sample_tasks`.

    Raises:
      ModuleNotFoundError: the simulator is not installed.
      ValueError: an unknown goal, or a horizon that is no integer of at least 1.

    References:
      Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning", ICML 2017, section 5.3.
    """
    check_value("goal", goal, Goal, "brax_half_cheetah: ")
    check_value("horizon", horizon, Count, "brax_half_cheetah: ")
    from brax import envs  # pyright: ignore[reportMissingImports]

    physics = envs.get_environment("halfcheetah", backend="spring")

    def reset(key, target):
        del target
        state = physics.reset(key)
        return state, state.obs

    def step(state, action, target):
        action = jnp.clip(action, -1, 1)
        state = physics.step(state, action)
        gain = reward(goal, state.metrics["x_velocity"], action, target)
        return state, state.obs, gain, jnp.array(False)

    return Environment(reset, step, horizon)


def mujoco_half_cheetah(goal: Goal, *, horizon: int = 200) -> Environment:
    """Gymnasium's HalfCheetah-v5, on the host; needs `pip install imaml_jax[mujoco]`.

    The state is MuJoCo's positions and velocities, and a step a callback, one for all trajectories
    that are side by side, so that it serves wherever an `Environment` does. The solver starts cold
    at each step, which makes it a function of the state. Arguments, result, errors and reference
    are those of `brax_half_cheetah`.
    """
    check_value("goal", goal, Goal, "mujoco_half_cheetah: ")
    check_value("horizon", horizon, Count, "mujoco_half_cheetah: ")
    import gymnasium  # pyright: ignore[reportMissingImports]

    physics: Any = gymnasium.make("HalfCheetah-v5").unwrapped
    num_positions = physics.model.nq
    alone = threading.Lock()  # devices call from threads of their own

    def simulate_one(state, action):
        physics.set_state(state[:num_positions], state[num_positions:])
        physics.data.qacc_warmstart[:] = 0
        physics.do_simulation(action, physics.frame_skip)
        return np.concatenate([physics.data.qpos, physics.data.qvel])

    simulate_all = np.vectorize(simulate_one, otypes=[np.float64], signature="(n),(m)->(n)")

    def simulate(states, actions):
        with alone:
            following = simulate_all(
                np.asarray(states, np.float64), np.asarray(actions, np.float64)
            )
        return following.astype(np.asarray(states).dtype)

    def see(state):
        return state[1:]  # where it is plays no part

    def reset(key, target):
        del target
        position_key, velocity_key = jax.random.split(key)
        offset = partial(jax.random.uniform, minval=-_RESET_NOISE, maxval=_RESET_NOISE)
        positions = physics.init_qpos + offset(position_key, physics.init_qpos.shape)
        noise = jax.random.normal(velocity_key, physics.init_qvel.shape)
        state = jnp.concatenate([positions, physics.init_qvel + _RESET_NOISE * noise])
        return state, see(state)

    def step(state, action, target):
        action = jnp.clip(action, -1, 1)
        following = jax.pure_callback(
            simulate,
            jax.ShapeDtypeStruct(state.shape, state.dtype),
            state,
            action,
            vmap_method="broadcast_all",
        )
        velocity = (following[0] - state[0]) / physics.dt
        gain = reward(goal, velocity, action, target)
        return following, see(following), gain, jnp.array(False)

    return Environment(reset, step, horizon)
