"""Adaptation of a policy by its own trajectories, and how that adaptation is differentiated."""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import optax
from jax import lax

from imaml_jax.bilevel.curvature import hessian
from imaml_jax.bilevel.implicit import custom_argmin, root_vjp
from imaml_jax.bilevel.inner import MinimizeInfo, minimize, proximal_objective
from imaml_jax.bilevel.linear_solve import solve_cg_steihaug
from imaml_jax.bilevel.linear_system import SolveInfo
from imaml_jax.learners.base import MetaInfo, inner_report
from imaml_jax.learners.settings import Count, Positive, check_value
from imaml_jax.policies.losses import Estimator, surrogate_loss, weighted_regression
from imaml_jax.policies.policy import Policy
from imaml_jax.policies.returns import Experience, estimate_advantages
from imaml_jax.policies.trajectories import Trajectories, rollout
from imaml_jax.types import Array, Environment, Params, PyTree, Task

Algorithm = Literal["maml", "fomaml", "reptile", "imaml"]
_TEN_CG_STEPS = partial(solve_cg_steihaug, tol=1e-4, max_steps=10)


class Adaptation(NamedTuple):
    """A policy adapted to one task.

    Attributes:
      support: the `Experience` that it was adapted by, with a leading axis of the inner steps; of
        length 1 for implicit MAML, whose inner problem keeps its trajectories.
      params: the policy's parameters afterwards.
      info: of implicit MAML's inner problem, else None.
    """

    support: Experience
    params: Params
    info: MinimizeInfo | None


class PolicyProblem(NamedTuple):
    """What `policy_gradient` and TRPO need of an algorithm.

    Attributes:
      policy: the policy.
      algorithm: its name.
      estimator: that of the inner gradient.
      adapt: `(params, env_params, key) -> Adaptation`, by the evaluation settings.
      collect: `(params, task, key) -> (Adaptation, Experience)`, by the training settings; the
        second is that of the adapted policy in the query's environment.
      repeat: `(params, support) -> adapted params`: the adaptation with its experience fixed,
        differentiable in `params` as the algorithm has it (Reptile's is of no use).
      pull_back: `(params, adaptation, cotangent) -> (grads, MetaInfo)`, by the transposed
        derivative of `repeat`.
    """

    policy: Policy
    algorithm: Algorithm
    estimator: Estimator
    adapt: Callable[[Params, PyTree, Array], Adaptation]
    collect: Callable[[Params, Task, Array], tuple[Adaptation, Experience]]
    repeat: Callable[[Params, Experience], Params]
    pull_back: Callable[[Params, Adaptation, Params], tuple[Params, MetaInfo]]


def policy_problem(
    policy: Policy,
    environment: Environment,
    *,
    algorithm: Algorithm = "maml",
    estimator: Estimator = "naive",
    inner: optax.GradientTransformation,
    num_steps: int,
    eval_num_steps: int | None = None,
    num_trajectories: int = 20,
    eval_num_trajectories: int | None = None,
    estimate: Callable[[Trajectories], Experience] = estimate_advantages,
    reg_strength: float = 1.0,
    temperature: float = 1.0,
    solve: Callable[..., tuple[PyTree, SolveInfo]] = _TEN_CG_STEPS,
) -> PolicyProblem:
    """The adaptation of a policy to a task from trajectories in it.

    MAML, first-order MAML and Reptile take `num_steps` steps on
    `L(phi, D) = -mean_D(log pi_phi(a|s) A)`, each with new trajectories `D` of the policy at that
    step. They differ in the derivative of the adapted parameters: that of the steps with their
    trajectories fixed, the identity, or the displacement in place of a gradient.

    Implicit MAML samples once, from theta, and takes `num_steps` towards
    `phi* = argmin_phi -sum_D w log pi_phi(a|s) + lambda/2 ||phi - theta||^2` with
    `w = softmax_D(A / temperature)`, an advantage-weighted regression; signed weights could leave
    that without a lower bound. Its derivative is `lambda (lambda I + H)^-1`, and needs lambda above
    minus the smallest eigenvalue of `H`: watch `min_curvature` and `inner_residual`.

    In all of them trajectories count as given, though their distribution depends on theta: that
    part of the derivative is neglected, but for the estimators that bring it back.

    Args:
      policy: what acts, see `imaml_jax.policies`.
      environment: where; a task's support and query are what its functions take for the task.
      algorithm: as above.
      estimator: of an inner step. All have one gradient, but not its derivative: "naive" (as
        published) neglects the above; "loaded_dice" is unbiased for `J(theta + alpha grad J)`, and
        "lvc" nearly so with less variance, see `surrogate_loss`. "emaml" is the naive one with a
        score term in `policy_gradient`, unbiased for the expected return after an adaptation by
        sampled trajectories; with another surrogate that term would count twice.
      inner: Optax transform of the inner loop, `optax.sgd(0.5)` as published.
      num_steps: inner steps in training, 1 as published.
      eval_num_steps: the same in evaluation; default `num_steps`.
      num_trajectories: of a batch of experience, in training.
      eval_num_trajectories: the same in evaluation; default `num_trajectories`.
      estimate: bind the settings of `estimate_advantages` with `partial`.
      reg_strength: lambda of implicit MAML, positive; this and the next two are its alone.
      temperature: of its weights, positive.
      solve: its linear solver, of `imaml_jax.bilevel.linear_solve`.

    Returns:
      The `PolicyProblem`.

    Raises:
      ValueError: a setting out of its range, or one that the algorithm does not have.

    References:
      Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning", ICML 2017, Algorithm 3.
      Rothfuss et al., "ProMP: Proximal Meta-Policy Search", ICLR 2019 (both objectives, LVC).
      Farquhar, Whiteson, Foerster, "Loaded DiCE", NeurIPS 2019.
      Stadie et al., "Some Considerations on Learning to Explore via Meta-Reinforcement Learning",
      2018 (E-MAML).
      Peng et al., "Advantage-Weighted Regression", 2019.
    """
    if eval_num_steps is None:
        eval_num_steps = num_steps
    if eval_num_trajectories is None:
        eval_num_trajectories = num_trajectories
    for name, value, hint in (
        ("algorithm", algorithm, Algorithm),
        ("estimator", estimator, Estimator),
        ("num_steps", num_steps, Count),
        ("eval_num_steps", eval_num_steps, Count),
        ("num_trajectories", num_trajectories, Count),
        ("eval_num_trajectories", eval_num_trajectories, Count),
        ("reg_strength", reg_strength, Positive),
        ("temperature", temperature, Positive),
    ):
        check_value(name, value, hint, "policy_problem: ")
    if algorithm != "maml" and estimator != "naive":
        raise ValueError(
            f"policy_problem: estimator={estimator!r} differs from 'naive' in the derivative of an "
            f"inner step, which algorithm={algorithm!r} does not take; leave it out"
        )
    if estimator == "emaml" and num_steps != 1:
        raise ValueError(f"policy_problem: num_steps={num_steps} must be 1 with estimator='emaml'")
    is_default = reg_strength == temperature == 1.0 and solve is _TEN_CG_STEPS
    if algorithm != "imaml" and not is_default:
        raise ValueError(
            "policy_problem: reg_strength, temperature and solve are settings of "
            f"algorithm='imaml', not of {algorithm!r}; leave them out"
        )
    surrogate = partial(surrogate_loss, policy, estimator)

    def sample(params, env_params, key, count):
        return estimate(rollout(environment, policy, params, env_params, key, count))

    def explore(params, env_params, key, steps, count):
        """Steps, each with experience of its own."""

        def step(carry, key):
            params, state = carry
            support = sample(params, env_params, key, count)
            updates, state = inner.update(jax.grad(surrogate)(params, support), state, params)
            return (optax.apply_updates(params, updates), state), support

        start, keys = (params, inner.init(params)), jax.random.split(key, steps)
        (adapted, _), supports = lax.scan(step, start, keys)
        return Adaptation(supports, adapted, None)

    def repeat_steps(params, supports):
        steps = supports.scale.shape[0]
        return minimize(
            surrogate, params, tx=inner, num_steps=steps, batches=supports, remat=False
        )[0]

    def repeat_first_order(params, supports):
        moved = optax.tree.sub(repeat_steps(params, supports), params)
        return optax.tree.add(params, lax.stop_gradient(moved))

    def proximal(params, anchor, supports):
        regression = partial(weighted_regression, policy, temperature)
        return proximal_objective(regression)(params, anchor, reg_strength, last_step(supports))

    def find_proximal(steps, init, anchor, supports):
        return minimize(proximal, init, anchor, supports, tx=inner, num_steps=steps)

    def explore_once(params, env_params, key, steps, count):
        support = sample(params, env_params, key, count)
        supports = jax.tree.map(lambda x: x[None], support)
        return Adaptation(supports, *find_proximal(steps, params, params, supports))

    def repeat_proximal(params, supports):
        differentiable = custom_argmin(proximal, solve, has_aux=True, on_failure="accept")
        find = differentiable(partial(find_proximal, num_steps))
        return find(params, params, supports)[0]

    implicit = algorithm == "imaml"
    run = explore_once if implicit else explore
    repeat = {"fomaml": repeat_first_order, "imaml": repeat_proximal}.get(algorithm, repeat_steps)

    def adapt(params, env_params, key):
        return run(params, env_params, key, eval_num_steps, eval_num_trajectories)

    def collect(params, task, key):
        support_key, query_key = jax.random.split(key)
        adaptation = run(params, task.support, support_key, num_steps, num_trajectories)
        return adaptation, sample(adaptation.params, task.query, query_key, num_trajectories)

    def pull_back(params, adaptation, cotangent):
        supports, adapted, inner_info = adaptation
        if algorithm == "reptile":
            return optax.tree.sub(params, adapted), MetaInfo()
        if not implicit:
            _, transposed = jax.vjp(lambda p: repeat(p, supports), params)
            return transposed(cotangent)[0], MetaInfo()
        (grads,), solve_info = root_vjp(
            lambda p, anchor: jax.grad(proximal)(p, anchor, supports),
            adapted,
            (params,),
            cotangent,
            solve,
            symmetric=True,
            operator=hessian(lambda p: proximal(p, params, supports), adapted),
        )
        return grads, inner_report(
            inner_info,
            solve_residual=solve_info.relative_residual,
            solve_steps=solve_info.num_steps,
            min_curvature=solve_info.min_curvature,
        )

    return PolicyProblem(policy, algorithm, estimator, adapt, collect, repeat, pull_back)


def last_step(supports: Experience) -> Experience:
    """The experience of the last inner step."""
    return jax.tree.map(lambda x: x[-1], supports)
