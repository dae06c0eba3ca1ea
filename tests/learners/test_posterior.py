"""Log-densities against scipy and numerical integration, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from imaml_jax import learned_precisions, likelihood, mean_squared_error
from imaml_jax.learners.posterior import Precisions, log_gamma_of_log
from imaml_jax.networks import Network

pytestmark = pytest.mark.usefixtures("x64_module")

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(4, 2)), RNG.normal(size=(4, 1))
NETWORK = Network(lambda key, inputs: {"w": jnp.ones((2, 1))}, lambda p, inputs: inputs @ p["w"])


@pytest.mark.parametrize("shape, rate", [(2.0, 0.2), (2.0, 2.0), (0.7, 3.0)])
def test_the_density_of_a_logarithm_has_its_jacobian(shape, rate):
    log_x = np.linspace(-3, 3, 7)
    expected = stats.gamma.logpdf(np.exp(log_x), shape, scale=1 / rate) + log_x
    np.testing.assert_allclose(log_gamma_of_log(log_x, shape, rate), expected, rtol=1e-12)
    grid = np.linspace(-40, 8, 40_001)
    density = np.exp(log_gamma_of_log(grid, shape, rate))
    assert integrate.simpson(density, x=grid) == pytest.approx(1, abs=1e-8)


def test_learned_precisions_against_scipy():
    posterior = learned_precisions()
    network = posterior.wrap(NETWORK)
    params = network.init(jax.random.key(0), X)
    assert isinstance(params, Precisions)
    np.testing.assert_allclose(np.exp(params[1:]), [100, 1], rtol=1e-12)
    params = Precisions({"w": jnp.array([[0.3], [-0.2]])}, jnp.log(7.0), jnp.log(0.4))
    outputs = network.apply(params, X)
    expected = (
        stats.norm.logpdf(Y, X @ params.params["w"], 7**-0.5).sum()
        + stats.norm.logpdf(params.params["w"], 0, 0.4**-0.5).sum()
        + stats.gamma.logpdf(7, 2, scale=1 / 0.2)
        + np.log(7)
        + stats.gamma.logpdf(0.4, 2, scale=1 / 2)
        + np.log(0.4)
    )
    np.testing.assert_allclose(posterior.log_density(params, outputs, Y), expected, rtol=1e-12)
    assert posterior.compared("params/w") and not posterior.compared("log_noise_precision")


def test_likelihood_is_a_sum_over_examples_with_a_gaussian_prior():
    params = {"w": jnp.array([[0.3], [-0.2]]), "slow": None}
    outputs = X @ params["w"]
    flat = likelihood(mean_squared_error).log_density(params, outputs, Y)
    np.testing.assert_allclose(flat, -np.sum((outputs - Y) ** 2), rtol=1e-12)
    curved = likelihood(mean_squared_error, prior_precision=3.0).log_density(params, outputs, Y)
    np.testing.assert_allclose(flat - curved, 1.5 * (0.3**2 + 0.2**2), rtol=1e-12)


def test_targets_of_another_shape_are_refused():
    posterior = learned_precisions()
    params = posterior.wrap(NETWORK).init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=r"one shape; got \(4, 1\) and \(4,\)"):
        posterior.log_density(params, jnp.asarray(Y), jnp.asarray(Y[:, 0]))


def test_precisions_that_are_not_adapted_are_refused():
    params = Precisions({"w": jnp.ones((2, 1))}, None, None)
    with pytest.raises(ValueError, match="fast must be true for the paths log_noise_precision"):
        learned_precisions().log_density(params, X, X)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["noise_precision", "weight_precision", "noise_prior"])
def test_bad_precisions_are_named(name, value):
    setting = (2.0, value) if name == "noise_prior" else value
    with pytest.raises(ValueError, match=f"{name}="):
        learned_precisions(**{name: setting})


@pytest.mark.parametrize("value", [(2.0,), 2.0, (2.0, 0.2, 1.0)])
def test_a_prior_is_a_pair(value):
    with pytest.raises(ValueError, match="must be a shape and a rate, both positive"):
        learned_precisions(weight_prior=value)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_bad_prior_precisions_are_named(value):
    with pytest.raises(ValueError, match="prior_precision="):
        likelihood(mean_squared_error, prior_precision=value)
