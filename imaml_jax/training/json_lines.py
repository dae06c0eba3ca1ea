"""A log as one JSON object a line, valid after a kill at any moment."""

import json
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from imaml_jax.training.workdir import write_whole


def row_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """`row` with JSON's types: array scalars become numbers, NaN and infinities become None."""
    found = {}
    for name, value in row.items():
        if hasattr(value, "__array__"):
            value = np.asarray(value).item()
        odd = isinstance(value, float) and not math.isfinite(value)
        found[name] = None if odd else value
    return found


def append(path: str | os.PathLike, row: Mapping[str, Any]) -> None:
    """Appends `row` to the file at `path` as one line of strict JSON, flushed.

    NaN and infinities are written as null, since JSON has no word for them.
    """
    line = json.dumps(row_of(row), allow_nan=False) + "\n"
    with open(path, "a", encoding="utf-8") as file:
        file.write(line)


def read(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of the file at `path`; none where it does not exist.

    A last line without its newline, torn by a kill, is left out. Any other line that is not a JSON
    object is left out with a warning.
    """
    path = Path(path)
    if not path.exists():
        return []
    *lines, _torn = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            warnings.warn(f"{path}: line {number} is not a JSON object; left out", stacklevel=2)
    return rows


def rewind(path: str | os.PathLike, last_step: int) -> list[dict[str, Any]]:
    """Drops from the file at `path` the rows after `last_step` and whatever is damaged.

    So a run that resumes after `last_step` appends to a valid file and repeats no step. The file is
    replaced in one move.

    Args:
      path: a JSON-lines file whose rows have a field `step`; it may be missing.
      last_step: the newest step to keep.

    Returns:
      The rows kept.
    """
    rows = [row_of(row) for row in read(path)]
    rows = [row for row in rows if isinstance(row.get("step"), int) and row["step"] <= last_step]
    write_whole(Path(path), "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
    return rows
