"""Bayesian MAML by implicit differentiation."""

import dataclasses
import math
from functools import partial
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from imaml_jax.bilevel.gmres import solve_gmres
from imaml_jax.bilevel.implicit import Solve, root_vjp
from imaml_jax.bilevel.inner import minimize
from imaml_jax.bilevel.linear_solve import solve_right_preconditioned
from imaml_jax.bilevel.linear_system import dot
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
from imaml_jax.learners.settings import Count, Positive, check_arguments
from imaml_jax.learners.svgd import (
    Kernel,
    by_gradients,
    check_kernel,
    median_bandwidth,
    svgd_direction,
    svgd_objective,
)
from imaml_jax.types import MetaLearner

_SHORT_GMRES = partial(solve_gmres, restart=20, max_restarts=2)


def implicit_bmaml(
    network: Any,
    loss_fn: LossFn,
    *,
    num_particles: int,
    inner: optax.GradientTransformation,
    num_steps: int,
    reg_strength: float,
    meta_loss: Literal["particles", "query"] = "query",
    solve: Solve = _SHORT_GMRES,
    eval_num_steps: int | None = None,
    posterior: Posterior | None = None,
    bandwidth: float | None = None,
    kernel: Kernel = "exact",
    average: AverageOption = "auto",
    fast: FastPredicate | None = None,
    statistics: Statistics = "batch",
    init_spread: float = 0.01,
    precondition: bool = False,
) -> MetaLearner:
    """The query loss of an ensemble at SVGD's fixed point, differentiated as a root.

    Particle `m` is drawn to the density `log p(theta) - lambda/2 ||theta - theta0_m||^2`, the prior
    that its initial value makes; without it the fixed point would not depend on where the particles
    began. With `phi` the SVGD direction and `A = d phi / d Theta` at `phi = 0`, which is not
    symmetric, `u = A^-T grad L^query` and the meta-gradient is `-(d phi / d Theta0)^T u`. Memory
    does not grow with the steps; watch `inner_residual` and `solve_residual`.

    The median bandwidth is differentiated here, since the fixed point depends on it. One particle
    gives iMAML: with lambda, the sum over examples, and the posterior's prior.

    Args:
      network: `(init, apply)` pair, see `imaml_jax.networks.Network`.
      loss_fn: `(outputs, targets) -> scalar`, a mean over examples.
      num_particles: `M`.
      inner: as in `bmaml`, such as `optax.sgd(0.01)`.
      num_steps: inner steps in training; the fixed point must be reached.
      reg_strength: lambda, positive; `n` times that of `imaml`, whose loss is a mean.
      meta_loss: as in `bmaml`, without the chaser's.
      solve: a solver of `bilevel.linear_solve` for matrices without symmetry; default at most 40
        steps of GMRES, restarted once. With `precondition` its matrix is close to the identity, and
        not symmetric even for one particle.
      eval_num_steps: inner steps in `adapt`; default `num_steps`.
      posterior: as in `bmaml`.
      bandwidth: as in `bmaml`.
      kernel: as in `bmaml`.
      average: as in `bmaml`.
      fast: as in `bmaml`.
      statistics: as in `bmaml`.
      init_spread: as in `bmaml`.
      precondition: whether the particles' damped Gauss-Newton matrices stand before the solver. For
        sinusoids with lambda = 20, after 2,000 meta-steps, ten steps of GMRES then left half of
        what forty left without; where the kernel or a prior outweighs lambda, more may be left.
        Takes a backward pass for every output of the support examples, `m` in all, and `m` copies
        of each particle in memory.

    Returns:
      The `MetaLearner`; its meta-parameters are those of `bmaml`.

    Raises:
      ValueError: a setting out of its range; the median kernel with one particle; when called, a
        transform that evaluates a function.

    References:
      Yoon et al., "Bayesian Model-Agnostic Meta-Learning", NeurIPS 2018, for the ensemble.
      Rajeswaran et al., "Meta-Learning with Implicit Gradients", NeurIPS 2019, for the derivative.
    """
    steps = {"num_steps": num_steps, "eval_num_steps": eval_num_steps}
    check_arguments("implicit_bmaml", ImplicitBmamlSettings, steps)
    if not 0 < reg_strength < math.inf:
        raise ValueError(
            f"implicit_bmaml: reg_strength={reg_strength} must be positive and finite; at 0 the "
            "meta-gradient is 0"
        )
    if meta_loss not in ("particles", "query"):
        raise ValueError(
            f"implicit_bmaml: meta_loss={meta_loss!r} must be one of ('particles', 'query'); the "
            "chaser loss is bmaml's"
        )
    problem = ensemble(
        "implicit_bmaml",
        network,
        loss_fn,
        num_particles=num_particles,
        posterior=posterior,
        average=average,
        fast=fast,
        statistics=statistics,
        init_spread=init_spread,
    )
    check_kernel("implicit_bmaml", num_particles, bandwidth, kernel)

    def log_densities(particles, anchors, slow, support):
        square = jax.vmap(partial(optax.tree.norm, squared=True))
        penalties = 0.5 * reg_strength * square(optax.tree.sub(particles, anchors))
        return problem.log_densities(particles, slow, support) - penalties

    def direction(particles, anchors, slow, support):
        scores = jax.grad(lambda p: log_densities(p, anchors, slow, support).sum())(particles)
        h = median_bandwidth(particles, kernel=kernel) if bandwidth is None else bandwidth
        return svgd_direction(scores, particles, bandwidth=h, kernel=kernel)

    def approximate_inverse(particles, slow, support):
        """Of `A`, as if its blocks were the particles' `-(G + lambda I) / M`."""

        def factor(particle):
            jacobian, output_hessian = problem.low_rank(particle, slow, support)
            dtype = jnp.promote_types(jacobian.dtype, jnp.float32)  # of the factorisation
            damped = dot(output_hessian, dot(jacobian, jacobian.T)).astype(dtype)
            damped += reg_strength * jnp.eye(*damped.shape, dtype=dtype)
            core = jnp.linalg.solve(damped, output_hessian.astype(dtype))
            return jacobian, core.astype(jacobian.dtype)

        def apply(jacobian, core, v):
            v, unravel = ravel_pytree(v)
            low_rank = dot(dot(core, dot(jacobian, v)), jacobian)
            return unravel((low_rank - v) * num_particles / reg_strength)

        return partial(jax.vmap(apply), *jax.vmap(factor)(particles))

    objective = svgd_objective(log_densities, bandwidth=bandwidth, kernel=kernel)
    descend = partial(minimize, objective, tx=by_gradients("implicit_bmaml", inner))

    def run_at_evaluation(anchors, slow, support, key):
        del key
        return descend(anchors, anchors, slow, support, num_steps=eval_num_steps or num_steps)

    def meta_grad(meta_params, task, key, step):
        del step
        anchors, slow = problem.split(meta_params)
        slow, pull_back = jax.vjp(lambda slow: problem.encode(slow, task), slow)
        adapted, inner_info = descend(anchors, anchors, slow, task.support, num_steps=num_steps)
        (value, (query_loss, accuracy)), (query_grad, direct) = jax.value_and_grad(
            problem.outer_loss, argnums=(0, 1), has_aux=True
        )(adapted, slow, task, meta_loss == "particles")
        optimality = partial(direction, support=task.support)
        solver = solve
        if precondition:
            inverse = approximate_inverse(adapted, slow, task.support)
            solver = partial(solve_right_preconditioned, solve=solve, inverse=inverse)
        (grads, through_adaptation), solve_info = root_vjp(
            optimality,
            adapted,
            (anchors, slow),
            query_grad,
            solver,
            key=key,
        )
        (slow_grads,) = pull_back(optax.tree.add(direct, through_adaptation))
        return combine(grads, slow_grads), inner_report(
            inner_info,
            query_loss=query_loss,
            query_accuracy=accuracy,
            meta_loss=None if meta_loss == "query" else value,
            solve_residual=solve_info.relative_residual,
            solve_steps=solve_info.num_steps,
        )

    adapt = make_adapt(problem, run_at_evaluation)
    return MetaLearner(problem.init, adapt, problem.predict, meta_grad)


@dataclasses.dataclass(frozen=True)
class ImplicitBmamlSettings(ParticleSettings):
    """Settings of `implicit_bmaml`, its system solved by preconditioned GMRES."""

    algorithm: ClassVar[str] = "implicit_bmaml"
    title: ClassVar[str] = "implicit BMAML"
    factory: ClassVar = staticmethod(implicit_bmaml)

    inner_rate: Positive = 0.001
    """Learning rate of the inner loop, of a sum over examples."""
    reg_strength: Positive = 20.0
    """Lambda, the strength of the proximal term; of a sum over examples."""
    meta_loss: Literal["particles", "query"] = "particles"
    """query is the loss of the particles' one prediction, particles the mean of their own."""
    gmres_steps: Count = 10
    """Steps of the linear solve."""

    def arguments(self) -> dict[str, Any]:
        """The arguments of the factory."""
        values = super().arguments()
        steps = values.pop("gmres_steps")
        solve = partial(solve_gmres, restart=steps, max_restarts=1)
        return values | {"solve": solve, "precondition": True}
