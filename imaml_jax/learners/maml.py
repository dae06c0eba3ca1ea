"""MAML and first-order MAML."""

import dataclasses
from functools import partial
from typing import Any, ClassVar

import jax
import optax

from imaml_jax.bilevel.inner import minimize
from imaml_jax.learners.algorithm import Adapts, DescentSettings, make_inner
from imaml_jax.learners.base import (
    FastPredicate,
    LossFn,
    Statistics,
    combine,
    inner_report,
    make_adapt,
)
from imaml_jax.learners.settings import check_arguments
from imaml_jax.learners.supervised import supervised
from imaml_jax.types import MetaLearner


def maml(
    network: Any,
    loss_fn: LossFn,
    *,
    inner: optax.GradientTransformation,
    num_steps: int,
    eval_num_steps: int | None = None,
    first_order: bool = False,
    fast: FastPredicate | None = None,
    statistics: Statistics = "batch",
    remat: bool = True,
) -> MetaLearner:
    """Model-agnostic meta-learning: the query loss after adaptation, differentiated by unrolling.

    `min_theta E_i L_i^query(U(theta, support_i))`, with `U` some steps of the inner transform.

    Args:
      network: `(init, apply)` pair, see `imaml_jax.networks.Network`.
      loss_fn: `(outputs, targets) -> scalar`, a mean over examples.
      inner: Optax transform of the inner loop, such as `optax.sgd(0.4)`.
      num_steps: inner steps in training.
      eval_num_steps: inner steps in `adapt`; default `num_steps`.
      first_order: take the derivative of the adaptation as the identity (first-order MAML).
      fast: which parameters are adapted, by path; default all. The others are meta-learned only, as
        norm scales are in MAML's own code and all but the head in ANIL.
      statistics: batch-norm mode of the query examples, see `learners.supervised.supervised`.
      remat: recompute each inner step in the backward pass instead of storing its activations.

    Returns:
      The `MetaLearner`.

    Raises:
      ValueError: a setting out of its range.

    References:
      Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning", ICML 2017, Algorithm 1 and section 5.2.
    """
    check_arguments("maml", MamlSettings, locals())
    problem = supervised(network, loss_fn, fast=fast, statistics=statistics)

    def run(fast_params, slow_params, support, steps):
        return minimize(
            problem.support_loss,
            fast_params,
            slow_params,
            support,
            tx=inner,
            num_steps=steps,
            remat=remat,
        )

    def run_at_evaluation(fast_params, slow_params, support, key):
        del key
        return run(fast_params, slow_params, support, eval_num_steps or num_steps)

    def meta_grad(meta_params, task, key, step):
        del key, step

        def query_loss(adapted, slow_params, info):
            loss, accuracy = problem.query_loss(adapted, slow_params, task)
            return loss, (accuracy, info)

        def unrolled_loss(fast_params, slow_params):
            slow_params = problem.encode(slow_params, task)
            adapted, info = run(fast_params, slow_params, task.support, num_steps)
            return query_loss(adapted, slow_params, info)

        fast_params, slow_params = problem.split(meta_params)
        grad = partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
        if first_order:
            slow_params, pull_back = jax.vjp(lambda slow: problem.encode(slow, task), slow_params)
            adapted, info = run(fast_params, slow_params, task.support, num_steps)
            (loss, (accuracy, info)), grads = grad(query_loss)(adapted, slow_params, info)
            grads = grads[0], *pull_back(grads[1])
        else:
            (loss, (accuracy, info)), grads = grad(unrolled_loss)(fast_params, slow_params)
        return combine(*grads), inner_report(info, query_loss=loss, query_accuracy=accuracy)

    adapt = make_adapt(problem, run_at_evaluation)
    return MetaLearner(problem.init, adapt, problem.predict, meta_grad)


fomaml = partial(maml, first_order=True)
"""First-order MAML: `maml` with `first_order=True`."""


@dataclasses.dataclass(frozen=True)
class MamlSettings(DescentSettings):
    """Settings of `maml`."""

    algorithm: ClassVar[str] = "maml"
    title: ClassVar[str] = "MAML"
    factory: ClassVar = staticmethod(maml)

    def arguments(self) -> dict[str, Any]:
        """The arguments of the factory; its Adam has a derivative at a gradient of 0."""
        return {
            **super().arguments(),
            "inner": make_inner(self.inner, self.inner_rate, eps_root=1e-16),
        }


@dataclasses.dataclass(frozen=True)
class FomamlSettings(DescentSettings):
    """Settings of `fomaml`."""

    algorithm: ClassVar[str] = "fomaml"
    title: ClassVar[str] = "first-order MAML"
    factory: ClassVar = staticmethod(fomaml)


@dataclasses.dataclass(frozen=True)
class AnilSettings(MamlSettings):
    """Settings of ANIL, which is `maml` with the head alone adapted."""

    algorithm: ClassVar[str] = "anil"
    title: ClassVar[str] = "ANIL"

    adapts: Adapts = "head"
    """Parameters that the inner loop adapts: the head, as published, or others."""
