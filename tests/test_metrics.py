"""Scores and confidence intervals."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from imaml_jax import metrics


def test_accuracy_counts_the_largest_logit():
    logits = jnp.array([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [0.0, 3.0, 1.0], [5.0, 0.0, 0.0]])
    assert metrics.accuracy(logits, jnp.array([0, 2, 1, 1])) == 0.75


def test_mean_ci95():
    values = np.array([0.2, 0.4, 0.9])
    mean, half_width = metrics.mean_ci95(values)
    np.testing.assert_allclose(mean, 0.5)
    np.testing.assert_allclose(half_width, 1.96 * values.std(ddof=1) / math.sqrt(3))
    mean, half_width = metrics.mean_ci95([0.5])
    assert mean == 0.5 and math.isnan(half_width)
    with pytest.raises(ValueError, match="values"):
        metrics.mean_ci95([])


def test_reduce_scalars_keeps_the_worst_case():
    stacked = {name: jnp.array([1.0, 2.0, 6.0]) for name in ("loss", "min_x", "max_x", "minimum")}
    assert metrics.reduce_scalars(stacked) == {"loss": 3, "min_x": 1, "max_x": 6, "minimum": 3}
