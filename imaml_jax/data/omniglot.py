"""Omniglot: 1,623 handwritten characters of 50 alphabets, 20 drawings of each."""

import hashlib
import io
import os
from pathlib import Path

import numpy as np

from imaml_jax.data import archives
from imaml_jax.data.archives import DataError
from imaml_jax.data.cache import cached_arrays
from imaml_jax.data.episodes import Dataset, Splits, from_class_arrays
from imaml_jax.data.omniglot_splits import (
    BACKGROUND,
    DRAWERS,
    EVALUATION,
    class_names,
    split_indices,
)

ARCHIVES = ("images_background.zip", "images_evaluation.zip")
SIDE = 105
_URL = "https://github.com/brendenlake/omniglot/raw/master/python/"
_HELP = (
    "Call imaml_jax.data.omniglot.load(download=True) to download them, or put the two files from "
    "https://github.com/brendenlake/omniglot/tree/master/python into a directory and name it by "
    f"data_dir or ${archives.ENV_DATA_DIR}."
)


def load(
    data_dir: str | os.PathLike | None = None,
    *,
    split: str = "finn",
    image_size: int = 28,
    cache_dir: str | os.PathLike | None = None,
    download: bool = False,
) -> Splits:
    """Loads Omniglot from its public archives, resized, split by character.

    The drawings are black and white, `105 x 105`. They are resized with Pillow's LANCZOS filter, as
    in the code of the authors of MAML and implicit MAML, which leaves grey values at the strokes.
    Polarity as stored: ink is 0, paper 255; `sample_tasks(..., invert=True)` turns it round, as
    MAML does.

    The resized images of all characters are cached in one file, whose name depends on the content
    of the archives and on `image_size`; the first call takes some seconds. The data directory is
    only read.

    Args:
      data_dir: directory of `images_background.zip` and `images_evaluation.zip`, or its parent if
        it is named `omniglot`; default: the environment variable `IMAML_DATA_DIR`, else what an
        earlier `download=True` left in the cache.
      split: "finn" (1100/100/423 characters), "vinyals" (1028/172/423), "lake" (964/659, no
        validation), "reptile" (1200/423, no validation) or "mamlpp" (1150/50/423); see
        `omniglot_splits.split_indices`.
      image_size: side of the returned images in pixels.
      cache_dir: default: the environment variable `IMAML_CACHE_DIR`, else `~/.cache/imaml_jax`.
      download: whether to download archives that are missing, into `data_dir`, `IMAML_DATA_DIR` or
        the cache. Uses tensorflow-datasets and its published checksums, without TensorFlow.

    Returns:
      `Splits` with images uint8 `[characters * 20, image_size, image_size, 1]`, grouped by
      character.

    Raises:
      ValueError: unknown `split`, or `image_size` out of range.
      DataError: archives missing, damaged or not Omniglot, or the download failed; a ValueError
        too.

    References:
      Lake, Salakhutdinov, Tenenbaum, Human-level concept learning through probabilistic program
      induction, Science 350, 2015
    """
    train, val, test = split_indices(split)
    if not 1 <= image_size <= SIDE:
        raise ValueError(f"image_size={image_size}; allowed: 1 to {SIDE}.")
    paths = _archives(data_dir, cache_dir, download)
    recipe = {
        "archives": tuple(_sha256(path) for path in paths),
        "image_size": image_size,
        "filter": "lanczos",
        "version": 1,
    }
    shape = (len(class_names()), DRAWERS, image_size, image_size, 1)
    arrays = cached_arrays(
        "omniglot",
        recipe,
        lambda: {"images": _read(paths, image_size)},
        is_valid=lambda stored: _is_uint8(stored.get("images"), shape),
        cache_dir=cache_dir,
    )
    images = arrays["images"]

    def subset(indices: np.ndarray) -> Dataset:
        return from_class_arrays(images[indices])

    return Splits(subset(train), None if val is None else subset(val), subset(test))


def _archives(data_dir, cache_dir, download) -> list[Path]:
    options = {"subdir": "omniglot", "data_dir": data_dir, "cache_dir": cache_dir}
    try:
        return archives.find_archives(ARCHIVES, help_text=_HELP, **options)
    except DataError:
        if not download:
            raise
    archives.download(
        [_URL + name for name in ARCHIVES],
        archives.download_dir(**options),
        checksums_of="omniglot",
    )
    return archives.find_archives(ARCHIVES, help_text=_HELP, **options)


def _is_uint8(array: np.ndarray | None, shape: tuple[int, ...]) -> bool:
    return array is not None and array.shape == shape and array.dtype == np.uint8


def _sha256(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error}. Check its permissions.") from error


def _read(paths: list[Path], image_size: int) -> np.ndarray:
    """Returns all images, uint8 `[1623, 20, image_size, image_size, 1]`, in canonical order."""
    positions = {name: index for index, name in enumerate(class_names())}
    images = np.zeros((len(positions), DRAWERS, image_size, image_size, 1), np.uint8)
    for path, alphabets in zip(paths, (BACKGROUND, EVALUATION), strict=True):
        counts = dict.fromkeys((n for n in positions if n.split("/")[0] in alphabets), 0)
        pattern = rf"{path.stem}/([^/]+/character\d\d)/(\d{{4}}_\d\d)\.png"
        for match, content in archives.read_members(path, pattern):
            name = match[1]
            if name in counts:
                if counts[name] < DRAWERS:
                    image = _decode(content, image_size, f"{path}: {match[0]}")
                    images[positions[name], counts[name], ..., 0] = image
                counts[name] += 1
            else:
                raise DataError(
                    f"{path} holds a character {name!r} that Omniglot has not there. {_fresh(path)}"
                )
        _check_counts(path, alphabets, counts)
    return images


def _check_counts(path: Path, alphabets: dict[str, int], counts: dict[str, int]) -> None:
    expected = DRAWERS * sum(alphabets.values())
    wrong = [f"{name}: {count}" for name, count in counts.items() if count != DRAWERS]
    if wrong:
        examples = ", ".join(wrong[:3]) + (", ..." if len(wrong) > 3 else "")
        raise DataError(
            f"{path}: expected {len(alphabets)} alphabets, {sum(alphabets.values())} characters "
            f"and {DRAWERS} drawings of each, {expected} images in all; found "
            f"{sum(counts.values())} images under {path.stem}/<alphabet>/character<NN>/, with "
            f"another number of drawings for {len(wrong)} characters ({examples}). "
            f"{_fresh(path)}"
        )


def _decode(content: bytes, image_size: int, where: str) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            if image.size != (SIDE, SIDE):
                found = "x".join(map(str, image.size))
                raise DataError(f"{where}: expected {SIDE}x{SIDE} pixels, found {found}.")
            image = image.convert("L")
            if image_size != SIDE:
                image = image.resize((image_size, image_size), Image.Resampling.LANCZOS)
            return np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{where}: expected a PNG image of {SIDE}x{SIDE} pixels, found {len(content)} bytes "
            f"that Pillow cannot read ({error}). Get a fresh copy of the archive."
        ) from error


def _fresh(path: Path) -> str:
    return (
        f"Delete {path.name} and load with download=True, or get it again from {_URL}{path.name}."
    )
