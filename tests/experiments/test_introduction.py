"""The interactive introduction: its arrows are exact, and its page stands alone.

What a reader meets, and the numbers of the whole page, are in test_introduction_page.py.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.introduction import implicit, landscape, page, plane

SEED, STEPS = 3, 3
SIZES = plane.Sizes(side=5, rates=(0.05, 0.2), steps=(STEPS,), strengths=(0.5, 2.0))
DIGITS = 2e-5  # of packed floats


@pytest.fixture(scope="module")
def found(x64_module):
    return landscape.compute(SIZES, SEED)


@pytest.fixture(scope="module")
def tasks(x64_module):
    return plane.sample_tasks(jax.random.key(SEED))


def picks(*shape):
    """Three random places of a grid."""
    rng = np.random.default_rng(0)
    return [tuple(int(rng.integers(n)) for n in shape) for _ in range(3)]


def test_packing_keeps_the_numbers():
    rng = np.random.default_rng(0)
    numbers = rng.normal(size=(3, 4)) * 10.0 ** rng.integers(-30, 30, (3, 4))
    numbers[0, 0] = 0
    np.testing.assert_allclose(page.unpack(page.pack(numbers)), numbers, rtol=DIGITS)
    places = rng.uniform(-7.9, 7.9, (2, 5))
    found = page.unpack(page.pack(places, 1 / 4096))
    np.testing.assert_allclose(found, places, atol=0.5 / 4096)
    assert page.unpack(page.pack([50.0], 1 / 4096))[0] == 32767 / 4096
    with pytest.raises(ValueError, match="not finite; choose another seed"):
        page.pack([1.0, np.nan])


def test_grid_points_recomputed(found, tasks):
    points = plane.grid(SIZES.side)
    for name in plane.ALGORITHMS:
        again = jax.jit(partial(landscape.arrow, name, tasks=tasks, steps=STEPS))
        for a, s, r, c in picks(2, 2, 5, 5):
            rate, strength = SIZES.rates[a], SIZES.strengths[s]
            place = (a, 0, s, r, c) if name == "imaml" else (a, 0, r, c)
            shown = page.unpack(page.pack(found[name]))[place]
            expected, info = again(points[r, c], rate=rate, strength=strength)
            np.testing.assert_allclose(shown, expected, rtol=DIGITS, atol=1e-9)
            if name == "imaml":
                residual = found["inner_residual"][place]
                np.testing.assert_allclose(residual, info.inner_residual.max(), rtol=1e-9)
            if name == "maml":
                losses = found["unrolled_loss"][a, 0, 2 * r, 2 * c], found["curves"][a, r, c, STEPS]
                np.testing.assert_allclose(losses, info.query_loss.mean(), rtol=1e-9)


def test_maml_arrows_equal_central_differences(found, tasks):
    points, h = plane.grid(SIZES.side), 1e-5

    @jax.jit
    def loss(theta, rate):
        return plane.query_loss(plane.make_learner("maml", rate, STEPS), theta, tasks)

    for a, r, c in picks(2, 5, 5):
        theta, rate = points[r, c], SIZES.rates[a]
        slopes = [loss(theta + h * e, rate) - loss(theta - h * e, rate) for e in jnp.eye(2)]
        for name in ("maml", "exact_unrolled"):
            expected = np.array(slopes) / (2 * h)
            np.testing.assert_allclose(found[name][a, 0, r, c], expected, rtol=1e-6, atol=1e-9)


def test_implicit_arrows_equal_a_dense_solve(found, tasks):
    points = plane.grid(SIZES.side)
    slope, curvature = jax.jit(jax.grad(plane.valley)), jax.jit(jax.hessian(plane.valley))
    for s, r, c in picks(2, 5, 5):
        strength, expected = SIZES.strengths[s], []
        for phi, support, query in zip(
            found["minima"][s, r, c], tasks.support.targets, tasks.query.targets, strict=True
        ):
            pull = slope(phi, support) + strength * (phi - points[r, c])
            assert np.linalg.norm(pull) < 1e-6
            matrix = np.eye(2) + curvature(phi, support) / strength
            expected.append(np.linalg.solve(matrix, slope(phi, query)))
        shown = found["exact_implicit"][s, r, c]
        np.testing.assert_allclose(shown, np.mean(expected, 0), rtol=1e-6, atol=1e-8)


def test_many_steps_meet_the_exact_arrow(found, tasks):
    """Those of implicit MAML; its reports are then in order."""
    theta = plane.grid(SIZES.side)[1, 3]
    arrow = jax.jit(partial(landscape.arrow, "imaml", tasks=tasks, steps=500))
    shown, info = arrow(theta, rate=0.2, strength=0.5)
    np.testing.assert_allclose(shown, found["exact_implicit"][0, 1, 3], rtol=1e-6)
    assert info.inner_residual.max() < 1e-6 and info.min_curvature.min() > 0


def test_solver_errors_fall_with_cg_steps():
    sizes = implicit.Sizes(conditions=(10.0,), descent_steps=(4, 64), cg_steps=12)
    found = implicit.solver_errors(sizes, SEED)
    error, residual = found["error"][0], found["solve_residual"][0]
    assert error.shape == residual.shape == (2, 12)
    assert (error[:, -1] < error[:, 0]).all() and error[1, -1] < 1e-2 * error[0, -1]
    np.testing.assert_array_less(residual[:, -1], 1e-2)
    assert found["inner_residual"][0, 1] < 1e-3 < found["inner_residual"][0, 0]


def test_the_page_needs_nothing_else():
    text = page.render({"seed": SEED})
    assert "{{" not in text and page.data_of(text) == {"seed": SEED}
    assert "://" not in text
    for reference in re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]+)""", text):
        assert reference.startswith("data:")
    for reference in re.findall(r"url\(([^)]*)", text):
        assert reference.startswith(("$", "#"))
    for word in ("@import", "fetch(", "XMLHttpRequest", "import(", "WebSocket", "sendBeacon"):
        assert word not in text
    assert text.count("<script") == text.count("</script>") == 2


def test_tables_and_speech():
    text = page.render({})
    assert "<th>" not in text and '<th scope="row"' in text
    assert re.findall(r'id="([^"]+)"[^>]* aria-live', text) == ["game-verdict", "spoken"]


def test_text_in_the_data_cannot_end_it():
    hostile = "</script><script>alert(1)</script><!--<script>&"
    text = page.render({"command": hostile})
    assert page.data_of(text) == {"command": hostile}
    assert text.count("<script") == text.count("</script>") == 2 and "<!--" not in text
