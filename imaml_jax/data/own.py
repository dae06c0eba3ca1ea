"""Your own images: folders of classes, or arrays in an .npz file."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from imaml_jax.data import class_splits, listings
from imaml_jax.data.archives import DataError, explained
from imaml_jax.data.cache import UNREADABLE, read_arrays
from imaml_jax.data.episodes import Splits, from_grouped
from imaml_jax.data.images import SPLITS, Listing, load_splits


class Folder(NamedTuple):
    """Class folders, looked at but not read.

    Attributes:
      path: of the folder.
      files: its files, see `listings.scan`.
      classes: the pictures of each class, by its name.
      split: "train", "val" or "test" of each class where the folder tells, else None.
      passed_over: in words, the class folders without images and the files that are no images.
    """

    path: Path
    files: listings.Files
    classes: Listing
    split: Mapping[str, str] | None
    passed_over: str = ""


def open_folder(path: str | os.PathLike, *, has_splits: bool = True) -> Folder:
    """Looks what class folders there are.

    Args:
      path: a folder with `<class>/...`, or with `{train,val,test}/<class>/...`, where `val` may be
        absent.
      has_splits: whether `train` and `test` are splits; if not, they are classes as others.

    Returns:
      The `Folder`.

    Raises:
      DataError: no such folder, no images in class folders, or split folders of which one is
        missing; a ValueError too.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise DataError(
            f"{folder}: expected a folder with {{train,val,test}}/<class>/ or with <class>/, found "
            f"{'a file' if folder.exists() else 'nothing there'}. Name the folder that holds the "
            "class folders."
        )
    files, split = listings.scan(folder), None
    if has_splits and (folder / "train").is_dir() and (folder / "test").is_dir():
        parts = dict(zip(SPLITS, listings.from_split_folders(folder, files), strict=True))
        split = {name: part for part, classes in parts.items() for name in classes}
    else:
        parts = {"": listings.from_class_folders(folder, files)}
    classes = {name: sources for part in parts.values() for name, sources in part.items()}
    has_odd_names = all(name.lower() in class_splits.NAMES for name in classes)
    if has_splits and split is None and classes and has_odd_names:
        missing = " and ".join(f"{s}/" for s in ("train", "test") if not (folder / s).is_dir())
        raise DataError(
            f"{folder}: expected train/<class>/ and test/<class>/, or <class>/ of other names; "
            f"found {', '.join(f'{name}/' for name in classes)}, so that {missing} is missing. Add "
            "it, or name the folder that holds all class folders."
        )
    empty = sorted(
        place.relative_to(folder).as_posix()
        for part, found in parts.items()
        if (folder / part).is_dir()
        for place in (folder / part).iterdir()
        if place.is_dir() and not place.name.startswith(".") and place.name not in found
    )
    said = [f"class folders without images: {class_splits.some(empty)}"] if empty else []
    passed_over = "; ".join([*said, *no_images(folder)])
    if not classes:
        flat = sum("/" not in name and name.lower().endswith(listings.IMAGES) for name in files)
        raise DataError(
            f"{folder}: expected images ({', '.join(listings.IMAGES)}) in one folder for each "
            f"class, found {f'{flat} images directly in it' if flat else 'none'}"
            f"{f' ({passed_over})' if passed_over else ''}. Make {folder.name}/<class>/ and put "
            "the images of each class there."
        )
    return Folder(folder, files, classes, split, passed_over)


def load_folder(
    path: str | os.PathLike,
    *,
    split: Mapping[str, str] | None = None,
    cache_dir: str | os.PathLike | None = None,
    image_size: int = 84,
    channels: int = 3,
) -> Splits:
    """Loads images from class folders.

    Either `path/{train,val,test}/<class>/...`, where `val` may be absent, or `path/<class>/...`.
    Decoded once, into the cache; see `images.decode` and `images.load_splits`.

    Args:
      path: the folder.
      split: "train", "val" or "test" of each class, as `class_splits.seeded_split` and
        `class_splits.read_split` make it; default: as the folder has it, else
        `class_splits.split_of`.
      cache_dir: default: the environment variable `IMAML_CACHE_DIR`, else `~/.cache/imaml_jax`.
      image_size: side of the returned images in pixels.
      channels: 3 for RGB, 1 for grey.

    Returns:
      `Splits` with images uint8 `[N, image_size, image_size, channels]`, grouped by class.

    Raises:
      ValueError: `image_size` or `channels` out of range.
      DataError: no such folder, no images, a split of other classes, an image that cannot be read;
        a ValueError too.
    """
    folder = open_folder(path)
    split = folder.split if split is None else split
    if split is None:
        remedy = "folders train/<class>/, val/<class>/, test/<class>/"
        split = _split_by_name(folder.classes, folder.path, remedy)
    class_splits.check_split(split, folder.classes, str(folder.path))

    def list_splits() -> list[Listing]:
        return [{c: s for c, s in folder.classes.items() if split[c] == part} for part in SPLITS]

    return load_splits(
        "folder",
        {"files": folder.files, "split": sorted(split.items())},
        list_splits,
        image_size=image_size,
        channels=channels,
        cache_dir=cache_dir,
    )


def load_arrays(path: str | os.PathLike) -> Splits:
    """Loads images from an .npz file of arrays, as they are.

    Either `train_images`, `train_labels`, `test_images`, `test_labels` and, if there are,
    `val_images` and `val_labels`, or `images` and `labels`, which are split by
    `class_splits.split_of`. Images are uint8 `[N, H, W, C]`, labels integers or text `[N]`.

    Args:
      path: the file.

    Returns:
      `Splits` with images uint8 `[N, H, W, C]`, grouped by class.

    Raises:
      DataError: the file cannot be read or has other arrays, or a class is in two splits; a
        ValueError too.
    """
    path = Path(path).expanduser()
    remedy = "Write it by numpy.savez, without objects."
    with explained(f"{path}: expected an .npz file of arrays", remedy, UNREADABLE):
        arrays = read_arrays(path)
    if "images" in arrays:
        images, labels = _pair(path, arrays, "")
        remedy = "arrays named train_images, train_labels, ..."
        split_of = _split_by_name(labels.tolist(), path, remedy)
        parts = np.array([split_of[label] for label in labels.tolist()])
        pairs = {split: (images[parts == split], labels[parts == split]) for split in SPLITS}
    else:
        given = [split for split in SPLITS if split != "val" or "val_images" in arrays]
        pairs = {split: _pair(path, arrays, f"{split}_") for split in given}
        labels = [pairs[split][1].tolist() if split in pairs else [] for split in SPLITS]
        listings.require_disjoint(labels, str(path))
    shapes = {split: images.shape[1:] for split, (images, _) in pairs.items()}
    if len(set(shapes.values())) > 1:
        raise DataError(f"{path}: images of one size in all splits expected, found {shapes}.")
    datasets = {}
    for split, (images, labels) in pairs.items():
        if len(labels):
            order = np.argsort(labels, kind="stable")
            _, sizes = np.unique(labels, return_counts=True)
            datasets[split] = from_grouped(images[order], np.cumsum([0, *sizes]))
    return Splits(datasets["train"], datasets.get("val"), datasets["test"])


def _split_by_name(classes: Iterable[str], where: Path, remedy: str) -> dict[str, str]:
    split = {name: class_splits.split_of(name) for name in classes}
    counts = Counter(split.values())
    if not counts["train"] or not counts["test"]:
        raise DataError(
            f"{where}: expected enough classes for a split by the hash of their names; found "
            f"{len(split)} with images, {counts['train']} of them for train and "
            f"{counts['test']} for test. Add classes, or split them yourself: give {remedy}."
        )
    return split


def no_images(folder: Path) -> list[str]:
    """The files below a folder that are no images, in words; nothing where there are none."""
    others = listings.other_files(folder)
    return [f"files that are no images: {class_splits.some(others)}"] if others else []


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
