"""Few-shot accuracy on unseen classes of photographs: mini-ImageNet, tiered-ImageNet or your own.

python -m experiments.mini_imagenet --algorithm imaml --data-dir DIR
python -m experiments.mini_imagenet --dataset tiered_imagenet --data-dir DIR
python -m experiments.mini_imagenet --dataset folder:PATH
python -m experiments.mini_imagenet --dataset arrays:FILE.npz
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, ClassVar

from experiments.shared import common, few_shot
from imaml_jax.data import mini_imagenet, own, tiered_imagenet
from imaml_jax.data.episodes import Splits
from imaml_jax.learners.settings import Range


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(few_shot.Config):
    """Few-shot classification of photographs."""

    DATASET: ClassVar = "mini_imagenet"

    dataset: str = "mini_imagenet"
    """mini_imagenet, tiered_imagenet, folder:PATH (folders {train,val,test}/<class>/, or <class>/
    split by name) or arrays:FILE.npz."""
    data_dir: Path | None = None
    """Directory of mini_imagenet or tiered_imagenet; default the environment variable
    IMAML_DATA_DIR."""
    image_size: Annotated[int, Range(least=1, most=1024)] = 84
    """Side of the images in pixels; arrays keep theirs."""


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


def prepare(config: Config) -> tuple[Config, Splits, str]:
    """The config, the data and their name, as `few_shot.run` takes them."""
    protocol = config.settings
    tasks = dataclasses.replace(protocol.tasks, split=config.dataset)
    settings = dataclasses.replace(protocol, tasks=tasks)
    return dataclasses.replace(config, settings=settings), load(config), config.dataset


def main(config: Config) -> dict[str, Any]:
    """Runs the experiment; see `few_shot.run`."""
    return few_shot.run(*prepare(config))


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
