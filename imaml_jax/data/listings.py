"""What pictures a data set has: by csv files and images in folders or zips, or by class folders."""

import contextlib
import csv
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from imaml_jax.data import archives
from imaml_jax.data.archives import Archive, DataError, readable
from imaml_jax.data.episodes import Splits
from imaml_jax.data.images import SPLITS, Listing, Source, load_splits

CSV_FILES = tuple(f"{split}.csv" for split in SPLITS)
IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")
_READ = (*IMAGES, ".csv", ".zip")

Files = Mapping[str, tuple[int, int]]


def load_found(
    name: str,
    readers: Mapping[tuple[str, ...], Callable[[Path, Files], Iterable[Listing]]],
    *,
    image_size: int,
    cache_dir: str | os.PathLike | None,
    **places: Any,
) -> Splits:
    """Returns the images of a data set in the layout in which it is found.

    Args:
      name: as the next ones, the result and the errors, see `images.load_splits`.
      readers: of each layout the function `(folder, files) -> listings of the splits`, such as
        `from_csv`; `files` holds size and time of change of its pickles, else it is `scan(folder)`.
      image_size: side of the images in pixels.
      cache_dir: as in `cache.cache_root`.
      **places: where it is looked for, see `archives.find_layout`.
    """
    folder, layout = archives.find_layout(list(readers), cache_dir=cache_dir, **places)
    if layout[0].endswith(".pkl"):
        with readable(folder):
            files = {file: _stamp((folder / file).stat()) for file in layout}
        recipe = {"pickles": list(files.values())}
    else:
        files = scan(folder)
        recipe = {"files": files}
    return load_splits(
        name,
        recipe,
        lambda: readers[layout](folder, files),
        image_size=image_size,
        cache_dir=cache_dir,
    )


def scan(folder: Path) -> Files:
    """Returns size and time of change of the images, csv files and zips anywhere below `folder`.

    By path relative to `folder`, sorted; equal results stand for equal contents. Hidden files and
    folders are passed over, symbolic links are followed.

    Raises:
      DataError: a folder that cannot be read.
    """
    with readable(folder):
        found = sorted(_walk(folder), key=lambda pair: pair[0])
        return {name: _stamp(e.stat()) for name, e in found if name.lower().endswith(_READ)}


def other_files(folder: Path) -> list[str]:
    """Returns the files anywhere below `folder` that are no images, sorted; see `scan`."""
    with readable(folder):
        return sorted(name for name, _ in _walk(folder) if not name.lower().endswith(IMAGES))


def from_csv(folder: Path, files: Files) -> list[Listing]:
    """Lists the images of train.csv, val.csv and test.csv, whose rows are `filename,label`.

    A file is looked for below `folder` and in the zips directly in it, as `filename`,
    `label/filename`, `split/filename` or `split/label/filename`, and each of them in `images/`.

    Args:
      folder: of the csv files.
      files: `scan(folder)`.

    Returns:
      The listings of the three splits.

    Raises:
      DataError: a csv file of another form, an image that is not there, a damaged zip, or a class
        in two splits.
    """
    zips = [name for name in files if name.lower().endswith(".zip") and "/" not in name]
    sources = {}
    for archive in (Archive(folder / name) for name in zips):
        for name in archive.names:
            sources[name] = Source(f"{archive.path}: {name}", partial(archive.read, name))
    sources |= {name: Source(str(folder / name), (folder / name).read_bytes) for name in files}

    def find(split: str, filename: str, label: str) -> Source:
        for place in ("", f"{label}/", f"{split}/", f"{split}/{label}/"):
            for name in (f"images/{place}{filename}", place + filename):
                if name in sources:
                    return sources[name]
        raise DataError(
            f"{folder / split}.csv names {filename} of class {label}: expected it in "
            f"{folder / 'images'} or in a zip in {folder} (found {', '.join(zips) or 'none'}), as "
            f"images/{filename}, {filename}, or below a folder {label}, {split} or {split}/{label}."
            " Put the missing images there, or take their rows out of the csv file."
        )

    listings = []
    for split in SPLITS:
        listing = {}
        for filename, label in _read_csv(folder / f"{split}.csv"):
            listing.setdefault(label, []).append(find(split, filename, label))
        listings.append(dict(sorted(listing.items())))
    require_disjoint(listings, str(folder))
    return listings


def from_class_folders(folder: Path, files: Files, prefix: str = "") -> Listing:
    """Lists the images anywhere below `folder/prefix<class>/`; those in no class are passed over.

    Args:
      folder: where the data set begins.
      files: `scan(folder)`.
      prefix: part of the way to the class folders, ending in "/".
    """
    listing = {}
    for name in files:
        label, _, rest = name.removeprefix(prefix).partition("/")
        if name.startswith(prefix) and rest and name.lower().endswith(IMAGES):
            source = Source(str(folder / name), (folder / name).read_bytes)
            listing.setdefault(label, []).append(source)
    return listing


def from_split_folders(folder: Path, files: Files) -> list[Listing]:
    """Lists the images of `folder/{train,val,test}/<class>/`; `val` may be absent.

    Raises:
      DataError: train or test has no images, or a class is in two splits.
    """
    listings = [from_class_folders(folder, files, f"{split}/") for split in SPLITS]
    for split, listing in zip(SPLITS, listings, strict=True):
        if split != "val" and not listing:
            raise DataError(
                f"{folder / split}: expected images ({', '.join(IMAGES)}) in {split}/<class>/, "
                "found none. Make one folder for each class and put its images there."
            )
    require_disjoint(listings, str(folder))
    return listings


def require_disjoint(splits: Sequence[Iterable[str]], where: str) -> None:
    """Checks that no class is in two of the three splits.

    Raises:
      DataError: one is; its name and splits are in the message.
    """
    owner = {}
    for split, labels in zip(SPLITS, splits, strict=True):
        for label in labels:
            if owner.setdefault(label, split) != split:
                raise DataError(
                    f"{where}: class {label!r} is in both {owner[label]} and {split}; expected "
                    "splits with no class in common. Take it out of one, or, if these are two "
                    "classes, give them different names."
                )


def _read_csv(path: Path) -> list[list[str]]:
    header, rows = [], []
    with readable(path), contextlib.suppress(ValueError, csv.Error):  # no line, or no text
        with open(path, newline="", encoding="utf-8-sig") as file:
            header, *rows = [[cell.strip() for cell in row] for row in csv.reader(file) if row]
    bad = next((row for row in rows if len(row) != 2 or not all(row)), None)
    if header != ["filename", "label"] or not rows or bad:
        raise DataError(
            f"{path}: expected the line 'filename,label' and then one line for each image; found "
            f"{','.join(bad or header)!r}{'' if rows else ' and no image'}. Get it again from "
            "https://github.com/twitter-research/meta-learning-lstm/tree/master/data/miniImagenet, "
            "or write one of that form."
        )
    return rows


def _walk(
    place: Path, prefix: str = "", above: frozenset[str] = frozenset()
) -> Iterator[tuple[str, os.DirEntry]]:
    real = os.path.realpath(place)
    if real in above:  # a link that leads back
        return
    with os.scandir(place) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk(place / entry.name, f"{prefix}{entry.name}/", above | {real})
            else:
                yield prefix + entry.name, entry


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns
