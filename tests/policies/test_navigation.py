"""2D navigation against hand calculations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imaml_jax.policies.navigation import navigation, sample_tasks

KEY = jax.random.key(0)
GOAL = jnp.array([0.3, -0.4])


def test_a_step_by_hand():
    environment = navigation()
    assert environment.horizon == 100
    state, observation = environment.reset(KEY, GOAL)
    np.testing.assert_array_equal(observation, [0, 0])

    # 0.1 times (0.5, -3), of which the second entry is clipped to -0.1.
    state, observation, reward, done = environment.step(state, jnp.array([0.5, -3.0]), GOAL)
    np.testing.assert_allclose(observation, [0.05, -0.1], rtol=1e-6)
    np.testing.assert_allclose(reward, -np.hypot(0.25, 0.3), rtol=1e-6)
    assert not done
    _, observation, reward, _ = environment.step(state, jnp.array([20.0, 1.0]), GOAL)
    np.testing.assert_allclose(observation, [0.15, 0.0], atol=1e-7)
    np.testing.assert_allclose(reward, -np.hypot(0.15, 0.4), rtol=1e-6)


@pytest.mark.parametrize(
    "offset, is_done",
    [((0.009, -0.009), True), ((0.011, 0.0), False), ((0.0, -0.011), False)],
)
def test_done_where_both_offsets_are_below_a_hundredth(offset, is_done):
    position = GOAL + jnp.array(offset)
    _, _, reward, done = navigation().step(position, jnp.zeros(2), GOAL)
    assert bool(done) is is_done
    np.testing.assert_allclose(reward, -np.hypot(*offset), rtol=1e-4)


def test_goals_are_uniform_in_a_square():
    tasks = sample_tasks(KEY, num_tasks=4000)
    np.testing.assert_array_equal(tasks.support, tasks.query)
    assert tasks.support.shape == (4000, 2)
    assert 0.49 < jnp.abs(tasks.support).max() <= 0.5
    np.testing.assert_allclose(tasks.support.mean(0), 0, atol=0.02)
    np.testing.assert_allclose(tasks.support.std(0), np.sqrt(1 / 12), atol=0.01)


@pytest.mark.parametrize(
    "call",
    [
        lambda: navigation(horizon=0),
        lambda: navigation(horizon=1.5),
        lambda: sample_tasks(KEY, num_tasks=0),
        lambda: sample_tasks(KEY, num_tasks=1, half_width=0.0),
        lambda: sample_tasks(KEY, num_tasks=1, half_width=float("inf")),
    ],
)
def test_bad_inputs_are_named(call):
    with pytest.raises(ValueError, match=r"=(0|1\.5|inf)"):
        call()
