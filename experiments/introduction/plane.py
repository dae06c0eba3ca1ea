"""Several tasks of two parameters, and what each algorithm does with them.

The parameters are the network's outputs, so that a loss is a picture of the plane. All of it is in
float64.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import imaml_jax
from imaml_jax import Batch, MetaLearner, Task
from imaml_jax.networks import Network

ALGORITHMS = ("maml", "fomaml", "reptile", "imaml")
EXTENT = 2.0
NUM_TASKS = 4
STIFFNESS = 3.0
_EXACT_STEPS = 40
KEY = jax.random.key(0)  # plays no part in these learners


class Sizes(NamedTuple):
    """How much is computed.

    Attributes:
      side: points a side of the grid of meta-parameters.
      rates: inner learning rates.
      steps: inner steps.
      strengths: lambdas.
      starts_side: points a side of the grid of starts of meta-training.
      meta_steps: meta-steps of each run.
      record_every: meta-steps between two recorded points.
    """

    side: int = 21
    rates: tuple[float, ...] = (0.05, 0.2, 0.4)
    steps: tuple[int, ...] = (1, 2, 4, 8, 16)
    strengths: tuple[float, ...] = (0.125, 0.5, 2.0, 8.0)
    starts_side: int = 3
    meta_steps: int = 60
    record_every: int = 3

    @property
    def fine(self) -> int:
        """Points a side of the grid of the contours."""
        return 2 * self.side - 1


plane = Network(lambda key, inputs: jnp.zeros(2), lambda theta, inputs: theta)


def valley(theta: jax.Array, shape: jax.Array) -> jax.Array:
    """A curved valley, `sqrt(1 + u^2 / 2 + 3 (v - bend u^2)^2) - 1`.

    Not quadratic, and beside the valley's floor not convex.

    Args:
      theta: `[2]`.
      shape: `[4]`, the two coordinates of the minimum, the angle of the axes `u, v`, and the bend.

    Returns:
      The loss.
    """
    x, y = theta - shape[:2]
    angle, bend = shape[2], shape[3]
    u = jnp.cos(angle) * x + jnp.sin(angle) * y
    v = jnp.cos(angle) * y - jnp.sin(angle) * x
    return jnp.sqrt(1 + 0.5 * u**2 + STIFFNESS * jnp.square(v - bend * u**2)) - 1


def sample_tasks(key: jax.Array) -> Task:
    """Random valleys; a query's minimum and angle differ a little from its support's."""
    keys = jax.random.split(key, 5)
    turn = jnp.arange(NUM_TASKS) * (2 * jnp.pi / NUM_TASKS)
    radius = jax.random.uniform(keys[0], (NUM_TASKS,), minval=0.6, maxval=1.4)
    angle = jax.random.uniform(keys[1], (NUM_TASKS,), minval=0.0, maxval=jnp.pi)
    bend = jax.random.uniform(keys[2], (NUM_TASKS,), minval=-0.5, maxval=0.5)
    place = turn + jax.random.uniform(keys[3], (NUM_TASKS,), minval=-0.5, maxval=0.5)
    support = jnp.stack([radius * jnp.cos(place), radius * jnp.sin(place), angle, bend], axis=-1)
    shift = 0.2 * jax.random.normal(keys[4], (NUM_TASKS, 4))
    inputs = jnp.zeros((NUM_TASKS, 1))
    return Task(Batch(inputs, support), Batch(inputs, support + shift.at[:, 3].set(0.0)))


def make_learner(name: str, rate: Any, steps: int, strength: Any = None) -> MetaLearner:
    """One of the four, with plain gradient descent inside."""
    factory = getattr(imaml_jax, name)
    own = {"imaml": {"reg_strength": strength}, "reptile": {"statistics": "batch"}}.get(name, {})
    return factory(plane, valley, inner=optax.sgd(rate), num_steps=steps, **own)


def exact_learner(strength: Any) -> MetaLearner:
    """Implicit MAML that solves the inner problem, to a residual of 1e-7, and the linear system."""
    return imaml_jax.imaml(
        plane,
        valley,
        inner=imaml_jax.newton_cg(cg_tol=1e-12),
        num_steps=_EXACT_STEPS,
        reg_strength=strength,
        solve=partial(imaml_jax.solve_cg_steihaug, tol=1e-14, max_steps=10),
    )


def meta_gradient(learner: MetaLearner, theta: jax.Array, task: Task) -> tuple[jax.Array, Any]:
    """That of one task, and its report."""
    return learner.meta_grad(theta, task, KEY, jnp.zeros((), jnp.int32))


def mean_gradient(learner: MetaLearner, theta: jax.Array, tasks: Task) -> tuple[jax.Array, Any]:
    """The mean over the tasks, `[2]`, and the report on each."""
    grads, info = jax.vmap(lambda task: meta_gradient(learner, theta, task))(tasks)
    return grads.mean(0), info


def adapt(learner: MetaLearner, theta: jax.Array, tasks: Task) -> jax.Array:
    """`[tasks, 2]`, where each task's adaptation ends."""
    return jax.vmap(learner.adapt, (None, 0, None))(theta, tasks.support, KEY)[0].params


def query_loss(learner: MetaLearner, theta: jax.Array, tasks: Task) -> jax.Array:
    """The mean query loss after `adapt`."""
    return jax.vmap(valley)(adapt(learner, theta, tasks), tasks.query.targets).mean()


def descent(
    loss: Callable[[Any, Any], jax.Array],
    theta: Any,
    strength: Any,
    data: Any,
    rate: Any,
    num_steps: int,
    shown: Callable[[Any], Any],
) -> Any:
    """What is `shown` of the parameters after 0 to `num_steps` steps of iMAML's inner problem."""
    objective = imaml_jax.proximal_objective(loss)

    def step(params, _):
        moved, _ = imaml_jax.minimize(
            objective, params, theta, strength, data, tx=optax.sgd(rate), num_steps=1
        )
        return moved, shown(params)

    return jax.lax.scan(step, theta, None, length=num_steps + 1)[1]


def grid(side: int) -> jax.Array:
    """`[side, side, 2]`: rows are the second coordinate."""
    line = jnp.linspace(-EXTENT, EXTENT, side)
    return jnp.stack(jnp.meshgrid(line, line), axis=-1)


def at_all(fun: Callable[..., Any], *axes: Any) -> Any:
    """`fun` of one entry each of several arrays, or trees of arrays, in all combinations.

    Returns:
      What `fun` returns, with one leading axis for each of `axes`, in their order.
    """
    for place in reversed(range(len(axes))):
        fun = jax.vmap(fun, [0 if place == other else None for other in range(len(axes))])
    return fun(*axes)


def over(side: int, fun: Callable[..., Any], *axes: Any) -> Any:
    """`fun(point, ...)` at every point of `grid(side)`, whose axes come after `axes`."""

    def at_points(*settings):
        return jax.vmap(jax.vmap(lambda point: fun(point, *settings)))(grid(side))

    return at_all(at_points, *axes)
