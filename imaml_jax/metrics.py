"""Scores, confidence intervals, and metrics kept as one JSON object a line."""

import json
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from imaml_jax.types import Array


def accuracy(outputs: Array, targets: Array) -> Array:
    """The share of examples whose largest logit is that of their label.

    Args:
      outputs: `[n, classes]` logits.
      targets: `[n]` integer labels.
    """
    return jnp.mean(jnp.argmax(outputs, axis=-1) == targets, dtype=jnp.float32)


def mean_ci95(values: Any) -> tuple[float, float]:
    """The mean of `values` and the half-width of its 95% confidence interval.

    The half-width is `1.96 s / sqrt(n)`, `s` with `n - 1` degrees of freedom, in float64.

    Args:
      values: `[n]`.

    Returns:
      `(mean, half_width)`; the half-width is NaN where `n < 2`.

    Raises:
      ValueError: if `values` is empty.
    """
    values = np.asarray(values, dtype=np.float64).ravel()
    if values.size == 0:
        raise ValueError("values must hold at least 1 number; got none")
    if values.size == 1:
        return float(values[0]), math.nan
    return float(values.mean()), float(1.96 * values.std(ddof=1) / math.sqrt(values.size))


def info_scalars(info: Any) -> dict[str, Array]:
    """The fields of a learner's `info` that exist (are not None), by name."""
    return {name: value for name, value in info._asdict().items() if value is not None}


def reduce_scalars(stacked: Mapping[str, Array]) -> dict[str, Array]:
    """Summarises named arrays, each to a float32 scalar over its axes.

    `min_*` keeps the smallest and `max_*` the largest value, so that one bad task shows; all else
    is averaged.
    """
    floats = {name: jnp.asarray(value, jnp.float32) for name, value in stacked.items()}
    return {name: _reduction(name)(value) for name, value in floats.items()}


def _reduction(name: str) -> Any:
    return {"min": jnp.min, "max": jnp.max}.get(name.split("_")[0], jnp.mean)


def json_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """`row` with JSON's types: array scalars become numbers, NaN and infinities become None."""
    return {name: _json_value(value) for name, value in row.items()}


def _json_value(value: Any) -> Any:
    if isinstance(value, np.generic) or hasattr(value, "__array__"):
        value = np.asarray(value).item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def append_json_line(path: str | os.PathLike, row: Mapping[str, Any]) -> None:
    """Appends `row` to the file at `path` as one line of strict JSON, flushed.

    NaN and infinities are written as null, since JSON has no word for them.
    """
    line = json.dumps(json_row(row), allow_nan=False) + "\n"
    with open(path, "a", encoding="utf-8") as file:
        file.write(line)


def read_json_lines(path: str | os.PathLike) -> list[dict[str, Any]]:
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
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            warnings.warn(f"{path}: line {number} is not a JSON object; left out", stacklevel=2)
    return rows


def rewind_json_lines(path: str | os.PathLike, last_step: int) -> list[dict[str, Any]]:
    """Drops from the file at `path` the rows after `last_step` and whatever is damaged.

    So a run that resumes after `last_step` appends to a valid file and repeats no step. The file is
    replaced in one move.

    Args:
      path: a JSON-lines file whose rows have a field `step`; it may be missing.
      last_step: the newest step to keep.

    Returns:
      The rows kept.
    """
    rows = [row for row in read_json_lines(path) if row.get("step", 0) <= last_step]
    temporary = Path(path).with_name(f".tmp_{Path(path).name}")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, path)
    return rows
