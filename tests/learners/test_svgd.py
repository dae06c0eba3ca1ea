"""SVGD against loops and autodiff of the kernel, in float64."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from jax.test_util import check_grads

from imaml_jax import median_bandwidth, minimize, svgd_direction, svgd_objective

pytestmark = pytest.mark.usefixtures("x64_module")

M = 5


def tree(seed, number=M):
    rng = np.random.default_rng(seed)
    return {
        "a": jnp.asarray(rng.normal(size=(number, 2, 2))),
        "b": jnp.asarray(rng.normal(size=number)),
    }


def rows(particles):
    """`[M, P]` in numpy."""
    return np.asarray(jax.vmap(lambda p: ravel_pytree(p)[0])(particles))


def direction_by_loops(scores, particles, h, repulsion=1.0):
    x, s = rows(particles), rows(scores)

    def kernel(a, b):
        return jnp.exp(-jnp.sum((a - b) ** 2) / h)

    slope = jax.jit(jax.grad(kernel))
    total = [
        sum(float(kernel(x[j], x[i])) * s[j] + repulsion * slope(x[j], x[i]) for j in range(len(x)))
        for i in range(len(x))
    ]
    return np.stack(total) / len(x)


def median_by_loops(particles, official):
    x = rows(particles)
    squares = [
        np.sum((x[i] - x[j]) ** 2)
        for i in range(len(x))
        for j in range(len(x))
        if official or i != j
    ]
    return np.median(squares) / math.log(len(x))


@pytest.mark.parametrize("number", [2, M])
@pytest.mark.parametrize("kernel, repulsion", [("exact", 1.0), ("official", 0.5)])
def test_direction_against_loops_and_the_kernels_own_derivative(kernel, repulsion, number):
    particles, scores = tree(0, number), tree(1, number)
    h = median_by_loops(particles, kernel == "official")
    np.testing.assert_allclose(median_bandwidth(particles, kernel=kernel), h, rtol=1e-12)
    for given in (None, 3.0):
        actual = svgd_direction(scores, particles, bandwidth=given, kernel=kernel)
        expected = direction_by_loops(scores, particles, given or h, repulsion)
        np.testing.assert_allclose(rows(actual), expected, rtol=1e-11)


def test_the_official_median_of_two_particles_is_half_their_squared_distance():
    x = jnp.array([0.0, 3.0])
    np.testing.assert_allclose(median_bandwidth(x, kernel="official"), 4.5 / math.log(2))
    np.testing.assert_allclose(median_bandwidth(x), 9 / math.log(2))


def test_one_particle_with_a_bandwidth_follows_its_score():
    particles, scores = tree(0, 1), tree(1, 1)
    actual = svgd_direction(scores, particles, bandwidth=0.3)
    np.testing.assert_allclose(rows(actual), rows(scores), rtol=1e-15)


def test_permuting_the_particles_permutes_the_direction():
    order = np.array([3, 0, 4, 1, 2])
    particles, scores = tree(0), tree(1)
    permuted = svgd_direction(*(jax.tree.map(lambda x: x[order], t) for t in (scores, particles)))
    np.testing.assert_allclose(rows(permuted), rows(svgd_direction(scores, particles))[order])


def test_a_shift_of_all_particles_changes_nothing():
    particles, scores = tree(0), tree(1)
    shifted = jax.tree.map(lambda x: x + 1e4, particles)
    expected = rows(svgd_direction(scores, particles))
    np.testing.assert_allclose(rows(svgd_direction(scores, shifted)), expected, rtol=1e-8)


def test_derivatives_to_second_order():
    particles, scores = tree(0, 3), tree(1, 3)
    direction = partial(svgd_direction, bandwidth=2.0)
    check_grads(jax.jit(direction), (scores, particles), order=2, modes=["fwd", "rev"])


def test_the_median_is_held_fixed_in_derivatives_unless_it_is_given():
    particles, scores, tangent = tree(0), tree(1), tree(2)

    def slope(bandwidth):
        return rows(jax.jvp(lambda p: svgd_direction(scores, p, bandwidth=bandwidth(p)), *pair)[1])

    pair = ((particles,), (tangent,))
    held = median_bandwidth(particles)
    by_default = slope(lambda p: None)
    np.testing.assert_allclose(by_default, slope(lambda p: held), rtol=1e-12)
    whole = slope(median_bandwidth)
    assert np.linalg.norm(whole - by_default) > 1e-3 * np.linalg.norm(whole)

    def at(step):
        return rows(svgd_direction(scores, optax.tree.add_scale(particles, step, tangent)))

    np.testing.assert_allclose(whole, (at(1e-6) - at(-1e-6)) / 2e-6, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kernel", ["exact", "official"])
def test_particles_that_coincide_stay_together_and_finite(kernel):
    """In float32, at a point whose mean is rounded."""
    particles = jnp.full((3, 7), 0.1, jnp.float32)
    scores = jnp.ones((3, 7), jnp.float32)

    def total(p):
        return jnp.sum(jnp.sin(svgd_direction(scores, p, kernel=kernel)))

    actual = svgd_direction(scores, particles, kernel=kernel)
    np.testing.assert_allclose(actual, scores, rtol=1e-5)
    assert jnp.isfinite(jax.grad(total)(particles)).all()


def test_the_objective_has_the_directions_gradient_and_its_derivatives():
    particles, offset = tree(0, 3), jnp.arange(3.0)

    def log_densities(p, offset):
        return -(jnp.square(p["a"]).sum((1, 2)) ** 2) - jnp.square(p["b"] - offset)

    objective = svgd_objective(log_densities, bandwidth=2.0)
    value, grads = jax.jit(jax.value_and_grad(objective))(particles, offset)
    np.testing.assert_allclose(value, -log_densities(particles, offset).mean())

    def minus_direction(particles, offset):
        scores = jax.vmap(
            jax.grad(lambda p, o: log_densities(jax.tree.map(lambda x: x[None], p), o)[0])
        )
        direction = svgd_direction(scores(particles, offset[:, None]), particles, bandwidth=2.0)
        return jax.tree.map(jnp.negative, direction)

    np.testing.assert_allclose(rows(grads), rows(minus_direction(particles, offset)), rtol=1e-12)
    tangents = (tree(2, 3), jnp.ones(3))
    actual, expected = (
        jax.jit(lambda f=f: jax.jvp(f, (particles, offset), tangents)[1])()
        for f in (jax.grad(objective), minus_direction)
    )
    np.testing.assert_allclose(rows(actual), rows(expected), rtol=1e-11)


def test_particles_come_to_have_the_mean_and_the_spread_of_a_gaussian():
    objective = svgd_objective(lambda x: -jnp.square(x - 1) / 8)
    start = jnp.linspace(-1.0, 0.0, 20)
    x, info = jax.jit(lambda x: minimize(objective, x, tx=optax.adam(0.1), num_steps=600))(start)
    assert info.relative_residual < 1e-3
    assert float(x.mean()) == pytest.approx(1, abs=1e-3)
    assert float(x.std()) == pytest.approx(2, rel=0.1)


def test_one_particle_without_a_bandwidth_is_told_what_to_do():
    with pytest.raises(ValueError, match="give more particles, or a bandwidth"):
        svgd_direction(jnp.ones((1, 2)), jnp.ones((1, 2)))
    with pytest.raises(ValueError, match="give more particles, or a bandwidth"):
        median_bandwidth(jnp.ones((1, 2)))


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(bandwidth=0.0), "bandwidth=0.0"),
        (dict(bandwidth=-1.0), "bandwidth=-1.0"),
        (dict(bandwidth=math.nan), "bandwidth=nan"),
        (dict(bandwidth=math.inf), "bandwidth=inf"),
        (dict(kernel="laplace"), "kernel='laplace'"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        svgd_direction(jnp.ones((2, 2)), jnp.ones((2, 2)), **settings)
