"""The four-block convolutional network of few-shot classification."""

from collections.abc import Callable
from typing import Literal

import flax.linen as nn

from imaml_jax.networks.convolution import convolve
from imaml_jax.networks.layers import (
    ConvNorm,
    Initializer,
    Network,
    check_images,
    check_settings,
    max_pool2x2,
    with_head,
)
from imaml_jax.types import Array

_XAVIER = nn.initializers.xavier_uniform()
_INCREASING = (nn.relu, nn.leaky_relu, nn.elu, nn.softplus, nn.sigmoid, nn.tanh)


def conv4(
    ways: int,
    *,
    filters: int = 64,
    num_blocks: int = 4,
    downsample: Literal["stride", "max_pool"] = "stride",
    readout: Literal["flatten", "mean"] = "flatten",
    pool_padding: Literal["valid", "same"] = "valid",
    conv_bias: bool = False,
    epsilon: float = 1e-3,
    activation: Callable[[Array], Array] = nn.relu,
    convolution: Callable[[Array, Array, int], Array] = convolve,
    kernel_init: Initializer = _XAVIER,
    head_init: Initializer = nn.initializers.zeros,
) -> Network:
    """The four-block convolutional network of few-shot classification.

    Each block is a 3x3 convolution, batch norm with the statistics of the batch at hand, and the
    activation; it halves the image by a stride of 2 (Omniglot) or by 2x2 max-pooling
    (mini-ImageNet, with 32 filters). Parameters are named `block_0/kernel`, `block_0/scale`,
    `block_0/offset`, ..., `head/kernel`, `head/bias`.

    Args:
      ways: classes, the width of the head.
      filters: channels of each block.
      num_blocks: number of blocks.
      downsample: "stride" or "max_pool".
      readout: "flatten", or "mean" over positions before the head.
      pool_padding: of an odd number of rows or columns max-pooling drops the last ("valid"), or
        pools it alone ("same", as in Reptile's code).
      conv_bias: a bias before the norm; off, since it is an exactly flat direction of the loss.
      epsilon: added to the variance.
      activation: after the norm.
      convolution: `(x, kernel, stride) -> y`, see `imaml_jax.networks.convolution`.
      kernel_init: of the convolutions.
      head_init: of the head's kernel; zero keeps a fresh head indifferent to the order of labels
        (Ye and Chao, UNICORN-MAML, 2022).

    Returns:
      A `Network`; inputs `[n, height, width, channels]`, outputs `[n, ways]`.

    Raises:
      ValueError: a setting out of its range.
    """
    check_settings("conv4", ways=ways, filters=filters, num_blocks=num_blocks, epsilon=epsilon)
    for name, value, choices in (
        ("downsample", downsample, ("stride", "max_pool")),
        ("readout", readout, ("flatten", "mean")),
        ("pool_padding", pool_padding, ("valid", "same")),
    ):
        if value not in choices:
            raise ValueError(f"conv4: {name}={value!r} must be one of {choices}")
    pools = downsample == "max_pool"
    # The norm may follow the pooling only where the activation is increasing.
    pool = pool_padding if pools and activation in _INCREASING else None
    settings = filters, 3, 1 if pools else 2, conv_bias, epsilon, convolution, kernel_init, pool

    def features(x, statistics_weights):
        check_images("conv4", x, num_blocks if pools else 0)
        for i in range(num_blocks):
            x = activation(ConvNorm(*settings, name=f"block_{i}")(x, statistics_weights))
            x = max_pool2x2(x, pool_padding) if pools and not pool else x
        return x.mean((1, 2)) if readout == "mean" else x.reshape(x.shape[0], -1)

    return with_head(features, ways, head_init)
