"""Bayesian MAML."""

import dataclasses
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import optax
from jax import lax

from imaml_jax.bilevel.inner import minimize
from imaml_jax.learners.base import (
    AverageOption,
    FastPredicate,
    LossFn,
    Statistics,
    combine,
    inner_report,
    make_adapt,
)
from imaml_jax.learners.ensemble import ParticleSettings, ensemble
from imaml_jax.learners.posterior import Posterior
from imaml_jax.learners.settings import Count, When, check_arguments, check_value
from imaml_jax.learners.svgd import Kernel, by_gradients, check_kernel, svgd_objective
from imaml_jax.types import Batch, MetaLearner, Task

MetaLoss = Literal["chaser", "particles", "query"]


def bmaml(
    network: Any,
    loss_fn: LossFn,
    *,
    num_particles: int,
    inner: optax.GradientTransformation,
    num_steps: int,
    meta_loss: MetaLoss = "chaser",
    leader_steps: int = 1,
    leader: optax.GradientTransformation | None = None,
    eval_num_steps: int | None = None,
    posterior: Posterior | None = None,
    bandwidth: float | None = None,
    kernel: Kernel = "exact",
    average: AverageOption = "auto",
    fast: FastPredicate | None = None,
    statistics: Statistics = "batch",
    init_spread: float = 0.01,
    remat: bool = True,
) -> MetaLearner:
    """MAML for an ensemble, adapted by Stein variational gradient descent to a task's posterior.

    `Theta_c = SVGD_s(Theta, support)` is the chaser, `Theta_l = SVGD_t(Theta_c, support + query)`
    the leader. The chaser loss is `||Theta_c - stop(Theta_l)||^2`, differentiated by unrolling the
    chaser. The query loss is that of the ensemble's one prediction; the particles' is the mean of
    their own, which bounds that of their mixture, or of their mean for a convex loss, from above.

    The meta-parameters are the network's, those that are adapted with a leading axis of particles.
    An inner rate is that of a sum over examples: one particle with a bandwidth of any value, a flat
    prior, the rate `a/n` and the query loss is MAML with the rate `a`. `support_loss` is the mean
    negative log-density, `inner_residual` that of the direction.

    Args:
      network: `(init, apply)` pair, see `imaml_jax.networks.Network`.
      loss_fn: `(outputs, targets) -> scalar`, a mean over examples.
      num_particles: `M`.
      inner: Optax transform that is fed minus the SVGD direction, such as `optax.sgd(1e-3)`; none
        that evaluates a function, as `newton_cg` and line searches do.
      num_steps: chaser's steps in training.
      meta_loss: "chaser", "particles" or "query".
      leader_steps: leader's steps beyond the chaser, at least 0; only for the chaser loss.
      leader: transform of those steps; default `inner`, begun anew.
      eval_num_steps: steps in `adapt`; default `num_steps`.
      posterior: the density, of `learners.posterior`: default `likelihood(loss_fn)`;
        `learned_precisions()` is the published one for regression.
      bandwidth: of the kernel, see `svgd_direction`; default the median's.
      kernel: "exact", or "official" for the constants of the published code.
      average: the one prediction, `outputs [M, n, ...] -> [n, ...]`; "auto" for `mixture_logits`
        with `cross_entropy` and `mean_outputs` with `mean_squared_error`. None makes `predict`
        return all particles' outputs.
      fast: which parameters are adapted and have particles, by path; default all. Published for
        classification is the head alone.
      statistics: batch-norm mode of the query examples, see `learners.supervised.supervised`.
      init_spread: standard deviation of noise on two or more initial particles, for parameters
        that `network.init` makes equal (biases, a head of zeros): equal particles remain equal.
      remat: recompute each inner step in the backward pass instead of storing its activations.

    Returns:
      The `MetaLearner`.

    Raises:
      ValueError: a setting out of its range, or that the meta-loss does not have; the median kernel
        with one particle; when called, a transform that evaluates a function.

    References:
      Yoon, Kim, Dia, Kim, Bengio, Ahn, "Bayesian Model-Agnostic Meta-Learning", NeurIPS 2018,
      Algorithms 1 to 3.
      github.com/jsikyoon/bmaml
    """
    given = locals()
    if leader_steps == 0:
        given.pop("leader_steps")
    check_arguments("bmaml", BmamlSettings, given)
    check_value("meta_loss", meta_loss, MetaLoss, "bmaml: ")
    if meta_loss != "chaser" and (leader is not None or leader_steps != 1):
        raise ValueError(
            "bmaml: leader and leader_steps are settings of meta_loss='chaser'; leave them out"
        )
    problem = ensemble(
        "bmaml",
        network,
        loss_fn,
        num_particles=num_particles,
        posterior=posterior,
        average=average,
        fast=fast,
        statistics=statistics,
        init_spread=init_spread,
    )
    check_kernel("bmaml", num_particles, bandwidth, kernel)
    objective = svgd_objective(problem.log_densities, bandwidth=bandwidth, kernel=kernel)
    descend = partial(minimize, objective, remat=remat)
    inner = by_gradients("bmaml", inner)
    leader = inner if leader is None else by_gradients("bmaml", leader)

    def run_at_evaluation(particles, slow, support, key):
        del key
        steps = eval_num_steps or num_steps
        return descend(particles, slow, support, tx=inner, num_steps=steps)

    def chaser_loss(chaser, slow, task):
        start, slow = lax.stop_gradient((chaser, slow))
        both = Batch(*map(jnp.concatenate, zip(task.support, task.query, strict=True)))
        slow = problem.encode(slow, Task(both, None))
        last, _ = descend(start, slow, both, tx=leader, num_steps=leader_steps)
        difference = optax.tree.sub(*map(problem.compared, (chaser, last)))
        return optax.tree.norm(difference, squared=True)

    def meta_grad(meta_params, task, key, step):
        del key, step

        def loss(particles, slow):
            encoded = problem.encode(slow, task)
            adapted, info = descend(particles, encoded, task.support, tx=inner, num_steps=num_steps)
            value, scores = problem.outer_loss(adapted, encoded, task, meta_loss == "particles")
            if meta_loss == "chaser":
                value = chaser_loss(adapted, slow, task)
            return value, (*scores, info)

        (value, (query_loss, accuracy, info)), grads = jax.value_and_grad(
            loss, argnums=(0, 1), has_aux=True
        )(*problem.split(meta_params))
        return combine(*grads), inner_report(
            info,
            query_loss=query_loss,
            query_accuracy=accuracy,
            meta_loss=None if meta_loss == "query" else value,
        )

    adapt = make_adapt(problem, run_at_evaluation)
    return MetaLearner(problem.init, adapt, problem.predict, meta_grad)


@dataclasses.dataclass(frozen=True)
class BmamlSettings(ParticleSettings):
    """Settings of `bmaml`."""

    algorithm: ClassVar[str] = "bmaml"
    title: ClassVar[str] = "BMAML"
    factory: ClassVar = staticmethod(bmaml)

    meta_loss: MetaLoss = "chaser"
    """Published is chaser; query is the loss of the particles' one prediction, particles the mean
    of their own."""
    leader_steps: Annotated[
        Count, When(lambda own: own.meta_loss == "chaser", "a meta_loss but chaser")
    ] = 1
    """Inner steps of the leader beyond the adapted particles."""
    remat: bool = True
    """Recomputes each inner step in the backward pass instead of storing its activations."""
