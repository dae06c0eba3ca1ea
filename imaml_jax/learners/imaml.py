"""Implicit MAML."""

import dataclasses
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from imaml_jax.bilevel.adaptive import adaptive_gradient
from imaml_jax.bilevel.curvature import damped, gauss_newton, hessian
from imaml_jax.bilevel.implicit import root_vjp
from imaml_jax.bilevel.inner import minimize, proximal_objective
from imaml_jax.bilevel.linear_solve import solve_cg_steihaug
from imaml_jax.bilevel.linear_system import Solve
from imaml_jax.learners.algorithm import (
    AnyInner,
    InnerSettings,
    NewtonOrNot,
    Solver,
    make_inner,
    make_solver,
)
from imaml_jax.learners.base import (
    FastPredicate,
    LossFn,
    MetaInfo,
    Statistics,
    check_steps,
    combine,
    inner_report,
    make_adapt,
)
from imaml_jax.learners.reg_strength import LearnedStrength, check_strength, spread
from imaml_jax.learners.settings import (
    NotNegative,
    Positive,
    Steps,
    When,
    check_arguments,
    check_value,
)
from imaml_jax.learners.supervised import supervised
from imaml_jax.types import Array, MetaLearner, PyTree

Curvature = Literal["hessian", "gauss_newton"]
_GRANULARITIES = {None: False, "one": True, "leaf": "leaf", "parameter": "parameter"}
_OF_PARTS = ("inner_rate", "cg_steps")  # of `inner` and of `solve`
_FIVE_CG_STEPS = partial(solve_cg_steihaug, tol=0.0, max_steps=5)


def imaml(
    network: Any,
    loss_fn: LossFn,
    *,
    inner: optax.GradientTransformation,
    num_steps: int,
    reg_strength: PyTree = 2.0,
    learn_reg_strength: bool | Literal["leaf", "parameter"] = False,
    solve: Solve = _FIVE_CG_STEPS,
    curvature: Curvature = "hessian",
    eval_num_steps: int | None = None,
    eval_reg_strength: PyTree | None = None,
    fast: FastPredicate | None = None,
    statistics: Statistics = "batch",
    accuracy: float | None = None,
    max_rounds: int = 10,
) -> MetaLearner:
    """MAML whose meta-gradient comes from the implicit function theorem, not from unrolling.

    The inner problem is `phi*(theta) = argmin_phi L^support(phi) + lambda/2 ||phi - theta||^2`, and
    `dF/dtheta = lambda (lambda I + H)^-1 grad L^query(phi*)` with `H` the Hessian of the support
    loss at `phi*`. Memory does not grow with the inner steps, and how `phi*` was found does
    not matter; found it must be: watch `inner_residual`, `solve_residual` and `min_curvature`.

    Parameters that are not adapted get `dF/dpsi - (d2L/dphi dpsi)^T u` with `u` the solution of the
    linear system.

    Args:
      network: `(init, apply)` pair, see `imaml_jax.networks.Network`.
      loss_fn: `(outputs, targets) -> scalar`, a mean over examples.
      inner: any Optax transform for the inner problem: `optax.sgd(rate)` with a rate below
        `2 / (largest curvature + lambda)`, `adaptive_gd`, `newton_cg()` (Hessian-free), ...
      num_steps: inner steps in training; with `accuracy`, those of a round.
      reg_strength: lambda, positive: a scalar or a tree prefix of the adapted parameters. May be
        traced, so that the factory can be called inside a function that is transformed; then it
        is not checked.
      learn_reg_strength: meta-learn lambda, from `reg_strength` on: the meta-parameters are then a
        `LearnedStrength`, whose gradient in log lambda is `-lambda (phi - theta)^T u`, with `u` the
        solution of the linear system. True learns what `reg_strength` holds: one lambda, or one for
        each branch of a tree. "leaf" learns one for each array of adapted parameters, "parameter"
        one for each of their entries.
      solve: a solver of `bilevel.linear_solve`; `partial(solve_cg, max_steps=5)` is the original
        description's, `solve_woodbury` is exact for the Gauss-Newton matrix.
      curvature: "hessian" (exact), or "gauss_newton": positive semi-definite whatever batch norm
        does, but the meta-gradient is biased where the residual curvature matters. `newton_cg`
        takes its directions with the same matrix.
      eval_num_steps: inner steps in `adapt`, whatever `accuracy` says; default `num_steps`.
      eval_reg_strength: lambda in `adapt`, 0 turns the proximal term off; default `reg_strength`.
      fast: which parameters are adapted, by path; default all.
      statistics: batch-norm mode of the query examples, see `learners.supervised.supervised`.
      accuracy: relative error of each meta-gradient, positive, instead of fixed step counts: rounds
        of `num_steps` inner steps and a linear solve follow one another until the estimate of its
        error, `gradient_error`, is within it, see `adaptive_gradient`. That takes lambda for the
        smallest curvature; `solve_woodbury` cannot serve it. None: one pass, no estimate.
      max_rounds: most rounds of a meta-gradient; 1 tells what error fixed step counts leave.

    Returns:
      The `MetaLearner`.

    Raises:
      ValueError: a setting out of its range.

    References:
      Rajeswaran, Finn, Kakade, Levine, "Meta-Learning with Implicit Gradients", NeurIPS 2019,
      Algorithms 1 and 2, Eq. 6.
    """
    steps = {"num_steps": num_steps, "eval_num_steps": eval_num_steps}
    check_arguments("imaml", ImamlSettings, steps)
    check_value("curvature", curvature, Curvature, "imaml: ")
    check_steps("imaml", max_rounds=max_rounds)
    if accuracy is not None and (isinstance(accuracy, bool) or not 0 < accuracy < np.inf):
        raise ValueError(
            f"imaml: accuracy={accuracy} must be positive and finite, or None for fixed steps"
        )
    check_strength(reg_strength, eval_reg_strength, learn_reg_strength)
    problem = supervised(network, loss_fn, fast=fast, statistics=statistics)
    objective = proximal_objective(problem.support_loss)

    def given_strength(params):
        dtype = jnp.result_type(*jax.tree.leaves(params))
        return jax.tree.map(lambda s: jnp.asarray(s, dtype), reg_strength)

    def init(key, example_inputs):
        params = problem.init(key, example_inputs)
        if not learn_reg_strength:
            return params
        strength = given_strength(params)
        if learn_reg_strength is not True:
            anchor, _ = problem.split(params)
            strength = jax.tree.map(partial(spread, learn_reg_strength), strength, anchor)
        return LearnedStrength(params, jax.tree.map(jnp.log, strength))

    def separate(meta_params):
        """The network's parameters, and lambda."""
        if not learn_reg_strength:
            return meta_params, given_strength(meta_params)
        return meta_params.params, jax.tree.map(jnp.exp, meta_params.log_reg_strength)

    def inner_curvature(params, anchor, strength, slow_params, support):
        del anchor
        if curvature == "hessian":
            operator = hessian(lambda p: problem.support_loss(p, slow_params, support), params)
        else:
            operator = gauss_newton(
                lambda p: problem.support_outputs(p, slow_params, support),
                lambda outputs: loss_fn(outputs, support.targets),
                params,
            )
        return damped(operator, strength)

    def run(fast_params, slow_params, support, strength, steps):
        return minimize(
            objective,
            fast_params,
            fast_params,
            strength,
            slow_params,
            support,
            tx=inner,
            num_steps=steps,
            curvature=inner_curvature,
        )

    def adapt(meta_params, support, key):
        params, strength = separate(meta_params)
        strength = strength if eval_reg_strength is None else eval_reg_strength

        def run_at_evaluation(fast_params, slow_params, support, key):
            del key
            return run(fast_params, slow_params, support, strength, eval_num_steps or num_steps)

        return make_adapt(problem, run_at_evaluation)(params, support, key)

    def gather(grads, slow_grads, log_strength_grad):
        meta_grads = combine(grads, slow_grads)
        if not learn_reg_strength:
            return meta_grads
        return LearnedStrength(meta_grads, log_strength_grad)

    def adaptive_meta_grad(meta_params, task, key, step):
        del step
        assert accuracy is not None
        params, strength = separate(meta_params)
        anchor, slow_params = problem.split(params)
        smallest = jnp.min(jnp.stack([jnp.min(x) for x in jax.tree.leaves(strength)]))

        def inner_objective(params, anchor, log_strength, slow_params):
            log_strength = log_strength if learn_reg_strength else lax.stop_gradient(log_strength)
            strength = jax.tree.map(jnp.exp, log_strength)
            return objective(params, anchor, strength, slow_params, task.support)

        def inner_matrix(params, anchor, log_strength, slow_params):
            del log_strength
            return inner_curvature(params, anchor, strength, slow_params, task.support)

        def query_loss(params, slow_params):
            return problem.query_loss(params, slow_params, task)

        log_strength = jax.tree.map(jnp.log, strength)
        _, (grads, log_strength_grad, slow_grads), adapted, found = adaptive_gradient(
            lambda params, anchor, log_strength, slow_params: query_loss(params, slow_params)[0],
            inner_objective,
            anchor,
            (anchor, log_strength, slow_params),
            accuracy=accuracy,
            strong_convexity=smallest,
            inner=inner,
            num_steps=num_steps,
            solve=solve,
            curvature=inner_matrix,
            max_rounds=max_rounds,
            key=key,
        )
        (loss, query_accuracy), query_grad = jax.value_and_grad(query_loss, has_aux=True)(
            adapted, slow_params
        )
        return gather(grads, slow_grads, log_strength_grad), MetaInfo(
            query_loss=loss,
            query_accuracy=query_accuracy,
            support_loss=inner_objective(adapted, anchor, log_strength, slow_params),
            inner_residual=found.inner_residual,
            solve_residual=found.solve_residual,
            solve_steps=found.solve_steps,
            min_curvature=found.min_curvature,
            cosine=_cosine(grads, query_grad),
            gradient_error=found.error,
            num_rounds=found.num_rounds,
            missed_accuracy=1.0 - found.converged,
        )

    def meta_grad(meta_params, task, key, step):
        del step
        params, strength = separate(meta_params)
        anchor, slow_params = problem.split(params)
        slow_params, pull_back = jax.vjp(lambda slow: problem.encode(slow, task), slow_params)
        adapted, inner_info = run(anchor, slow_params, task.support, strength, num_steps)
        (loss, accuracy), (query_grad, direct) = jax.value_and_grad(
            problem.query_loss, argnums=(0, 1), has_aux=True
        )(adapted, slow_params, task)
        (grads, strength_grad, through_adaptation), solve_info = root_vjp(
            lambda p, *args: jax.grad(objective)(p, *args, task.support),
            adapted,
            (anchor, strength, slow_params),
            query_grad,
            solve,
            symmetric=True,
            operator=inner_curvature(adapted, anchor, strength, slow_params, task.support),
            key=key,
        )
        (slow_grads,) = pull_back(optax.tree.add(direct, through_adaptation))
        log_strength_grad = optax.tree.mul(strength, strength_grad)
        return gather(grads, slow_grads, log_strength_grad), inner_report(
            inner_info,
            query_loss=loss,
            query_accuracy=accuracy,
            solve_residual=solve_info.relative_residual,
            solve_steps=solve_info.num_steps,
            min_curvature=solve_info.min_curvature,
            cosine=_cosine(grads, query_grad),
        )

    grad_of_task = meta_grad if accuracy is None else adaptive_meta_grad
    return MetaLearner(init, adapt, problem.predict, grad_of_task)


def _cosine(a: PyTree, b: PyTree) -> Array:
    product = jnp.asarray(optax.tree.vdot(a, b))
    norms = optax.tree.norm(a) * optax.tree.norm(b)
    return product / jnp.maximum(norms, jnp.finfo(product.dtype).tiny)


@dataclasses.dataclass(frozen=True)
class ImamlSettings(InnerSettings):
    """Settings of `imaml`."""

    algorithm: ClassVar[str] = "imaml"
    title: ClassVar[str] = "iMAML, gradient descent"
    factory: ClassVar = staticmethod(imaml)

    reg_strength: Positive = 2.0
    """Lambda, the strength of the proximal term."""
    eval_reg_strength: NotNegative | None = None
    """Lambda at validation and test; None for the same value, 0 for no proximal term."""
    learn_reg_strength: Literal["one", "leaf", "parameter"] | None = None
    """Learns one lambda, one for each array of parameters, or one for each parameter."""
    curvature: Curvature = "hessian"
    """Curvature matrix of the linear system."""
    solve: Solver = "cg"
    """Solver of the linear system; woodbury needs gauss_newton."""
    cg_steps: Annotated[
        Steps,
        When(lambda own: own.solve != "woodbury" or own.inner == "newton_cg", "solve=woodbury"),
    ] = 5
    """Steps of that solver, and CG steps of a Newton direction."""
    inner: AnyInner = "sgd"
    """Inner optimiser; newton_cg is Hessian-free, nesterov is SGD with momentum 0.8."""
    inner_rate: NewtonOrNot = 0.1
    """Learning rate of the inner loop."""

    def check_together(self) -> None:
        """Raises ValueError for Woodbury's formula with the Hessian."""
        if (self.solve, self.curvature) == ("woodbury", "hessian"):
            raise ValueError(
                "solve=woodbury needs the low rank of curvature=gauss_newton, not curvature="
                "hessian; change either, for example to solve=cg_steihaug"
            )

    def arguments(self) -> dict[str, Any]:
        """The arguments of the factory."""
        values = super().arguments() | {
            "inner": make_inner(self.inner, self.inner_rate, cg_steps=self.cg_steps),
            "learn_reg_strength": _GRANULARITIES[self.learn_reg_strength],
            "solve": make_solver(self.solve, self.cg_steps),
        }
        return {name: value for name, value in values.items() if name not in _OF_PARTS}

    def before_adaptation(self, meta_params: PyTree) -> PyTree:
        """The network's parameters."""
        return meta_params if self.learn_reg_strength is None else meta_params.params
