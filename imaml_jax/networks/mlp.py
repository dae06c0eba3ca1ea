"""The fully connected network."""

from collections.abc import Callable, Sequence

import flax.linen as nn

from imaml_jax.networks.layers import (
    Initializer,
    Network,
    check_inputs,
    check_size,
    dense,
    from_parts,
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
    if not features:
        raise ValueError("mlp: features=[] must hold at least the outputs' width")
    for width in features:
        check_size("mlp", "features", width)

    class MLP(nn.Module):
        @nn.compact
        def __call__(self, x, part="all"):
            if part != "head":
                check_inputs("mlp", x, 2, "[n, d]")
                for width in features[:-1]:
                    x = activation(dense(x, width, kernel_init))
            return x if part == "features" else dense(x, features[-1], kernel_init, name="head")

    return from_parts(MLP(), takes_weights=False)
