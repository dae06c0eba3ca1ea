"""The residual network of few-shot classification."""

from collections.abc import Callable, Sequence

import flax.linen as nn

from imaml_jax.networks.convolution import convolve
from imaml_jax.networks.layers import (
    ConvNorm,
    Network,
    check_images,
    check_settings,
    max_pool2x2,
    with_head,
)
from imaml_jax.types import Array

_HE_NORMAL = nn.initializers.he_normal()


def resnet12(
    ways: int,
    *,
    widths: Sequence[int] = (64, 160, 320, 640),
    epsilon: float = 1e-5,
    convolution: Callable[[Array, Array, int], Array] = convolve,
) -> Network:
    """The residual network of few-shot classification, with the mean over positions as features.

    Each block is three 3x3 convolutions with batch norm, a shortcut by a 1x1 convolution with batch
    norm, leaky ReLU of slope 0.1 after the first two and after the sum, and 2x2 max-pooling. Batch
    norm has the statistics of the batch at hand; no dropout. Parameters are named
    `block_0/conv_0/kernel`, ..., `block_0/shortcut/kernel`, ..., `head/kernel`, `head/bias`; the
    convolutions start as by He et al., the head at zero.

    Args:
      ways: classes, the width of the head.
      widths: channels of each block.
      epsilon: added to the variance.
      convolution: `(x, kernel, stride) -> y`, see `imaml_jax.networks.convolution`.

    Returns:
      A `Network`; inputs `[n, height, width, channels]`, outputs `[n, ways]`.

    Raises:
      ValueError: a setting out of its range.

    References:
      Oreshkin, Rodriguez, Lacoste, "TADAM", NeurIPS 2018; the widths are those of Lee et al.,
      "Meta-Learning with Differentiable Convex Optimization", CVPR 2019, without DropBlock.
    """
    check_settings("resnet12", ways=ways, widths=widths, epsilon=epsilon)

    class Block(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x, statistics_weights):
            def conv_norm(x, size, name):
                settings = self.width, size, 1, False, epsilon, convolution, _HE_NORMAL
                return ConvNorm(*settings, name=name)(x, statistics_weights)

            shortcut = conv_norm(x, 1, "shortcut")
            for i in range(2):
                x = nn.leaky_relu(conv_norm(x, 3, f"conv_{i}"), 0.1)
            return max_pool2x2(nn.leaky_relu(conv_norm(x, 3, "conv_2") + shortcut, 0.1))

    def features(x, statistics_weights):
        check_images("resnet12", x, len(widths))
        for i, width in enumerate(widths):
            x = Block(width, name=f"block_{i}")(x, statistics_weights)
        return x.mean((1, 2))

    return with_head(features, ways, nn.initializers.zeros)
