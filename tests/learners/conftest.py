"""Fixtures of the learners' exact tests."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree


def relative_error(actual, expected):
    """Of two trees, in the norm over all their entries."""
    actual, expected = (ravel_pytree(x)[0] for x in (actual, expected))
    return float(jnp.linalg.norm(actual - expected) / jnp.linalg.norm(expected))


@pytest.fixture(scope="session")
def finite_differences():
    """`(fun, x [n]) -> gradient [n]` by central differences, one point at a time."""

    def gradient(fun, x, step=1e-5):
        x, steps = np.asarray(x), step * np.eye(x.size)
        points = np.concatenate([x + steps, x - steps])
        forward, backward = np.split(jax.jit(lambda points: jax.lax.map(fun, points))(points), 2)
        return (forward - backward) / (2 * step)

    return gradient
