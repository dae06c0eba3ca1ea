"""Networks: shapes, names and counts as published, and their parts against plain formulas."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from imaml_jax.networks import batch_norm, conv4, layers, max_pool2x2, mlp, resnet12
from imaml_jax.networks.convolution import convolve, lax_convolve

pytestmark = pytest.mark.usefixtures("x64")


def normal(seed, *shape, dtype=np.float64):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def random_params(network, inputs, seed=0):
    """Random parameters for every leaf, so that no zero head and no unit scale hides anything."""
    shapes = jax.eval_shape(network.init, jax.random.key(0), inputs)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.5, s.shape), s.dtype), shapes)


def describe(network, inputs):
    """`{"block_0/kernel": shape, ...}` and the number of parameters."""
    shapes = jax.eval_shape(network.init, jax.random.key(0), inputs)
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    named = {"/".join(key.key for key in path): leaf.shape for path, leaf in leaves}
    return named, sum(np.prod(shape) for shape in named.values())


def test_batch_norm_equals_its_formula():
    x, scale, offset = np.asarray(normal(0, 3, 4, 5, 2)), np.array([2.0, -1.0]), np.ones(2)
    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
    expected = scale * (x - mean) / np.sqrt(variance + 1e-3) + offset
    found = jax.jit(batch_norm, static_argnums=3)(x, scale, offset, 1e-3)
    np.testing.assert_allclose(found, expected, atol=1e-13)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_statistics_weights_choose_the_examples_of_the_statistics(dtype):
    x, one = normal(0, 5, 4, 3, 2, dtype=dtype), np.ones(2, dtype)
    norm = jax.jit(batch_norm, static_argnums=3)
    equal = norm(x, one, one, 1e-3, jnp.full(5, 7.0, dtype))
    np.testing.assert_allclose(equal, norm(x, one, one, 1e-3), atol=1e-6)
    support_only = norm(x, one, one, 1e-3, jnp.array([1, 1, 1, 0, 0], dtype))
    np.testing.assert_allclose(support_only[:3], norm(x[:3], one, one, 1e-3), atol=1e-6)
    mean, variance = (f(np.asarray(x[:3]), axis=(0, 1, 2)) for f in (np.mean, np.var))
    expected = (np.asarray(x[3:]) - mean) / np.sqrt(variance + 1e-3) + 1
    np.testing.assert_allclose(support_only[3:], expected, atol=1e-5)
    twice = norm(x[jnp.array([0, 0, 1])], one, one, 1e-3)[1:]
    weighted = norm(x[:2], one, one, 1e-3, jnp.array([2, 1], dtype))
    np.testing.assert_allclose(weighted, twice, atol=1e-6)
    assert support_only.dtype == dtype


@pytest.mark.parametrize("shape", [(6, 4), (5, 7)], ids=str)
def test_max_pool_equals_that_of_lax(shape):
    x = normal(0, 2, *shape, 3)
    expected = lax.reduce_window(x, -np.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    np.testing.assert_array_equal(max_pool2x2(x), expected)


@pytest.mark.parametrize("level", [0, 3])
def test_the_derivative_of_max_pooling_survives_another_rounding(level):
    """Unoptimised code computes the norm twice, and not to the same bits."""
    x, scale, offset = (
        normal(i, *s, dtype=np.float32) for i, s in enumerate([(9, 4, 4, 3), (3,), (3,)])
    )

    def pooled(x, scale, offset):
        return jnp.sum(jnp.cos(max_pool2x2(batch_norm(x, scale, offset, 1e-3))))

    gradient = jax.grad(pooled, argnums=(0, 1, 2))
    compiled = jax.jit(gradient, compiler_options={"xla_backend_optimization_level": level})
    with jax.disable_jit():
        expected = gradient(x, scale, offset)
    for found, wanted in zip(compiled(x, scale, offset), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_conv4_has_the_published_parameters_on_omniglot():
    named, count = describe(conv4(5), jnp.zeros((2, 28, 28, 1)))
    expected = {"head/kernel": (256, 5), "head/bias": (5,)}
    for i in range(4):
        expected[f"block_{i}/kernel"] = (3, 3, 64 if i else 1, 64)
        expected[f"block_{i}/scale"] = expected[f"block_{i}/offset"] = (64,)
    assert named == expected
    assert count == 112_965


def test_conv4_has_the_published_shapes_on_mini_imagenet():
    network = conv4(5, filters=32, downsample="max_pool", conv_bias=True)
    images = jax.ShapeDtypeStruct((3, 84, 84, 3), jnp.float32)
    named, count = describe(network, images)
    assert named["head/kernel"] == (5 * 5 * 32, 5)
    assert named["block_0/kernel"] == (3, 3, 3, 32)
    assert named["block_3/bias"] == (32,)
    assert count == 32_901  # as in the literature on this network
    params = jax.eval_shape(network.init, jax.random.key(0), images)
    assert jax.eval_shape(network.apply, params, images).shape == (3, 5)


def forward_by_hand(params, x, weights, *, pools, mean):
    """Two blocks and the head in `lax` and `jnp`; a norm by its formula."""
    for i in range(2):
        block = params[f"block_{i}"]
        x = lax_convolve(x, block["kernel"], 1 if pools else 2)
        picked = x if weights is None else x[np.flatnonzero(weights)]
        mu, var = (f(picked, (0, 1, 2), keepdims=True) for f in (jnp.mean, jnp.var))
        scale, offset = (block[name][None, None, None, :] for name in ("scale", "offset"))
        x = jnp.tanh(scale * (x - mu) / jnp.sqrt(var + 1e-3) + offset)
        if pools:
            x = lax.reduce_window(x, -np.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), pools)
    x = x.mean((1, 2)) if mean else x.reshape(x.shape[0], -1)
    return x @ params["head"]["kernel"] + params["head"]["bias"][None]


@pytest.mark.parametrize("part_bytes", [2**20, 2000])
@pytest.mark.parametrize("weights", [None, np.array([1.0, 0.0, 2.0, 1.0, 0.5, 1.0])])
@pytest.mark.parametrize(("channels", "padding"), [(1, "valid"), (8, "same")])
def test_the_norm_may_follow_the_pooling(monkeypatch, part_bytes, weights, channels, padding):
    """In one part and in several, with negative scales: values, gradients, Hessian products."""
    monkeypatch.setattr(layers, "_PART_BYTES", part_bytes)
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (6, 5, 6, channels))
    kernel = jax.random.normal(keys[1], (3, 3, channels, 4))
    scale, offset = jnp.array([1.0, -2.0, 0.5, -0.1]), jnp.arange(4.0)
    given = x, kernel, scale, offset

    def pooled_first(x, kernel, scale, offset):
        convolved = lambda x: convolve(x, kernel)  # noqa: E731
        return layers.norm_and_pool(convolved, x, scale, offset, 1e-3, weights, padding)

    def pooled_last(x, kernel, scale, offset):
        return max_pool2x2(batch_norm(convolve(x, kernel), scale, offset, 1e-3, weights), padding)

    def outcomes(fun):
        gradient = jax.grad(lambda *args: jnp.sum(jnp.sin(fun(*args))), (0, 1, 2, 3))
        return fun(*given), *jax.jvp(gradient, given, given)

    found, expected = (jax.jit(partial(outcomes, fun))() for fun in (pooled_first, pooled_last))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-10), found, expected)


def test_an_activation_that_falls_comes_before_the_pooling():
    x = jax.random.normal(jax.random.key(0), (3, 8, 8, 1))
    increasing, falling = (
        conv4(2, filters=2, num_blocks=2, downsample="max_pool", activation=f)
        for f in (nn.relu, lambda x: -nn.relu(x))
    )
    params = increasing.init(jax.random.key(1), x)
    found = falling.features(params, x)
    for i in range(2):
        block = params[f"block_{i}"]
        x = convolve(x, block["kernel"])
        x = max_pool2x2(-nn.relu(batch_norm(x, block["scale"], block["offset"], 1e-3)))
    np.testing.assert_allclose(found, x.reshape(3, -1), rtol=1e-10)


@pytest.mark.parametrize(
    "settings, pools, mean",
    [
        ({}, None, False),
        ({"readout": "mean"}, None, True),
        ({"downsample": "max_pool"}, "VALID", False),
        ({"downsample": "max_pool", "pool_padding": "same"}, "SAME", False),
    ],
    ids=["stride", "mean", "max_pool", "padded max_pool"],
)
@pytest.mark.parametrize("weights", [None, (1.0, 1.0, 0.0)], ids=["batch", "support"])
def test_conv4_equals_its_definition(settings, pools, mean, weights):
    network = conv4(3, filters=4, num_blocks=2, activation=jnp.tanh, **settings)
    x = normal(0, 3, 9, 6, 1)
    params = random_params(network, x)
    extra = {} if weights is None else {"statistics_weights": jnp.array(weights)}
    found = jax.jit(network.apply)(params, x, **extra)
    by_hand = partial(forward_by_hand, pools=pools, mean=mean)
    expected = jax.jit(lambda params, x: by_hand(params, x, weights))(params, x)
    assert found.shape == (3, 3)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_a_padded_pool_is_that_of_lax():
    x = normal(0, 2, 5, 7, 3)

    def reference(x):
        return lax.reduce_window(x, -np.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "SAME")

    np.testing.assert_array_equal(max_pool2x2(x, "same"), reference(x))
    weights = normal(1, *reference(x).shape)
    found, expected = (
        jax.grad(lambda x, f=f: jnp.sum(weights * f(x)))(x)
        for f in (partial(max_pool2x2, padding="same"), reference)
    )
    np.testing.assert_allclose(found, expected, atol=1e-14)


def test_support_statistics_make_predictions_independent_of_other_queries():
    network = conv4(3, filters=4, num_blocks=2)
    x = normal(0, 5, 8, 8, 1)
    params, weights = random_params(network, x), jnp.array([1.0, 1.0, 1.0, 0.0, 0.0])
    apply = jax.jit(network.apply)
    other = jnp.concatenate([x[:4], x[4:] + 3])
    changed = apply(params, other, statistics_weights=weights)
    unchanged = apply(params, x, statistics_weights=weights)
    np.testing.assert_allclose(changed[:4], unchanged[:4], atol=1e-12)
    np.testing.assert_allclose(unchanged[:3], apply(params, x[:3]), atol=1e-12)
    transductive = np.asarray(apply(params, other)) - np.asarray(apply(params, x))
    assert np.abs(transductive[:4]).max() > 1e-3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("name", ["mlp", "conv4"])
def test_the_inputs_choose_the_dtype(name, dtype):
    network, shape = {
        "mlp": (mlp([4, 2]), (3, 2)),
        "conv4": (conv4(2, filters=2, num_blocks=1, conv_bias=True), (3, 4, 4, 1)),
    }[name]
    x = jax.ShapeDtypeStruct(shape, dtype)
    params = jax.eval_shape(network.init, jax.random.key(0), x)
    outputs = jax.eval_shape(network.apply, params, x)
    assert {leaf.dtype for leaf in jax.tree.leaves((params, outputs))} == {jnp.dtype(dtype)}


def test_the_sinusoid_network_is_that_of_maml():
    named, count = describe(mlp([40, 40, 1]), jnp.zeros((10, 1)))
    assert named == {
        "Dense_0/kernel": (1, 40),
        "Dense_0/bias": (40,),
        "Dense_1/kernel": (40, 40),
        "Dense_1/bias": (40,),
        "head/kernel": (40, 1),
        "head/bias": (1,),
    }
    assert count == 1761


def test_mlp_equals_its_definition():
    network = mlp([4, 2], activation=jnp.tanh)
    x = normal(0, 3, 2)
    params = random_params(network, x)
    hidden, head = params["Dense_0"], params["head"]
    expected = np.tanh(np.asarray(x @ hidden["kernel"]) + np.asarray(hidden["bias"]))
    expected = expected @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    np.testing.assert_allclose(network.apply(params, x), expected, atol=1e-14)


def test_resnet12_has_the_parameters_of_its_field():
    """12.4 million without the head, as Lee et al. have it."""
    named, count = describe(resnet12(5), jnp.zeros((2, 84, 84, 3)))
    assert count == 12_424_320 + 640 * 5 + 5
    assert named["block_0/conv_0/kernel"] == (3, 3, 3, 64)
    assert named["block_3/conv_2/kernel"] == (3, 3, 640, 640)
    assert named["block_3/shortcut/kernel"] == (1, 1, 320, 640)
    assert named["head/kernel"] == (640, 5)
    assert len(named) == 4 * 4 * 3 + 2


def test_resnet12_equals_its_definition():
    network = resnet12(3, widths=(2, 4))
    x = normal(0, 3, 9, 8, 2)
    params = random_params(network, x)

    def conv_norm(x, layer, size):
        padded = np.pad(x, ((0, 0), (size // 2,) * 2, (size // 2,) * 2, (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), (1, 2))
        x = np.einsum("nhwcij,ijco->nhwo", windows, np.asarray(layer["kernel"]))
        x = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)
        return x * np.asarray(layer["scale"]) + np.asarray(layer["offset"])

    def leaky(x):
        return np.where(x > 0, x, 0.1 * x)

    expected = np.asarray(x)
    for block in (params["block_0"], params["block_1"]):
        y = leaky(conv_norm(expected, block["conv_0"], 3))
        y = conv_norm(leaky(conv_norm(y, block["conv_1"], 3)), block["conv_2"], 3)
        y = leaky(y + conv_norm(expected, block["shortcut"], 1))
        expected = np.asarray(max_pool2x2(jnp.asarray(y)))
    features = expected.mean((1, 2))
    np.testing.assert_allclose(jax.jit(network.features)(params, x), features, atol=1e-10)
    expected = features @ np.asarray(params["head"]["kernel"]) + np.asarray(params["head"]["bias"])
    np.testing.assert_allclose(jax.jit(network.apply)(params, x), expected, atol=1e-10)


@pytest.mark.parametrize(
    "make", [partial(conv4, filters=2, num_blocks=2), partial(resnet12, widths=(2, 3))]
)
def test_the_head_after_the_features_is_the_network(make):
    x, weights = normal(0, 4, 8, 8, 1), jnp.array([1.0, 1, 1, 0])
    network = make(3)
    params = random_params(network, x)
    features = network.features(params, x, statistics_weights=weights)
    outputs = network.apply(params, x, statistics_weights=weights)
    np.testing.assert_allclose(network.head(params, features), outputs, atol=1e-12)
    np.testing.assert_allclose(network.head({"head": params["head"]}, features), outputs)
    del params["head"]
    np.testing.assert_allclose(network.features(params, x, statistics_weights=weights), features)


def test_initial_parameters_are_as_documented():
    """A zero head, unit scales, and an MLP drawn from a narrow normal; the key decides the rest."""
    init, images = (
        jax.jit(conv4(5, filters=4, num_blocks=1).init),
        jnp.zeros((1, 8, 8, 1), jnp.float32),
    )
    params, again, other = (init(jax.random.key(k), images) for k in (0, 0, 1))
    np.testing.assert_array_equal(params["head"]["kernel"], 0)
    np.testing.assert_array_equal(params["block_0"]["scale"], 1)
    np.testing.assert_array_equal(params["block_0"]["offset"], 0)
    jax.tree.map(np.testing.assert_array_equal, params, again)
    assert (params["block_0"]["kernel"] != other["block_0"]["kernel"]).any()
    params = jax.jit(mlp([200, 1]).init)(jax.random.key(0), jnp.zeros((1, 5), jnp.float32))
    assert np.std(params["Dense_0"]["kernel"]) == pytest.approx(0.01, rel=0.15)


@pytest.mark.parametrize(
    "make, value",
    [
        (lambda: mlp([]), r"mlp: features=\[\]"),
        (lambda: mlp([40, 0]), "mlp: features=0"),
        (lambda: conv4(0), "conv4: ways=0"),
        (lambda: conv4(5, filters=0), "conv4: filters=0"),
        (lambda: conv4(5, num_blocks=0), "conv4: num_blocks=0"),
        (lambda: conv4(5, epsilon=0.0), "epsilon=0.0"),
        (lambda: conv4(5, downsample="pool"), "downsample='pool'"),
        (lambda: conv4(5, readout="max"), "readout='max'"),
        (lambda: resnet12(0), "resnet12: ways=0"),
        (lambda: resnet12(5, widths=()), r"resnet12: widths=\[\]"),
        (lambda: resnet12(5, widths=(4, 0)), "resnet12: widths=0"),
        (lambda: resnet12(5, epsilon=-1.0), "resnet12: epsilon=-1.0"),
    ],
)
def test_settings_out_of_range_are_named(make, value):
    with pytest.raises(ValueError, match=value):
        make()


@pytest.mark.parametrize("readout", ["flatten", "mean"])
def test_images_too_small_for_the_blocks_are_refused(readout):
    """Four poolings of 8x8 leave nothing: the outputs would be a constant, or NaN."""
    network = conv4(5, filters=2, downsample="max_pool", readout=readout)
    for refusing in (network, resnet12(5)):
        with pytest.raises(ValueError, match="8x8"):
            jax.eval_shape(refusing.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))


@pytest.mark.parametrize(
    ("network", "inputs"),
    [
        (conv4(5), jnp.zeros((1, 28, 28, 1), jnp.uint8)),
        (conv4(5), jnp.zeros((1, 784))),
        (mlp([1]), jnp.zeros(3)),
        (mlp([1]), jnp.zeros((1, 3), int)),
    ],
)
def test_inputs_of_another_kind_are_refused(network, inputs):
    with pytest.raises(ValueError, match="must be floating"):
        network.init(jax.random.key(0), inputs)
