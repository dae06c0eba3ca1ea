"""Curvature products against dense matrices and finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from imaml_jax.bilevel.curvature import damped, gauss_newton, ggnvp, ggnvp_fn, hessian, hvp, hvp_fn
from imaml_jax.networks import conv4, mlp

pytestmark = pytest.mark.usefixtures("x64")

NETWORKS = {
    "mlp": (mlp([4, 3], activation=jnp.tanh), (5, 2)),
    "conv": (conv4(3, filters=4, num_blocks=2, activation=jnp.tanh), (4, 8, 8, 1)),
}
both = pytest.mark.parametrize("name", NETWORKS)


def random_like(tree, seed, scale=1.0):
    """A tree of normal numbers, shaped like `tree`."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, scale, x.shape), x.dtype), tree)


def cross_entropy(logits):
    """Mean cross-entropy with the classes 0, 1, 2, 0, ..."""
    labels = jnp.arange(logits.shape[0]) % logits.shape[1]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()


@functools.cache
def problem(name):
    """`(apply_fn, fun, params)` of a classification problem at random parameters."""
    network, shape = NETWORKS[name]
    inputs = jnp.asarray(np.random.default_rng(1).normal(size=shape))
    params = random_like(jax.eval_shape(network.init, jax.random.key(2), inputs), 3, scale=0.5)
    assert all(p.dtype == jnp.float64 for p in jax.tree.leaves(params))

    def apply_fn(p):
        return network.apply(p, inputs)

    return apply_fn, lambda p: cross_entropy(apply_fn(p)), params


@functools.cache
def dense_pieces(name):
    """`H`, `J` and `S` as numpy matrices."""
    apply_fn, fun, params = problem(name)
    flat, unravel = ravel_pytree(params)
    shape = jax.eval_shape(apply_fn, params).shape

    def flat_apply(p):
        return apply_fn(unravel(p)).ravel()

    def pieces(p):
        output_hessian = jax.hessian(lambda z: cross_entropy(z.reshape(shape)))(flat_apply(p))
        return jax.hessian(lambda q: fun(unravel(q)))(p), jax.jacrev(flat_apply)(p), output_hessian

    return tuple(map(np.asarray, jax.jit(pieces)(flat)))


@functools.cache
def products(name):
    """A compiled function of the point and the vector: the products by name, gradient, factor.

    One compilation for many tests; those products that share their code are left out on the conv
    net, which takes long to compile.
    """
    apply_fn, fun, _ = problem(name)

    def all_products(p, v):
        exact, approximate = hessian(fun, p), gauss_newton(apply_fn, cross_entropy, p)
        gradient = jax.grad(fun)(p)
        found = {
            "hvp": hvp(fun, p, v),
            "hessian": exact.matvec(v),
            "damped hessian": damped(exact, gradient).matvec(v),
            "gauss_newton": approximate.matvec(v),
        }
        if name == "mlp":
            found["hvp_fn"] = hvp_fn(fun, p)(v)
            found["ggnvp"] = ggnvp(apply_fn, cross_entropy, p, v)
            found["ggnvp_fn"] = ggnvp_fn(apply_fn, cross_entropy, p)(v)
        return found, gradient, approximate.factor()

    return jax.jit(all_products)


def as_matrix(matvec, like):
    """The matrix of a linear map on trees, by vmapped products with the basis."""
    flat, unravel = ravel_pytree(like)
    columns = jax.jit(jax.vmap(lambda e: ravel_pytree(matvec(unravel(e)))[0], out_axes=1))
    return np.asarray(columns(jnp.eye(flat.size, dtype=flat.dtype)))


def flatten(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@both
def test_products_equal_those_of_the_dense_matrices(name):
    hessian_matrix, jacobian, output_hessian = dense_pieces(name)
    params = problem(name)[2]
    v = random_like(params, 4)
    found, gradient, _ = products(name)(params, v)
    with_hessian = hessian_matrix @ flatten(v)
    with_gauss_newton = jacobian.T @ output_hessian @ jacobian @ flatten(v)
    expected = {
        "hvp": with_hessian,
        "hvp_fn": with_hessian,
        "hessian": with_hessian,
        "damped hessian": with_hessian + flatten(gradient) * flatten(v),
        "ggnvp": with_gauss_newton,
        "ggnvp_fn": with_gauss_newton,
        "gauss_newton": with_gauss_newton,
    }
    for kind, product in found.items():
        assert jax.tree.structure(product) == jax.tree.structure(params)
        np.testing.assert_allclose(flatten(product), expected[kind], atol=1e-12, err_msg=kind)


@both
def test_hessian_products_equal_finite_differences_of_the_gradient(name):
    params = problem(name)[2]
    v = random_like(params, 4)
    step = 1e-5

    def gradient(size):
        return flatten(products(name)(jax.tree.map(lambda p, u: p + size * u, params, v), v)[1])

    expected = (gradient(step) - gradient(-step)) / (2 * step)
    found = flatten(products(name)(params, v)[0]["hvp"])
    np.testing.assert_allclose(found, expected, atol=1e-7)


@both
def test_products_are_symmetric_and_linear(name):
    params = problem(name)[2]
    v, w = random_like(params, 6), random_like(params, 7)
    mixed = jax.tree.map(lambda a, b: 2 * a - 3 * b, v, w)
    with_v, with_w, with_mixed = (products(name)(params, u)[0] for u in (v, w, mixed))
    for kind in with_v:
        av, aw, amixed = (flatten(found[kind]) for found in (with_v, with_w, with_mixed))
        np.testing.assert_allclose(flatten(w) @ av, flatten(v) @ aw, rtol=1e-10, err_msg=kind)
        np.testing.assert_allclose(amixed, 2 * av - 3 * aw, atol=1e-11, err_msg=kind)


@both
def test_gauss_newton_is_positive_semidefinite_where_the_hessian_is_not(name):
    hessian_matrix, jacobian, output_hessian = dense_pieces(name)
    scale = np.abs(hessian_matrix).max()
    assert np.linalg.eigvalsh(hessian_matrix)[0] < -1e-3 * scale
    assert np.linalg.eigvalsh(jacobian.T @ output_hessian @ jacobian)[0] > -1e-12 * scale


@both
def test_the_factor_holds_the_dense_pieces(name):
    params = problem(name)[2]
    _, jacobian, output_hessian = dense_pieces(name)
    pieces = products(name)(params, params)[2]
    np.testing.assert_allclose(pieces.jacobian, jacobian, atol=1e-12)
    np.testing.assert_allclose(pieces.output_hessian, output_hessian, atol=1e-12)


def test_gauss_newton_equals_the_hessian_of_a_linear_model():
    inputs = random_like(jnp.zeros((5, 2)), 1)
    params = random_like({"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}, 2)

    def apply_fn(p):
        return inputs @ p["kernel"] + p["bias"][None]

    found = as_matrix(ggnvp_fn(apply_fn, cross_entropy, params), params)
    expected = as_matrix(hvp_fn(lambda p: cross_entropy(apply_fn(p)), params), params)
    np.testing.assert_allclose(found, expected, atol=1e-14)


def test_outputs_may_be_any_tree():
    params = jnp.array([0.3, -0.7])

    def apply_fn(p):
        return {"sum": p.sum(), "sines": (jnp.sin(p), None)}

    def loss_fn(outputs):
        return outputs["sum"] ** 2 + jnp.exp(outputs["sines"][0]).sum() * outputs["sum"]

    def flat_apply(p):
        return ravel_pytree(apply_fn(p))[0]

    jacobian = jax.jit(jax.jacobian(flat_apply))(params)
    unravel = ravel_pytree(apply_fn(params))[1]
    output_hessian = jax.jit(jax.hessian(lambda z: loss_fn(unravel(z))))(flat_apply(params))
    operator = gauss_newton(apply_fn, loss_fn, params)
    found = as_matrix(operator.matvec, params)
    np.testing.assert_allclose(found, jacobian.T @ output_hessian @ jacobian, atol=1e-14)
    pieces = jax.jit(operator.factor)()
    np.testing.assert_allclose(pieces.jacobian, jacobian, atol=1e-14)
    np.testing.assert_allclose(pieces.output_hessian, output_hessian, atol=1e-14)


DAMPINGS = {
    "number": lambda params: 0.7,
    "integer": lambda params: 2,
    "array": lambda params: jnp.array(0.7),
    "a number for each layer": lambda params: {layer: 0.1 * i for i, layer in enumerate(params)},
    "a number for each leaf": lambda params: jax.tree.map(lambda p: 0.1 * p.ndim, params),
    "one for each parameter": lambda params: jax.tree.map(lambda p: 1 + p**2, params),
}


@functools.cache
def damped_products():
    """For each kind of damping: products damped once and twice, and the factor."""
    apply_fn, _, params = problem("mlp")
    v = random_like(params, 11)

    def products_of(operator, damping):
        once = damped(operator, damping)
        twice = damped(once, 0.25)
        return once.matvec(v), twice.matvec(v), twice.factor(), twice.dampings

    @jax.jit
    def all_products(p):
        operator = gauss_newton(apply_fn, cross_entropy, p)
        return {kind: products_of(operator, make(params)) for kind, make in DAMPINGS.items()}

    return v, all_products(params)


@pytest.mark.parametrize("kind", DAMPINGS)
def test_damping_adds_a_diagonal(kind):
    params = problem("mlp")[2]
    _, jacobian, output_hessian = dense_pieces("mlp")
    damping = DAMPINGS[kind](params)
    diagonal = flatten(
        jax.tree.map(
            lambda d, p: np.broadcast_to(d, p.shape), jax.tree.broadcast(damping, params), params
        )
    )
    v, found = damped_products()
    once, twice, factor, dampings = found[kind]
    product = jacobian.T @ output_hessian @ jacobian @ flatten(v)
    np.testing.assert_allclose(flatten(once), product + diagonal * flatten(v), atol=1e-12)
    np.testing.assert_allclose(flatten(twice), flatten(once) + 0.25 * flatten(v), atol=1e-12)
    np.testing.assert_allclose(factor.jacobian, jacobian, atol=1e-12)
    first, second = dampings
    jax.tree.map(np.testing.assert_allclose, first, damping)
    assert second == 0.25


def test_damping_a_hessian_makes_no_factor():
    _, fun, params = problem("mlp")
    assert hessian(fun, params).factor is None
    assert damped(hessian(fun, params), 1.0).factor is None


@pytest.mark.parametrize(
    "damping", [np.float64(2.0), jnp.float32(2.0), 2], ids=["numpy", "float32", "integer"]
)
def test_damping_keeps_the_dtype_of_the_parameters(damping):
    for dtype in (jnp.float32, jnp.float64):
        params = {"w": jnp.ones(3, dtype)}
        operator = damped(hessian(lambda p: jnp.sum(p["w"] ** 2), params), damping)
        product = operator.matvec(params)
        assert product["w"].dtype == dtype
        np.testing.assert_allclose(product["w"], 4.0)


def test_none_leaves_are_left_alone():
    params = {"w": jnp.array([1.0, 2.0]), "frozen": None, "deep": (jnp.array(3.0), None)}
    v = {"w": jnp.array([1.0, -1.0]), "frozen": None, "deep": (jnp.array(0.5), None)}

    def apply_fn(p):
        return jnp.sin(p["w"]) * p["deep"][0]

    def loss_fn(outputs):
        return jnp.sum(outputs**4)

    def fun(p):
        return loss_fn(apply_fn(p))

    flat, unravel = ravel_pytree(params)
    expected = jax.jit(jax.hessian(lambda p: fun(unravel(p))))(flat) @ ravel_pytree(v)[0]
    for product in (lambda p, u: hvp(fun, p, u), lambda p, u: hvp_fn(fun, p)(u)):
        found = jax.jit(product)(params, v)
        assert jax.tree.structure(found) == jax.tree.structure(params)
        np.testing.assert_allclose(ravel_pytree(found)[0], expected)
    operator = gauss_newton(apply_fn, loss_fn, params)
    assert jax.eval_shape(operator.factor).jacobian.shape == (2, 3)
    for damping in (2.0, {"w": 2.0, "frozen": None, "deep": 2.0}, jax.tree.map(jnp.ones_like, v)):
        found = damped(operator, damping).matvec(v)
        assert jax.tree.structure(found) == jax.tree.structure(params)
        shift = ravel_pytree(jax.tree.map(lambda f, a: f - a, found, operator.matvec(v)))[0]
        factor = 1.0 if isinstance(damping, dict) and not isinstance(damping["w"], float) else 2.0
        np.testing.assert_allclose(shift, factor * ravel_pytree(v)[0])


def test_products_at_many_points_of_a_conv_net():
    """`vmap` over parameters and vectors: per-task weights, as in a meta-batch."""
    apply_fn, fun, params = problem("conv")
    points = [params, random_like(params, 8, scale=0.5)]
    vectors = [random_like(params, 9), random_like(params, 10)]
    stack = functools.partial(jax.tree.map, lambda *leaves: jnp.stack(leaves))

    def both_products(p, v):
        return hvp_fn(fun, p)(v), ggnvp(apply_fn, cross_entropy, p, v)

    found = jax.jit(jax.vmap(both_products))(stack(*points), stack(*vectors))
    lanes = [products("conv")(p, v)[0] for p, v in zip(points, vectors, strict=True)]
    expected = stack(*((lane["hessian"], lane["gauss_newton"]) for lane in lanes))
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, atol=1e-12), found, expected)
