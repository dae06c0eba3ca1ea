"""The meta-gradient of the code that was published with iMAML, which is not the paper's."""

import dataclasses
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import jax
import optax

from imaml_jax.bilevel.curvature import damped, hessian
from imaml_jax.bilevel.inner import minimize
from imaml_jax.bilevel.linear_solve import solve_cg
from imaml_jax.learners.algorithm import InnerSettings
from imaml_jax.learners.base import (
    LossFn,
    Statistics,
    inner_report,
    make_adapt,
)
from imaml_jax.learners.settings import NotNegative, Positive, Range, check_arguments
from imaml_jax.learners.supervised import supervised
from imaml_jax.types import MetaLearner

_LAMBDA_DAMPING = 10.0  # a constant of the code


def imaml_dev(
    network: Any,
    loss_fn: LossFn,
    *,
    inner_rate: float,
    num_steps: int,
    reg_strength: float = 2.0,
    cg_damping: float = 1.0,
    cg_steps: int = 5,
    eval_num_steps: int | None = None,
    statistics: Statistics = "batch",
) -> MetaLearner:
    """What the published code of iMAML computes, for comparison with numbers that it gave.

    Gradient descent on the support loss without the proximal term; in training one step more, on
    that term alone: `phi <- phi - rate lambda (phi - theta)`. The meta-gradient is the solution of
    `((1 + damping) I + H / (lambda + 10)) g = grad L^query(phi)`, close to first-order MAML's; the
    paper has `(I + H / lambda) g = grad L^query(phi*)`, which `imaml` solves. All parameters are
    adapted.

    Args:
      network: `(init, apply)` pair, see `imaml_jax.networks.Network`.
      loss_fn: `(outputs, targets) -> scalar`, a mean over examples.
      inner_rate: learning rate of the descent, positive.
      num_steps: inner steps in training, without the last one.
      reg_strength: lambda, at least 0.
      cg_damping: at least 0.
      cg_steps: steps of conjugate gradient, at least 2.
      eval_num_steps: inner steps in `adapt`; default `num_steps`.
      statistics: batch-norm mode of the query examples, see `learners.supervised.supervised`.

    Returns:
      The `MetaLearner`; `inner_residual` is that of the support loss before the last step.

    Raises:
      ValueError: a setting out of its range.

    References:
      github.com/aravindr93/imaml_dev, `examples/omniglot_implicit_maml.py` and
      `Learner.matrix_evaluator`; the defaults are its README's.
    """
    check_arguments("imaml_dev", ImamlDevSettings, locals())
    problem = supervised(network, loss_fn, statistics=statistics)
    descend = partial(minimize, problem.support_loss, tx=optax.sgd(inner_rate))

    def run_at_evaluation(fast_params, slow_params, support, key):
        del key
        steps = eval_num_steps or num_steps
        return descend(fast_params, slow_params, support, num_steps=steps)

    def meta_grad(meta_params, task, key, step):
        del key, step
        anchor, slow_params = problem.split(meta_params)
        adapted, inner_info = descend(anchor, slow_params, task.support, num_steps=num_steps)
        adapted = jax.tree.map(
            lambda phi, theta: phi - inner_rate * reg_strength * (phi - theta), adapted, anchor
        )
        (loss, accuracy), query_grad = jax.value_and_grad(problem.query_loss, has_aux=True)(
            adapted, slow_params, task
        )
        # The code's system times lambda + 10, which conjugate gradient does not notice.
        scale = reg_strength + _LAMBDA_DAMPING
        curvature = hessian(lambda p: problem.support_loss(p, slow_params, task.support), adapted)
        grads, solve_info = solve_cg(
            damped(curvature, (1 + cg_damping) * scale),
            optax.tree.scale(scale, query_grad),
            tol=0.0,
            max_steps=cg_steps,
        )
        return grads, inner_report(
            inner_info,
            query_loss=loss,
            query_accuracy=accuracy,
            solve_residual=solve_info.relative_residual,
        )

    adapt = make_adapt(problem, run_at_evaluation)
    return MetaLearner(problem.init, adapt, problem.predict, meta_grad)


@dataclasses.dataclass(frozen=True)
class ImamlDevSettings(InnerSettings):
    """Settings of `imaml_dev`, which goes by the name of the algorithm that it is published as."""

    algorithm: ClassVar[str] = "imaml"
    title: ClassVar[str] = "iMAML, published code"
    factory: ClassVar = staticmethod(imaml_dev)

    adapts: Literal["all"] = "all"
    """Parameters that the inner loop adapts."""
    inner: Literal["sgd"] = "sgd"
    """Inner optimiser."""
    inner_rate: Positive = 0.1
    """Learning rate of the inner loop."""
    reg_strength: NotNegative = 2.0
    """Lambda, the strength of the last inner step's pull to the start."""
    cg_damping: NotNegative = 1.0
    """Damping of the linear system."""
    cg_steps: Annotated[int, Range(least=2)] = 5
    """Steps of conjugate gradient; with one the code takes the query gradient, as fomaml does."""

    def arguments(self) -> dict[str, Any]:
        """The arguments of the factory, without those that it has no choice of."""
        values = super().arguments()
        return {name: values[name] for name in values if name not in ("fast", "inner")}
