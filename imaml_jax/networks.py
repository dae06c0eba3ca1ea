"""Networks of the field as `(init, apply)` pairs of pure functions; only this file imports flax.

Any other pair of such functions serves the learners as well.
"""

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from imaml_jax.convolution import convolve
from imaml_jax.types import Array, Params

Initializer = Any
_SMALL_NORMAL = nn.initializers.truncated_normal(0.01)
_XAVIER = nn.initializers.xavier_uniform()
_HE_NORMAL = nn.initializers.he_normal()


class Network(NamedTuple):
    """A network as pure functions.

    Attributes:
      init: `(key, inputs [n, ...]) -> params`.
      apply: `(params, inputs [n, ...]) -> outputs [n, ...]`. Networks with batch norm also take
        `statistics_weights [n]`: the weight of each example in the batch statistics; default equal.
      features: `(params, inputs) -> features [n, ...]`, what the last layer sees; None where it has
        no name. With batch norm it takes `statistics_weights` too.
      head: `(params, features) -> outputs`, by the parameters below `head/` alone, so that `apply`
        is `head` after `features`.
    """

    init: Callable[[Array, Array], Params]
    apply: Callable[..., Array]
    features: Callable[..., Array] | None = None
    head: Callable[[Params, Array], Array] | None = None


def mlp(
    features: Sequence[int],
    *,
    activation: Callable[[Array], Array] = nn.relu,
    kernel_init: Initializer = _SMALL_NORMAL,
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
        _check_size("mlp", "features", width)

    class MLP(nn.Module):
        @nn.compact
        def __call__(self, x, part="all"):
            if part != "head":
                _check_inputs("mlp", x, 2, "[n, d]")
                for width in features[:-1]:
                    x = activation(_dense(x, width, kernel_init))
            return x if part == "features" else _dense(x, features[-1], kernel_init, name="head")

    return _network(MLP(), takes_weights=False)


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
      convolution: `(x, kernel, stride) -> y`, see `imaml_jax.convolution`.
      kernel_init: of the convolutions.
      head_init: of the head's kernel; zero keeps a fresh head indifferent to the order of labels
        (Ye and Chao, UNICORN-MAML, 2022).

    Returns:
      A `Network`; inputs `[n, height, width, channels]`, outputs `[n, ways]`.

    Raises:
      ValueError: a setting out of its range.
    """
    _check_size("conv4", "ways", ways)
    for name, size in (("filters", filters), ("num_blocks", num_blocks)):
        _check_size("conv4", name, size)
    _check_choice("downsample", downsample, ("stride", "max_pool"))
    _check_choice("readout", readout, ("flatten", "mean"))
    _check_choice("pool_padding", pool_padding, ("valid", "same"))
    if not epsilon > 0:
        raise ValueError(f"conv4: epsilon={epsilon} must be positive")
    stride = 2 if downsample == "stride" else 1
    pools = downsample == "max_pool"
    settings = filters, 3, stride, conv_bias, epsilon, convolution, kernel_init

    class Conv4(nn.Module):
        @nn.compact
        def __call__(self, x, statistics_weights=None, part="all"):
            if part != "head":
                _check_images("conv4", x, num_blocks if pools else 0)
                for i in range(num_blocks):
                    block = _ConvNorm(*settings, name=f"block_{i}")
                    x = activation(block(x, statistics_weights))
                    x = max_pool2x2(x, pool_padding) if pools else x
                x = x.mean((1, 2)) if readout == "mean" else x.reshape(x.shape[0], -1)
            return x if part == "features" else _dense(x, ways, head_init, name="head")

    return _network(Conv4())


def resnet12(
    ways: int,
    *,
    widths: Sequence[int] = (64, 160, 320, 640),
    epsilon: float = 1e-5,
    convolution: Callable[[Array, Array, int], Array] = convolve,
    kernel_init: Initializer = _HE_NORMAL,
    head_init: Initializer = nn.initializers.zeros,
) -> Network:
    """The residual network of few-shot classification, with the mean over positions as features.

    Each block is three 3x3 convolutions with batch norm, a shortcut by a 1x1 convolution with batch
    norm, leaky ReLU of slope 0.1 after the first two and after the sum, and 2x2 max-pooling. Batch
    norm has the statistics of the batch at hand; no dropout. Parameters are named
    `block_0/conv_0/kernel`, ..., `block_0/shortcut/kernel`, ..., `head/kernel`, `head/bias`.

    Args:
      ways: classes, the width of the head.
      widths: channels of each block.
      epsilon: added to the variance.
      convolution: `(x, kernel, stride) -> y`, see `imaml_jax.convolution`.
      kernel_init: of the convolutions.
      head_init: of the head's kernel.

    Returns:
      A `Network`; inputs `[n, height, width, channels]`, outputs `[n, ways]`.

    Raises:
      ValueError: a setting out of its range.

    References:
      Oreshkin, Rodriguez, Lacoste, "TADAM", NeurIPS 2018; the widths are those of Lee et al.,
      "Meta-Learning with Differentiable Convex Optimization", CVPR 2019, without DropBlock.
    """
    _check_size("resnet12", "ways", ways)
    if not widths:
        raise ValueError("resnet12: widths=[] must hold the channels of at least one block")
    for width in widths:
        _check_size("resnet12", "widths", width)
    if not epsilon > 0:
        raise ValueError(f"resnet12: epsilon={epsilon} must be positive")

    class Block(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x, statistics_weights):
            def conv_norm(x, size, name):
                settings = self.width, size, 1, False, epsilon, convolution, kernel_init
                return _ConvNorm(*settings, name=name)(x, statistics_weights)

            shortcut = conv_norm(x, 1, "shortcut")
            for i in range(2):
                x = nn.leaky_relu(conv_norm(x, 3, f"conv_{i}"), 0.1)
            return max_pool2x2(nn.leaky_relu(conv_norm(x, 3, "conv_2") + shortcut, 0.1))

    class ResNet12(nn.Module):
        @nn.compact
        def __call__(self, x, statistics_weights=None, part="all"):
            if part != "head":
                _check_images("resnet12", x, len(widths))
                for i, width in enumerate(widths):
                    x = Block(width, name=f"block_{i}")(x, statistics_weights)
                x = x.mean((1, 2))
            return x if part == "features" else _dense(x, ways, head_init, name="head")

    return _network(ResNet12())


class _ConvNorm(nn.Module):
    """A convolution and batch norm with the statistics of the batch at hand."""

    filters: int
    size: int
    stride: int
    bias: bool
    epsilon: float
    convolution: Callable[[Array, Array, int], Array]
    kernel_init: Initializer

    @nn.compact
    def __call__(self, x, statistics_weights):
        shape = (self.size, self.size, x.shape[-1], self.filters)
        x = self.convolution(x, self.param("kernel", self.kernel_init, shape, x.dtype), self.stride)
        width, zeros = (self.filters,), nn.initializers.zeros
        if self.bias:
            x = x + _per_channel(self.param("bias", zeros, width, x.dtype))
        scale = self.param("scale", nn.initializers.ones, width, x.dtype)
        offset = self.param("offset", zeros, width, x.dtype)
        return batch_norm(x, scale, offset, self.epsilon, statistics_weights)


def max_pool2x2(x: Array, padding: Literal["valid", "same"] = "valid") -> Array:
    """2x2 max-pooling with stride 2; an odd last row or column is dropped, or pooled alone.

    The derivative goes to one entry, the first of equal ones. It does so by comparing entries, not
    by finding the maximum among them again, as `jnp.max` has it: where a compiler computes `x`
    twice with another rounding, none is equal to the maximum, and 0/0 is the derivative.
    """
    n, height, width, channels = x.shape
    if padding == "same":
        x = jnp.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    rows, columns = x.shape[1] // 2, x.shape[2] // 2
    x = x[:, : 2 * rows, : 2 * columns].reshape(n, rows, 2, columns, 2, channels)
    x = _larger(x[:, :, 0], x[:, :, 1])
    return _larger(x[:, :, :, 0], x[:, :, :, 1])


def _larger(a: Array, b: Array) -> Array:
    return jnp.where(b > a, b, a)


def batch_norm(
    x: Array,
    scale: Array,
    offset: Array,
    epsilon: float,
    statistics_weights: Array | None = None,
) -> Array:
    """Batch norm with the statistics of the batch at hand, as one multiply-add.

    Args:
      x: `[n, height, width, channels]`.
      scale: `[channels]`.
      offset: `[channels]`.
      epsilon: added to the (biased) variance.
      statistics_weights: `[n]`, weight of each example in the statistics; None for equal ones.

    Returns:
      Shaped like `x`.
    """
    if statistics_weights is None:
        mean = x.mean((0, 1, 2))
        variance = jnp.square(x - _per_channel(mean)).mean((0, 1, 2))
    else:
        positions = x.shape[1] * x.shape[2]
        weights = statistics_weights / (positions * statistics_weights.sum())
        mean = jnp.einsum("n,nhwc->c", weights, x, precision=lax.Precision.HIGHEST)
        deviations = jnp.square(x - _per_channel(mean))
        variance = jnp.einsum("n,nhwc->c", weights, deviations, precision=lax.Precision.HIGHEST)
    factor = scale * lax.rsqrt(variance + epsilon)
    return x * _per_channel(factor) + _per_channel(offset - mean * factor)


def _per_channel(x: Array) -> Array:
    return x[None, None, None, :]


def _dense(x: Array, width: int, kernel_init: Initializer, name: str | None = None) -> Array:
    return nn.Dense(
        width,
        param_dtype=x.dtype,  # flax would keep float32 parameters in a float64 network
        precision=lax.Precision.HIGHEST,
        kernel_init=kernel_init,
        name=name,
    )(x)


def _network(module: nn.Module, takes_weights: bool = True) -> Network:
    """Of a module whose call takes `part`: "all", "features" or "head"."""

    def apply_part(part: str) -> Callable[..., Any]:
        def apply(params: Params, inputs: Array) -> Any:
            return module.apply({"params": params}, inputs, part=part)

        def apply_weighted(
            params: Params, inputs: Array, statistics_weights: Array | None = None
        ) -> Any:
            return module.apply({"params": params}, inputs, statistics_weights, part=part)

        return apply_weighted if takes_weights and part != "head" else apply

    def init(key: Array, inputs: Array) -> Params:
        return module.init(key, inputs)["params"]

    return Network(init, *map(apply_part, ("all", "features", "head")))


def _check_inputs(name: str, x: Array, rank: int, shape: str) -> None:
    if x.ndim != rank or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"{name}: inputs are {x.dtype}{list(x.shape)}, must be floating {shape}; scale uint8 "
            "images to [0, 1] and keep the axis of examples"
        )


def _check_images(name: str, x: Array, num_poolings: int) -> None:
    _check_inputs(name, x, 4, "[n, height, width, channels]")
    height, width = x.shape[1:3]
    if min(height, width) < 2**num_poolings:
        raise ValueError(
            f"{name}: num_blocks={num_poolings} poolings leave nothing of {height}x{width} images"
        )


def _check_size(network: str, name: str, size: int) -> None:
    if not isinstance(size, Integral) or isinstance(size, bool) or size < 1:
        raise ValueError(f"{network}: {name}={size!r} must be an integer >= 1")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"conv4: {name}={value!r} must be one of {choices}")
