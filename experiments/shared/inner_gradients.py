"""Gradients along an inner loop: combinations as meta-gradients, and their inner products."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from imaml_jax.bilevel.inner import mini_batches
from imaml_jax.learners.base import MetaInfo
from imaml_jax.training import mapping
from imaml_jax.types import Batch, MetaLearner, Task

NUM_BATCHES = 4
Loss = Callable[[Any, Batch], jax.Array]


def combination(
    adapting: MetaLearner, loss: Loss, weights: Sequence[float], rate: float, batch_size: int
) -> MetaLearner:
    """The learner `adapting` with the meta-gradient `sum_i weights[i] g_i`."""

    def meta_grad(meta_params, task, key, step):
        del step
        batches = task_batches(key, task, batch_size)
        batches = jax.tree.map(lambda x: x[: len(weights)], batches)
        grads, losses = inner_gradients(loss, meta_params, batches, rate)
        grads = jax.tree.map(lambda g: sum(w * g[i] for i, w in enumerate(weights) if w), grads)
        return grads, MetaInfo(support_loss=losses[-1])

    return adapting._replace(meta_grad=meta_grad)


def inner_gradients(loss: Loss, params: Any, batches: Batch, rate: float) -> tuple[Any, jax.Array]:
    """The gradients g_1, ..., g_k, stacked, along SGD with one step a mini-batch, and the losses.

    `batches` holds arrays `[k, batch_size, ...]`.
    """

    def step(params, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        return jax.tree.map(lambda p, g: p - rate * g, params, grads), (grads, value)

    return jax.lax.scan(step, params, batches)[1]


def task_batches(key: jax.Array, task: Task, batch_size: int) -> Batch:
    """`NUM_BATCHES` mini-batches of a task's support and query examples, shuffled together."""
    examples = jax.tree.map(lambda *parts: jnp.concatenate(parts), task.support, task.query)
    return mini_batches(key, examples, NUM_BATCHES, batch_size)


def taylor(weights: Sequence[float]) -> float:
    """The weight of -alpha AvgGradInner over that of AvgGrad in the expected combination."""
    return sum(i * w for i, w in enumerate(weights)) / sum(weights)


def make_measure(
    loss: Loss, sample: mapping.Sample, batch_size: int
) -> Callable[[Any, jax.Array], dict[str, float]]:
    """Makes `(params, key) -> products` of the gradients on the task batch that `sample` draws."""

    def gradients(params, task, key):
        batches = task_batches(key, task, batch_size)
        return jax.lax.map(lambda b: ravel_pytree(jax.grad(loss)(params, b))[0], batches)

    def gram(params, key):
        found = mapping.map_over_tasks(gradients)(params, *mapping.draw_tasks(sample, key, 0))
        flat = found.reshape(-1, found.shape[-1])
        return jnp.matmul(flat, flat.T, precision=jax.lax.Precision.HIGHEST)

    compiled = mapping.jit_lifted(gram)
    return lambda params, key: products(compiled(params, key))


def products(gram: Any) -> dict[str, float]:
    """Mean inner product and cosine over the pairs of gradients of one task, and of two tasks.

    `gram` holds the inner products `[n, n]` of `NUM_BATCHES` gradients of each task in turn.
    """
    gram = np.asarray(gram, np.float64)
    norms = np.sqrt(np.diag(gram))
    task = np.arange(len(gram)) // NUM_BATCHES
    same = task[:, None] == task
    within, cosines = same & ~np.eye(len(gram), dtype=bool), gram / np.outer(norms, norms)
    return {
        "within": float(gram[within].mean()),
        "between": float(gram[~same].mean()),
        "within_cosine": float(cosines[within].mean()),
        "between_cosine": float(cosines[~same].mean()),
    }
