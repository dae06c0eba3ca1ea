"""Rollouts, returns, advantages and the baseline against loops in NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imaml_jax import Environment, gaussian_policy
from imaml_jax.networks import Network
from imaml_jax.policies.returns import (
    discounted_sums,
    estimate_advantages,
    fit_linear_baseline,
    generalised_advantages,
)
from imaml_jax.policies.trajectories import Trajectories, masked_mean, mean_return, rollout

pytestmark = pytest.mark.usefixtures("x64_module")

KEY = jax.random.key(0)
HORIZON, LENGTHS = 7, (7, 3, 1, 5)


def counter(horizon):
    """Counts its steps; the trajectory that starts at `s` is done when it reaches `task`."""

    def reset(key, task):
        start = jax.random.randint(key, (), 0, 3).astype(float)
        return start, start[None]

    def step(state, action, task):
        state = state + 1
        return state, state[None], action[0], state >= task

    return Environment(reset, step, horizon)


POLICY = gaussian_policy(
    Network(lambda key, x: jnp.ones((1, 1)), lambda kernel, x: x @ kernel), init_log_std=-1.0
)


def test_rollouts_by_a_loop():
    params = POLICY.init(KEY, jnp.zeros((1, 1)))
    found = jax.jit(partial(rollout, counter(6), POLICY, num_trajectories=9))(params, 4.0, KEY)
    assert found.observations.shape == (6, 9, 1) and found.rewards.shape == (6, 9)
    starts = np.asarray(found.observations[0, :, 0])
    assert set(starts) == {0, 1, 2}  # each trajectory has a key of its own
    for i, start in enumerate(starts):
        length = int(4 - start)
        np.testing.assert_array_equal(found.mask[:, i], np.arange(6) < length)
        np.testing.assert_array_equal(found.observations[:length, i, 0], start + np.arange(length))
    np.testing.assert_array_equal(found.rewards, found.actions[..., 0])
    noise = (found.actions - found.observations)[..., 0] / np.exp(-1)
    np.testing.assert_allclose(
        found.log_probs, -(noise**2) / 2 + 1 - np.log(2 * np.pi) / 2, rtol=1e-9
    )
    assert len(np.unique(noise)) == noise.size  # and each action noise of its own
    total = sum(float(found.rewards[t, i]) for t, i in np.argwhere(np.asarray(found.mask) > 0))
    np.testing.assert_allclose(mean_return(found), total / 9)

    again = jax.jit(partial(rollout, counter(6), POLICY, num_trajectories=9))(params, 4.0, KEY)
    jax.tree.map(np.testing.assert_array_equal, again, found)
    other = rollout(counter(6), POLICY, params, 4.0, jax.random.key(1), 9)
    assert (other.actions != found.actions).all()


def test_a_rollout_is_not_differentiated():
    params = POLICY.init(KEY, jnp.zeros((1, 1)))
    grads = jax.grad(lambda p: mean_return(rollout(counter(3), POLICY, p, 9.0, KEY, 2)))(params)
    assert all((g == 0).all() for g in jax.tree.leaves(grads))


@pytest.fixture(scope="module")
def trajectories(x64_module):
    rng = np.random.default_rng(1)
    n = len(LENGTHS)
    mask = np.arange(HORIZON)[:, None] < np.array(LENGTHS)[None]
    observations = 8 * rng.normal(size=(HORIZON, n, 2))  # some are clipped
    rewards = rng.normal(size=(HORIZON, n))
    zeros = jnp.zeros((HORIZON, n))
    found = (observations, zeros, zeros, rewards, mask.astype(float))
    return Trajectories(*map(jnp.asarray, found))


def returns_by_loop(trajectories, discount):
    returns = np.zeros((HORIZON, len(LENGTHS)))
    for i, length in enumerate(LENGTHS):
        for t in range(length):
            for k in range(t, length):
                returns[t, i] += discount ** (k - t) * trajectories.rewards[k, i]
    return returns


def baseline_by_normal_equations(trajectories, discount):
    rows, targets = [], []
    returns = returns_by_loop(trajectories, discount)
    for i, length in enumerate(LENGTHS):
        for t in range(length):
            o = np.clip(trajectories.observations[t, i], -10, 10)
            rows.append([*o, *o**2, t / 100, (t / 100) ** 2, (t / 100) ** 3, 1])
            targets.append(returns[t, i])
    rows, targets = np.array(rows), np.array(targets)
    weights = np.linalg.solve(rows.T @ rows + 1e-5 * np.eye(8), rows.T @ targets)
    values, predictions = np.zeros(returns.shape), iter(rows @ weights)
    for i, length in enumerate(LENGTHS):
        values[:length, i] = [next(predictions) for _ in range(length)]
    return values


def test_discounted_sums(trajectories):
    taken = trajectories.rewards * trajectories.mask
    expected = returns_by_loop(trajectories, 0.9)
    found = np.asarray(discounted_sums(taken, 0.9)) * trajectories.mask
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.7, 1.0])
def test_generalised_advantages(trajectories, gae_lambda):
    values = np.random.default_rng(2).normal(size=(HORIZON, len(LENGTHS)))
    expected = np.zeros_like(values)
    for i, length in enumerate(LENGTHS):
        v = np.append(values[:length, i], 0)
        delta = [trajectories.rewards[t, i] + 0.9 * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected[t, i] = sum((0.9 * gae_lambda) ** (k - t) * delta[k] for k in range(t, length))
    found = generalised_advantages(
        trajectories.rewards, values, trajectories.mask, discount=0.9, gae_lambda=gae_lambda
    )
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)


def test_the_linear_baseline(trajectories):
    found = fit_linear_baseline(trajectories, discount=0.9) * trajectories.mask
    expected = baseline_by_normal_equations(trajectories, 0.9)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)


def test_the_linear_baseline_in_float32():
    """Of a hundred steps, whose powers of time are nearly dependent."""
    rng = np.random.default_rng(3)
    observations = 0.1 * rng.normal(size=(100, 20, 2)).cumsum(0)
    rewards = -np.linalg.norm(observations, axis=-1)
    zeros = np.zeros((100, 20))
    exact = Trajectories(*map(jnp.asarray, (observations, zeros, zeros, rewards, zeros + 1)))
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32), exact)
    expected = fit_linear_baseline(exact, discount=0.99)
    found = fit_linear_baseline(rounded, discount=0.99)
    assert found.dtype == jnp.float32
    assert jnp.abs(found - expected).max() < 1e-3 * jnp.abs(expected).max()


def test_the_linear_baseline_keeps_its_digits_on_a_gpu(trajectories):
    with jax.default_matmul_precision("default"):
        program = str(jax.make_jaxpr(partial(fit_linear_baseline, discount=0.99))(trajectories))
    assert program.count("dot_general[") == program.count("precision=(Precision.HIGHEST") == 2


def test_advantages_as_published(trajectories):
    experience = jax.jit(estimate_advantages)(trajectories)
    mask = np.asarray(trajectories.mask) > 0
    raw = returns_by_loop(trajectories, 0.99) - baseline_by_normal_equations(trajectories, 0.99)
    expected = (raw - raw[mask].mean()) / (raw[mask].std() + 1e-8)
    np.testing.assert_allclose(experience.advantages[mask], expected[mask], rtol=1e-5, atol=1e-8)
    assert (experience.advantages[~mask] == 0).all()
    np.testing.assert_allclose(experience.scale, 1 / raw[mask].std(), rtol=1e-5)

    plain = estimate_advantages(
        trajectories, discount=1.0, linear_baseline=False, standardise=False
    )
    np.testing.assert_allclose(plain.advantages, returns_by_loop(trajectories, 1.0), rtol=1e-12)
    assert plain.scale == 1


def test_what_follows_the_end_counts_for_nothing(trajectories):
    ended = trajectories.mask == 0

    def spoil(x):
        return jnp.where(ended.reshape(ended.shape + (1,) * (x.ndim - 2)), jnp.nan, x)

    spoilt = jax.tree.map(spoil, trajectories)._replace(mask=trajectories.mask)
    found, expected = (estimate_advantages(t).advantages for t in (spoilt, trajectories))
    np.testing.assert_array_equal(found, expected)


def test_a_masked_mean_is_that_of_the_steps_taken():
    values, mask = jnp.array([1.0, 2.0, 9.0]), jnp.array([1.0, 1.0, 0.0])
    assert masked_mean(values, mask) == 1.5
    assert masked_mean(values, jnp.array([0.25, 0.5, 0.25])) == 3.5


@pytest.mark.parametrize(
    "setting", [{"discount": 1.1}, {"discount": -0.1}, {"gae_lambda": float("nan")}]
)
def test_settings_out_of_range_are_named(trajectories, setting):
    with pytest.raises(ValueError, match=f"{next(iter(setting))}="):
        estimate_advantages(trajectories, **setting)


def test_no_trajectory_is_refused():
    params = POLICY.init(KEY, jnp.zeros((1, 1)))
    with pytest.raises(ValueError, match="num_trajectories=0"):
        rollout(counter(3), POLICY, params, 4.0, KEY, 0)
