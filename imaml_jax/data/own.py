"""Your own images: folders of classes, or arrays in an .npz file."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from imaml_jax.data import listings
from imaml_jax.data.archives import DataError
from imaml_jax.data.cache import UNREADABLE
from imaml_jax.data.episodes import Dataset, Splits, from_grouped
from imaml_jax.data.images import SPLITS, Listing, load_splits


def load_folder(
    path: str | os.PathLike,
    *,
    cache_dir: str | os.PathLike | None = None,
    image_size: int = 84,
    progress: bool = True,
) -> Splits:
    """Loads images from class folders.

    Either `path/{train,val,test}/<class>/...`, where `val` may be absent, or `path/<class>/...`,
    which is split by `split_of`. Decoded once, into the cache; see `images.load_splits`.

    Args:
      path: the folder.
      cache_dir: default: the environment variable `IMAML_CACHE_DIR`, else `~/.cache/imaml_jax`.
      image_size: side of the returned images in pixels.
      progress: whether to show a progress bar, if on a terminal.

    Returns:
      `Splits` with images uint8 `[N, image_size, image_size, 3]`, grouped by class.

    Raises:
      ValueError: `image_size` out of range.
      DataError: no such folder, no images, an image that cannot be read; a ValueError too.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise DataError(
            f"{folder}: expected a folder with {{train,val,test}}/<class>/ or with <class>/, found "
            f"{'a file' if folder.exists() else 'nothing there'}. Name the folder that holds the "
            "class folders."
        )
    files = listings.scan(folder)

    def list_splits() -> list[Listing]:
        if (folder / "train").is_dir() and (folder / "test").is_dir():
            return listings.from_split_folders(folder, files)
        classes = listings.from_class_folders(folder, files)
        _require_split(classes, folder, "folders train/<class>/, val/<class>/, test/<class>/")
        return [{c: s for c, s in classes.items() if split_of(c) == split} for split in SPLITS]

    return load_splits(
        "folder",
        {"files": files},
        list_splits,
        image_size=image_size,
        cache_dir=cache_dir,
        progress=progress,
    )


def load_arrays(path: str | os.PathLike) -> Splits:
    """Loads images from an .npz file of arrays, as they are.

    Either `train_images`, `train_labels`, `test_images`, `test_labels` and, if there are,
    `val_images` and `val_labels`, or `images` and `labels`, which are split by `split_of`. Images
    are uint8 `[N, H, W, C]`, labels integers or text `[N]`.

    Args:
      path: the file.

    Returns:
      `Splits` with images uint8 `[N, H, W, C]`, grouped by class.

    Raises:
      DataError: the file cannot be read or has other arrays, or a class is in two splits; a
        ValueError too.
    """
    path = Path(path).expanduser()
    arrays = _read(path)
    if "images" in arrays:
        images, labels = _pair(path, arrays, "")
        _require_split(np.unique(labels), path, "arrays named train_images, train_labels, ...")
        parts = np.array([split_of(label) for label in labels])
        pairs = {split: (images[parts == split], labels[parts == split]) for split in SPLITS}
    else:
        given = [split for split in SPLITS if split != "val" or "val_images" in arrays]
        pairs = {split: _pair(path, arrays, f"{split}_") for split in given}
        labels = [pairs[split][1].tolist() if split in pairs else [] for split in SPLITS]
        listings.require_disjoint(labels, str(path))
    shapes = {split: images.shape[1:] for split, (images, _) in pairs.items()}
    if len(set(shapes.values())) > 1:
        raise DataError(f"{path}: images of one size in all splits expected, found {shapes}.")
    datasets = {split: _grouped(*pair) for split, pair in pairs.items() if len(pair[1])}
    return Splits(datasets["train"], datasets.get("val"), datasets["test"])


def split_of(name: str) -> str:
    """Returns the split of a class, about 70/15/15, from a hash of its name.

    It depends on nothing else, so that a class stays where it is as others are added.
    """
    draw = hashlib.sha256(f"class {name}".encode()).digest()[0] / 256
    return "train" if draw < 0.7 else "val" if draw < 0.85 else "test"


def _require_split(names: Iterable[str], where: Path, remedy: str) -> None:
    splits = [split_of(name) for name in names]
    if "train" not in splits or "test" not in splits:
        raise DataError(
            f"{where}: expected enough classes for a split by the hash of their names; found "
            f"{len(splits)} with images, {splits.count('train')} of them for train and "
            f"{splits.count('test')} for test. Add classes, or split them yourself: give {remedy}."
        )


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (AttributeError, *UNREADABLE) as error:  # AttributeError: a single array, no .npz
        raise DataError(
            f"{path}: expected an .npz file of arrays ({type(error).__name__}: {error}). Write it "
            "by numpy.savez, without objects."
        ) from error


def _pair(path: Path, arrays: dict[str, np.ndarray], prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """Images `[N, H, W, C]` and the names of their classes `[N]`."""
    images, labels = (arrays.get(prefix + name, np.zeros(0)) for name in ("images", "labels"))
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) == 0:
        problem = f"{prefix}images is {images.dtype}{images.shape}, expected uint8[N, H, W, C]"
    elif labels.dtype.kind not in "iuU" or labels.shape != images.shape[:1]:
        problem = (
            f"{prefix}labels is {labels.dtype}{labels.shape}, expected integers or text "
            f"[{len(images)}]"
        )
    else:
        return images, labels.astype(str)
    raise DataError(
        f"{path} (arrays {', '.join(arrays) or 'none'}): {problem}. Give images and labels, or "
        "train_images, train_labels, test_images and test_labels; add a channel axis to grey "
        "images, scale floating-point images to 0..255."
    )


def _grouped(images: np.ndarray, labels: np.ndarray) -> Dataset:
    order = np.argsort(labels, kind="stable")
    _, sizes = np.unique(labels, return_counts=True)
    return from_grouped(images[order], np.cumsum([0, *sizes]))
