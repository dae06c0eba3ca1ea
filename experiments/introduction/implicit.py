"""Implicit MAML under a lens: what lambda does, what its error is made of, and when it fails."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import imaml_jax
from experiments import meta_gradient_accuracy as regression
from experiments.introduction import plane

TASK = 1
STARTS = ((1.6, 0.2), (0.0, -1.4))


class Sizes(NamedTuple):
    """How much is computed.

    Attributes:
      rates: inner learning rates.
      steps: inner steps.
      conditions: condition numbers of the regression.
      descent_steps: inner steps there.
      cg_steps: most CG steps there.
    """

    rates: tuple[float, ...] = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.6)
    steps: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    conditions: tuple[float, ...] = (10.0, 50.0, 250.0)
    descent_steps: tuple[int, ...] = (4, 16, 64, 256)
    cg_steps: int = 20


def inner_problem(sizes: Sizes, strengths: tuple[float, ...], seed: int) -> dict[str, Any]:
    """One task from two starts: the inner iterates, the meta-gradient, and what is reported.

    Axes are, where they are there, in the order start, strength, rate, inner steps. `rate_limit` is
    the rate past which gradient descent cannot stay at the minimum.
    """
    with jax.enable_x64(True):
        tasks = plane.sample_tasks(jax.random.key(seed))
        task = jax.tree.map(lambda x: x[TASK], tasks)
        axes = jnp.asarray(STARTS), jnp.asarray(strengths), jnp.asarray(sizes.rates)

        def path(start, strength, rate):
            shape, most = task.support.targets, max(sizes.steps)
            return plane.descent(plane.valley, start, strength, shape, rate, most, lambda x: x)

        def meta_grad(steps, start, strength, rate):
            learner = plane.make_learner("imaml", rate, steps, strength)
            grads, info = plane.meta_gradient(learner, start, task)
            report = _named(info, "inner_residual", "solve_residual", "min_curvature")
            return {"grads": grads} | report

        def exact(start, strength):
            learner = plane.exact_learner(strength)
            grads, _ = plane.meta_gradient(learner, start, task)
            minimum = learner.adapt(start, task.support, plane.KEY)[0].params
            hessian = imaml_jax.hessian(lambda p: plane.valley(p, task.support.targets), minimum)
            matrix = jax.vmap(hessian.matvec)(jnp.eye(2))
            return {"exact": grads, "minimum": minimum, "hessian": matrix}

        @jax.jit
        def run():
            reports = [plane.at_all(partial(meta_grad, steps), *axes) for steps in sizes.steps]
            stacked = jax.tree.map(lambda *x: jnp.stack(x, 3), *reports)
            at_minimum = plane.at_all(exact, *axes[:2])
            return stacked | at_minimum | {"paths": plane.at_all(path, *axes)}

        found = jax.device_get(run())
    largest = np.linalg.eigvalsh(found.pop("hessian"))[..., -1]
    return found | {"rate_limit": 2 / (largest + np.asarray(strengths))}


def _named(info: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(info, name) for name in names}


def solver_errors(sizes: Sizes, seed: int) -> dict[str, Any]:
    """A regression with 50 parameters: the meta-gradient's relative error and its reports.

    Returns:
      `error` and `solve_residual`, `[conditions, descent steps, CG steps]`, and `inner_residual`,
      `[conditions, descent steps]`.
    """
    with jax.enable_x64(True):
        problems = [regression.regression(condition, 1, seed) for condition in sizes.conditions]
        tasks, exact = jax.tree.map(
            lambda *x: jnp.stack(x)[:, 0], *((p.tasks, p.exact) for p in problems)
        )
        network, start = problems[0].network, problems[0].params
        rates = jnp.asarray([2 / (p.smallest + p.largest) for p in problems])

        def measure(steps, problem, max_steps):
            task, exact, rate = problem
            learner = imaml_jax.imaml(
                network,
                regression.half_squared_error,
                inner=optax.sgd(rate),
                num_steps=steps,
                reg_strength=regression.REG_STRENGTH,
                solve=partial(imaml_jax.solve_cg_steihaug, tol=0.0, max_steps=max_steps),
            )
            grads, info = plane.meta_gradient(learner, start, task)
            error = jnp.linalg.norm(grads - exact) / jnp.linalg.norm(exact)
            return {"error": error} | _named(info, "solve_residual", "inner_residual")

        @jax.jit
        def run():
            axes = (tasks, exact, rates), jnp.arange(1, sizes.cg_steps + 1)
            rows = [plane.at_all(partial(measure, steps), *axes) for steps in sizes.descent_steps]
            return jax.tree.map(lambda *x: jnp.stack(x, 1), *rows)

        found = jax.device_get(run())
    return found | {"inner_residual": found["inner_residual"][..., 0]}
