"""Pictures decoded once, in parallel, into memory-mapped uint8 arrays in the cache."""

import contextlib
import io
import math
import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from imaml_jax.data.archives import DataError, explained
from imaml_jax.data.cache import ENV_CACHE_DIR, UNREADABLE, cache_root, read_arrays, recipe_key
from imaml_jax.data.episodes import Splits, from_grouped

SPLITS = ("train", "val", "test")
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
_MAX_SIDE = 1024
_MODES = {1: "L", 3: "RGB"}  # of Pillow, by channels
_UNDECODABLE = (OSError, SyntaxError, ValueError, TypeError, EOFError, struct.error, zlib.error)
_SHOWN = 5  # images that cannot be read, in one message
_CHUNK = 64  # images that one thread decodes between two steps of the progress bar


class Source(NamedTuple):
    """A picture that is read when it is needed.

    Attributes:
      where: its file, for error messages.
      read: `() -> bytes` of an image file, or pixels, uint8 `[height, width, 3]`.
    """

    where: str
    read: Callable[[], bytes | np.ndarray]


Listing = Mapping[str, Sequence[Source]]  # the pictures of each class, by its name


def load_splits(
    name: str,
    recipe: Mapping[str, object],
    list_splits: Callable[[], Iterable[Listing]],
    *,
    image_size: int,
    channels: int = 3,
    cache_dir: str | os.PathLike | None,
) -> Splits:
    """Returns the images of three listings, from the cache where they were decoded before.

    Pictures are read by `decode`, which see, by threads (Pillow decodes outside Python's lock) and
    with a progress bar where standard error is a terminal. The files have a temporary name, which
    is changed when all are complete: half a cache is never read.

    Args:
      name: start of the name of the cache folder.
      recipe: all that the pictures depend on; see `cache.recipe_key`.
      list_splits: gives the listings of train, val and test; an empty one of val becomes None.
        Called only where the cache has nothing.
      image_size: side of the images in pixels.
      channels: 3 for RGB, 1 for grey.
      cache_dir: as in `cache.cache_root`.

    Returns:
      `Splits` with images uint8 `[N, image_size, image_size, channels]`, grouped by class in the
      order of the listings; memory-mapped where the device is the CPU.

    Raises:
      ValueError: `image_size` or `channels` out of range.
      DataError: a picture that cannot be read, or a cache that cannot be written.
    """
    check_image(image_size, channels)
    shape = (image_size, image_size, channels)
    recipe = {**recipe, "shape": shape, "filter": "lanczos", "version": 2}
    folder = cache_root(cache_dir) / f"{name}-{recipe_key(recipe)}"
    with contextlib.suppress(*UNREADABLE):
        return _stored(folder, shape)
    remedy = f"Name another place by cache_dir or ${ENV_CACHE_DIR}."
    with explained(f"Cannot write the decoded images to {folder.parent}", remedy, OSError):
        _build(folder, list_splits, shape, remedy)
    with explained(f"{folder} changed while it was read", "Load again.", UNREADABLE):
        return _stored(folder, shape)


def check_image(image_size: int, channels: int) -> None:
    """Raises ValueError for a size or a number of channels that `decode` does not make."""
    if not 1 <= image_size <= _MAX_SIDE:
        raise ValueError(f"image_size={image_size}; allowed: 1 to {_MAX_SIDE}.")
    if channels not in _MODES:
        raise ValueError(f"channels={channels}; allowed: 1 (grey) and 3 (RGB).")


def decode(source: Source, image_size: int, channels: int = 3) -> np.ndarray:
    """Reads a picture as every data set of images does.

    It is turned as its camera says (EXIF), laid on white where it is transparent, made RGB or grey
    and, if it is not `image_size` square, resized to it, whatever its proportions, by Pillow's
    LANCZOS filter, as in the script by which MAML's authors made the 84x84 images of mini-ImageNet.

    Args:
      source: the picture.
      image_size: side of the result in pixels.
      channels: 3 for RGB, 1 for grey.

    Returns:
      uint8 `[image_size, image_size, channels]`.

    Raises:
      DataError: it cannot be read.
    """
    from PIL import Image, ImageOps

    with explained(
        f"{source.where}: expected an image in one of the formats {', '.join(_FORMATS)}",
        "Get a fresh copy of it, or take it out.",
        (*_UNDECODABLE, Image.DecompressionBombError),
    ):
        content = source.read()
        try:
            if isinstance(content, np.ndarray):
                image = Image.fromarray(content)
            else:
                image = Image.open(io.BytesIO(content), formats=_FORMATS)
        except Image.UnidentifiedImageError:  # whose text names an object in memory
            raise ValueError("its content is none") from None
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"mode {image.mode}; convert it to 8 bits a channel")
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert(_MODES[channels])
        if image.size != (image_size, image_size):
            image = image.resize((image_size, image_size), Image.Resampling.LANCZOS)
        return np.asarray(image).reshape(image_size, image_size, channels)


def decode_all(
    sources: Sequence[Source], images: np.ndarray, *, progress: bool, title: str
) -> None:
    """Decodes pictures by threads into `images`, uint8 `[n, size, size, channels]`.

    Raises:
      DataError: pictures that cannot be read; the first few are named.
    """
    from tqdm import tqdm

    faults: dict[int, DataError] = {}

    def decode_chunk(start: int) -> int:
        chunk = sources[start : start + _CHUNK]
        for index, source in enumerate(chunk, start):
            try:
                images[index] = decode(source, images.shape[1], images.shape[3])
            except DataError as error:
                faults[index] = error
        return len(chunk)

    bar = tqdm(total=len(sources), desc=title, unit="image", disable=None if progress else True)
    with bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        for count in pool.map(decode_chunk, range(0, len(sources), _CHUNK)):
            bar.update(count)
    if faults:
        shown = [str(faults[index]) for index in sorted(faults)]
        if len(shown) > _SHOWN:
            shown[_SHOWN:] = [f"{len(shown) - _SHOWN} more images cannot be read either."]
        raise DataError("\n".join(shown)) from faults[min(faults)]


def _stored(folder: Path, shape: tuple[int, int, int]) -> Splits:
    """What `_build` wrote; raises one of `UNREADABLE` where that is absent or damaged."""
    datasets: dict[str, Any] = {}
    for split, offsets in read_arrays(folder / "offsets.npz").items():
        datasets[split] = None
        if len(offsets) > 1:
            images = np.load(folder / f"{split}.npy", mmap_mode="r")
            if images.dtype != np.uint8 or images.shape[1:] != shape:
                raise ValueError(f"{split}.npy is {images.dtype}{images.shape}")
            datasets[split] = from_grouped(images, offsets)
    return Splits(**datasets)


def _build(folder: Path, list_splits, shape: tuple[int, int, int], remedy: str) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=folder.parent, prefix=f"{folder.name}-", suffix=".tmp", ignore_cleanup_errors=True
    ) as name:
        temporary, offsets = Path(name), {}
        for split, listing in zip(SPLITS, list_splits(), strict=True):
            sources = [source for group in listing.values() for source in group]
            offsets[split] = np.cumsum([0, *map(len, listing.values())])
            needed, free = len(sources) * math.prod(shape), shutil.disk_usage(name).free
            if needed > free:
                raise DataError(
                    f"The decoded {split} images take {needed / 1e9:.1f} GB, {folder.parent} has "
                    f"{free / 1e9:.1f} GB left. {remedy}"
                )
            if sources:
                images = np.lib.format.open_memmap(
                    temporary / f"{split}.npy", "w+", np.uint8, (len(sources), *shape)
                )
                decode_all(sources, images, progress=True, title=split)
                images.flush()
        np.savez(temporary / "offsets.npz", **offsets)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)
