"""2D navigation: a point that learns where its goal is from its rewards alone."""

import jax
import jax.numpy as jnp

from imaml_jax.learners.settings import Count, Positive, check_value
from imaml_jax.types import Array, Environment, Task

_STRIDE, _REACHED = 0.1, 0.01


def navigation(*, horizon: int = 100) -> Environment:
    """A point in the plane, rewarded by how near it comes to a goal that it does not see.

    It starts at the origin. A step moves it by the action times 0.1, each entry clipped to
    [-0.1, 0.1]; the observation is the position, the reward minus the distance to the goal after
    the move, and a trajectory is done when both entries of that are below 0.01.

    Args:
      horizon: most steps of a trajectory, at least 1.

    Returns:
      The `Environment`; a task is the goal `[2]`.

    Raises:
      ValueError: a horizon that is no integer of at least 1.

    References:
      Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning", ICML 2017, section 5.3, and its code,
      whose wrapper of the environment scales the actions by the 0.1.
    """
    check_value("horizon", horizon, Count, "navigation: ")

    def reset(key, goal):
        del key
        position = jnp.zeros_like(goal)
        return position, position

    def step(position, action, goal):
        position = position + jnp.clip(_STRIDE * action, -_STRIDE, _STRIDE)
        offset = position - goal
        done = jnp.all(jnp.abs(offset) < _REACHED)
        return position, position, -jnp.linalg.norm(offset), done

    return Environment(reset, step, horizon)


def sample_tasks(key: Array, *, num_tasks: int, half_width: float = 0.5) -> Task:
    """Draws goals, uniform in a square about the origin.

    Args:
      key: PRNG key.
      num_tasks: size of the leading axis.
      half_width: of the square.

    Returns:
      A `Task` of goals `[num_tasks, 2]`, the same for support and query.

    Raises:
      ValueError: a value is out of range; raised at trace time.
    """
    check_value("num_tasks", num_tasks, Count)
    check_value("half_width", half_width, Positive)
    goals = jax.random.uniform(key, (num_tasks, 2), minval=-half_width, maxval=half_width)
    return Task(support=goals, query=goals)
