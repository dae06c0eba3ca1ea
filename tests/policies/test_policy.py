"""Distributions of actions against NumPy and quadrature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imaml_jax import categorical_policy, gaussian_policy
from imaml_jax.networks import Network
from imaml_jax.policies import Gaussian

pytestmark = pytest.mark.usefixtures("x64_module")

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
LINEAR = Network(lambda key, x: jnp.ones((x.shape[-1], 2), x.dtype), lambda kernel, x: x @ kernel)


def test_a_gaussian_policy():
    policy = gaussian_policy(LINEAR, init_log_std=0.5)
    observations = jnp.asarray(RNG.normal(size=(3, 4)))
    params = policy.init(KEY, observations)
    assert params.log_std.shape == (2,) and (params.log_std == 0.5).all()
    distribution = policy.apply(params, observations)
    mean, std = np.asarray(observations @ params.network), np.exp(0.5)
    actions = RNG.normal(size=(3, 2))
    density = np.exp(-((actions - mean) ** 2) / (2 * std**2)) / np.sqrt(2 * np.pi * std**2)
    np.testing.assert_allclose(
        policy.log_prob(distribution, actions), np.log(density).sum(-1), rtol=1e-12
    )
    wide = jax.tree.map(lambda x: jnp.repeat(x[:1], 20_000, axis=0), distribution)
    drawn = policy.sample(wide, KEY)
    np.testing.assert_allclose(drawn.mean(0), mean[0], atol=0.05)
    np.testing.assert_allclose(drawn.std(0), std, atol=0.05)


def test_the_divergence_of_gaussians_by_quadrature():
    policy = gaussian_policy(LINEAR)
    one, other = (Gaussian(*map(jnp.asarray, RNG.normal(size=(2, 1, 1)) / 2)) for _ in range(2))
    grid = jnp.linspace(-12, 12, 4001)[:, None]

    def log_density(gaussian):
        wide = jax.tree.map(lambda x: jnp.broadcast_to(x, grid.shape), gaussian)
        return policy.log_prob(wide, grid)

    p, q = log_density(one), log_density(other)
    expected = jnp.trapezoid(jnp.exp(p) * (p - q), grid[:, 0])
    np.testing.assert_allclose(policy.kl(one, other)[0], expected, rtol=1e-9)
    assert policy.kl(one, one)[0] == 0


def test_a_categorical_policy():
    policy = categorical_policy(LINEAR)
    observations = jnp.asarray(RNG.normal(size=(3, 4)))
    kernel, other_kernel = jnp.asarray(RNG.normal(size=(2, 4, 2)))
    distribution = policy.apply(kernel, observations)
    logits = np.asarray(observations @ kernel)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    actions = jnp.array([0, 1, 1])
    expected = np.log(p[np.arange(3), actions])
    np.testing.assert_allclose(policy.log_prob(distribution, actions), expected, rtol=1e-12)
    other = policy.apply(other_kernel, observations)
    kl = np.sum(p * (np.log(p) - other), axis=-1)
    np.testing.assert_allclose(policy.kl(distribution, other), kl, rtol=1e-12)
    drawn = policy.sample(jnp.repeat(distribution[:1], 20_000, axis=0), KEY)
    np.testing.assert_allclose(drawn.mean(), p[0, 1], atol=0.02)
