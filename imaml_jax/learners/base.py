"""What every learner shares: its report, losses, the split into adapted and other parameters."""

from collections.abc import Callable
from numbers import Integral
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from imaml_jax.bilevel.inner import MinimizeInfo
from imaml_jax.types import Array, Batch, Params, PyTree, Task

LossFn = Callable[[Any, Any], Array]
FastPredicate = Callable[[str], bool]
Average = Callable[[Array], Array]
AverageOption = Average | Literal["auto"] | None
Statistics = Literal["batch", "support", "joint", "support_and_one"]


class MetaInfo(NamedTuple):
    """What a user must see to trust a meta-gradient; scalars, None where a quantity does not exist.

    Attributes:
      query_loss: loss on the query set after adaptation.
      query_accuracy: accuracy there, for integer targets.
      support_loss: inner objective at the end of adaptation.
      inner_residual: norm of its gradient there relative to the start; an implicit gradient needs
        it small.
      solve_residual: relative residual of the linear solve.
      solve_steps: its iterations.
      min_curvature: smallest curvature it met; at or below 0 the inner point is no minimum.
      cosine: between the meta-gradient and the plain query gradient (first-order MAML's).
      gradient_error: estimated error of the meta-gradient relative to its norm.
      num_rounds: rounds that an adaptive meta-gradient took.
      missed_accuracy: 1 where they were not enough, 0 where they were.
      kl_divergence: of the distribution that training samples from the prior, before its weight.
      meta_loss: what was differentiated, where that is not `query_loss`; Reptile differentiates
        nothing.
    """

    query_loss: Array | None = None
    query_accuracy: Array | None = None
    support_loss: Array | None = None
    inner_residual: Array | None = None
    solve_residual: Array | None = None
    solve_steps: Array | None = None
    min_curvature: Array | None = None
    cosine: Array | None = None
    gradient_error: Array | None = None
    num_rounds: Array | None = None
    missed_accuracy: Array | None = None
    kl_divergence: Array | None = None
    meta_loss: Array | None = None


class Adapted(NamedTuple):
    """Adapted parameters, and the support inputs where batch statistics need them to predict."""

    params: Params
    support_inputs: Any


def is_right(outputs: Array, targets: Array) -> Array:
    """Which examples have the largest logit at their label; none with a logit that is NaN.

    Args:
      outputs: `[..., classes]` logits.
      targets: `[...]` integer labels.
    """
    return (outputs.argmax(-1) == targets) & ~jnp.isnan(outputs).any(-1)


def accuracy(outputs: Array, targets: Array) -> Array:
    """The share of examples that are right, see `is_right`.

    Args:
      outputs: `[n, classes]` logits.
      targets: `[n]` integer labels.
    """
    return jnp.mean(is_right(outputs, targets), dtype=jnp.float32)


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Mean softmax cross-entropy of `[n, classes]` logits and `[n]` integer labels."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def mean_squared_error(outputs: Array, targets: Array) -> Array:
    """Mean of the squared differences of two arrays of one shape.

    Raises:
      ValueError: the shapes differ; broadcast, the mean would be that of all pairs.
    """
    if outputs.shape != targets.shape:
        raise ValueError(
            f"outputs and targets must have one shape; got {outputs.shape} and {targets.shape}"
        )
    return jnp.mean(jnp.square(outputs - targets))


def mean_outputs(outputs: Array) -> Array:
    """The mean over samples `[samples, n, ...]` of the outputs of a regressor."""
    return outputs.mean(0)


def mixture_logits(logits: Array) -> Array:
    """The averaged predictive of a classifier: log of the mean probabilities.

    Args:
      logits: `[samples, n, classes]`.

    Returns:
      `[n, classes]` normalised log-probabilities.
    """
    log_probabilities = jax.nn.log_softmax(logits)
    return jax.nn.logsumexp(log_probabilities, axis=0) - jnp.log(logits.shape[0])


def fitting_average(name: str, average: AverageOption, loss_fn: LossFn) -> Average:
    """One prediction of several samples' outputs.

    Args:
      name: of the learner, for messages.
      average: a function, or "auto" or None for the one that fits the loss.
      loss_fn: `cross_entropy` for `mixture_logits`, `mean_squared_error` for `mean_outputs`.

    Returns:
      `[samples, n, ...] -> [n, ...]`.

    Raises:
      ValueError: another loss, or another word.
    """
    if callable(average):
        return average
    if average not in ("auto", None):
        raise ValueError(f"{name}: average={average!r} must be a function, 'auto' or None")
    if loss_fn is cross_entropy:
        return mixture_logits
    if loss_fn is mean_squared_error:
        return mean_outputs
    raise ValueError(
        f"{name}: average={average!r} knows cross_entropy and mean_squared_error only; with "
        "another loss give a function of outputs [M, n, ...], as learners.base.mixture_logits"
    )


def accuracy_of(outputs: Array, targets: Array) -> Array | None:
    """The share of integer targets whose logit is the largest; None for other targets."""
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        return None
    return accuracy(outputs, targets)


def partition(params: Params, fast: FastPredicate) -> tuple[PyTree, PyTree]:
    """Splits parameters by their path.

    Args:
      params: any pytree.
      fast: predicate on a path such as "block_0/scale"; true for adapted parameters.

    Returns:
      `(fast, slow)`: two trees like `params`, with None where the other has the leaf.
    """

    def select(wanted: bool) -> PyTree:
        return jax.tree_util.tree_map_with_path(
            lambda path, x: x if bool(fast(path_string(path))) is wanted else None, params
        )

    return select(True), select(False)


def combine(fast: PyTree, slow: PyTree) -> Params:
    """Inverse of `partition`."""
    return jax.tree.map(lambda f, s: s if f is None else f, fast, slow, is_leaf=lambda x: x is None)


def is_head(path: str) -> bool:
    """Whether a parameter is of a network's head, as `networks.Network` has it."""
    return path.startswith("head/")


def is_norm(path: str) -> bool:
    """Whether a parameter is the scale or offset of a norm, as `networks` names them."""
    return path.endswith(("/scale", "/offset"))


def learned_rates(meta_params: PyTree) -> PyTree:
    """For each meta-parameter whether it is an inner rate that `mamlpp` learns."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path_string(path).startswith("rates/"), meta_params
    )


def path_string(path: tuple) -> str:
    """A tree path as "block_0/scale"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def make_adapt(
    problem: Any, run: Callable[[PyTree, PyTree, Batch, Array], tuple[PyTree, MinimizeInfo]]
) -> Callable[[Params, Batch, Array], tuple[Adapted, MetaInfo]]:
    """The `adapt` of a learner.

    Args:
      problem: a record with `split` and `finish`, as `Problem` is.
      run: `(fast, slow, support, key) -> (adapted fast, MinimizeInfo)`, by the evaluation settings.

    Returns:
      `(meta_params, support, key) -> (Adapted, MetaInfo)`.
    """

    def adapt(meta_params, support, key):
        fast, slow = problem.split(meta_params)
        slow = problem.encode(slow, Task(support, None))
        adapted, info = run(fast, slow, support, key)
        return problem.finish(adapted, slow, support), inner_report(info)

    return adapt


def inner_report(info: MinimizeInfo, **others: Array | None) -> MetaInfo:
    """The `MetaInfo` of an inner solve, and what else is known."""
    return MetaInfo(support_loss=info.loss, inner_residual=info.relative_residual, **others)


def check_steps(name: str, **values: Any) -> None:
    """Raises ValueError for the first count that is not an integer of at least 1.

    None stands for a default in `batch_size` and what is of evaluation alone.
    """
    for argument, value in values.items():
        if value is None and argument.startswith(("batch_size", "eval_")):
            continue
        if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 1:
            raise ValueError(f"{name}: {argument}={value!r} must be an integer >= 1")
