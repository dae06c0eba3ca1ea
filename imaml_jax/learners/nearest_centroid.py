"""The nearest class mean, with which every method on fixed features is to be compared."""

import jax
import jax.numpy as jnp
from jax import lax

from imaml_jax.learners.base import MetaInfo, accuracy_of, check_steps, cross_entropy
from imaml_jax.types import MetaLearner


def nearest_centroid(*, ways: int) -> MetaLearner:
    """Classifies by the nearest mean of a class's support examples; nothing is learned.

    `logit_c(x) = -||x - mean of the support examples of class c||^2`.

    Inputs are `[n, ...]`, compared in the Euclidean norm of all their entries. There are no
    meta-parameters, so the meta-gradient is empty.

    Args:
      ways: classes of a task.

    Returns:
      The `MetaLearner`.

    Raises:
      ValueError: `ways` is no positive integer.

    References:
      Snell, Swersky, Zemel, "Prototypical Networks", NeurIPS 2017, equation 2;
      Wang et al., "SimpleShot", 2019.
    """
    check_steps("nearest_centroid", ways=ways)

    def init(key, example_inputs):
        del key, example_inputs
        return {}

    def adapt(meta_params, support, key):
        del meta_params, key
        inputs = support.inputs.reshape(support.inputs.shape[0], -1)
        members = jax.nn.one_hot(support.targets, ways, axis=0, dtype=inputs.dtype)
        counts = members.sum(1, keepdims=True)
        sums = jnp.matmul(members, inputs, precision=lax.Precision.HIGHEST)
        # A class without examples is infinitely far.
        return jnp.where(counts > 0, sums / jnp.maximum(counts, 1), jnp.inf), MetaInfo()

    def predict(adapted, inputs):
        inputs = inputs.reshape(inputs.shape[0], -1)
        return -jnp.square(inputs[:, None] - adapted[None]).sum(-1)

    def meta_grad(meta_params, task, key, step):
        del step
        logits = predict(adapt(meta_params, task.support, key)[0], task.query.inputs)
        accuracy = accuracy_of(logits, task.query.targets)
        return meta_params, MetaInfo(cross_entropy(logits, task.query.targets), accuracy)

    return MetaLearner(init, adapt, predict, meta_grad)
