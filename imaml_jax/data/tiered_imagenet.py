"""tiered-ImageNet: 608 classes of ImageNet in 34 categories, split by category."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from imaml_jax.data import listings, pickles
from imaml_jax.data.archives import ENV_DATA_DIR, DataError, explained
from imaml_jax.data.episodes import Splits
from imaml_jax.data.images import SPLITS, Listing, Source

PICKLES = tuple(f"{split}_{kind}.pkl" for split in SPLITS for kind in ("images_png", "labels"))
FOLDERS = tuple(f"{split}/" for split in SPLITS)
_SUBDIRS = ("tiered_imagenet", "tiered-imagenet", "tieredimagenet", "tiered")
_HELP = (
    "tiered-ImageNet cannot be downloaded freely: its images are ImageNet's. Get the pickles named "
    "at https://github.com/renmengye/few-shot-ssl-public, or put the images into train/<class>/, "
    "val/<class>/ and test/<class>/; name their directory by data_dir (on the command line "
    f"--data-dir) or ${ENV_DATA_DIR}."
)


def load(
    data_dir: str | os.PathLike | None = None,
    *,
    cache_dir: str | os.PathLike | None = None,
    image_size: int = 84,
) -> Splits:
    """Loads tiered-ImageNet, whose classes differ in size.

    Read from train.csv, val.csv and test.csv (`filename,label`) with the images in folders or zips
    beside them (see `listings.from_csv`), else from the published pickles,
    {train,val,test}_images_png.pkl, a list of PNG files, and {train,val,test}_labels.pkl, a dict
    with their classes in `label_specific`, else from the folders {train,val,test}/<class>/. Pickles
    are read as data: nothing in them is run. Decoded once, into the cache, one split after another;
    see `images.load_splits`. All of the published images take 16.5 GB there.

    Args:
      data_dir: directory of these files, or its parent if it is named `tiered_imagenet`,
        `tiered-imagenet`, `tieredimagenet` or `tiered`; default: the environment variable
        `IMAML_DATA_DIR`.
      cache_dir: default: the environment variable `IMAML_CACHE_DIR`, else `~/.cache/imaml_jax`.
      image_size: side of the returned images in pixels.

    Returns:
      `Splits` with images uint8 `[N, image_size, image_size, 3]`, grouped by class; 351, 97 and 160
      classes where the files are the published ones.

    Raises:
      ValueError: `image_size` out of range.
      DataError: files missing, damaged or of another form; a ValueError too.

    References:
      Ren et al., Meta-Learning for Semi-Supervised Few-Shot Classification, ICLR 2018,
      https://arxiv.org/abs/1803.00676
    """
    return listings.load_found(
        "tiered_imagenet",
        {
            listings.CSV_FILES: listings.from_csv,
            PICKLES: _from_pickles,
            FOLDERS: listings.from_split_folders,
        },
        image_size=image_size,
        cache_dir=cache_dir,
        data_dir=data_dir,
        subdirs=_SUBDIRS,
        help_text=_HELP,
    )


def _from_pickles(folder: Path, _) -> Iterator[Listing]:
    """One split after another, since the pictures of one take gigabytes.

    Each split numbers its classes from 0, and names of ImageNet classes are not unique (crane,
    maillot), so that nothing here can tell whether a class is in two splits.
    """
    for split in SPLITS:
        yield _from_pickle(folder / f"{split}_images_png.pkl", folder / f"{split}_labels.pkl")


def _from_pickle(images_path: Path, labels_path: Path) -> Listing:
    labels = pickles.load(labels_path)
    expected = "expected a dict with 'label_specific', the class number of each image"
    with explained(f"{labels_path}: {expected}", "Get the file again."):
        labels = np.asarray(labels["label_specific"])
        if labels.dtype.kind not in "iu" or labels.ndim != 1 or not labels.size:
            raise ValueError(f"'label_specific' is {labels.dtype}{labels.shape}")
    contents = pickles.load(images_path)
    if not isinstance(contents, list | tuple) or len(contents) != len(labels):
        found = len(contents) if isinstance(contents, list | tuple) else type(contents).__name__
        raise DataError(
            f"{images_path}: expected a list of {len(labels)} PNG files, as many as "
            f"{labels_path.name} has classes for; found {found}. Get both files again."
        )

    def read(index: int) -> bytes:
        if isinstance(contents[index], bytes):
            return contents[index]
        content = np.asarray(contents[index])
        if content.dtype != np.uint8:
            raise ValueError(f"dtype {content.dtype}, not the uint8 of a file's bytes")
        return content.tobytes()

    order = np.argsort(labels, kind="stable")
    listing = {}
    for index in order:
        source = Source(f"{images_path}: image {index}", partial(read, index))
        listing.setdefault(int(labels[index]), []).append(source)
    return {str(label): sources for label, sources in listing.items()}
