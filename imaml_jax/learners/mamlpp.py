"""MAML++."""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import lax

from imaml_jax.learners.algorithm import StepSettings
from imaml_jax.learners.base import (
    FastPredicate,
    LossFn,
    MetaInfo,
    Statistics,
    is_norm,
    partition,
    path_string,
)
from imaml_jax.learners.settings import Count, Positive, Range, Steps, check_arguments, check_value
from imaml_jax.learners.supervised import supervised
from imaml_jax.types import Array, MetaLearner, PyTree

_HUNDREDTHS = 100  # epochs of a run, whatever its length


class LearnedRates(NamedTuple):
    """Meta-parameters of a MAML++ that learns its inner rates.

    Attributes:
      params: the network's; those with a value of their own for each step have an axis
        `[num_steps, ...]` in front.
      rates: `[num_steps]` for each array of adapted parameters, None for the others.
    """

    params: PyTree
    rates: PyTree


def multi_step_weights(epoch: Array | int, num_steps: int, num_epochs: int) -> Array:
    """Weights of the query losses after each inner step.

    From equal weights they move towards the last step, linearly in the epoch.

    Args:
      epoch: from 0.
      num_steps: inner steps `K`.
      num_epochs: after so many all the weight is on the last step.

    Returns:
      `[num_steps]`; their sum is 1.

    References:
      Antoniou et al., ICLR 2019, section 4, and its code, whose floor of 0.03 / K this has.
    """
    share = 1 / num_steps
    early = jnp.maximum(share - epoch * share / num_epochs, 0.03 * share)
    early = jnp.where(epoch < num_epochs, early, 0.0)
    return jnp.full(num_steps, early).at[-1].set(1 - (num_steps - 1) * early)


def mamlpp(
    network: Any,
    loss_fn: LossFn,
    *,
    inner_rate: float,
    num_steps: int,
    eval_num_steps: int | None = None,
    learn_rates: bool = True,
    multi_step_epochs: int = 10,
    first_order_epochs: int = 0,
    epoch_length: int = 500,
    per_step: FastPredicate | None = is_norm,
    fast: FastPredicate | None = None,
    statistics: Statistics = "batch",
    remat: bool = True,
) -> MetaLearner:
    """MAML with what its authors found to steady and speed it up, each a switch of its own.

    Step `i` of the inner loop is `phi_t <- phi_t - rate_ti grad_t L^support(phi)`, with a rate for
    each array `t` of adapted parameters. The outer loss is the weighted sum over steps of
    `L^query(phi_i)`. With `learn_rates=False`, `multi_step_epochs=0` and `per_step=None` this is
    `maml` with `optax.sgd(inner_rate)`. The sixth part, cosine annealing, is the outer optimiser's.

    Args:
      network: `(init, apply)` pair, see `imaml_jax.networks.Network`.
      loss_fn: `(outputs, targets) -> scalar`, a mean over examples.
      inner_rate: of every inner step at the start.
      num_steps: inner steps, in training and in `adapt`.
      eval_num_steps: the same number or None: there are rates and norms for no other. Any, where
        neither is learned for each step.
      learn_rates: meta-learn them; the meta-parameters are then `LearnedRates`. Free in sign.
      multi_step_epochs: epochs with losses after every step, see `multi_step_weights`; 0 for none.
      first_order_epochs: epochs with first-order gradients, before the second-order ones.
      epoch_length: meta-steps of an epoch.
      per_step: which parameters, by path, have a value for each step and are not adapted; default
        the scales and offsets of norms. The query set is judged with those of the update before.
        None for none.
      fast: which of the other parameters are adapted, by path; default all.
      statistics: batch-norm mode of the query examples, see `learners.supervised.supervised`.
      remat: recompute each inner step in the backward pass instead of storing its activations.

    Returns:
      The `MetaLearner`. `query_loss` in its info is that after the last step.

    Raises:
      ValueError: a setting out of its range; when called, meta-parameters of another number of
        steps, or not of the kind that `learn_rates` makes.

    References:
      Antoniou, Edwards, Storkey, "How to train your MAML", ICLR 2019, section 4.
    """
    check_arguments("mamlpp", MamlppSettings, locals())
    check_value("eval_num_steps", eval_num_steps, Steps | None, "mamlpp: ")
    check_value("epoch_length", epoch_length, Count, "mamlpp: ")
    if (learn_rates or per_step) and eval_num_steps not in (None, num_steps):
        raise ValueError(
            f"mamlpp: eval_num_steps={eval_num_steps} must be num_steps={num_steps}: rates and "
            "norms were learned for these steps. Train with as many as you evaluate with"
        )
    has_rows = per_step or (lambda path: False)
    problem = supervised(
        network,
        loss_fn,
        fast=lambda path: not has_rows(path) and (fast is None or bool(fast(path))),
        statistics=statistics,
    )

    def on_rows(fun: Callable[[Array], Array], params: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(
            lambda path, x: fun(x) if has_rows(path_string(path)) else x, params
        )

    def at_step(slow_params, step):
        return on_rows(lambda x: x[step], slow_params)

    def init(key, example_inputs):
        params = problem.init(key, example_inputs)
        params = on_rows(lambda x: jnp.broadcast_to(x, (num_steps, *x.shape)), params)
        if not learn_rates:
            return params
        return LearnedRates(params, constant_rates(problem.split(params)[0], num_steps))

    def constant_rates(fast_params, steps):
        return jax.tree.map(lambda x: jnp.full(steps, inner_rate, x.dtype), fast_params)

    def separate(meta_params, steps=num_steps):
        """Fast and slow parameters, and the rates."""
        if isinstance(meta_params, LearnedRates) is not bool(learn_rates):
            expected = "LearnedRates" if learn_rates else "the network's parameters"
            raise ValueError(
                f"mamlpp: meta_params is a {type(meta_params).__name__}, and learn_rates="
                f"{learn_rates} takes {expected}, as init makes them; give those, or change "
                "learn_rates"
            )
        params, rates = meta_params if learn_rates else (meta_params, None)
        for each in jax.tree.leaves((partition(params, has_rows)[0], rates)):
            if each.shape[:1] != (num_steps,):  # past its end, an index would be the last
                raise ValueError(
                    f"mamlpp: num_steps={num_steps} must be that of meta_params, whose rates or "
                    f"norms [num_steps, ...] have the shape {each.shape}: rates and norms were "
                    "learned for these steps. Train with as many as you evaluate with"
                )
        fast_params, slow_params = problem.split(params)
        if not learn_rates:
            rates = constant_rates(fast_params, steps)
        return fast_params, slow_params, rates

    def unroll(
        fast_params, slow_params, rates, support, judge, steps=num_steps, first_order=False
    ) -> tuple[PyTree, Any]:
        """Parameters after the last step, and what `judge` says of those after each."""

        def update(params, step):
            now = at_step(slow_params, step)
            grads = jax.grad(problem.support_loss)(params, now, support)
            if first_order:
                grads = lax.stop_gradient(grads)
            params = jax.tree.map(lambda p, g, r: p - r[step] * g, params, grads, rates)
            return params, judge(params, now)

        update = jax.checkpoint(update, prevent_cse=False) if remat else update
        return lax.scan(update, fast_params, jnp.arange(steps))

    def adapt(meta_params, support, key):
        del key
        steps = eval_num_steps or num_steps
        fast_params, slow_params, rates = separate(meta_params, steps)
        adapted, _ = unroll(fast_params, slow_params, rates, support, _say_nothing, steps)
        last = at_step(slow_params, num_steps - 1)
        info = MetaInfo(support_loss=problem.support_loss(adapted, last, support))
        return problem.finish(adapted, last, support), info

    def grad_of_task(meta_params, task, epoch, multi_step, first_order):
        def judge(params, slow_params):
            return problem.query_loss(params, slow_params, task)

        def outer_loss(meta_params):
            fast_params, slow_params, rates = separate(meta_params)
            adapted, outcomes = unroll(
                fast_params,
                slow_params,
                rates,
                task.support,
                judge if multi_step else _say_nothing,
                first_order=first_order,
            )
            if not multi_step:
                loss, accuracy = judge(adapted, at_step(slow_params, num_steps - 1))
                return loss, (loss, accuracy)
            losses, accuracies = outcomes
            weights = multi_step_weights(epoch, num_steps, multi_step_epochs).astype(losses.dtype)
            last = losses[-1], None if accuracies is None else accuracies[-1]
            return weights @ losses, last

        (value, last), grads = jax.value_and_grad(outer_loss, has_aux=True)(meta_params)
        return grads, MetaInfo(*last, meta_loss=value if multi_step_epochs else None)

    def meta_grad(meta_params, task, key, step):
        del key
        epoch = step // epoch_length

        def in_phase(num_epochs, run):
            """`run(True)` in the first epochs, `run(False)` after them."""
            if num_epochs == 0:
                return run(False)
            return lax.cond(epoch < num_epochs, lambda: run(True), lambda: run(False))

        return in_phase(
            multi_step_epochs,
            lambda multi_step: in_phase(
                first_order_epochs,
                lambda first: grad_of_task(meta_params, task, epoch, multi_step, first),
            ),
        )

    return MetaLearner(init, adapt, problem.predict, meta_grad)


def _say_nothing(params: PyTree, slow_params: PyTree) -> None:
    del params, slow_params


@dataclasses.dataclass(frozen=True)
class MamlppSettings(StepSettings):
    """Settings of `mamlpp`."""

    algorithm: ClassVar[str] = "mamlpp"
    title: ClassVar[str] = "MAML++"
    factory: ClassVar = staticmethod(mamlpp)

    inner: Literal["sgd"] = "sgd"
    """Inner optimiser."""
    inner_rate: Positive = 0.1
    """Learning rate of every inner step at the start."""
    learn_rates: bool = True
    """Learns the inner rates, one for each array and step."""
    per_step_norm: bool = True
    """Whether the norms have a scale and an offset for each inner step."""
    multi_step_epochs: Annotated[int, Range(least=0)] = 10
    """Epochs with a loss after every inner step."""
    first_order_epochs: Annotated[int, Range(least=0)] = 0
    """Epochs with first-order gradients, before the second-order ones."""
    epoch_length: Count | None = None
    """Meta-steps of an epoch; None for a hundredth of the run."""

    def for_run(self, meta_steps: int) -> Self:
        """With the length of an epoch."""
        length = self.epoch_length or max(1, meta_steps // _HUNDREDTHS)
        return dataclasses.replace(self, epoch_length=length)

    def arguments(self) -> dict[str, Any]:
        """The arguments of the factory, which has gradient descent alone."""
        values = super().arguments()
        if self.epoch_length is None:
            del values["epoch_length"]
        per_step = is_norm if values.pop("per_step_norm") else None
        return {n: x for n, x in values.items() if n != "inner"} | {"per_step": per_step}

    def before_adaptation(self, meta_params: PyTree) -> PyTree:
        """The network's parameters."""
        return meta_params.params if self.learn_rates else meta_params
