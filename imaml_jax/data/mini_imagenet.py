"""mini-ImageNet: 100 classes of ImageNet with 600 images each, split by class."""

import os
from functools import partial
from pathlib import Path

import numpy as np

from imaml_jax.data import listings, pickles
from imaml_jax.data.archives import ENV_DATA_DIR, explained
from imaml_jax.data.episodes import Splits
from imaml_jax.data.images import SPLITS, Listing, Source

PICKLES = tuple(f"mini-imagenet-cache-{split}.pkl" for split in SPLITS)
_SUBDIRS = ("miniimagenet", "mini_imagenet", "mini-imagenet", "images")
_HELP = (
    "mini-ImageNet cannot be downloaded freely: its images are ImageNet's. Put train.csv, val.csv "
    "and test.csv (https://github.com/twitter-research/meta-learning-lstm/tree/master/data/"
    "miniImagenet) beside a folder images/ or zips of the images, or take the three files "
    "mini-imagenet-cache-*.pkl; name their directory by data_dir (on the command line --data-dir) "
    f"or ${ENV_DATA_DIR}."
)


def load(
    data_dir: str | os.PathLike | None = None,
    *,
    cache_dir: str | os.PathLike | None = None,
    image_size: int = 84,
) -> Splits:
    """Loads mini-ImageNet in the split of Ravi and Larochelle.

    Read from train.csv, val.csv and test.csv (`filename,label`) with the images in a folder or in
    zips beside them (see `listings.from_csv`), else from mini-imagenet-cache-{train,val,test}.pkl:
    dicts of `image_data`, uint8 `[N, 84, 84, 3]`, and `class_dict`, the indices of each class.
    Pickles are read as data: nothing in them is run. Decoded once, into the cache; see
    `images.load_splits`.

    Args:
      data_dir: directory of these files, or its parent if it is named `miniimagenet`,
        `mini_imagenet`, `mini-imagenet` or `images`; default: the environment variable
        `IMAML_DATA_DIR`.
      cache_dir: default: the environment variable `IMAML_CACHE_DIR`, else `~/.cache/imaml_jax`.
      image_size: side of the returned images in pixels.

    Returns:
      `Splits` with images uint8 `[N, image_size, image_size, 3]`, grouped by class; 64, 16 and 20
      classes of 600 images where the files are the published ones. Another selection is taken as it
      is.

    Raises:
      ValueError: `image_size` out of range.
      DataError: files missing, damaged or of another form; a ValueError too.

    References:
      Vinyals et al., Matching Networks for One Shot Learning, https://arxiv.org/abs/1606.04080
      Ravi and Larochelle, Optimization as a Model for Few-Shot Learning, ICLR 2017 (the split)
    """
    return listings.load_found(
        "mini_imagenet",
        {listings.CSV_FILES: listings.from_csv, PICKLES: _from_pickles},
        image_size=image_size,
        cache_dir=cache_dir,
        data_dir=data_dir,
        subdirs=_SUBDIRS,
        help_text=_HELP,
    )


def _from_pickles(folder: Path, files: listings.Files) -> list[Listing]:
    found = [_from_pickle(folder / name) for name in files]
    listings.require_disjoint(found, str(folder))
    return found


def _from_pickle(path: Path) -> Listing:
    content = pickles.load(path)
    with explained(
        f"{path}: expected a dict of 'image_data', uint8 [N, 84, 84, 3], and 'class_dict', the "
        "indices of each class by its name",
        "Get the file again, or use the csv files and images.",
    ):
        images = np.asarray(content["image_data"])
        classes = {str(k): np.asarray(v) for k, v in sorted(content["class_dict"].items())}
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"'image_data' is {images.dtype}{images.shape}")
        for name, indices in classes.items():
            if indices.dtype.kind not in "iu" or indices.ndim != 1 or not indices.size:
                raise ValueError(f"class {name!r} is no list of indices")
            if not 0 <= indices.min() <= indices.max() < len(images):
                raise ValueError(f"class {name!r} has indices outside 0 to {len(images) - 1}")
    return {
        name: [Source(f"{path}: image {i}", partial(images.__getitem__, i)) for i in indices]
        for name, indices in classes.items()
    }
