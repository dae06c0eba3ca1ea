"""What every learner shares."""

import jax.numpy as jnp
import pytest

from imaml_jax import mean_squared_error


def test_mean_squared_error_refuses_to_broadcast():
    assert mean_squared_error(jnp.array([[1.0], [3.0]]), jnp.zeros((2, 1))) == 5.0
    with pytest.raises(ValueError, match=r"one shape; got \(2, 1\) and \(2,\)"):
        mean_squared_error(jnp.ones((2, 1)), jnp.ones(2))
