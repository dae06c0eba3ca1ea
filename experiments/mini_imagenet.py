"""Few-shot accuracy on unseen classes of photographs: mini-ImageNet, tiered-ImageNet or your own.

python -m experiments.mini_imagenet --algorithm imaml --data-dir DIR
python -m experiments.mini_imagenet --dataset tiered_imagenet --data-dir DIR
python -m experiments.mini_imagenet --dataset folder:PATH
python -m experiments.mini_imagenet --dataset arrays:FILE.npz
"""

import dataclasses
from pathlib import Path
from typing import Any

from experiments.shared import common, few_shot
from imaml_jax.data import mini_imagenet, own, tiered_imagenet
from imaml_jax.data.episodes import Splits
from imaml_jax.protocols import Protocol


@dataclasses.dataclass(frozen=True)
class Config(few_shot.Config):
    """Few-shot classification of photographs."""

    dataset: str = "mini_imagenet"
    """mini_imagenet, tiered_imagenet, folder:PATH (folders {train,val,test}/<class>/, or <class>/
    split by name) or arrays:FILE.npz."""
    data_dir: Path | None = None
    """Directory of mini_imagenet or tiered_imagenet; default the environment variable
    IMAML_DATA_DIR."""
    image_size: int = 84
    """Side of the images in pixels, between 1 and 1024; arrays keep theirs."""


def resolve(config: Config) -> Protocol:
    """The protocol of mini-ImageNet, which serves the other data sets too.

    Raises:
      ValueError: a setting out of its range, or a protocol that has none for photographs.
    """
    protocol = few_shot.resolve(config, "mini_imagenet")
    return protocol._replace(split=config.dataset)


def load(config: Config) -> Splits:
    """Loads the data set that the config names.

    Raises:
      ValueError: an unknown name, or what the data set's own function raises.
    """
    kind, _, path = config.dataset.partition(":")
    if kind == "folder" and path:
        return own.load_folder(path, image_size=config.image_size)
    if kind == "arrays" and path:
        return own.load_arrays(path)
    named = {"mini_imagenet": mini_imagenet, "tiered_imagenet": tiered_imagenet}
    if config.dataset not in named:
        raise ValueError(
            f"dataset={config.dataset} must be mini_imagenet, tiered_imagenet, folder:PATH or "
            "arrays:FILE.npz"
        )
    return named[config.dataset].load(config.data_dir, image_size=config.image_size)


def prepare(config: Config) -> tuple[Protocol, Splits, str]:
    """The protocol, the data and their name, as `few_shot.run` takes them."""
    return resolve(config), load(config), config.dataset


def main(config: Config) -> dict[str, Any]:
    """Runs the experiment; see `few_shot.run`."""
    return few_shot.run(config, *prepare(config))


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
