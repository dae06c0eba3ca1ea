"""Omniglot: 1,623 handwritten characters of 50 alphabets, 20 drawings of each."""

import hashlib
import io
import os
import re
from pathlib import Path

import numpy as np

from imaml_jax.data import archives
from imaml_jax.data.archives import DataError
from imaml_jax.data.cache import cached_arrays
from imaml_jax.data.episodes import Splits, from_class_arrays
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
    digests = []
    for path in paths:
        with archives.readable(path), open(path, "rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    recipe = {
        "archives": tuple(digests),
        "image_size": image_size,
        "filter": "lanczos",
        "version": 1,
    }
    images = cached_arrays(
        "omniglot",
        recipe,
        lambda: {"images": _read(paths, image_size)},
        is_valid=lambda stored: (
            stored["images"].dtype == np.uint8
            and stored["images"].shape == (len(class_names()), DRAWERS, image_size, image_size, 1)
        ),
        cache_dir=cache_dir,
    )["images"]
    return Splits(
        from_class_arrays(images[train]),
        None if val is None else from_class_arrays(images[val]),
        from_class_arrays(images[test]),
    )


def _archives(data_dir, cache_dir, download) -> list[Path]:
    places = {"data_dir": data_dir, "cache_dir": cache_dir}
    try:
        folder, names = archives.find_layout(
            [ARCHIVES], subdirs=["omniglot"], help_text=_HELP, **places
        )
        return [folder / name for name in names]
    except DataError:
        if not download:
            raise
    return archives.download(
        [_URL + name for name in ARCHIVES],
        archives.download_dir("omniglot", **places),
        checksums_of="omniglot",
    )


def _read(paths: list[Path], image_size: int) -> np.ndarray:
    """Returns all images, uint8 `[1623, 20, image_size, image_size, 1]`, in canonical order."""
    positions = {name: index for index, name in enumerate(class_names())}
    images = np.zeros((len(positions), DRAWERS, image_size, image_size, 1), np.uint8)
    for path, alphabets in zip(paths, (BACKGROUND, EVALUATION), strict=True):
        counts = dict.fromkeys((n for n in positions if n.split("/")[0] in alphabets), 0)
        fresh = f"Delete {path.name} and load with download=True, or get it again from "
        fresh += f"{_URL}{path.name}."
        pattern = re.compile(rf"{path.stem}/([^/]+/character\d\d)/\d{{4}}_\d\d\.png")
        archive = archives.Archive(path)
        for match in filter(None, map(pattern.fullmatch, sorted(archive.names))):
            name = match[1]
            if name not in counts:
                raise DataError(
                    f"{path} holds a character {name!r} that Omniglot has not there. {fresh}"
                )
            if counts[name] < DRAWERS:
                image = _decode(archive.read(match[0]), image_size, f"{path}: {match[0]}")
                images[positions[name], counts[name], ..., 0] = image
            counts[name] += 1
        wrong = [f"{name}: {count}" for name, count in counts.items() if count != DRAWERS]
        if wrong:
            examples = ", ".join(wrong[:3]) + (", ..." if len(wrong) > 3 else "")
            raise DataError(
                f"{path}: expected {len(alphabets)} alphabets, {len(counts)} characters and "
                f"{DRAWERS} drawings of each, {DRAWERS * len(counts)} images in all; found "
                f"{sum(counts.values())} images under {path.stem}/<alphabet>/character<NN>/, with "
                f"another number of drawings for {len(wrong)} characters ({examples}). {fresh}"
            )
    return images


def _decode(content: bytes, image_size: int, where: str) -> np.ndarray:
    from PIL import Image

    with archives.explained(
        f"{where}: expected a PNG image of {SIDE}x{SIDE} pixels, found {len(content)} bytes that "
        "Pillow cannot read",
        "Get a fresh copy of the archive.",
        (OSError, SyntaxError, ValueError),
    ):
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            if image.size != (SIDE, SIDE):
                found = "x".join(map(str, image.size))
                raise DataError(f"{where}: expected {SIDE}x{SIDE} pixels, found {found}.")
            image = image.convert("L")
            if image_size != SIDE:
                image = image.resize((image_size, image_size), Image.Resampling.LANCZOS)
            return np.asarray(image)
