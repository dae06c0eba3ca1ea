"""What the networks share: the record, layers with the statistics of the batch at hand, checks."""

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from imaml_jax.networks.convolution import divisor_at_most
from imaml_jax.types import Array, Params

Initializer = Any
# Bytes of a part's convolutions, and from how many channels on these are kept; measured at 84x84.
_PART_BYTES, _MIN_CHANNELS_TO_KEEP = 3 * 2**20, 8


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


class ConvNorm(nn.Module):
    """A convolution and batch norm with the statistics of the batch at hand.

    With `pool` also 2x2 max-pooling, whose padding it names; the activation that follows must be
    increasing, since the pooling comes first.
    """

    filters: int
    size: int
    stride: int
    bias: bool
    epsilon: float
    convolution: Callable[[Array, Array, int], Array]
    kernel_init: Initializer
    pool: Literal["valid", "same"] | None = None

    @nn.compact
    def __call__(self, x, statistics_weights):  # noqa: D102
        shape = (self.size, self.size, x.shape[-1], self.filters)
        kernel = self.param("kernel", self.kernel_init, shape, x.dtype)
        width, zeros = (self.filters,), nn.initializers.zeros
        bias = self.param("bias", zeros, width, x.dtype) if self.bias else None
        scale = self.param("scale", nn.initializers.ones, width, x.dtype)
        offset = self.param("offset", zeros, width, x.dtype)

        def convolved(x):
            y = self.convolution(x, kernel, self.stride)
            return y if bias is None else y + _per_channel(bias)

        if self.pool:
            return norm_and_pool(
                convolved, x, scale, offset, self.epsilon, statistics_weights, self.pool
            )
        return batch_norm(convolved(x), scale, offset, self.epsilon, statistics_weights)


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
    return _largest(x[:, : 2 * rows, : 2 * columns].reshape(n, rows, 2, columns, 2, channels))


@jax.custom_jvp
def _largest(x: Array) -> Array:
    """Over axes 2 and 4, of length 2."""
    return _compare(x)[0]


@_largest.defjvp
def _largest_jvp(primals, tangents):
    y, is_lower, is_right = _compare(*primals)
    # A mask, whose transpose is elementwise; that of slices would be padding.
    rows = jnp.stack([~is_lower, is_lower], 2)
    columns = jnp.stack([~is_right, is_right], 3)[:, :, None]
    return y, jnp.sum(jnp.where(rows & columns, tangents[0], 0), (2, 4))


def _compare(x: Array) -> tuple[Array, Array, Array]:
    is_lower = x[:, :, 1] > x[:, :, 0]
    x = jnp.where(is_lower, x[:, :, 1], x[:, :, 0])
    is_right = x[:, :, :, 1] > x[:, :, :, 0]
    return jnp.where(is_right, x[:, :, :, 1], x[:, :, :, 0]), is_lower, is_right


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
    factor, shift = _line(*_moments(x, statistics_weights), scale, offset, epsilon)
    return x * _per_channel(factor) + _per_channel(shift)


def norm_and_pool(
    convolved: Callable[[Array], Array],
    x: Array,
    scale: Array,
    offset: Array,
    epsilon: float,
    statistics_weights: Array | None = None,
    padding: Literal["valid", "same"] = "valid",
) -> Array:
    """`max_pool2x2(batch_norm(convolved(x), ...))`, which normalises only what is left of pooling.

    The norm is increasing in each channel, or decreasing where the scale is negative, so that it
    may follow the pooling. On the CPU, large batches pass in parts whose convolutions fit a core's
    cache: these are never in memory at once, and where they are cheap, not kept for the backward
    pass.

    Args:
      convolved: `x -> [n, height, width, channels]`, each example by itself.
      x: `[n, ...]`.
      scale: `[channels]`.
      offset: `[channels]`.
      epsilon: as in `batch_norm`.
      statistics_weights: as in `batch_norm`; with them, the batch passes in one part.
      padding: as in `max_pool2x2`.

    Returns:
      `[n, height / 2, width / 2, channels]`.
    """
    sign = jnp.where(scale < 0, -1, 1).astype(x.dtype)

    def part(x):
        y = convolved(x)
        return *_moments(y, statistics_weights), max_pool2x2(y * _per_channel(sign), padding)

    size = len(x) if statistics_weights is not None else _part_size(convolved, x)
    if size == len(x):
        mean, variance, y = part(x)
    else:
        if x.shape[-1] < _MIN_CHANNELS_TO_KEEP:
            part = jax.checkpoint(part, prevent_cse=False)
        means, variances, y = lax.map(part, x.reshape(-1, size, *x.shape[1:]))
        y = y.reshape(-1, *y.shape[2:])
        mean = means.mean(0)
        variance = variances.mean(0) + jnp.square(means - mean[None]).mean(0)
    factor, shift = _line(mean, variance, scale, offset, epsilon)
    return y * _per_channel(factor * sign) + _per_channel(shift)


def _line(
    mean: Array, variance: Array, scale: Array, offset: Array, epsilon: float
) -> tuple[Array, Array]:
    factor = scale * lax.rsqrt(variance + epsilon)
    return factor, offset - mean * factor


def _part_size(convolved: Callable[[Array], Array], x: Array) -> int:
    """The most examples, a divisor of them all, whose convolutions fit `_PART_BYTES`; or all."""
    n = len(x)
    if jax.default_backend() != "cpu":
        return n
    y = jax.eval_shape(convolved, x[:1])
    size = divisor_at_most(n, _PART_BYTES // (y.size * y.dtype.itemsize))
    return n if size == 1 else size


def _moments(x: Array, statistics_weights: Array | None) -> tuple[Array, Array]:
    if statistics_weights is None:
        mean = x.mean((0, 1, 2))
        return mean, jnp.square(x - _per_channel(mean)).mean((0, 1, 2))
    positions = x.shape[1] * x.shape[2]
    weights = statistics_weights / (positions * statistics_weights.sum())
    mean = jnp.einsum("n,nhwc->c", weights, x, precision=lax.Precision.HIGHEST)
    deviations = jnp.square(x - _per_channel(mean))
    return mean, jnp.einsum("n,nhwc->c", weights, deviations, precision=lax.Precision.HIGHEST)


def _per_channel(x: Array) -> Array:
    return x[None, None, None, :]


def dense(x: Array, width: int, kernel_init: Initializer, name: str | None = None) -> Array:
    """A layer of full precision whose parameters have the type of its inputs."""
    return nn.Dense(
        width,
        param_dtype=x.dtype,  # flax would keep float32 parameters in a float64 network
        precision=lax.Precision.HIGHEST,
        kernel_init=kernel_init,
        name=name,
    )(x)


def with_head(
    features: Callable[[Array, Array | None], Array],
    width: int,
    head_init: Initializer,
    *,
    takes_weights: bool = True,
) -> Network:
    """Of features `(inputs, statistics_weights) -> [n, d]`, made of flax modules, a linear head."""

    class WithHead(nn.Module):
        @nn.compact
        def __call__(self, x, statistics_weights=None, part="all"):
            if part != "head":
                x = features(x, statistics_weights)
            return x if part == "features" else dense(x, width, head_init, name="head")

    module = WithHead()

    def apply_part(part: str) -> Callable[..., Any]:
        def apply(params, inputs, statistics_weights=None):
            return module.apply({"params": params}, inputs, statistics_weights, part=part)

        weighted = takes_weights and part != "head"
        return apply if weighted else lambda params, inputs: apply(params, inputs)

    def init(key, inputs):
        return module.init(key, inputs)["params"]

    return Network(init, *map(apply_part, ("all", "features", "head")))


def check_inputs(name: str, x: Array, rank: int, shape: str) -> None:
    """Raises ValueError for inputs that are not floating, or of another rank."""
    if x.ndim != rank or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"{name}: inputs are {x.dtype}{list(x.shape)}, must be floating {shape}; scale uint8 "
            "images to [0, 1] and keep the axis of examples"
        )


def check_images(name: str, x: Array, num_poolings: int) -> None:
    """Raises ValueError for inputs that are no images, or too small for the poolings."""
    check_inputs(name, x, 4, "[n, height, width, channels]")
    height, width = x.shape[1:3]
    if min(height, width) < 2**num_poolings:
        raise ValueError(
            f"{name}: num_blocks={num_poolings} poolings leave nothing of {height}x{width} images"
        )


def check_settings(network: str, *, epsilon: float = 1.0, **sizes: Any) -> None:
    """Raises ValueError for a size, or one in a sequence of sizes, that is no integer above 0."""
    for name, value in sizes.items():
        each = value if isinstance(value, Sequence) else [value]
        if not each:
            raise ValueError(f"{network}: {name}=[] must hold the size of at least one layer")
        for size in each:
            if not isinstance(size, Integral) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{network}: {name}={size!r} must be an integer >= 1")
    if not epsilon > 0:
        raise ValueError(f"{network}: epsilon={epsilon} must be positive")
