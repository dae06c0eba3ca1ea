"""What every learner shares: the supervised few-shot problem, and the fast/slow split."""

import inspect
from collections.abc import Callable
from functools import partial
from numbers import Integral
from typing import Any, Literal, NamedTuple, get_args

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


class Encoded(NamedTuple):
    """Slow parameters, and the features that they give where only a network's head is adapted."""

    params: PyTree
    support: Array
    query: Array | None


class Problem(NamedTuple):
    """A supervised few-shot problem as learners see it; parameters are split into fast and slow.

    Attributes:
      init: `(key, example_inputs) -> meta_params`.
      split: `meta_params -> (fast, slow)`, each with None where the other has a leaf.
      encode: `(slow, task) -> slow`, with whatever of the task does not depend on the fast ones
        computed once; the functions below take either. `task.query` may be None.
      support_loss: `(fast, slow, batch) -> scalar`.
      query_loss: `(fast, slow, task) -> (scalar, accuracy or None)`.
      support_outputs: `(fast, slow, batch) -> outputs`, whose `loss_fn` is `support_loss`.
      query_outputs: `(fast, slow, task) -> outputs`, whose `loss_fn` is `query_loss`.
      finish: `(fast, slow, support) -> Adapted`.
      predict: `(adapted, inputs) -> outputs`.
    """

    init: Callable[[Array, Any], Params]
    split: Callable[[Params], tuple[PyTree, PyTree]]
    encode: Callable[[PyTree, Task], PyTree]
    support_loss: Callable[[PyTree, PyTree, Batch], Array]
    query_loss: Callable[[PyTree, PyTree, Task], tuple[Array, Array | None]]
    support_outputs: Callable[[PyTree, PyTree, Batch], Any]
    query_outputs: Callable[[PyTree, PyTree, Task], Any]
    finish: Callable[[PyTree, PyTree, Batch], Adapted]
    predict: Callable[[Adapted, Any], Any]


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


def supervised(
    network: Any,
    loss_fn: LossFn,
    *,
    fast: FastPredicate | None = None,
    statistics: Statistics = "batch",
) -> Problem:
    """The supervised problem: a network, a loss, what is adapted, and the batch-norm mode.

    Args:
      network: `(init, apply)` pair, see `imaml_jax.networks.Network`.
      loss_fn: `(outputs, targets) -> scalar`, a mean over examples.
      fast: predicate on the path of a parameter, true for the adapted ones; None adapts all.
      statistics: whose batch statistics normalise the query examples. "batch": of the query batch
        itself (transductive, as in MAML and iMAML); "support": of the support set; "joint": of both
        together; "support_and_one": of the support set and that one example (Reptile). Support
        examples are always normalised by the support set's own.

    Returns:
      The `Problem`.

    Raises:
      ValueError: unknown `statistics`, or one that the network cannot serve.
    """
    if statistics not in get_args(Statistics):
        raise ValueError(f"statistics={statistics!r} must be one of {get_args(Statistics)}")
    if statistics == "support" and not _takes_weights(network.apply):
        raise ValueError(
            "statistics='support' needs a network whose apply takes statistics_weights, as conv4's "
            "does; without batch norm all modes are the same: leave it at 'batch'"
        )
    is_fast = fast or (lambda path: True)
    outputs_given_support = partial(_apply_given_support, network.apply, statistics)

    def init(key, example_inputs):
        params = network.init(key, example_inputs)
        if not jax.tree.leaves(partition(params, is_fast)[0]):
            paths = [path_string(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)]
            raise ValueError(f"fast selects no parameter; there are {paths}")
        return params

    def encode(slow, task):
        if statistics != "batch" or not _is_head_only(network, slow):
            return slow
        query = None if task.query is None else network.features(slow, task.query.inputs)
        return Encoded(slow, network.features(slow, task.support.inputs), query)

    def support_outputs(fast, slow, batch):
        if isinstance(slow, Encoded):
            return network.head(combine(fast, slow.params), slow.support)
        return network.apply(combine(fast, slow), batch.inputs)

    def support_loss(fast, slow, batch):
        return loss_fn(support_outputs(fast, slow, batch), batch.targets)

    def query_outputs(fast, slow, task):
        if isinstance(slow, Encoded):
            return network.head(combine(fast, slow.params), slow.query)
        params = combine(fast, slow)
        return outputs_given_support(params, task.support.inputs, task.query.inputs)

    def query_loss(fast, slow, task):
        outputs = query_outputs(fast, slow, task)
        return loss_fn(outputs, task.query.targets), accuracy_of(outputs, task.query.targets)

    def finish(fast, slow, support):
        kept = None if statistics == "batch" else support.inputs
        return Adapted(combine(fast, slow.params if isinstance(slow, Encoded) else slow), kept)

    def predict(adapted, inputs):
        return outputs_given_support(adapted.params, adapted.support_inputs, inputs)

    return Problem(
        init,
        lambda params: partition(params, is_fast),
        encode,
        support_loss,
        query_loss,
        support_outputs,
        query_outputs,
        finish,
        predict,
    )


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


def _is_head_only(network: Any, slow: PyTree) -> bool:
    """Whether the network has a head, and only parameters of it are missing from the slow ones."""
    if getattr(network, "head", None) is None:
        return False
    leaves = jax.tree_util.tree_leaves_with_path(slow, is_leaf=lambda x: x is None)
    return all(is_head(path_string(path)) for path, leaf in leaves if leaf is None)


def _takes_weights(apply: Callable[..., Any]) -> bool:
    return "statistics_weights" in inspect.signature(apply).parameters


def _apply_given_support(apply, statistics: Statistics, params, support_inputs, inputs):
    if statistics == "batch":
        return apply(params, inputs)
    num_support = support_inputs.shape[0]
    if statistics == "support_and_one":

        def apply_one(example):
            return apply(params, jnp.concatenate([support_inputs, example[None]]))[-1]

        return jax.vmap(apply_one)(inputs)
    both = jnp.concatenate([support_inputs, inputs])
    if statistics == "joint":
        return apply(params, both)[num_support:]
    weights = (jnp.arange(both.shape[0]) < num_support).astype(both.dtype)
    return apply(params, both, statistics_weights=weights)[num_support:]


def check_steps(name: str, **values: Any) -> None:
    """Raises ValueError for the first count that is not an integer of at least 1.

    None stands for a default in `batch_size` and what is of evaluation alone.
    """
    for argument, value in values.items():
        if value is None and argument.startswith(("batch_size", "eval_")):
            continue
        if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 1:
            raise ValueError(f"{name}: {argument}={value!r} must be an integer >= 1")
