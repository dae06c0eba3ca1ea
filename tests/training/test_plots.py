"""Pictures are written, and show what they are given."""

import jax.numpy as jnp
import numpy as np
import pytest

from imaml_jax import Batch
from imaml_jax.training import metrics, plots


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is drawn."""
    drawn = []
    new_figure = plots.new_figure
    monkeypatch.setattr(plots, "new_figure", lambda *x: drawn.append(new_figure(*x)) or drawn[-1])
    return drawn


def test_reliability_diagram(tmp_path, figures):
    confidences = jnp.array([0.15, 0.55, 0.95, 0.95])
    calibration = metrics.calibration_error(confidences, jnp.array([0, 1, 1, 0]), bins=5)
    plots.reliability_diagram(calibration, tmp_path / "reliability.png")
    assert (tmp_path / "reliability.png").stat().st_size > 0
    upper, lower = figures[0].axes
    assert [bar.get_height() for bar in upper.patches] == [0, 0, 1, 0, 0.5]
    assert [bar.get_height() for bar in lower.patches] == [0.25, 0, 0.25, 0, 0.5]
    np.testing.assert_allclose(upper.lines[0].get_xdata(), [0.15, 0.55, 0.95], rtol=1e-6)
    assert upper.get_title() == f"ECE {calibration.ece:.3f}, MCE {calibration.mce:.3f}"


def test_prediction_bands(tmp_path, figures):
    x = np.linspace(-1, 1, 7)
    samples = x[None] + np.linspace(-1, 1, 5)[:, None]
    support = Batch(jnp.array([[0.0], [0.5]]), jnp.array([[0.1], [0.4]]))
    plots.prediction_bands(x, samples, np.sin(x), support, tmp_path / "bands.png", levels=(0.5,))
    assert (tmp_path / "bands.png").stat().st_size > 0
    (axes,) = figures[0].axes
    low, high = axes.collections[0].get_datalim(axes.transData).intervaly
    np.testing.assert_allclose([low, high], [-1.5, 1.5])
    np.testing.assert_allclose(axes.lines[-1].get_ydata(), [0.1, 0.4], rtol=1e-6)
