"""Checkpoints that a kill cannot tear and whose damage is noticed; Orbax writes the arrays.

A checkpoint is a directory `step_00000040` with the arrays and a `metadata.json` that holds a
checksum over both. It is written under another name and then moved, so a directory of that name is
complete; what time or a disk does to it afterwards, the checksum shows.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imaml_jax.training import workdir
from imaml_jax.types import PyTree

_ARRAYS, _METADATA, _CHECKSUM = "arrays", "metadata.json", "checksum"
_TEMPORARY = ".tmp_"


def save(
    directory: str | os.PathLike,
    step: int,
    tree: PyTree,
    metadata: Mapping[str, Any],
    keep: int = 3,
) -> Path:
    """Writes a checkpoint and returns when it is complete.

    Args:
      directory: where checkpoints live; made if missing.
      step: the number of the checkpoint; one of the same number is replaced.
      tree: a pytree of arrays (no typed PRNG keys), fully present on this process.
      metadata: anything that JSON can hold.
      keep: how many checkpoints to keep, this one and those before it. Checkpoints of later steps,
        which `restore` must have found damaged, are left alone.

    Returns:
      The path of the checkpoint.

    Raises:
      ValueError: if `step` is negative or `keep` is less than 1.
      OSError: if the disk is full or the directory not writable; earlier checkpoints are kept.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"step must be at least 0 and keep at least 1; got {step} and {keep}")
    directory = Path(directory).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    final = _path(directory, step)
    temporary = directory / f"{_TEMPORARY}{final.name}"
    arrays = _named(jax.device_get(tree))
    metadata = json.loads(json.dumps({**metadata, "step": step}))
    try:
        with _quiet():
            _checkpointer().save(temporary / _ARRAYS, arrays)
        described = {**metadata, _CHECKSUM: _checksum(temporary / _ARRAYS, metadata)}
        workdir.write_whole(temporary / _METADATA, json.dumps(described, indent=1))
        if final.exists():
            os.replace(final, directory / f"{_TEMPORARY}replaced")
        os.replace(temporary, final)
        workdir.flush(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(directory / f"{_TEMPORARY}replaced", ignore_errors=True)
    for old in [other for other in steps(directory) if other < step][: -(keep - 1) or None]:
        shutil.rmtree(_path(directory, old), ignore_errors=True)
    return final


def restore(directory: str | os.PathLike, like: PyTree) -> tuple[PyTree, dict[str, Any]] | None:
    """Reads the newest checkpoint that is whole.

    Args:
      directory: what was given to `save`; it may be missing.
      like: a pytree of arrays with the structure, shapes and dtypes of the saved one.

    Returns:
      `(tree, metadata)` with arrays on the default device and metadata that also holds the
      checkpoint's `step` and `path`, or None where there is no whole checkpoint. A damaged one
      is skipped with a warning for the one before it.

    Raises:
      ValueError: if a whole checkpoint has another structure, shape or dtype than `like`.
    """
    directory = Path(directory).absolute()
    for step in reversed(steps(directory)):
        path = _path(directory, step)
        try:
            arrays, metadata = _read(path)
            break
        except Exception as error:  # Whatever a damaged file makes Orbax, JSON or the system raise.
            reason = str(error).strip().partition("\n")[0][:200]
            warnings.warn(
                f"skipped the damaged checkpoint {path} ({type(error).__name__}: {reason})",
                stacklevel=2,
            )
    else:
        return None
    _check_like(path, arrays, _named(like))
    tree = jax.tree.map_with_path(
        lambda where, x: jnp.asarray(arrays.get(jax.tree_util.keystr(where), x)), like
    )
    return tree, {**metadata, "path": path}


def steps(directory: str | os.PathLike) -> list[int]:
    """The numbers of the checkpoints in `directory`, oldest first."""
    names = [path.name for path in Path(directory).glob("step_*")]
    return sorted(int(name[5:]) for name in names if re.fullmatch(r"step_\d{8,}", name))


def _path(directory: Path, step: int) -> Path:
    return directory / f"step_{step:08d}"


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    metadata = json.loads((path / _METADATA).read_text(encoding="utf-8"))
    checksum = metadata.pop(_CHECKSUM)
    if _checksum(path / _ARRAYS, metadata) != checksum:
        raise ValueError("the checksum does not match")
    with _quiet():
        arrays = _checkpointer().restore(path / _ARRAYS)
    return {name: np.asarray(array) for name, array in arrays.items()}, metadata


def _check_like(path: Path, arrays: dict[str, np.ndarray], expected: dict[str, Any]) -> None:
    saved, wanted = (
        {name: f"{x.dtype}{list(x.shape)}" for name, x in tree.items()}
        for tree in (arrays, expected)
    )
    names = [name for name in {**saved, **wanted} if saved.get(name) != wanted.get(name)]
    if names:
        examples = "; ".join(
            f"{name}: saved {saved.get(name, 'nothing')}, wanted {wanted.get(name, 'nothing')}"
            for name in names[:3]
        )
        raise ValueError(
            f"the checkpoint {path} is of another model or optimiser: {len(names)} arrays differ "
            f"({examples}); use another directory"
        )


def _named(tree: PyTree) -> dict[str, Any]:
    """The leaves by path, without empty arrays, which Orbax refuses and which hold nothing."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path): x for path, x in leaves if x.size}


def _checksum(folder: Path, metadata: Mapping[str, Any]) -> str:
    """Of the files below `folder`, so that damage is found before Orbax meets it."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()


@functools.cache
def _checkpointer() -> Any:
    import orbax.checkpoint as ocp

    # One process writes and each reads for itself, so that none waits for another.
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes={jax.process_index()}
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Orbax's notes on its own workings out of the log and out of the warnings."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)
