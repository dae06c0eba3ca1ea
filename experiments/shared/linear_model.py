"""A linear classifier, differentiable in all that it is trained on, and training of the latter."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from imaml_jax import cross_entropy, custom_argmin, minimize, newton_cg, solve_cg_steihaug


def init(num_inputs: int, num_classes: int) -> dict[str, jax.Array]:
    """Parameters of zero."""
    return {"kernel": jnp.zeros((num_inputs, num_classes)), "bias": jnp.zeros((1, num_classes))}


def predict(params: Any, inputs: jax.Array) -> jax.Array:
    """Outputs of inputs `[n, features]`: the classifier's logits `[n, classes]`."""
    return inputs @ params["kernel"] + params["bias"]


def loss(params: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy."""
    return cross_entropy(predict(params, inputs), labels)


def accuracy(params: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Share of the inputs that are classified right."""
    return jnp.mean(predict(params, inputs).argmax(-1) == labels)


def objective(
    params: Any, inputs: jax.Array, labels: jax.Array, weights: jax.Array, reg_strength: jax.Array
) -> jax.Array:
    """Weighted mean of the cross-entropies and `reg_strength / 2 ||params||^2`."""
    losses = optax.softmax_cross_entropy_with_integer_labels(predict(params, inputs), labels)
    mean = jnp.sum(weights * losses) / jnp.sum(weights)
    return mean + 0.5 * reg_strength * optax.tree.norm(params, squared=True)


_newton = partial(minimize, objective, tx=newton_cg(max_cg_steps=50, cg_tol=1e-2), num_steps=6)
_solve = partial(solve_cg_steihaug, tol=1e-4, max_steps=100)
fit = custom_argmin(objective, _solve, has_aux=True, on_failure="accept")(_newton)
"""`(init, inputs, labels, weights, reg_strength) -> (params, MinimizeInfo)`.

Minimises the objective from `init` by Newton's method with products by the Hessian.
"""


def learn(
    outer_loss: Callable[[Any, Any], tuple[jax.Array, tuple[Any, Any]]],
    hyperparams: Any,
    params: Any,
    *,
    rate: float,
    num_steps: int,
) -> tuple[Any, Any, Any]:
    """Trains hyperparameters by Adam; each inner training starts from the result of the last one.

    Args:
      outer_loss: `(hyperparams, params) -> (loss, (params, record))`, which trains from `params`
        and returns the loss of the trained ones, these, and what is to be recorded.
      hyperparams: where Adam starts.
      params: where the first inner training starts.
      rate: Adam's learning rate.
      num_steps: its steps.

    Returns:
      `(hyperparams, params, records)` at the end; the records of all steps are stacked.
    """
    tx = optax.adam(rate)

    def step(carry, _):
        hyperparams, params, opt_state = carry
        grads, (params, record) = jax.grad(outer_loss, has_aux=True)(hyperparams, params)
        updates, opt_state = tx.update(grads, opt_state)
        return (optax.apply_updates(hyperparams, updates), params, opt_state), record

    carry = (hyperparams, params, tx.init(hyperparams))
    (hyperparams, params, _), records = lax.scan(step, carry, length=num_steps)
    return hyperparams, params, records
