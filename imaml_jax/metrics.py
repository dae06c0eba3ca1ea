"""Scores and confidence intervals."""

import math
from collections.abc import Mapping
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
