"""Fixtures of the learners' exact tests."""

import jax
import pytest


@pytest.fixture(scope="module")
def x64_module():
    """Runs a whole module with float64 enabled, so that its fixtures can be shared."""
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.fixture(scope="session")
def finite_differences():
    """`(fun, x [n]) -> gradient [n]` by central differences, one point at a time."""

    def gradient(fun, x, step=1e-5):
        def slope(direction):
            return (fun(x + step * direction) - fun(x - step * direction)) / (2 * step)

        return jax.jit(lambda basis: jax.lax.map(slope, basis))(jax.numpy.eye(x.size))

    return gradient
