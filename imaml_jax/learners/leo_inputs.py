"""What LEO asks of its inputs: features, integer labels, as many examples of each class."""

import jax.numpy as jnp
from jax.core import Tracer

from imaml_jax.types import Array, Batch


def by_class(inputs: Array, targets: Array, ways: int) -> Array:
    """The support features `[n, D]` as `[N, K, D]`."""
    if inputs.shape[0] % ways:
        raise ValueError(
            f"leo: ways={ways} must divide the support examples, {inputs.shape[0]}: every class "
            "needs the same number of them"
        )
    shots = inputs.shape[0] // ways
    balanced = jnp.all(jnp.bincount(targets, length=ways) == shots)
    if not isinstance(balanced, Tracer) and not balanced:
        raise ValueError(f"leo: support targets {targets} must hold each of {ways} classes equally")
    grouped = inputs[jnp.argsort(targets, stable=True)].reshape(ways, shots, inputs.shape[1])
    return jnp.where(balanced, grouped, jnp.nan)  # nothing else can be said of traced targets


def features_of(batch: Batch, params: dict[str, Array]) -> Batch:
    """The batch with its inputs as `[n, D]`, `D` that of the parameters."""
    if not jnp.issubdtype(batch.targets.dtype, jnp.integer):
        raise ValueError(
            f"leo: targets are {batch.targets.dtype}; expected integer labels, as LEO classifies"
        )
    return batch._replace(inputs=features(batch.inputs, params["encoder"].shape[0]))


def features(inputs: Array, width: int | None = None) -> Array:
    """Inputs as `[n, D]`; `width` is the `D` that there must be."""
    if sum(size > 1 for size in inputs.shape[1:]) > 1:
        raise ValueError(
            f"leo: inputs have shape {inputs.shape}; expected features [n, D], not images: "
            "python -m experiments.features makes features of them"
        )
    if not jnp.issubdtype(inputs.dtype, jnp.floating):
        raise ValueError(
            f"leo: inputs are {inputs.dtype}; expected floating-point features, which "
            "python -m experiments.features makes of images"
        )
    inputs = inputs.reshape(inputs.shape[0], -1)
    if width not in (None, inputs.shape[1]):
        raise ValueError(
            f"leo: inputs have {inputs.shape[1]} features; expected {width}, as many as the "
            "example_inputs of init: initialise with inputs like these, or give those features"
        )
    return inputs
