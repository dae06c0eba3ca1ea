"""Arrows, losses and reports at every point of a grid; whole runs of meta-training."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.introduction import plane
from experiments.introduction.plane import Sizes
from imaml_jax import Task

OUTER_RATE = 0.3
REACH = 7.9  # farther from the middle no run goes
_UNROLLED = ("maml", "fomaml", "reptile")


def compute(sizes: Sizes, seed: int) -> dict[str, np.ndarray]:
    """What the figures on the plane show.

    Axes are, where they are there, in the order rate, steps, strength, row, column, and then what
    belongs to a point. Reptile's arrow is its displacement divided by rate times steps.
    """
    with jax.enable_x64(True):
        tasks = plane.sample_tasks(jax.random.key(seed))
        of_all = jax.jit(partial(_at_any_steps, sizes))(tasks)
        return _over_steps(_at_steps, sizes, tasks) | jax.device_get(of_all)


def _over_steps(fun: Callable[..., Any], sizes: Sizes, tasks: Task) -> dict[str, Any]:
    """`fun(sizes, tasks, steps)` for every number of inner steps, which are the second axis."""
    run = jax.jit(partial(fun, sizes), static_argnums=1)
    found = [jax.device_get(run(tasks, steps)) for steps in sizes.steps]
    return jax.tree.map(lambda *x: np.stack(x, axis=1), *found)


def arrow(name: str, theta: jax.Array, tasks: Task, rate: Any, steps: int, strength: Any) -> Any:
    """A mean meta-gradient `[2]`; Reptile's is of a gradient's length; and its report."""
    learner = plane.make_learner(name, rate, steps, strength)
    mean, info = plane.mean_gradient(learner, theta, tasks)
    return (mean / (rate * steps) if name == "reptile" else mean), info


def _at_steps(sizes: Sizes, tasks: Task, steps: int) -> dict[str, Any]:
    """At one number of inner steps, for every rate and strength."""
    rates, strengths = jnp.asarray(sizes.rates), jnp.asarray(sizes.strengths)

    def loss(theta, rate):
        return plane.query_loss(plane.make_learner("maml", rate, steps), theta, tasks)

    def unrolled(theta, rate):
        arrows = {name: arrow(name, theta, tasks, rate, steps, None)[0] for name in _UNROLLED}
        ends = plane.adapt(plane.make_learner("maml", rate, steps), theta, tasks)
        return arrows | {"exact_unrolled": jax.jacfwd(loss)(theta, rate), "ends": ends}

    def implicit(theta, rate, strength):
        mean, info = arrow("imaml", theta, tasks, rate, steps, strength)
        return {
            "imaml": mean,
            "inner_residual": info.inner_residual.max(),
            "min_curvature": info.min_curvature.min(),
        }

    return {
        **plane.over(sizes.side, unrolled, rates),
        **plane.over(sizes.side, implicit, rates, strengths),
        "unrolled_loss": plane.over(sizes.fine, loss, rates),
    }


def _at_any_steps(sizes: Sizes, tasks: Task) -> dict[str, Any]:
    """What no number of inner steps plays a part in: `curves` are over all of them."""
    rates, strengths = jnp.asarray(sizes.rates), jnp.asarray(sizes.strengths)

    def solved(theta, strength):
        learner = plane.exact_learner(strength)
        grad, info = plane.mean_gradient(learner, theta, tasks)
        minima = plane.adapt(learner, theta, tasks)
        return {"exact_implicit": grad, "minima": minima}, info.query_loss.mean()

    def curve(theta, rate):
        def of_task(support, query):
            loss = partial(plane.valley, shape=query)
            return plane.descent(plane.valley, theta, 0.0, support, rate, max(sizes.steps), loss)

        return jax.vmap(of_task)(tasks.support.targets, tasks.query.targets).mean(0)

    fine, losses = plane.over(sizes.fine, solved, strengths)
    return {
        **{name: values[:, ::2, ::2] for name, values in fine.items()},
        "implicit_loss": losses,
        "curves": plane.over(sizes.side, curve, rates),
        "task_losses": plane.over(sizes.fine, plane.valley, tasks.support.targets),
        "support_centres": tasks.support.targets[:, :2],
        "query_centres": tasks.query.targets[:, :2],
    }


def trajectories(sizes: Sizes, seed: int) -> dict[str, dict[str, np.ndarray]]:
    """Whole runs of meta-training by gradient descent on the mean over all tasks.

    A run stays where its next step would lead beyond `REACH`: it diverges.

    Returns:
      `paths` of each algorithm, `[rates, steps, (strengths,) starts, recorded, 2]`, and `losses` at
      their ends: the mean query loss after the algorithm's own adaptation.
    """
    with jax.enable_x64(True):
        tasks = plane.sample_tasks(jax.random.key(seed))
        found = _over_steps(_runs, sizes, tasks)
    return {kind: {name: own[kind] for name, own in found.items()} for kind in ("paths", "losses")}


def starts(sizes: Sizes) -> jax.Array:
    """`[starts, 2]`."""
    return 0.9 * plane.grid(sizes.starts_side).reshape(-1, 2)


def _runs(sizes: Sizes, tasks: Task, steps: int) -> dict[str, Any]:
    rates, strengths = jnp.asarray(sizes.rates), jnp.asarray(sizes.strengths)

    def train(name, rate, strength, start):
        def step(theta, _):
            moved = theta - OUTER_RATE * arrow(name, theta, tasks, rate, steps, strength)[0]
            return jnp.where(jnp.all(jnp.abs(moved) <= REACH), moved, theta), None

        def stretch(theta, _):
            return jax.lax.scan(step, theta, None, length=sizes.record_every)[0], theta

        count = sizes.meta_steps // sizes.record_every
        path = jax.lax.scan(stretch, start, None, length=count + 1)[1]
        learner = plane.make_learner(name, rate, steps, strength)
        return {"paths": path, "losses": plane.query_loss(learner, path[-1], tasks)}

    def each(name):
        if name == "imaml":
            return plane.at_all(partial(train, name), rates, strengths, starts(sizes))
        return plane.at_all(
            lambda rate, start: train(name, rate, None, start), rates, starts(sizes)
        )

    return {name: each(name) for name in plane.ALGORITHMS}
