"""Arrays that are slow to make and quick to store: one compressed .npz file for each recipe."""

import contextlib
import hashlib
import os
import tempfile
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

ENV_CACHE_DIR = "IMAML_CACHE_DIR"
# What NumPy raises for files that are missing, cut, or something else altogether.
_NUMPY_ERRORS = (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError)
_OF_HEADERS = (tokenize.TokenError, SyntaxError, MemoryError, OverflowError)  # parsed as Python
UNREADABLE = (*_NUMPY_ERRORS, *_OF_HEADERS, zipfile.BadZipFile, zlib.error)


def cache_root(cache_dir: str | os.PathLike | None = None) -> Path:
    """Returns `cache_dir`, else the directory in `IMAML_CACHE_DIR`, else `~/.cache/imaml_jax`."""
    return Path(cache_dir or os.environ.get(ENV_CACHE_DIR) or "~/.cache/imaml_jax").expanduser()


def recipe_key(recipe: Mapping[str, object]) -> str:
    """Returns the hash that names what `recipe` makes; its values have reprs that are stable."""
    return hashlib.sha256(repr(sorted(recipe.items())).encode()).hexdigest()[:16]


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of an .npz file; raises one of `UNREADABLE` where that is none."""
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


def cached_arrays(
    name: str,
    recipe: Mapping[str, object],
    build: Callable[[], dict[str, np.ndarray]],
    *,
    is_valid: Callable[[dict[str, np.ndarray]], bool],
    cache_dir: str | os.PathLike | None = None,
) -> dict[str, np.ndarray]:
    """Returns `build()`, from the cache where the same recipe was built before.

    The file is written under another name and moved into place, so that a reader never sees half of
    it. A file that cannot be read or is not valid is built anew. A cache that cannot be written
    costs a warning, not the run.

    Args:
      name: start of the file name.
      recipe: all that the result depends on; its `recipe_key` ends the file name.
      build: makes the arrays.
      is_valid: whether what was read has the shapes and dtypes that `build` gives; a name that is
        missing may raise KeyError.
      cache_dir: directory; default as in `cache_root`.

    Returns:
      The arrays by name.
    """
    path = cache_root(cache_dir) / f"{name}-{recipe_key(recipe)}.npz"
    with contextlib.suppress(*UNREADABLE):
        arrays = read_arrays(path)
        if is_valid(arrays):
            return arrays
    arrays = build()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=path.stem, suffix=".tmp") as made:
            np.savez_compressed(Path(made) / path.name, **arrays)  # pyright: ignore[reportArgumentType]
            os.replace(Path(made) / path.name, path)
    except OSError as error:
        warnings.warn(
            f"Could not write the cache file {path} ({error}); the data will be prepared again "
            f"next time. Set {ENV_CACHE_DIR} or cache_dir to a directory that can be written.",
            stacklevel=3,
        )
    return arrays
