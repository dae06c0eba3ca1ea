"""A linear classifier with L2 regularisation, differentiable in all that it is trained on."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from imaml_jax import MinimizeInfo, custom_argmin, minimize, newton_cg, solve_cg_steihaug

_NEWTON_STEPS, _NEWTON_CG_STEPS, _TOLERANCE, _CG_STEPS = 6, 50, 1e-4, 100


def init(num_inputs: int, num_classes: int) -> dict[str, jax.Array]:
    """Parameters of zero."""
    return {"kernel": jnp.zeros((num_inputs, num_classes)), "bias": jnp.zeros((1, num_classes))}


def predict(params: Any, inputs: jax.Array) -> jax.Array:
    """Logits `[n, classes]` of inputs `[n, features]`."""
    return inputs @ params["kernel"] + params["bias"]


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


@custom_argmin(
    objective, partial(solve_cg_steihaug, tol=_TOLERANCE, max_steps=_CG_STEPS), has_aux=True
)
def fit(
    init: Any, inputs: jax.Array, labels: jax.Array, weights: jax.Array, reg_strength: jax.Array
) -> tuple[Any, MinimizeInfo]:
    """Minimises the objective from `init` by Newton's method with products by the Hessian."""
    tx = newton_cg(max_cg_steps=_NEWTON_CG_STEPS, cg_tol=1e-2)
    return minimize(
        objective, init, inputs, labels, weights, reg_strength, tx=tx, num_steps=_NEWTON_STEPS
    )
