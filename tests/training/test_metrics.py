"""Scores and confidence intervals."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imaml_jax import cross_entropy, mixture_logits
from imaml_jax.training import metrics


def test_nothing_is_right_about_nan():
    outputs = jnp.array([[jnp.nan, 0.0], [1.0, jnp.nan], [1.0, 0.0]])
    assert metrics.is_right(outputs, jnp.zeros(3, int)).tolist() == [False, False, True]


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


def test_calibration_error_of_cases_by_hand():
    confidences = jnp.array([0.1, 0.2, 0.6, 0.9, 1.0, 1.0])
    correct = jnp.array([0, 1, 1, 1, 0, 1])
    found = jax.jit(lambda *x: metrics.calibration_error(*x, bins=2))(confidences, correct)
    np.testing.assert_allclose(found.shares, [2 / 6, 4 / 6], rtol=1e-6)
    np.testing.assert_allclose(found.confidences, [0.15, 0.875], rtol=1e-6)
    np.testing.assert_allclose(found.accuracies, [0.5, 0.75], rtol=1e-6)
    np.testing.assert_allclose(found.ece, (2 * 0.35 + 4 * 0.125) / 6, rtol=1e-6)
    np.testing.assert_allclose(found.mce, 0.35, rtol=1e-6)
    perfect = metrics.calibration_error(jnp.array([1.0, 1.0, 0.0]), jnp.array([1, 1, 0]))
    assert perfect.ece == perfect.mce == 0
    worst = metrics.calibration_error(jnp.ones(3), jnp.zeros(3, bool))
    assert worst.ece == worst.mce == 1


def test_an_edge_belongs_to_the_bin_below_it():
    found = metrics.calibration_error(jnp.array([0.0, 0.5, 0.75, 1.0]), jnp.ones(4), bins=4)
    np.testing.assert_array_equal(found.shares, [0.25, 0.25, 0.25, 0.25])


def test_calibration_error_is_a_loop_over_bins():
    """On pooled tasks `[tasks, n]`, some of the bins being empty."""
    rng = np.random.default_rng(0)
    confidences = (0.3 + 0.7 * rng.random((5, 60))).astype(np.float32)
    correct = rng.random((5, 60)) < confidences
    ece, gaps = 0.0, []
    for b in range(15):
        inside = (confidences > b / 15) & (confidences <= (b + 1) / 15)
        if inside.any():
            gaps.append(abs(correct[inside].mean() - confidences[inside].mean()))
            ece += inside.mean() * gaps[-1]
    found = metrics.calibration_error(jnp.asarray(confidences), jnp.asarray(correct))
    np.testing.assert_allclose([found.ece, found.mce], [ece, max(gaps)], rtol=1e-5)
    assert len(gaps) < 15


def test_confidence_and_brier_score_of_logits():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(2, 4, 3)).astype(np.float32), rng.integers(3, size=(2, 4))
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    confidences, correct = metrics.confidence_and_correct(jnp.asarray(logits), jnp.asarray(labels))
    np.testing.assert_allclose(confidences, probabilities.max(-1), rtol=1e-6)
    np.testing.assert_array_equal(correct, logits.argmax(-1) == labels)
    expected = ((probabilities - np.eye(3)[labels]) ** 2).sum(-1).mean()
    np.testing.assert_allclose(metrics.brier(jnp.asarray(logits), jnp.asarray(labels)), expected)
    certain = jnp.array([[50.0, 0.0], [50.0, 0.0]])
    assert metrics.brier(certain, jnp.array([0, 0])) == 0
    assert metrics.brier(certain, jnp.array([1, 1])) == 2
    assert metrics.brier(jnp.zeros((2, 2)), jnp.array([0, 1])) == 0.5


def test_likelihood_of_labels_is_the_cross_entropy_of_the_averaged_predictive():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(3, 4, 5)).astype(np.float32), np.arange(4)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = -np.log(probabilities.mean(0)[np.arange(4), labels]).mean()
    found = cross_entropy(mixture_logits(jnp.asarray(logits)), jnp.asarray(labels))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.fixture
def regression(x64):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(4, 6, 2))), jnp.asarray(rng.normal(size=(6, 2))), 0.7


def test_mixture_likelihood_is_a_loop(regression):
    samples, targets, noise_std = regression
    expected = 0.0
    for i in range(6):
        densities = [
            np.prod(
                np.exp(-0.5 * ((targets[i] - sample[i]) / noise_std) ** 2)
                / (noise_std * math.sqrt(2 * math.pi))
            )
            for sample in samples
        ]
        expected -= math.log(np.mean(densities)) / 6
    found = jax.jit(metrics.gaussian_mixture_nll)(samples, targets, noise_std)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    far = metrics.gaussian_mixture_nll(samples, targets + 1e4, 1e-2)
    assert jnp.isfinite(far)


@pytest.mark.parametrize("level", [0.5, 0.9])
def test_coverage_is_that_of_the_quantiles(regression, level):
    """Against quantiles of the mixture that are found on a grid."""
    samples, targets, noise_std = (np.asarray(x) for x in regression)
    grid = np.linspace(-8, 8, 200_001)
    inside = []
    for place in np.ndindex(6, 2):
        cdf = np.mean(
            [jax.scipy.stats.norm.cdf(grid, sample[place], noise_std) for sample in samples],
            axis=0,
        )
        low, high = (grid[np.searchsorted(cdf, (1 + sign * level) / 2)] for sign in (-1, 1))
        inside.append(low <= targets[place] <= high)
    found = metrics.coverage(*regression, level=level)
    assert 0 < np.mean(inside) < 1
    np.testing.assert_allclose(found, np.mean(inside), rtol=1e-12)


def test_coverage_of_its_own_predictive_is_the_level(x64):
    keys = jax.random.split(jax.random.key(0), 3)
    samples = 2 * jax.random.normal(keys[0], (5, 10_000))
    member = jax.random.randint(keys[1], (10_000,), 0, 5)
    targets = samples[member, jnp.arange(10_000)] + 0.3 * jax.random.normal(keys[2], (10_000,))
    for level in (0.5, 0.9):
        assert abs(metrics.coverage(samples, targets, 0.3, level=level) - level) < 0.015


def test_bad_calibration_arguments_are_named():
    with pytest.raises(ValueError, match=r"bins must be .* got 0"):
        metrics.calibration_error(jnp.ones(2), jnp.ones(2), bins=0)
    with pytest.raises(ValueError, match=r"one shape; got \(2,\) and \(3,\)"):
        metrics.calibration_error(jnp.ones(2), jnp.ones(3))
    with pytest.raises(ValueError, match=r"level must lie .* got 1\.0"):
        metrics.coverage(jnp.ones((1, 2)), jnp.ones(2), 0.1, level=1.0)
    with pytest.raises(ValueError, match=r"got \(3, 2\)"):
        metrics.gaussian_mixture_nll(jnp.ones((3, 2)), jnp.ones((2, 1)), 0.1)
    for noise_std in (0.0, -0.1, jnp.inf):
        with pytest.raises(ValueError, match=f"noise_std must be positive .* got {noise_std}"):
            metrics.coverage(jnp.ones((1, 2)), jnp.ones(2), noise_std, level=0.9)
    for wrong in (-0.5, 3.0):
        with pytest.raises(ValueError, match=rf"in \[0, 1\]; got .*{wrong}.* takes logits"):
            metrics.calibration_error(jnp.array([0.5, wrong]), jnp.ones(2))
    for label in (-1, 2):
        with pytest.raises(ValueError, match=f"labels must .* 0 to 1.*; got .*{label}"):
            metrics.brier(jnp.zeros((2, 2)), jnp.array([0, label]))
