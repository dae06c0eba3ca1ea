"""The parts of the experiments on features; their command lines are in test_experiments."""

from functools import partial
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import family, features, leo
from experiments.shared import common, family_runs
from imaml_jax.data import episodes
from imaml_jax.data import features as cached
from imaml_jax.learners.registry import ALGORITHMS
from imaml_jax.networks import conv4
from imaml_jax.networks.convolution import convolve


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
    assert leo.Config.of().settings.outer.outer_rate == 2.739071e-4
    many = leo.Config.of(shots=5, constants="tiered_imagenet", dropout=0.1).settings.learner
    assert (many.kl_weight, many.dropout) == (1.622811, 0.1)


@pytest.mark.parametrize(
    "place, dataset, is_printed",
    [
        ("made", "mini_imagenet", True),
        ("made", "omniglot", False),
        ("miniImageNet/made", "folder:x", False),
        ("miniImageNet/center", None, True),
        ("tieredImageNet/center", None, False),
        ("release", None, False),
    ],
)
def test_published_values_stand_beside_features_of_mini_imagenet(
    tmp_path, place, dataset, is_printed
):
    folder = tmp_path / place
    folder.mkdir(parents=True)
    if dataset is not None:
        common.write_results(folder, {"dataset": dataset})
    assert leo.published(folder, 5, 1) == ((61.76, 0.08) if is_printed else None)
    assert leo.published(folder, 20, 1) is leo.published(folder, 5, 2) is None
    runs = family_runs.of_features(family.Config(features=folder))
    assert [run.published for run in runs] == ["", "61.76 ± 0.08" if is_printed else ""]
    (tmp_path / "release" / "embeddings" / "miniImageNet").mkdir(parents=True)
    assert leo.published(tmp_path / "release", 5, 5) == (77.59, 0.12)


def test_the_nearest_centroid_needs_no_training_of_leo(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        cached.save(tmp_path, split, rng.normal(size=(90, 3)), np.arange(0, 91, 18))
    config = family.Config(
        tasks=("leo",),
        algorithms=("nearest_centroid",),
        features=tmp_path,
        workdir=tmp_path / "runs",
        output=tmp_path / "table",
    )
    with (
        mock.patch.object(leo.Config, "of", partial(leo.Config.of, test_tasks=100)),
        mock.patch.object(common, "cache_compilations"),
        mock.patch.object(common, "run_training", side_effect=AssertionError("trained")),
    ):
        (row,) = family.main(config)
    assert row["protocol"] == "own" and 0 < row["score"] < 40 and row["memory_mib"] is None
    assert row["nll"] > 0
    head, _, line, *_ = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
    assert head.startswith("| task | algorithm | protocol | score | NLL |")
    assert line.startswith("| features 5-way 1-shot | nearest_centroid | own | ")


@pytest.mark.slow
def test_memory_of_leo(tmp_path):
    _, run = family_runs.of_features(family.Config(features=tmp_path))
    assert run.algorithm == "leo" and (run.memory({"width": 3}) or 0) > 0


def test_photographs_in_the_family():
    runs = list(family_runs.of_images(family.Config(), "mini_imagenet"))
    assert [run.algorithm for run in runs] == list(ALGORITHMS)
    assert {(run.task, run.protocol) for run in runs} == {("mini_imagenet 5-way 1-shot", "common")}
    assert (runs[0].published, runs[0].full_meta_steps) == ("48.7 ± 1.84", 5_000)
    glyphs = next(family_runs.of_images(family.Config(), "glyphs"))
    assert (glyphs.published, glyphs.full_meta_steps) == ("", 5_000)
