"""3x3-style convolution as gathered patches and one matrix product, fast at every order.

With weights of its own for each task, `lax.conv` becomes a grouped convolution, which is slow on
CPUs and a weak path on GPUs; and the derivatives of a patch-and-product written in `jnp` are slow
scatters and badly laid-out products. So the three bilinear maps that a convolution and its
derivatives consist of are primitives here, each the transpose of the others:

    convolve:    y = x * k
    input_grad:  dx = dy * k^T,   the transpose in x
    kernel_grad: dk = x^T * dy,   the transpose in k

They are closed under differentiation, so Hessian-vector products stay on the same three products.
All take leading batch axes, with which `vmap` is served; an operand without them is shared.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from imaml_jax.types import Array

_PRECISION = lax.Precision.HIGHEST
# From this many columns on, the kernel's gradient is faster with the cotangent transposed first.
_MIN_COLUMNS_FOR_TRANSPOSE = 64


def convolve(x: Array, kernel: Array, stride: int = 1) -> Array:
    """Convolution with SAME padding, as `lax.conv_general_dilated` in NHWC and HWIO.

    Args:
      x: `[n, height, width, in]`.
      kernel: `[size, size, in, out]`.
      stride: in both directions.

    Returns:
      `[n, ceil(height / stride), ceil(width / stride), out]`.
    """
    dtype = jnp.result_type(x, kernel)
    return _convolve_p.bind(x.astype(dtype), kernel.astype(dtype), stride=stride)


def _convolve(x, kernel, *, stride):
    height, width = (-(-n // stride) for n in x.shape[-3:-1])
    y = jnp.matmul(_patches(x, kernel.shape[-4], stride), _matrix(kernel), precision=_PRECISION)
    return y.reshape(*y.shape[:-2], x.shape[-4], height, width, kernel.shape[-1])


def _kernel_grad(x, dy, *, stride, size):
    patches = _patches(x, size, stride)
    cotangent = dy.reshape(*dy.shape[:-4], -1, dy.shape[-1])
    if patches.shape[-1] < _MIN_COLUMNS_FOR_TRANSPOSE:
        dk = jnp.matmul(jnp.swapaxes(patches, -1, -2), cotangent, precision=_PRECISION)
    else:  # the barriers keep the compiler from undoing the transpositions
        transposed = lax.optimization_barrier(jnp.swapaxes(cotangent, -1, -2))
        dk = lax.optimization_barrier(jnp.matmul(transposed, patches, precision=_PRECISION))
        dk = jnp.swapaxes(dk, -1, -2)
    return dk.reshape(*dk.shape[:-2], size, size, x.shape[-1], dy.shape[-1])


def _input_grad(dy, kernel, *, stride, image_shape):
    n, height, width = dy.shape[-4:-1]
    size, channels = kernel.shape[-4], kernel.shape[-2]
    cotangent = dy.reshape(*dy.shape[:-4], -1, dy.shape[-1])
    transposed = jnp.swapaxes(_matrix(kernel), -1, -2)
    dp = jnp.matmul(cotangent, transposed, precision=_PRECISION)
    dp = dp.reshape(*dp.shape[:-2], n, height, width, size, size, channels)
    pads = lax.padtype_to_pads(image_shape, (size, size), (stride, stride), "SAME")
    zero = jnp.zeros((), dp.dtype)
    dx = None
    for i in range(size):
        for j in range(size):
            spread = [
                (offset - before, image - offset + before - stride * (count - 1) - 1, stride - 1)
                for offset, (before, _), image, count in zip(
                    (i, j), pads, image_shape, (height, width), strict=True
                )
            ]
            config = [(0, 0, 0)] * (dp.ndim - 5) + spread + [(0, 0, 0)]
            part = lax.pad(dp[..., i, j, :], zero, config)
            dx = part if dx is None else dx + part
    return dx


def _patches(x, size, stride):
    """`[..., n, height, width, c]` to `[..., n * out_height * out_width, size * size * c]`."""
    image_shape = x.shape[-3:-1]
    pads = lax.padtype_to_pads(image_shape, (size, size), (stride, stride), "SAME")
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [*pads, (0, 0)])
    rows, columns = (
        stride * np.arange(-(-count // stride))[:, None] + np.arange(size) for count in image_shape
    )
    patches = x[..., rows[:, None, :, None], columns[None, :, None, :], :]
    return patches.reshape(*x.shape[:-4], -1, size * size * x.shape[-1])


def _matrix(kernel):
    return kernel.reshape(*kernel.shape[:-4], -1, kernel.shape[-1])


def _bilinear(name, fun, *params):
    """A primitive of two operands, computed by `fun`, with leading axes for `vmap`."""
    primitive = Primitive(name)
    primitive.def_impl(jax.jit(fun, static_argnames=params))

    def abstract_eval(a, b, **params):
        shape = jax.eval_shape(partial(fun, **params), a, b)
        return ShapedArray(shape.shape, shape.dtype)

    def batch(operands, axes, **params):
        ranks = [x.ndim - (axis is not None) for x, axis in zip(operands, axes, strict=True)]
        moved = []
        for x, axis, rank in zip(operands, axes, ranks, strict=True):
            if axis is not None:
                x = jnp.moveaxis(x, axis, 0)
                x = x.reshape(x.shape[0], *[1] * (max(ranks) - rank), *x.shape[1:])
            moved.append(x)
        return primitive.bind(*moved, **params), 0

    primitive.def_abstract_eval(abstract_eval)
    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, mlir.lower_fun(fun, multiple_results=False))
    return primitive


def _derive(primitive, transpose_first, transpose_second):
    """Registers the derivatives of a bilinear primitive."""

    def transpose(cotangent, a, b, **params):
        if ad.is_undefined_primal(a):
            shape = a.aval.shape
            return _sum_to(transpose_first(cotangent, b, shape, params), shape), None
        shape = b.aval.shape
        return None, _sum_to(transpose_second(cotangent, a, shape, params), shape)

    def push_first(tangent, a, b, **params):
        return primitive.bind(tangent, b, **params)

    def push_second(tangent, a, b, **params):
        return primitive.bind(a, tangent, **params)

    ad.defjvp(primitive, push_first, push_second)
    ad.primitive_transposes[primitive] = transpose


def _sum_to(x, shape):
    """Sums over the leading axes along which an operand of that shape was shared."""
    x = x.sum(tuple(range(x.ndim - len(shape))))
    shared = tuple(i for i, (a, b) in enumerate(zip(x.shape, shape, strict=True)) if a != b)
    return x.sum(shared, keepdims=True)


_convolve_p = _bilinear("convolve", _convolve, "stride")
_kernel_grad_p = _bilinear("convolve_kernel_grad", _kernel_grad, "stride", "size")
_input_grad_p = _bilinear("convolve_input_grad", _input_grad, "stride", "image_shape")


def _to_input(dy, kernel, shape, params):
    return _input_grad_p.bind(dy, kernel, stride=params["stride"], image_shape=shape[-3:-1])


def _to_kernel(x, dy, shape, params):
    return _kernel_grad_p.bind(x, dy, stride=params["stride"], size=shape[-4])


def _to_output(x, kernel, shape, params):
    del shape
    return _convolve_p.bind(x, kernel, stride=params["stride"])


def _swapped(fun):
    return lambda first, second, *rest: fun(second, first, *rest)


_derive(_convolve_p, _to_input, _swapped(_to_kernel))
_derive(_input_grad_p, _to_output, _to_kernel)
_derive(_kernel_grad_p, _swapped(_to_input), _swapped(_to_output))
