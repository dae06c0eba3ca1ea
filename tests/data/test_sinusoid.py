import functools

import jax
import numpy as np
import pytest

from imaml_jax.data import sinusoid

SHAPE = {"num_tasks": 6, "shots": 5, "queries": 7}


def test_shapes_ranges_and_determinism(key):
    sample = functools.partial(sinusoid.sample_tasks, **SHAPE)
    task, again = (jax.jit(lambda key: sample(key))(key) for _ in range(2))
    assert task.support.inputs.shape == task.support.targets.shape == (6, 5, 1)
    assert task.query.inputs.shape == task.query.targets.shape == (6, 7, 1)
    assert task.support.inputs.dtype == np.float32
    assert np.abs(task.query.inputs).max() <= 5 and np.abs(task.query.targets).max() <= 5
    jax.tree.map(np.testing.assert_allclose, task, again)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
    jax.tree.map(close, task, sample(key))
    other = sinusoid.sample_tasks(jax.random.key(1), **SHAPE)
    assert not np.array_equal(task.support.inputs, other.support.inputs)


def test_one_sinusoid_explains_support_and_query(key, x64):
    """A least-squares fit of a sin(x) + b cos(x) to the support leaves nothing on the query."""
    task = sinusoid.sample_tasks(key, num_tasks=20, shots=4, queries=6)
    for i in range(20):
        x, y = np.asarray(task.support.inputs[i, :, 0]), np.asarray(task.support.targets[i, :, 0])
        a, b = np.linalg.lstsq(np.stack([np.sin(x), np.cos(x)], 1), y, rcond=None)[0]
        x, y = np.asarray(task.query.inputs[i, :, 0]), np.asarray(task.query.targets[i, :, 0])
        np.testing.assert_allclose(a * np.sin(x) + b * np.cos(x), y, atol=1e-6)
        assert 0.1 <= np.hypot(a, b) <= 5.0
        assert 0 <= np.arctan2(-b, a) <= np.pi


def test_noise_has_the_given_scale(key):
    options = {"num_tasks": 50, "shots": 50, "queries": 50}
    clean = sinusoid.sample_tasks(key, **options)
    noisy = sinusoid.sample_tasks(key, noise=0.3, **options)
    np.testing.assert_array_equal(clean.query.inputs, noisy.query.inputs)
    assert np.std(noisy.query.targets - clean.query.targets) == pytest.approx(0.3, rel=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_tasks": 0}, "num_tasks=0"),
        ({"shots": 0}, "shots=0"),
        ({"queries": -1}, "queries=-1"),
        ({"amplitude": (5.0, 0.1)}, "amplitude"),
        ({"noise": -1.0}, "noise=-1.0"),
        ({"noise": float("nan")}, "noise=nan"),
        ({"frequency": (2.0, 0.5)}, "frequency"),
        ({"relative_noise": -1.0}, "relative_noise=-1.0"),
        ({"noise": float("inf")}, "noise=inf"),
        ({"inputs": (0.0, float("inf"))}, r"inputs=\(0.0, inf\)"),
    ],
)
def test_rejects(key, change, message):
    with pytest.raises(ValueError, match=message):
        sinusoid.sample_tasks(key, **{**SHAPE, **change})


def test_frequencies_leave_all_else_as_it_was(key, x64):
    """A fit of sines and cosines of the frequency found on a grid leaves nothing."""
    options = {"num_tasks": 5, "shots": 10, "queries": 10}
    plain = sinusoid.sample_tasks(key, **options)
    task = sinusoid.sample_tasks(key, frequency=(0.5, 2.0), **options)
    np.testing.assert_array_equal(plain.support.inputs, task.support.inputs)
    grid = np.linspace(0.45, 2.05, 1601)
    best = []
    for x, y in zip(task.support.inputs[..., 0], task.support.targets[..., 0], strict=True):
        waves = [np.stack([np.sin(w * x), np.cos(w * x)], 1) for w in grid]
        fits = [np.linalg.lstsq(wave, y, rcond=None)[0] for wave in waves]
        errors = [np.abs(wave @ fit - y).max() for wave, fit in zip(waves, fits, strict=True)]
        assert np.min(errors) < 0.02
        best.append(grid[np.argmin(errors)])
    assert 0.5 <= np.min(best) < np.max(best) <= 2.0
    fixed = sinusoid.sample_tasks(key, frequency=(1.0, 1.0), **options)
    np.testing.assert_array_equal(fixed.query.targets, plain.query.targets)


def test_relative_noise_grows_with_the_amplitude(key):
    options = {"num_tasks": 50, "shots": 50, "queries": 50, "noise": 0.1, "relative_noise": 0.2}
    for amplitude, scale in ((1.0, 0.3), (4.0, 0.9)):
        clean, noisy = (
            sinusoid.sample_tasks(key, amplitude=(amplitude, amplitude), **chosen)
            for chosen in ({**options, "noise": 0.0, "relative_noise": 0.0}, options)
        )
        deviation = np.std(noisy.query.targets - clean.query.targets)
        assert deviation == pytest.approx(scale, rel=0.1)
