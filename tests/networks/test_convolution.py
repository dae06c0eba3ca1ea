"""The convolution against `lax.conv_general_dilated`, at every order and under every `vmap`."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from imaml_jax.networks import convolution
from imaml_jax.networks.convolution import convolve
from imaml_jax.networks.convolution import lax_convolve as reference

pytestmark = pytest.mark.usefixtures("x64")
CASES = [(1, (8, 8)), (2, (8, 8)), (2, (7, 9)), (1, (5, 6)), (2, (1, 2))]


def data(size, channels=2, filters=8):
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (3, *size, channels))
    kernel = jax.random.normal(keys[1], (3, 3, channels, filters))
    xs = jax.random.normal(keys[2], (2, *x.shape))
    kernels = jax.random.normal(keys[3], (2, *kernel.shape))
    return x, kernel, xs, kernels


def loss(fun, stride):
    return lambda x, kernel: jnp.sum(jnp.sin(fun(x, kernel, stride)))


@pytest.mark.parametrize(("stride", "size"), CASES)
def test_value_and_gradients_equal_lax(stride, size):
    x, kernel, _, _ = data(size)
    np.testing.assert_allclose(convolve(x, kernel, stride), reference(x, kernel, stride), 1e-11)
    ours = jax.jit(jax.grad(loss(convolve, stride), (0, 1)))(x, kernel)
    theirs = jax.grad(loss(reference, stride), (0, 1))(x, kernel)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kernel_size", [1, 2, 3])
@pytest.mark.parametrize(("channels", "block_bytes"), [(2, 2**20), (8, 2**20), (8, 3000), (2, 1)])
def test_no_patches_on_a_cpu(monkeypatch, kernel_size, channels, block_bytes):
    """Shifted images give what patches do, in one block, in several, and image by image."""
    monkeypatch.setattr(convolution, "_BLOCK_BYTES", block_bytes)
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (6, 5, 7, channels))
    kernel = jax.random.normal(keys[1], (kernel_size, kernel_size, channels, 4))
    dy = jax.random.normal(keys[2], (6, 5, 7, 4))
    to_input = {"image_shape": x.shape[1:3]}
    for name, operands, params in (
        ("convolve", (x, kernel), {}),
        ("kernel_grad", (x, dy), {"size": kernel_size}),
        ("input_grad", (dy, kernel), to_input),
    ):
        patched, on_cpu = (getattr(convolution, f"_{name}{end}") for end in ("", "_on_cpu"))
        settings = {"stride": 1, "precision": "highest", **params}
        expected = patched(*operands, **settings)
        np.testing.assert_allclose(on_cpu(*operands, **settings), expected, rtol=1e-11, atol=1e-12)


def test_a_program_for_a_cpu_builds_no_patches():
    x, kernel = jnp.zeros((4, 12, 12, 8)), jnp.zeros((3, 3, 8, 8))
    text = jax.jit(jax.grad(loss(convolve, 1), (0, 1))).lower(x, kernel).as_text()
    assert "convolution" in text and f"{9 * 8}xf64" not in text
    assert f"{9 * 8}xf64" in jax.jit(lambda *a: convolve(*a, 2)).lower(x, kernel).as_text()


# 8 channels take the other layout of the kernel's gradient.
@pytest.mark.parametrize(
    ("channels", "stride"), [pytest.param(2, 2, marks=pytest.mark.slow), (8, 2), (8, 1)]
)
def test_derivatives_to_third_order(channels, stride):
    x, kernel, _, _ = data((5, 4), channels, filters=2)
    fun = lambda x, kernel: convolve(x, kernel, stride)  # noqa: E731
    check_grads(fun, (x, kernel), order=3, modes=["fwd", "rev"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("in_axes", "stride"),
    [((0, 0), 2), ((0, None), 2), ((None, 0), 2), ((1, 4), 2), ((0, None), 1)],
)
def test_vmap_before_and_after_grad(in_axes, stride):
    x, kernel, xs, kernels = data((7, 8))
    args = [
        one if axis is None else jnp.moveaxis(many, 0, axis)
        for axis, one, many in zip(in_axes, (x, kernel), (xs, kernels), strict=True)
    ]
    for fun, other in (
        (
            jax.vmap(jax.grad(loss(convolve, stride), (0, 1)), in_axes),
            jax.vmap(jax.grad(loss(reference, stride), (0, 1)), in_axes),
        ),
        (
            jax.grad(lambda *a: jax.vmap(loss(convolve, stride), in_axes)(*a).sum(), (0, 1)),
            jax.grad(lambda *a: jax.vmap(loss(reference, stride), in_axes)(*a).sum(), (0, 1)),
        ),
    ):
        for a, b in zip(jax.jit(fun)(*args), other(*args), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_nested_vmap_shares_unbatched_operands():
    _, _, xs, kernels = data((6, 6))

    def grid(fun):
        inner = jax.grad(loss(fun, 2))
        return jax.vmap(lambda x: jax.vmap(lambda k: inner(x, k))(kernels))(xs)

    np.testing.assert_allclose(grid(convolve), grid(reference), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("stride", [1, 2])
def test_hessian_vector_products_and_many_cotangents(stride):
    x, kernel, _, kernels = data((6, 6))

    def products(fun):
        gradient = jax.grad(loss(fun, stride), 1)
        return jax.vmap(lambda v: jax.jvp(gradient, (x, kernel), (x, v))[1])(kernels)

    def rows(fun):
        y, pullback = jax.vjp(lambda k: fun(x, k, stride).sum((1, 2)), kernel)
        return jax.vmap(pullback)(jnp.eye(y.size).reshape(-1, *y.shape))[0]

    for make in (products, rows):
        np.testing.assert_allclose(make(convolve), make(reference), rtol=1e-9, atol=1e-11)


def test_float32_stays_float32():
    x, kernel, _, _ = data((6, 6))
    x, kernel = x.astype(jnp.float32), kernel.astype(jnp.float32)
    gradient = jax.grad(loss(convolve, 2), 1)(x, kernel)
    assert convolve(x, kernel, 2).dtype == gradient.dtype == jnp.float32


def test_mixed_dtypes_are_promoted_and_gradients_keep_those_of_the_arguments():
    x, kernel, _, _ = data((6, 6))
    x = x.astype(jnp.float32)
    gradients = jax.grad(lambda x, k: convolve(x, k, 2).sum() + x.sum(), (0, 1))(x, kernel)
    assert convolve(x, kernel, 2).dtype == jnp.float64
    assert [g.dtype for g in gradients] == [jnp.float32, jnp.float64]


@pytest.mark.parametrize("fun", [convolve, reference])
@pytest.mark.parametrize("precision", ["highest", "default"])
def test_the_precision_reaches_every_product(fun, precision):
    x, kernel, _, _ = data((6, 6))
    rounded = lambda x, k, stride: fun(x, k, stride, precision=precision)  # noqa: E731
    gradient = jax.grad(loss(rounded, 2), (0, 1))
    second = lambda x, k: jax.jvp(gradient, (x, k), (x, k))  # noqa: E731
    program = jax.jit(second).lower(x, kernel).as_text("hlo")
    products = [line for line in program.splitlines() if re.search(r" (dot|convolution)\(", line)]
    assert len(products) >= 9
    assert all(("operand_precision={highest" in p) == (precision == "highest") for p in products)
