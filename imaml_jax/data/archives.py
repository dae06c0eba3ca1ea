"""Public archives on disk: where they are looked for, how they are fetched, how they are read."""

import contextlib
import os
import shutil
import socket
import threading
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from imaml_jax.data.cache import cache_root

ENV_DATA_DIR = "IMAML_DATA_DIR"
_MAX_MEMBER_BYTES = 1 << 24  # no picture of a few-shot data set is larger


class DataError(ValueError):
    """A data set is missing, damaged, or not what it should be; the message says what to do."""


# What contents of another form than expected raise.
_OF_FORM = (AttributeError, KeyError, TypeError, ValueError)


@contextlib.contextmanager
def explained(
    problem: str, remedy: str, errors: type[Exception] | tuple[type[Exception], ...] = _OF_FORM
) -> Iterator[None]:
    """Raises DataError in place of errors of these types: the problem, the error, the remedy."""
    try:
        yield
    except DataError:
        raise
    except errors as error:
        raise DataError(f"{problem} ({type(error).__name__}: {error}). {remedy}") from error


def readable(path: str | os.PathLike) -> contextlib.AbstractContextManager[None]:
    """Raises DataError where the operating system does not let a file or folder be read."""
    return explained(f"Cannot read {path}", "Check its permissions.", OSError)


def find_layout(
    layouts: Sequence[tuple[str, ...]],
    *,
    subdirs: Sequence[str],
    help_text: str,
    data_dir: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> tuple[Path, tuple[str, ...]]:
    """Returns a directory that holds all files of a layout, and that layout.

    Looked at in this order: `data_dir` and its `subdirs`, where `data_dir` defaults to the
    environment variable `IMAML_DATA_DIR`; without either, `downloads/subdirs[0]` in the cache. The
    first layout that is complete anywhere is taken.

    Args:
      layouts: lists of file names that stand side by side; a name that ends in "/" is a directory.
      subdirs: names that the data set's directory goes by.
      help_text: how to get the files; ends the error message.
      data_dir: directory given by the user.
      cache_dir: as in `imaml_jax.data.cache.cache_root`.

    Raises:
      DataError: the directory or a file is missing, or is not what it should be.
    """
    root = download_dir(subdirs[0], data_dir=data_dir, cache_dir=cache_dir)
    expected = ", or ".join(map(_listed, layouts))
    if not root.is_dir():
        default = f"${ENV_DATA_DIR}" if os.environ.get(ENV_DATA_DIR) else "the default data_dir"
        found = "a file. Give its parent directory instead." if root.exists() else "nothing there."
        raise DataError(
            f"{'data_dir' if data_dir else default} is {root}: expected a directory that holds "
            f"{expected}, found {found} {help_text}"
        )
    places = [root, *(root / subdir for subdir in subdirs)]
    fewest = layouts[0]
    for layout in layouts:
        for place in places:
            missing = [name for name in layout if not _is_there(place, name)]
            if not missing:
                return place, layout
            fewest = min(fewest, missing, key=len)
    raise DataError(
        f"Expected {expected} side by side in {' or '.join(map(str, places))}; missing: "
        f"{_listed(fewest)}. {help_text}"
    )


def download_dir(
    subdir: str,
    *,
    data_dir: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> Path:
    """Returns where a download goes: the user's data directory if one is named, else the cache."""
    given = data_dir or os.environ.get(ENV_DATA_DIR)
    return Path(given).expanduser() if given else cache_root(cache_dir) / "downloads" / subdir


def download(urls: Sequence[str], destination: Path, *, checksums_of: str) -> list[Path]:
    """Downloads `urls` with tensorflow-datasets' download manager, which verifies the checksums.

    TensorFlow itself is not needed: the checksums come from the file that tensorflow-datasets ships
    for its builder `checksums_of`, the builder is not run.

    Args:
      urls: addresses; the last part of each becomes the file name.
      destination: directory, made where it is missing.
      checksums_of: name of the tensorflow-datasets builder.

    Returns:
      The paths of the files.

    Raises:
      DataError: no connection, a checksum that does not match, or a directory that cannot be
        written.
    """
    by_hand = (
        f"Or fetch {_listed(urls)} by any other means and put the files into {destination} (or "
        f"into another directory, and name it by data_dir or ${ENV_DATA_DIR})."
    )
    # Fails within seconds where the manager would try for minutes. A proxy resolves names itself.
    for parts in map(urllib.parse.urlparse, [] if urllib.request.getproxies() else urls):
        problem = f"Cannot reach {parts.hostname} to download {parts.geturl()}"
        with explained(problem, f"Check the network connection. {by_hand}", OSError):
            port = parts.port or (443 if parts.scheme == "https" else 80)
            socket.create_connection((parts.hostname, port), timeout=10).close()
    partial = destination / ".partial"
    remedy = f"Name a directory that can be written by data_dir or ${ENV_DATA_DIR}. {by_hand}"
    with explained(f"Cannot download into {destination}", remedy, OSError):
        partial.mkdir(parents=True, exist_ok=True)
    remedy = (
        "Try again: a wrong checksum mostly means a transfer that was cut or changed by a proxy"
    )
    try:  # requests, urllib3 and promise raise what the manager lets through
        with explained(f"Could not download {_listed(urls)}", f"{remedy}. {by_hand}", Exception):
            import tensorflow_datasets as tfds
            from tensorflow_datasets.core.download import checksums

            path = tfds.core.tfds_path(f"url_checksums/{checksums_of}.txt")
            manager = tfds.download.DownloadManager(
                download_dir=partial,
                url_infos=checksums.load_url_infos(path),
                force_checksums_validation=True,
            )
            fetched: Any = manager.download(list(urls))
            targets = [destination / Path(urllib.parse.urlparse(url).path).name for url in urls]
            for source, target in zip(fetched, targets, strict=True):
                os.replace(source, target)
            return targets
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class Archive:
    """A zip whose members are read into memory, by any thread; nothing is written to disk.

    Attributes:
      path: of the file.
      names: of the members.
    """

    def __init__(self, path: Path):
        self.path = path
        with self._complete():
            self._zip = zipfile.ZipFile(path)
        self.names = self._zip.namelist()
        self._lock = threading.Lock()

    def read(self, name: str) -> bytes:
        """Returns the content of a member.

        Raises:
          DataError: the archive is damaged, or the member too large for a picture.
        """
        info = self._zip.getinfo(name)
        if info.file_size > _MAX_MEMBER_BYTES:
            raise DataError(
                f"{self.path}: {name} claims {info.file_size} bytes; expected a small image. "
                "Get a fresh copy of the archive."
            )
        with self._lock, self._complete():
            return self._zip.read(info)

    def _complete(self) -> contextlib.AbstractContextManager[None]:
        return explained(
            f"{self.path} is not a complete zip archive",
            f"It has {self.path.stat().st_size} bytes. Delete it, then copy it again, or load with "
            "download=True where the data set has that.",
            (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError),
        )


def _is_there(place: Path, name: str) -> bool:
    return (place / name).is_dir() if name.endswith("/") else (place / name).is_file()


def _listed(names: Sequence[str]) -> str:
    return " and ".join(names)
