"""Public archives on disk: where they are looked for, how they are fetched, how they are read."""

import contextlib
import os
import re
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


def find_archives(
    names: Sequence[str],
    *,
    subdir: str,
    help_text: str,
    data_dir: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> list[Path]:
    """Returns the paths of the archives `names`, all in one directory.

    Arguments, places and errors as those of `find_layout`, with one layout and one `subdir`.
    """
    folder, _ = find_layout(
        [names], subdirs=[subdir], help_text=help_text, data_dir=data_dir, cache_dir=cache_dir
    )
    return [folder / name for name in names]


def find_layout(
    layouts: Sequence[Sequence[str]],
    *,
    subdirs: Sequence[str],
    help_text: str,
    data_dir: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> tuple[Path, Sequence[str]]:
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
    given = data_dir or os.environ.get(ENV_DATA_DIR)
    root = Path(given).expanduser() if given else download_dir(subdirs[0], cache_dir=cache_dir)
    origin = "data_dir" if data_dir else f"${ENV_DATA_DIR}" if given else "the default data_dir"
    expected = ", or ".join(map(_listed, layouts))
    if root.exists() and not root.is_dir():
        raise DataError(
            f"{origin} is {root}: expected a directory that holds {expected}, found a file. "
            f"Give its parent directory instead. {help_text}"
        )
    if not root.is_dir():
        raise DataError(
            f"{origin} is {root}: expected a directory that holds {expected}, found nothing "
            f"there. {help_text}"
        )
    places = [root, *(root / subdir for subdir in subdirs)]
    absent = {
        (i, place): [name for name in layout if not _is_there(place, name)]
        for i, layout in enumerate(layouts)
        for place in places
    }
    for (i, place), names in absent.items():
        if not names:
            return place, layouts[i]
    missing = min(absent.values(), key=len)
    raise DataError(
        f"Expected {expected} side by side in {' or '.join(map(str, places))}; missing: "
        f"{_listed(missing)}. {help_text}"
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


def download(
    urls: Sequence[str], destination: Path, *, checksums_of: str, url_infos: dict | None = None
) -> list[Path]:
    """Downloads `urls` with tensorflow-datasets' download manager, which verifies the checksums.

    TensorFlow itself is not needed: the checksums come from the file that tensorflow-datasets ships
    for its builder `checksums_of`, the builder is not run.

    Args:
      urls: addresses; the last part of each becomes the file name.
      destination: directory, made where it is missing.
      checksums_of: name of the tensorflow-datasets builder.
      url_infos: sizes and checksums by address, in place of the published ones.

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
    for url in urls:
        _check_connection(url, by_hand)
    try:
        destination.mkdir(parents=True, exist_ok=True)
        partial = destination / ".partial"
        partial.mkdir(exist_ok=True)
    except OSError as error:
        raise DataError(
            f"Cannot download into {destination}: {error}. Name a directory that can be written by "
            f"data_dir or ${ENV_DATA_DIR}. {by_hand}"
        ) from error
    try:
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core.download import checksums
    except ImportError as error:
        raise DataError(
            f"Downloading needs tensorflow-datasets: pip install tensorflow-datasets. {by_hand}"
        ) from error
    if url_infos is None:
        path = tfds.core.tfds_path(f"url_checksums/{checksums_of}.txt")
        url_infos = checksums.load_url_infos(path)
    try:
        manager = tfds.download.DownloadManager(
            download_dir=partial, url_infos=url_infos, force_checksums_validation=True
        )
        fetched: Any = manager.download(list(urls))
        targets = [destination / Path(urllib.parse.urlparse(url).path).name for url in urls]
        for source, target in zip(fetched, targets, strict=True):
            os.replace(source, target)
    except Exception as error:  # the manager lets through what requests, urllib3 and promise raise
        reason = str(error).strip().splitlines()
        raise DataError(
            f"Could not download {_listed(urls)}: {type(error).__name__}: "
            f"{reason[0] if reason else ''} Try again: a wrong checksum mostly means a transfer "
            f"that was cut or changed by a proxy. {by_hand}"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return targets


def read_members(path: Path, pattern: str) -> Iterator[tuple[re.Match, bytes]]:
    """Yields name (matched by `pattern` in full) and content of the members of a zip, by name.

    Raises:
      DataError: the archive is damaged.
    """
    archive = Archive(path)
    for name in sorted(archive.names):
        match = re.fullmatch(pattern, name)
        if match is not None:
            yield match, archive.read(name)


class Archive:
    """A zip whose members are read into memory, by any thread; nothing is written to disk.

    Attributes:
      path: of the file.
      names: of the members.
    """

    def __init__(self, path: Path):
        self.path = path
        with _explain_damage(path):
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
        with self._lock, _explain_damage(self.path):
            return self._zip.read(info)


@contextlib.contextmanager
def _explain_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError) as error:
        raise DataError(
            f"{path} is not a complete zip archive ({type(error).__name__}: {error}; found "
            f"{path.stat().st_size} bytes). Delete it, then copy it again, or load with "
            "download=True where the data set has that."
        ) from error


def _check_connection(url: str, by_hand: str) -> None:
    """Fails within seconds where the download manager would try again for minutes."""
    if urllib.request.getproxies():
        return  # the proxy resolves the name, not we
    parts = urllib.parse.urlparse(url)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname, port), timeout=10).close()
    except OSError as error:
        raise DataError(
            f"Cannot reach {parts.hostname} to download {url}: {error}. Check the network "
            f"connection. {by_hand}"
        ) from error


def _is_there(place: Path, name: str) -> bool:
    return (place / name).is_dir() if name.endswith("/") else (place / name).is_file()


def _listed(names: Sequence[str]) -> str:
    return " and ".join(names)
