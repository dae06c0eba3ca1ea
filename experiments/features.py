"""Trains a classifier of the training classes and caches what it sees of every image.

    python -m experiments.features --dataset mini_imagenet --data-dir DIR --output features
    python -m experiments.features --dataset omniglot --output features
    python -m experiments.features --dataset folder:PATH --output features

The features of train, val and test go into the output folder, in the layout of the features that
LEO's authors released; experiments.leo learns from them. The recipe is SimpleShot's: SGD with
momentum 0.9, its rate divided by 10 at half and at three quarters of the training. Batches are
drawn with replacement, so that an epoch is as many images as there are, not each of them once. At
the end the nearest class mean is scored on test tasks.

Batch norm here has the statistics of the batch at hand, which would make a feature depend on the
images beside it. So each image is embedded by the statistics of one fixed batch of training images:
a feature depends on its image, the network and those.
"""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import imaml_jax
from experiments import mini_imagenet
from experiments.shared import common
from imaml_jax.data import episodes, features, omniglot
from imaml_jax.data.images import SPLITS
from imaml_jax.learners.base import MetaInfo
from imaml_jax.learners.nearest_centroid import nearest_centroid
from imaml_jax.learners.settings import Count, NotNegative, Positive, Range, Record, Seed
from imaml_jax.networks import Network, conv4, resnet12
from imaml_jax.networks.convolution import convolve, lax_convolve
from imaml_jax.training import train
from imaml_jax.training.evaluation import evaluate
from imaml_jax.types import Batch, MetaLearner, Task

_MOMENTUM, _REFERENCE, _BLOCK, _WAYS, _QUERIES = 0.9, 256, 256, 5, 15


@dataclasses.dataclass(frozen=True)
class Config(Record):
    """Features of a classifier of the training classes."""

    output: Path
    """Folder of the features, of the training's checkpoints and of results.json; an earlier run
    there goes on."""
    dataset: str = "mini_imagenet"
    """mini_imagenet, tiered_imagenet, omniglot, folder:PATH or arrays:FILE.npz."""
    data_dir: Path | None = None
    """Directory of the data set; default the environment variable IMAML_DATA_DIR."""
    image_size: Annotated[int, Range(least=1, most=1024)] | None = None
    """Side of the images in pixels, between 1 and 1024; default 84, Omniglot 28."""
    backbone: Literal["conv4", "resnet12"] = "conv4"
    """Network; its features are those that the last layer sees."""
    width: Count = 64
    """Channels of conv4's blocks, or of resnet12's first one; at least 1."""
    epochs: Count = 90
    """Passes over as many images as there are, at least 1."""
    batch_size: Count = 256
    """Images a step, at least 1."""
    rate: Positive = 0.1
    """Learning rate at the start, above 0."""
    weight_decay: NotNegative = 1e-4
    """Times the parameters, added to the gradient; at least 0."""
    max_seconds: Positive | None = None
    """Stop after the first epoch past this many seconds of wall clock, above 0."""
    seed: Seed = 0
    """Seed of the initialisation and of the batches, at least 0."""
    test_tasks: Annotated[int, Range(least=2)] = 2000
    """Test tasks of the nearest class mean, at least 2."""


def main(config: Config) -> dict[str, Any]:
    """Trains, caches the features and scores the nearest class mean.

    Args:
      config: the run.

    Returns:
      What `results.json` in the output folder holds.

    Raises:
      ValueError: data that are not there.
    """
    common.cache_compilations()
    splits = load_images(config)
    classes = episodes.num_classes(splits.train)
    started = time.perf_counter()
    steps = -(-splits.train.images.shape[0] // config.batch_size)
    result = train(
        classifier(backbone(config, classes, convolve)),
        optimizer(config, config.epochs * steps),
        batches(splits.train, config.batch_size, flips=config.dataset != "omniglot"),
        key=jax.random.key(config.seed),
        num_steps=config.epochs * steps,
        log_every=steps,
        example_inputs=jnp.zeros((2, *splits.train.images.shape[1:])),
        workdir=config.output / "training",
        max_seconds=config.max_seconds,
        config=_recorded(config),
    )
    embed = embedder(backbone(config, classes, lax_convolve), result.meta_params, splits.train)
    for split, dataset in zip(SPLITS, splits, strict=True):
        if dataset is not None:
            features.save(config.output, split, embed(dataset), np.asarray(dataset.offsets))
    results = _recorded(config) | common.provenance() | common.outcome(result, started)
    results |= {
        "output": str(config.output),
        "train_classes": classes,
        "train_loss": result.history[-1]["query_loss"],
        "train_accuracy": result.history[-1]["query_accuracy"],
        "nearest_centroid": nearest_centroids(config),
    }
    common.write_results(config.output, results)
    common.say(report(results))
    return results


def load_images(config: Config) -> episodes.Splits:
    """The images that the config names, uint8."""
    if config.dataset == "omniglot":
        return omniglot.load(config.data_dir, image_size=config.image_size or 28)
    return mini_imagenet.load(
        mini_imagenet.Config.of(
            dataset=config.dataset, data_dir=config.data_dir, image_size=config.image_size or 84
        )
    )


def backbone(config: Config, classes: int, convolution: Callable) -> Network:
    """The network that the config names."""
    if config.backbone == "resnet12":
        widths = [config.width * multiple // 2 for multiple in (2, 5, 10, 20)]
        return resnet12(classes, widths=widths, convolution=convolution)
    return conv4(classes, filters=config.width, downsample="max_pool", convolution=convolution)


def classifier(network: Network) -> MetaLearner:
    """Supervised learning in the form that `train` drives: a "task" is a batch."""

    def meta_grad(params, task, key, step):
        del key, step

        def loss_fn(params):
            logits = network.apply(params, task.support.inputs)
            accuracy = jnp.mean(jnp.argmax(logits, -1) == task.support.targets)
            return imaml_jax.cross_entropy(logits, task.support.targets), accuracy

        (loss, accuracy), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        return grads, MetaInfo(query_loss=loss, query_accuracy=accuracy)

    def adapt(params, support, key):
        del support, key
        return params, MetaInfo()

    return MetaLearner(network.init, adapt, network.apply, meta_grad)


def optimizer(config: Config, num_steps: int) -> optax.GradientTransformation:
    """SGD with momentum and weight decay, and the rate's two drops."""
    drops = {num_steps // 2: 0.1, 3 * num_steps // 4: 0.1}
    schedule = optax.piecewise_constant_schedule(config.rate, drops)
    decay = optax.add_decayed_weights(config.weight_decay)
    return optax.chain(decay, optax.sgd(schedule, momentum=_MOMENTUM))


def batches(
    dataset: episodes.Dataset, batch_size: int, *, flips: bool
) -> Callable[[jax.Array], Task]:
    """`key -> Task` of one batch, augmented: cropped after padding, and mirrored if `flips`."""

    def sample(key):
        index_key, crop_key, flip_key = jax.random.split(key, 3)
        indices = jax.random.randint(index_key, (batch_size,), 0, dataset.images.shape[0])
        labels = jnp.searchsorted(dataset.offsets, indices, side="right") - 1
        images = _crop(crop_key, episodes.take(dataset, indices))
        if flips:
            mirrored = jax.random.bernoulli(flip_key, shape=(batch_size, 1, 1, 1))
            images = jnp.where(mirrored, images[:, :, ::-1], images)
        batch = Batch(episodes.to_unit(images)[None], labels[None])
        return Task(batch, batch)

    return sample


def embedder(
    network: Network, params: Any, train_set: episodes.Dataset
) -> Callable[[episodes.Dataset], np.ndarray]:
    """`dataset -> [N, D]` features, with the norm statistics of some training images."""
    total = train_set.images.shape[0]
    chosen = jax.random.choice(jax.random.key(0), total, (min(total, _REFERENCE),), replace=False)
    reference = episodes.take(train_set, chosen)
    weights = (jnp.arange(len(reference) + _BLOCK) < len(reference)).astype(jnp.float32)

    features = network.features
    assert features is not None

    @jax.jit
    def embed_block(params, reference, images):
        inputs = episodes.to_unit(jnp.concatenate([reference, images]))
        return features(params, inputs, statistics_weights=weights)[len(reference) :]

    def embed(dataset):
        size, blocks = dataset.images.shape[0], []
        for start in range(0, size, _BLOCK):
            indices = jnp.minimum(start + jnp.arange(_BLOCK), size - 1)
            blocks.append(
                np.asarray(embed_block(params, reference, episodes.take(dataset, indices)))
            )
        return np.concatenate(blocks)[:size]

    return embed


def nearest_centroids(config: Config) -> dict[str, dict[str, list[float]]]:
    """Test accuracy and its 95% confidence interval, by normalisation and shots."""
    found: dict[str, dict[str, list[float]]] = {}
    for name, centred in (("scaled", False), ("centred and scaled", True)):
        test = features.load(config.output, centred=centred).test
        smallest = int(np.diff(np.asarray(test.offsets)).min())
        ways = min(_WAYS, episodes.num_classes(test))
        found[name] = {}
        for shots in (1, 5):
            queries = min(_QUERIES, smallest - shots)
            if queries < 1:
                continue
            sample = partial(
                episodes.sample_tasks,
                dataset=test,
                num_tasks=min(config.test_tasks, 100),
                ways=ways,
                shots=shots,
                queries=queries,
            )
            key = common.fixed_key(common.TEST_KEY)
            scored = evaluate(
                nearest_centroid(ways=ways), {}, sample, key, num_tasks=config.test_tasks
            )
            found[name][f"{ways}-way {shots}-shot"] = [scored.mean, scored.ci95]
    return found


def report(results: dict[str, Any]) -> str:
    """The outcome in words."""
    lines = [
        f"{results['dataset']}, {results['backbone']} of width {results['width']}, "
        f"{results['train_classes']} training classes, {results['trained_meta_steps']} steps of "
        f"{results['batch_size']} images in {results['seconds']:.0f} s: training accuracy "
        f"{100 * results['train_accuracy']:.1f}% (augmented); features in {results['output']}"
    ]
    for name, scores in results["nearest_centroid"].items():
        for task, (mean, ci95) in scores.items():
            lines.append(
                f"nearest class mean of features {name}, {task}: {100 * mean:.2f} ± "
                f"{100 * ci95:.2f}% (95% CI over {results['test_tasks']} test tasks)"
            )
    return "\n".join(lines)


def _crop(key: jax.Array, images: jax.Array) -> jax.Array:
    """A random window of each image, after a tenth of its side was added on every side."""
    n, height, width, channels = images.shape
    margin = max(1, height // 10)
    corners = jax.random.randint(key, (n, 2), 0, 2 * margin + 1)
    padded = jnp.pad(images, ((0, 0), (margin, margin), (margin, margin), (0, 0)))

    def window(image, corner):
        return jax.lax.dynamic_slice(image, (*corner, 0), (height, width, channels))

    return jax.vmap(window)(padded, corners)


def _recorded(config: Config) -> dict[str, Any]:
    """Without the output, which may move as the workdir of the other experiments may."""
    return {name: x for name, x in common.lasting(config).items() if name != "output"}


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
