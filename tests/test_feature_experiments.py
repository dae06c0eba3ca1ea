"""The parts of the experiments on features; their command lines are in test_experiments."""

from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import features, leo
from imaml_jax.convolution import convolve
from imaml_jax.data import episodes
from imaml_jax.networks import conv4


def test_a_feature_depends_on_its_image_alone():
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), np.uint8)
    train_set = episodes.from_grouped(images, np.array([0, 10, 20]))
    network = conv4(2, filters=2, num_blocks=1)
    params = network.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    with mock.patch.multiple(features, _BLOCK=8, _REFERENCE=4):
        embed = features.embedder(network, params, train_set)
        some = episodes.Dataset(train_set.images[5:15], jnp.array([0, 10]))
        others = episodes.Dataset(train_set.images[9:11], jnp.array([0, 2]))
        np.testing.assert_allclose(embed(some)[4:6], embed(others), rtol=1e-4, atol=1e-5)


def test_batches_are_labelled_crops():
    images = np.arange(1, 7, dtype=np.uint8)[:, None, None, None] * np.ones((1, 10, 10, 1), "u1")
    dataset = episodes.from_grouped(images, np.array([0, 1, 3, 6]))
    task = features.batches(dataset, 50, flips=True)(jax.random.key(0))
    inputs, labels = np.asarray(task.support.inputs[0]), np.asarray(task.support.targets[0])
    assert inputs.shape == (50, 10, 10, 1)
    values = np.rint(255 * inputs.max((1, 2, 3))).astype(int)
    np.testing.assert_array_equal(labels, np.array([0, 1, 1, 2, 2, 2])[values - 1])
    assert set(labels) == {0, 1, 2}
    dark = (inputs == 0).mean((1, 2, 3))  # what the padding left
    assert dark.min() == 0 and 0 < dark.max() <= 0.19


def test_resnet12_and_the_drops_of_the_rate():
    config = features.Config(Path(), backbone="resnet12", width=4, weight_decay=0.0)
    init = features.backbone(config, 7, convolve).init
    shapes = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    assert shapes["head"]["kernel"].shape == (40, 7)
    tx = features.optimizer(config, 8)
    params, state, rates = jnp.zeros(()), tx.init(jnp.zeros(())), []
    for _ in range(8):
        update, state = tx.update(jnp.ones(()), state, params)
        rates.append(float(update))
    velocity, expected = 0.0, []
    for rate in [0.1] * 4 + [0.01] * 2 + [0.001] * 2:
        velocity = 0.9 * velocity + 1
        expected.append(-rate * velocity)
    np.testing.assert_allclose(rates, expected, rtol=1e-5)


def test_the_outer_gradient_is_clipped_twice():
    tx = leo.outer(1.0)
    grads = {"a": jnp.full((9,), 5.0), "b": jnp.array([0.01, -0.02])}
    _, state = tx.update(grads, tx.init(grads))
    moments = optax.tree.get(state, "mu")  # a tenth of what Adam saw
    np.testing.assert_allclose(10 * moments["a"], np.full(9, 0.1 / 3), rtol=1e-5)
    np.testing.assert_allclose(10 * moments["b"], grads["b"], rtol=1e-5)


def test_published_constants():
    assert leo.resolve(leo.Config()).outer_rate == 2.739071e-4
    many = leo.resolve(leo.Config(shots=5, constants="tiered_imagenet", dropout=0.1))
    assert (many.kl_weight, many.dropout) == (1.622811, 0.1)
