"""Meta-learning of policies: MAML, first-order MAML, Reptile and implicit MAML."""

import jax
import optax

from imaml_jax.learners.base import MetaInfo
from imaml_jax.policies.losses import log_probs, surrogate_loss
from imaml_jax.policies.problem import Adaptation, PolicyProblem, last_step
from imaml_jax.policies.returns import Experience
from imaml_jax.policies.trajectories import masked_mean, mean_return
from imaml_jax.types import Array, MetaLearner, Params


def policy_gradient(problem: PolicyProblem) -> MetaLearner:
    """Policies that adapt to a task by a few trajectories in it.

    `max_theta E_i J_i(U(theta, D_i))`: the policy gradient of the adapted policy on trajectories of
    its own, pulled back through the adaptation `U` as the algorithm has it. A task's support and
    query are parameters of the environment, such as the goal; `adapt` takes the support, rolls out
    by itself and returns the adapted parameters; `predict` gives the distribution of actions at
    observations `[n, ...]`. `info.support_loss` is minus the mean return of the trajectories of the
    last inner step, from before it, and `info.query_loss` that of the adapted policy.

    With the estimator "emaml", the score term `R(theta') grad log p_theta(D)` is added, with `R`
    the mean reward of a step after adaptation. Its variance grows with the number of actions in
    `D`: in long tasks it drowns the rest.

    Args:
      problem: made by `policy_problem`, which has the settings.

    Returns:
      The `MetaLearner`.

    References:
      Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning", ICML 2017, Algorithm 3.
    """

    def adapt(meta_params, env_params, key):
        adaptation = problem.adapt(meta_params, env_params, key)
        return adaptation.params, MetaInfo(
            support_loss=-mean_return(last_step(adaptation.support).trajectories)
        )

    def meta_grad(meta_params, task, key, step):
        del step
        adaptation, query = problem.collect(meta_params, task, key)
        return meta_gradient(problem, meta_params, adaptation, query)

    return MetaLearner(problem.policy.init, adapt, problem.policy.apply, meta_grad)


def meta_gradient(
    problem: PolicyProblem, params: Params, adaptation: Adaptation, query: Experience
) -> tuple[Params, MetaInfo]:
    """The meta-gradient of one task from what was collected there.

    Args:
      problem: made by `policy_problem`.
      params: theta, by which the support was collected.
      adaptation: what `problem.collect` returned first.
      query: what it returned second.

    Returns:
      `(grads, MetaInfo)`, gradients of a loss.
    """

    def loss(adapted):
        return surrogate_loss(problem.policy, "lvc", adapted, query)

    grads, info = problem.pull_back(params, adaptation, jax.grad(loss)(adaptation.params))
    support = last_step(adaptation.support).trajectories
    if problem.estimator == "emaml":
        rewards = query.trajectories.rewards
        weight = query.scale * masked_mean(rewards, query.trajectories.mask)

        def score(params) -> Array:
            return -weight * (support.mask * log_probs(problem.policy, params, support)).sum()

        grads = optax.tree.add(grads, jax.grad(score)(params))
    return grads, info._replace(
        support_loss=-mean_return(support), query_loss=-mean_return(query.trajectories)
    )
