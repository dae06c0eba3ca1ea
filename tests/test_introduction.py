"""The interactive introduction: its numbers are the library's, and its page stands alone."""

import json
import os
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

# Importing the experiments must not change the devices of the other tests.
with mock.patch.dict(os.environ, XLA_FLAGS=os.environ.get("XLA_FLAGS", "")):
    from experiments.introduction import __main__ as introduction
    from experiments.introduction import costs, game, implicit, landscape, page, plane, sinusoids

SEED = 3
SMALL = introduction.Sizes(
    tasks=plane.Sizes(
        side=5,
        rates=(0.05, 0.2),
        steps=(1, 4),
        strengths=(0.5, 2.0),
        starts_side=2,
        meta_steps=4,
        record_every=2,
    ),
    lens=implicit.Sizes(
        rates=(0.1, 0.6), steps=(1, 8), conditions=(10.0,), descent_steps=(4,), cg_steps=3
    ),
    fits=sinusoids.Sizes(meta_steps=2, points=(-1.0, 2.0), levels=(-1.0, 1.0), inputs=5),
    rounds=game.Sizes(filters=4, meta_steps=2, rounds=3, test_tasks=4),
    measured=costs.Sizes(num_steps=(2, 4), rounds=1),
)
DIGITS = 2e-5  # of packed floats
POSITION = 2e-4


def random_game(sizes, seed):
    """In place of `game.play`, whose network takes long to compile."""
    rng = np.random.default_rng(seed)
    return {
        "images": rng.integers(0, 256, (sizes.rounds, game.WAYS + 1, 28, 28), np.uint8),
        "answers": rng.integers(0, game.WAYS, sizes.rounds),
        "probabilities": rng.dirichlet(np.ones(game.WAYS), sizes.rounds),
        "accuracy": 0.9,
        "ci95": 0.01,
    }


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A small page."""
    output = tmp_path_factory.mktemp("introduction") / "page.html"
    with (
        mock.patch.object(game, "play", random_game),
        mock.patch.object(introduction.common, "cache_compilations"),
    ):
        introduction.main(introduction.Config(output=output, seed=SEED), SMALL)
    return output.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def data(text):
    return page.data_of(text)


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


def test_grid_points_recomputed(data, tasks):
    points = plane.grid(SMALL.tasks.side)
    for a, t, s, r, c in picks(2, 2, 2, 5, 5):
        rate, steps = SMALL.tasks.rates[a], SMALL.tasks.steps[t]
        strength = SMALL.tasks.strengths[s]
        for name in plane.ALGORITHMS:
            place = (a, t, s, r, c) if name == "imaml" else (a, t, r, c)
            shown = page.unpack(data["plane"][name])[place]
            expected, info = landscape.arrow(name, points[r, c], tasks, rate, steps, strength)
            np.testing.assert_allclose(shown, expected, rtol=DIGITS, atol=1e-7)
        residual = page.unpack(data["plane"]["inner_residual"])[a, t, s, r, c]
        np.testing.assert_allclose(residual, info.inner_residual.max(), rtol=DIGITS)
        maml = plane.make_learner("maml", rate, steps)
        loss = page.unpack(data["plane"]["unrolled_loss"])[a, t, 2 * r, 2 * c]
        np.testing.assert_allclose(loss, plane.query_loss(maml, points[r, c], tasks), rtol=DIGITS)
        curve = page.unpack(data["plane"]["curves"])[a, r, c]
        np.testing.assert_allclose(curve[steps], loss, rtol=2 * DIGITS)


def test_maml_arrows_equal_central_differences(data, tasks):
    points, h = plane.grid(SMALL.tasks.side), 1e-5
    for a, t, r, c in picks(2, 2, 5, 5):
        learner = plane.make_learner("maml", SMALL.tasks.rates[a], SMALL.tasks.steps[t])
        slopes = [
            plane.query_loss(learner, points[r, c] + h * e, tasks)
            - plane.query_loss(learner, points[r, c] - h * e, tasks)
            for e in jnp.eye(2)
        ]
        for name in ("maml", "exact_unrolled"):
            shown = page.unpack(data["plane"][name])[a, t, r, c]
            np.testing.assert_allclose(shown, np.array(slopes) / (2 * h), rtol=1e-4, atol=1e-7)


def test_implicit_arrows_equal_a_dense_solve(data, tasks):
    points = plane.grid(SMALL.tasks.side)
    for s, r, c in picks(2, 5, 5):
        strength = SMALL.tasks.strengths[s]
        minima = plane.adapt(plane.exact_learner(strength), points[r, c], tasks)
        shown = page.unpack(data["plane"]["minima"])[s, r, c]
        np.testing.assert_allclose(shown, minima, atol=POSITION)
        expected = []
        for phi, support, query in zip(
            minima, tasks.support.targets, tasks.query.targets, strict=True
        ):
            pull = jax.grad(plane.valley)(phi, support) + strength * (phi - points[r, c])
            assert np.linalg.norm(pull) < 1e-6
            matrix = np.eye(2) + jax.hessian(plane.valley)(phi, support) / strength
            expected.append(np.linalg.solve(matrix, jax.grad(plane.valley)(phi, query)))
        shown = page.unpack(data["plane"]["exact_implicit"])[s, r, c]
        np.testing.assert_allclose(shown, np.mean(expected, 0), rtol=1e-4, atol=1e-6)


def test_arrows_with_many_steps_meet_the_exact_one(tasks):
    """Implicit MAML's with both solves done; MAML's tends elsewhere."""
    theta, strength = jnp.array([0.4, -1.0]), 0.5
    exact, _ = plane.meta_gradient(plane.exact_learner(strength), theta, tasks)
    found, info = landscape.arrow("imaml", theta, tasks, 0.2, 400, strength)
    np.testing.assert_allclose(found, exact, rtol=1e-6)
    assert info.inner_residual.max() < 1e-8


def test_runs_follow_the_arrows(data, tasks):
    for name in plane.ALGORITHMS:
        place = (1, 1, 1, 2) if name == "imaml" else (1, 1, 2)
        path = page.unpack(data["runs"]["paths"][name])[place]
        theta = landscape.starts(SMALL.tasks)[2]
        np.testing.assert_allclose(path[0], theta, atol=POSITION)
        for _ in range(SMALL.tasks.record_every):
            step, _ = landscape.arrow(name, theta, tasks, 0.2, 4, 2.0)
            theta = theta - landscape.OUTER_RATE * step
        np.testing.assert_allclose(path[1], theta, atol=POSITION)


def test_the_inner_problem_reports_its_failure(data, tasks):
    """Past the limit of the rate the residual stays up, and it falls where the rate is fit."""
    inner = {name: page.unpack(x) for name, x in data["inner"].items() if isinstance(x, dict)}
    phi = jnp.asarray(inner["minimum"][0, 1])
    curved = jax.hessian(plane.valley)(phi, tasks.support.targets[implicit.TASK])
    limit = 2 / (np.linalg.eigvalsh(curved)[-1] + SMALL.tasks.strengths[1])
    np.testing.assert_allclose(inner["rate_limit"][0, 1], limit, rtol=1e-3)
    fit, unfit = SMALL.lens.rates
    assert fit < limit < unfit
    assert inner["inner_residual"][0, 1, 0, 1] < 0.1 < inner["inner_residual"][0, 1, 1, 1]
    np.testing.assert_allclose(inner["paths"][0, 1, 0, 0], implicit.STARTS[0], atol=POSITION)


def test_solver_errors_fall_with_cg_steps(data):
    error = page.unpack(data["solver"]["error"])
    assert error.shape == (1, 1, 3) and error[0, 0, 2] < error[0, 0, 0]
    residual = page.unpack(data["solver"]["solve_residual"])
    assert residual[0, 0, 2] < residual[0, 0, 0]


def test_sinusoids_are_fitted_to_the_chosen_points(data):
    shown = data["sinusoid"]
    fits, losses = page.unpack(shown["fits"]), page.unpack(shown["losses"])
    assert fits.shape == (3, 4, sinusoids.STEPS + 1, 5)
    assert (losses[:, :, -1] < losses[:, :, 0]).all()
    targets = np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]])
    params = sinusoids.NETWORK.init(jax.random.key(SEED), jnp.zeros((1, 1)))
    outputs = sinusoids.NETWORK.apply(params, jnp.array(shown["points"])[:, None])[:, 0]
    expected = np.square(outputs - targets).mean(1)
    np.testing.assert_allclose(losses[0, :, 0], expected, rtol=1e-3)


def test_costs_have_every_learner(data):
    for name in ("maml", "maml_recomputed", "fomaml", "reptile", "imaml"):
        row = data["costs"][name]
        assert len(row["bytes"]) == len(row["seconds"]) == 2 and min(row["bytes"]) > 0
    slope = {name: np.ptp(data["costs"][name]["bytes"]) for name in ("maml", "imaml")}
    assert slope["imaml"] < 0.2 * slope["maml"]


def test_the_page_needs_nothing_else(text, data):
    assert "{{" not in text and data["seed"] == SEED
    assert "://" not in text and "//" not in re.findall(r"""=["']([^"']*)""", text)
    for reference in re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]+)""", text):
        assert reference.startswith("data:")
    for reference in re.findall(r"url\(([^)]*)", text):
        assert reference.startswith(("$", "#"))
    for word in ("@import", "fetch(", "XMLHttpRequest", "import(", "WebSocket", "sendBeacon"):
        assert word not in text
    assert text.count("<script") == text.count("</script>") == 2


def test_text_in_the_data_cannot_end_it():
    hostile = "</script><script>alert(1)</script>"
    with mock.patch.object(page, "read", lambda name: "{{data}}" if name == "page.html" else ""):
        assert json.loads(page.render({"command": hostile})) == {"command": hostile}
        assert "</script>" not in page.render({"command": hostile})
