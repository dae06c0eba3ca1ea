"""Trust-region policy optimisation as the outer optimiser of policies that adapt."""

from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import partial
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from imaml_jax.bilevel.curvature import damped, gauss_newton
from imaml_jax.bilevel.linear_solve import solve_cg_steihaug
from imaml_jax.learners.settings import Count, NotNegative, Positive, Range, Record
from imaml_jax.policies.losses import distributions, outputs_loss
from imaml_jax.policies.problem import PolicyProblem, last_step
from imaml_jax.policies.trajectories import masked_mean, mean_return
from imaml_jax.training import mapping, metrics
from imaml_jax.training.step import TrainState, TrainStep, Update, latched
from imaml_jax.types import Array, Params, PyTree


@dataclass(frozen=True)
class TrpoSettings(Record):
    """The settings of `trpo_step`; ValueError for one out of its range."""

    max_kl: Positive = 0.01
    """Bound on the divergence."""
    damping: NotNegative = 1e-5
    """Of the linear system."""
    cg_steps: Count = 10
    """Most CG steps."""
    shrink: Annotated[float, Range(above=0, below=1)] = 0.8
    """Factor between two tries of the line search."""
    max_tries: Count = 15
    """Its tries."""


class TrpoInfo(NamedTuple):
    """What a step of TRPO met.

    Attributes:
      grads: the gradient of the loss, shaped like the parameters.
      improvement: by how much the loss fell.
      kl: the divergence of the new from the old outputs.
      step_fraction: share of the full step that was taken; 0 where none was accepted.
      solve_residual: relative residual of the linear solve.
      min_curvature: the smallest curvature that it met.
    """

    grads: PyTree
    improvement: Array
    kl: Array
    step_fraction: Array
    solve_residual: Array
    min_curvature: Array | None


def trpo_step(
    apply_fn: Callable[[Params], PyTree],
    loss_fn: Callable[[PyTree], Array],
    divergence_fn: Callable[[PyTree, PyTree], Array],
    params: Params,
    **settings: Any,
) -> tuple[Params, TrpoInfo]:
    """One natural-gradient step with a bound on the divergence, and a line search.

    `d = -(F + damping I)^-1 g` by CG and the step `sqrt(2 max_kl / d^T (F + damping I) d) d`, which
    shrinks until the loss is lower and the divergence at most `max_kl`; where it never is, nothing
    moves. `F` is the Hessian of the divergence at `params`. As the divergence has no gradient in
    the outputs there, that is its Gauss-Newton matrix, which needs no derivative of `apply_fn`
    beyond the first, be there an adaptation within or not.

    Args:
      apply_fn: `params -> outputs`, such as the distributions of actions at some observations.
      loss_fn: `outputs -> scalar`, to be lowered.
      divergence_fn: `(old outputs, outputs) -> scalar`, at its minimum 0 where they are equal.
      params: where to start.
      **settings: `TrpoSettings` by name.

    Returns:
      `(params, TrpoInfo)`.

    Raises:
      ValueError: a setting out of its range.

    References:
      Schulman et al., "Trust Region Policy Optimization", ICML 2015, appendix C.
    """
    max_kl, damping, cg_steps, shrink, max_tries = astuple(TrpoSettings(**settings))
    old, pullback = jax.vjp(apply_fn, params)
    old_loss, output_grads = jax.value_and_grad(loss_fn)(old)
    (grads,) = pullback(output_grads)

    fisher = damped(gauss_newton(apply_fn, lambda out: divergence_fn(old, out), params), damping)
    natural, solve_info = solve_cg_steihaug(fisher, grads, tol=1e-5, max_steps=cg_steps)
    squared = jnp.asarray(optax.tree.vdot(natural, fisher.matvec(natural)))
    full = jnp.sqrt(2 * max_kl / jnp.where(squared > 0, squared, 1))

    def at(fraction):
        moved = optax.tree.add_scale(params, -fraction * full, natural)
        outputs = apply_fn(moved)
        return fraction, moved, loss_fn(outputs), divergence_fn(old, outputs)

    def accepted(loss, kl):
        return (loss < old_loss) & (kl <= max_kl)

    def keep_trying(search):
        tries, (_, _, loss, kl) = search
        return ~accepted(loss, kl) & (tries < max_tries)

    def shorter(search):
        tries, (fraction, *_) = search
        return tries + 1, at(shrink * fraction)

    start = (1, at(jnp.ones((), old_loss.dtype)))
    fraction, moved, loss, kl = lax.while_loop(keep_trying, shorter, start)[1]
    good = accepted(loss, kl)
    return jax.tree.map(lambda new, before: jnp.where(good, new, before), moved, params), TrpoInfo(
        grads=grads,
        improvement=jnp.where(good, old_loss - loss, 0),
        kl=jnp.where(good, kl, 0),
        step_fraction=jnp.where(good, fraction, 0),
        solve_residual=solve_info.relative_residual,
        min_curvature=solve_info.min_curvature,
    )


def make_trpo_train_step(
    problem: PolicyProblem,
    sample: mapping.Sample,
    *,
    map_tasks: mapping.MapTasks = None,
    devices: mapping.Devices = None,
    **settings: Any,
) -> TrainStep:
    """The meta-step of MAML's reinforcement learning: TRPO on the experience after adaptation.

    The loss is minus the importance-weighted advantages of the adapted policies, on average over
    tasks, the divergence that of the adapted policies from what they were when they acted, on
    average over all steps taken. In both, the adaptation is repeated from its fixed experience for
    each theta.

    Args:
      problem: made by `policy_problem`; Reptile has no gradient for it, and "emaml" not with it.
      sample: `key -> Task` with a leading task axis.
      map_tasks: how tasks are mapped, see `mapping.map_over_tasks`.
      devices: devices over which they are sharded.
      **settings: `TrpoSettings` by name.

    Returns:
      What `training.train` takes as `train_step`.

    Raises:
      ValueError: an algorithm or estimator that it cannot serve, or a setting out of its range.
    """
    TrpoSettings(**settings)
    if problem.algorithm == "reptile" or problem.estimator == "emaml":
        raise ValueError(
            f"make_trpo_train_step: algorithm={problem.algorithm!r} with "
            f"estimator={problem.estimator!r} is no derivative of the return after adaptation with "
            "its experience fixed; use an Optax transform with policy_gradient"
        )
    policy = problem.policy

    def outputs_of(params, support, query):
        return distributions(policy, problem.repeat(params, support), query.trajectories)

    collect, map_outputs = (
        mapping.map_over_tasks(fn, map_tasks, devices) for fn in (problem.collect, outputs_of)
    )

    def update(state: TrainState, root_key: Array) -> Update:
        tasks, keys = mapping.draw_tasks(sample, root_key, state.step)
        adaptations, queries = collect(state.meta_params, tasks, keys)
        masks = queries.trajectories.mask

        def loss(outputs):
            return jax.vmap(partial(outputs_loss, policy, "lvc"))(outputs, queries).mean()

        def divergence(old, outputs):
            kl = jax.vmap(policy.kl)(old, outputs).reshape(masks.shape)
            return masked_mean(jnp.where(masks > 0, kl, 0), masks)

        meta_params, info = trpo_step(
            lambda params: map_outputs(params, adaptations.support, queries),
            loss,
            divergence,
            state.meta_params,
            **settings,
        )
        before = jax.vmap(lambda supports: mean_return(last_step(supports).trajectories))
        scalars = {
            "support_loss": -before(adaptations.support).mean(),
            "query_loss": -jax.vmap(mean_return)(queries.trajectories).mean(),
            "gradient_norm": optax.tree.norm(info.grads),
            **metrics.info_scalars(info._replace(grads=None)),
        }
        return Update(meta_params, state.opt_state, info.grads, scalars)

    return latched(update)
