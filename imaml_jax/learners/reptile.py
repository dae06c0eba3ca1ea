"""Reptile."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from imaml_jax.bilevel.inner import mini_batches, minimize
from imaml_jax.learners.algorithm import DescentSettings
from imaml_jax.learners.base import (
    FastPredicate,
    LossFn,
    Statistics,
    combine,
    inner_report,
    make_adapt,
)
from imaml_jax.learners.settings import Count, check_arguments
from imaml_jax.learners.supervised import supervised
from imaml_jax.types import MetaLearner


def reptile(
    network: Any,
    loss_fn: LossFn,
    *,
    inner: optax.GradientTransformation,
    num_steps: int,
    batch_size: int | None = None,
    eval_num_steps: int | None = None,
    eval_batch_size: int | None = None,
    fast: FastPredicate | None = None,
    statistics: Statistics = "support_and_one",
) -> MetaLearner:
    """Reptile: moves the initialisation towards where several inner steps end.

    The gradient is `theta - U(theta, support)`; with `optax.sgd(epsilon)` outside this is Reptile's
    `theta <- theta + epsilon (U(theta) - theta)`. Query examples take no part in training, so
    give it more shots there (10 in the paper) and one query a class. As published, the inner
    transform is `optax.adam(1e-3, b1=0)`; its state starts afresh for each task here, whereas the
    official code carries Adam's second moments from task to task.

    Args:
      network: `(init, apply)` pair, see `imaml_jax.networks.Network`.
      loss_fn: `(outputs, targets) -> scalar`, a mean over examples.
      inner: Optax transform of the inner loop.
      num_steps: inner steps in training.
      batch_size: support examples a step, drawn by passing through shuffles; default all.
      eval_num_steps: inner steps in `adapt`; default `num_steps`.
      eval_batch_size: the same in `adapt`; default `batch_size`.
      fast: which parameters are adapted, by path; default all. The others stay as initialised.
      statistics: batch-norm mode of the query examples: "support_and_one" as published, "batch" for
        Reptile with transduction.

    Returns:
      The `MetaLearner`.

    Raises:
      ValueError: a setting out of its range.

    References:
      Nichol, Achiam, Schulman, "On First-Order Meta-Learning Algorithms", 2018, Algorithm 1.
    """
    check_arguments("reptile", ReptileSettings, locals())
    problem = supervised(network, loss_fn, fast=fast, statistics=statistics)

    def run(fast_params, slow_params, support, key, steps, size):
        loss = problem.support_loss
        if size is None:
            return minimize(loss, fast_params, slow_params, support, tx=inner, num_steps=steps)
        return minimize(
            loss,
            fast_params,
            slow_params,
            tx=inner,
            num_steps=steps,
            batches=mini_batches(key, support, steps, size),
        )

    def run_at_evaluation(fast_params, slow_params, support, key):
        steps, size = eval_num_steps or num_steps, eval_batch_size or batch_size
        return run(fast_params, slow_params, support, key, steps, size)

    def meta_grad(meta_params, task, key, step):
        del step
        fast_params, slow_params = problem.split(meta_params)
        adapted, info = run(fast_params, slow_params, task.support, key, num_steps, batch_size)
        grads = combine(
            optax.tree.sub(fast_params, adapted), jax.tree.map(jnp.zeros_like, slow_params)
        )
        loss, accuracy = problem.query_loss(adapted, slow_params, task)
        return grads, inner_report(info, query_loss=loss, query_accuracy=accuracy)

    adapt = make_adapt(problem, run_at_evaluation)
    return MetaLearner(problem.init, adapt, problem.predict, meta_grad)


@dataclasses.dataclass(frozen=True)
class ReptileSettings(DescentSettings):
    """Settings of `reptile`."""

    algorithm: ClassVar[str] = "reptile"
    title: ClassVar[str] = "Reptile"
    factory: ClassVar = staticmethod(reptile)

    statistics: Statistics = "support_and_one"
    """Whose batch statistics normalise the query examples; published: the support set and it."""
    batch_size: Count | None = None
    """Examples of an inner step in training; None for all."""
    eval_batch_size: Count | None = None
    """Examples of an inner step at validation and test; None for as many as in training."""


@dataclasses.dataclass(frozen=True)
class TransductiveReptileSettings(ReptileSettings):
    """Settings of Reptile with the batch norm of the whole query set."""

    algorithm: ClassVar[str] = "reptile_transductive"
    title: ClassVar[str] = "Reptile + transduction"

    statistics: Statistics = "batch"
    """Whose batch statistics normalise the query examples."""
