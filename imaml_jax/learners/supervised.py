"""The supervised few-shot problem as learners see it: a network, a loss, what is adapted."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp

from imaml_jax.learners.base import (
    Adapted,
    FastPredicate,
    LossFn,
    Statistics,
    accuracy_of,
    combine,
    is_head,
    partition,
    path_string,
)
from imaml_jax.types import Array, Batch, Params, PyTree, Task


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
