"""The fully connected network."""

from collections.abc import Callable, Sequence

import flax.linen as nn

from imaml_jax.networks.layers import (
    Initializer,
    Network,
    check_inputs,
    check_settings,
    dense,
    with_head,
)
from imaml_jax.types import Array

SMALL_NORMAL = nn.initializers.truncated_normal(0.01)


def mlp(
    features: Sequence[int],
    *,
    activation: Callable[[Array], Array] = nn.relu,
    kernel_init: Initializer = SMALL_NORMAL,
) -> Network:
    """Fully connected network; `mlp([40, 40, 1])` is the sinusoid regressor of MAML.

    Args:
      features: widths of the layers, the last being the outputs, which have no activation.
      activation: between layers.
      kernel_init: of all layers; MAML's official code draws normal(0.01).

    Returns:
      A `Network`; inputs `[n, d]`, outputs `[n, features[-1]]`.

    Raises:
      ValueError: no layer, or a width below 1.
    """
    check_settings("mlp", features=features)
    *hidden, outputs = features

    def last_hidden(x, _):
        check_inputs("mlp", x, 2, "[n, d]")
        for width in hidden:
            x = activation(dense(x, width, kernel_init))
        return x

    return with_head(last_hidden, outputs, kernel_init, takes_weights=False)
