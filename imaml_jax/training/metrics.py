"""Scores, calibration and confidence intervals.

The negative log-likelihood of labels is `cross_entropy`, of an averaged predictive that of its
`mixture_logits`.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from imaml_jax.learners.base import accuracy as accuracy
from imaml_jax.learners.base import is_right
from imaml_jax.types import Array


class Calibration(NamedTuple):
    """How far confidences are from the shares of examples that are right, by bins of confidence.

    Attributes:
      ece: expected calibration error, the mean of `|accuracy - confidence|` over examples.
      mce: maximum calibration error, the largest of a bin that holds an example.
      shares: `[bins]`, of the examples in each bin.
      confidences: `[bins]`, their mean confidences; 0 where there are none.
      accuracies: `[bins]`, the shares of them that are right; 0 where there are none.
    """

    ece: Array
    mce: Array
    shares: Array
    confidences: Array
    accuracies: Array


def calibration_error(confidences: Array, correct: Array, *, bins: int = 15) -> Calibration:
    """Calibration errors over bins of equal width, each open below: `((b - 1)/B, b/B]`.

    Both errors are those of a population and biased on a sample: pool the examples of all test
    tasks, never average over tasks.

    Args:
      confidences: any shape, the largest probability of each example.
      correct: of that shape, 1 or True where the class of that probability is the label.
      bins: `B`, at least 1.

    Returns:
      The errors, and the bins that `plots.reliability_diagram` draws.

    Raises:
      ValueError: `bins` is out of range, the shapes differ, or a confidence is no probability.

    References:
      Naeini, Cooper, Hauskrecht, "Obtaining Well Calibrated Probabilities Using Bayesian Binning",
      AAAI 2015. Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks", ICML
      2017, Eqs. 3 and 5.
    """
    if not isinstance(bins, int) or bins < 1:
        raise ValueError(f"bins must be an integer of at least 1; got {bins!r}")
    if jnp.shape(confidences) != jnp.shape(correct):
        raise ValueError(
            "confidences and correct must have one shape; got "
            f"{jnp.shape(confidences)} and {jnp.shape(correct)}"
        )
    if not np.size(confidences):
        raise ValueError("confidences must hold at least one example; got none")
    if not isinstance(confidences, Tracer):
        low, high = np.min(confidences), np.max(confidences)
        if low < 0 or high > 1 + 1e-5:  # rounding
            raise ValueError(
                f"confidences must be probabilities, in [0, 1]; got {low} to {high}. "
                "confidence_and_correct takes logits"
            )
    confidences = jnp.ravel(confidences)
    confidences = confidences.astype(jnp.promote_types(confidences.dtype, jnp.float32))
    correct = jnp.ravel(correct).astype(confidences.dtype)
    inner_edges = jnp.linspace(0, 1, bins + 1, dtype=confidences.dtype)[1:-1]
    index = jnp.searchsorted(inner_edges, confidences, side="left")
    counts, confidence_sums, correct_sums = (
        jnp.zeros(bins, confidences.dtype).at[index].add(x)
        for x in (jnp.ones_like(confidences), confidences, correct)
    )
    occupied = jnp.maximum(counts, 1)
    shares = counts / confidences.size
    mean_confidences, accuracies = confidence_sums / occupied, correct_sums / occupied
    gaps = jnp.abs(accuracies - mean_confidences)
    return Calibration(jnp.sum(shares * gaps), gaps.max(), shares, mean_confidences, accuracies)


def confidence_and_correct(logits: Array, labels: Array) -> tuple[Array, Array]:
    """What `calibration_error` takes of a classifier.

    Args:
      logits: `[..., classes]`.
      labels: `[...]` integers.

    Returns:
      The largest probabilities `[...]`, and whether their classes are the labels.
    """
    return jax.nn.softmax(logits).max(-1), is_right(logits, labels)


def brier(logits: Array, labels: Array) -> Array:
    """The Brier score, in [0, 2]: the squared distance of probabilities from one-hot labels.

    `mean_i sum_k (p_ik - [k = y_i])^2`.

    Args:
      logits: `[..., classes]`.
      labels: `[...]` integers.

    Raises:
      ValueError: a label that is no class.

    References:
      Brier, "Verification of Forecasts Expressed in Terms of Probability", Monthly Weather Review
      1950, Eq. 2.
    """
    classes = logits.shape[-1]
    if not isinstance(labels, Tracer) and np.any((np.asarray(labels) < 0) | (labels >= classes)):
        raise ValueError(
            f"labels must be integers from 0 to {classes - 1}, by the last axis of logits; got "
            f"{np.min(labels)} to {np.max(labels)}"
        )
    probabilities = jax.nn.softmax(logits)
    one_hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return jnp.mean(jnp.sum(jnp.square(probabilities - one_hot), -1))


def gaussian_mixture_nll(samples: Array, targets: Array, noise_std: Array | float) -> Array:
    """Negative log-likelihood of targets under the equal mixture of `N(sample, noise_std^2 I)`.

    Mean over the first axis of the targets, sum over their others.

    Args:
      samples: `[samples, n, ...]` outputs of a regressor; one of `[n, ...]` as `outputs[None]`.
      targets: `[n, ...]`.
      noise_std: positive scalar.

    Raises:
      ValueError: the shapes differ, or `noise_std` is out of range.
    """
    z = _standardised(samples, targets, noise_std)
    terms = -0.5 * (jnp.square(z) + math.log(2 * math.pi)) - jnp.log(noise_std)
    log_densities = terms.reshape(*terms.shape[:2], -1).sum(-1)
    return -jnp.mean(jax.nn.logsumexp(log_densities, axis=0) - math.log(samples.shape[0]))


def coverage(samples: Array, targets: Array, noise_std: Array | float, *, level: float) -> Array:
    """The share of targets in the central interval of the predictive; calibrated, it is `level`.

    The predictive of each entry is the equal mixture of `N(sample, noise_std^2)`; the interval is
    where its cumulative distribution lies in `[(1 - level)/2, (1 + level)/2]`.

    Args:
      samples: `[samples, n, ...]` outputs of a regressor.
      targets: `[n, ...]`.
      noise_std: positive scalar.
      level: in (0, 1).

    Raises:
      ValueError: `level` or `noise_std` is out of range, or the shapes differ.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1); got {level}")
    cdf = jax.scipy.stats.norm.cdf(_standardised(samples, targets, noise_std)).mean(0)
    return jnp.mean(jnp.abs(cdf - 0.5) <= level / 2, dtype=cdf.dtype)


def _standardised(samples: Array, targets: Array, noise_std: Array | float) -> Array:
    if samples.shape[1:] != targets.shape:
        raise ValueError(
            f"samples must be [samples, *{targets.shape}] as the targets; got {samples.shape}"
        )
    if not isinstance(noise_std, Tracer) and not 0 < noise_std < math.inf:
        raise ValueError(f"noise_std must be positive and finite; got {noise_std}")
    return (targets[None] - samples) / noise_std


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
    reductions = {"min": jnp.min, "max": jnp.max}
    return {
        name: reductions.get(name.split("_")[0], jnp.mean)(jnp.asarray(value, jnp.float32))
        for name, value in stacked.items()
    }
