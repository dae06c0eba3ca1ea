"""Few-shot accuracy on unseen classes of your own images, and a model that takes new classes.

    python -m experiments.folder --data-dir PATH --model DIR
    python -m experiments.classify --model DIR --support FOLDER --query FOLDER

PATH has one folder of images for each class, or train/, val/ and test/ with such folders. Images of
any size are resized to squares.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from experiments.shared import common, few_shot
from imaml_jax.data import class_splits, own
from imaml_jax.data.episodes import Splits
from imaml_jax.data.images import SPLITS
from imaml_jax.learners.settings import Count, Fixed, Range
from imaml_jax.protocols import Protocol
from imaml_jax.protocols.protocol import ImageTasks
from imaml_jax.training import processes

_SHARES, _QUERIES = (0.7, 0.15, 0.15), 15


@dataclasses.dataclass(frozen=True)
class FolderTasks(ImageTasks):
    """Tasks whose queries follow from `queries` and the data."""

    train_queries: Annotated[Count, Fixed()] = 15
    test_queries: Annotated[Count, Fixed()] = 15


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(few_shot.Config):
    """Few-shot classification of your own images."""

    DATASET: ClassVar = "mini_imagenet"

    data_dir: Path | None = None
    """Folder with one folder of images for each class, or with train/, val/ and test/ of these."""
    model: Path | None = Path("model")
    """Folder for the trained model, in float16, which experiments.classify uses."""
    image_size: Annotated[int, Range(least=16, most=1024)] = 32
    """Side in pixels to which images are resized; time grows with its square. mini-ImageNet has 84,
    for which a GPU is wanted."""
    log_every: Count = 20
    """Meta-steps between two log points."""
    channels: Literal[1, 3] = 3
    """3 for colour, 1 for grey."""
    split_file: Path | None = None
    """JSON object or CSV file (class,split) that says which class is for train, validation or
    test."""
    shares: tuple[float, float, float] | None = None
    """Shares of classes for training, validation and test, each at least 0, 1 together; default 0.7
    0.15 0.15, with as many test classes as a task has, and validation classes only where enough are
    left for training."""
    split_seed: Annotated[int, Range(least=0)] = 0
    """Seed of the random split of classes, where neither a file nor the folder tells it."""
    queries: Count | None = None
    """Query examples a class; default 15, or what the smallest class has left."""

    @classmethod
    def published(cls, **selectors: Any) -> Protocol:
        """The protocol of photographs, for less time."""
        protocol = few_shot.with_tasks(super().published(**selectors), FolderTasks)
        return protocol.with_settings({"meta_steps": 1000})

    def check_together(self) -> None:
        """Raises ValueError for settings that do not go together."""
        super().check_together()
        if self.shares is not None and self.split_file is not None:
            raise ValueError(f"shares={self.shares} has no effect on split_file; leave either out")


def split_classes(config: Config, folder: own.Folder) -> dict[str, str]:
    """The split of each class: by the file, by the folder, or at random.

    Raises:
      ValueError: too few classes, or shares that are none.
    """
    if config.split_file is not None:
        split = class_splits.read_split(config.split_file)
        class_splits.check_split(split, folder.classes, str(folder.path))
    elif folder.split is not None:
        if config.shares is not None:
            raise ValueError(f"shares={config.shares} has no effect on train/ and test/ folders")
        split = dict(folder.split)
    else:
        counts = _counts(config, len(folder.classes))
        split = class_splits.seeded_split(folder.classes, counts, config.split_seed)
    found = [list(split.values()).count(name) for name in SPLITS]
    for name, count in zip(SPLITS, found, strict=True):
        if count < config.ways and (count or name != "val"):
            raise ValueError(
                f"ways={config.ways} needs at least as many classes in training and in test, and "
                f"in validation if there is one: the {len(split)} classes of {folder.path} are "
                f"split {'/'.join(map(str, found))}. Lower ways, add classes, or split them "
                "otherwise by shares or split_file"
            )
    return split


def choose_queries(config: Config, folder: own.Folder) -> int:
    """Query examples a class that every class has beside its support examples.

    Raises:
      ValueError: a class has too few images.
    """
    smallest = min(folder.classes, key=lambda name: len(folder.classes[name]))
    size, shots = (
        len(folder.classes[smallest]),
        max(config.shots, config.settings.tasks.train_shots),
    )
    wanted = config.queries or max(1, min(_QUERIES, size - shots))
    if shots + wanted > size:
        raise ValueError(
            f"class {smallest!r} has {size} images, tasks take {shots} support and "
            f"queries={wanted} query examples of each class: add images, take the class out, or "
            "lower shots or queries"
        )
    return wanted


def prepare(config: Config) -> tuple[Config, Splits, str]:
    """The config, the data and their name, as `few_shot.run` takes them."""
    return _prepare(config)[:3]


def _prepare(config: Config) -> tuple[Config, Splits, str, dict[str, str]]:
    """These, and the split of the classes."""
    if config.data_dir is None:
        raise ValueError(
            "data_dir=None: name the folder that has one folder of images for each class, "
            "--data-dir PATH"
        )
    folder = own.open_folder(config.data_dir)
    split = split_classes(config, folder)
    queries = choose_queries(config, folder)
    counts = "/".join(str(list(split.values()).count(name)) for name in SPLITS)
    sizes = [len(sources) for sources in folder.classes.values()]
    common.say(
        f"{folder.path}: {sum(sizes)} images of {len(sizes)} classes, {min(sizes)} to {max(sizes)} "
        f"a class; {counts} classes for training, validation and test; {queries} queries a class"
        + (f"; passed over {folder.passed_over}" if folder.passed_over else "")
    )
    splits = own.load_folder(
        config.data_dir, split=split, image_size=config.image_size, channels=config.channels
    )
    digest = hashlib.sha256(json.dumps(sorted(split.items())).encode()).hexdigest()[:8]
    protocol = config.settings
    tasks = dataclasses.replace(
        protocol.tasks,
        split=f"of {counts} classes ({digest})",
        test_queries=queries,
        # A protocol with one query in training has an algorithm that uses none.
        train_queries=1 if protocol.tasks.train_queries == 1 else queries,
    )
    settings = dataclasses.replace(protocol, tasks=tasks)
    name = folder.path.resolve().name
    return dataclasses.replace(config, settings=settings), splits, name, split


def main(config: Config) -> dict[str, Any]:
    """Runs the experiment and keeps the split beside its results; see `few_shot.run`."""
    config, splits, dataset, split = _prepare(config)
    results = few_shot.run(config, splits, dataset)
    for place in (config.workdir, config.model):
        if place is not None and processes.is_first():
            class_splits.write_split(place.expanduser() / "split.json", split)
    return results


def _counts(config: Config, classes: int) -> tuple[int, int, int]:
    """How many classes are for training, validation and test."""
    if config.shares is not None:
        if min(config.shares) < 0 or not abs(sum(config.shares) - 1) < 1e-6:
            raise ValueError(
                f"shares={config.shares} must be three numbers of at least 0 that add up to 1"
            )
        _, val, test = (round(classes * share) for share in config.shares)
        return classes - val - test, val, test
    _, val, test = (max(config.ways, round(classes * share)) for share in _SHARES)
    if classes - val - test < 2 * config.ways:
        val = 0
    if classes - val - test < config.ways:
        raise ValueError(
            f"ways={config.ways} needs at least {2 * config.ways} classes, as many for the test as "
            f"for training; {config.data_dir} has {classes}. Add classes, or lower ways"
        )
    return classes - val - test, val, test


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
