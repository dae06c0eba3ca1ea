"""The half-cheetah's rewards and targets, and its two simulators where they are installed."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from imaml_jax import gaussian_policy, policy_gradient, policy_problem
from imaml_jax.networks import mlp
from imaml_jax.policies import half_cheetah
from imaml_jax.policies.trajectories import rollout

KEY = jax.random.key(0)
WITHOUT_WARNINGS = pytest.mark.filterwarnings("ignore")  # theirs
BRAX, MUJOCO = "needs pip install imaml_jax[brax]", "needs pip install imaml_jax[mujoco]"


def test_rewards_by_hand():
    action = jnp.array([0.5, -1.0])
    assert jnp.isclose(half_cheetah.reward("velocity", 1.5, action, 2.0), -0.5 - 0.05 * 1.25)
    assert jnp.isclose(half_cheetah.reward("direction", 1.5, action, -1.0), -1.5 - 0.05 * 1.25)


def test_targets():
    velocities = half_cheetah.sample_tasks(KEY, "velocity", num_tasks=1000)
    np.testing.assert_array_equal(velocities.support, velocities.query)
    assert 0 <= velocities.support.min() < 0.05 and 1.95 < velocities.support.max() <= 2
    directions = half_cheetah.sample_tasks(KEY, "direction", num_tasks=1000).support
    assert set(np.asarray(directions)) == {-1, 1} and abs(directions.mean()) < 0.1


def adapts(environment):
    """A meta-gradient through two rollouts is finite and follows from the key."""
    policy = gaussian_policy(mlp([8, 6], kernel_init=jax.nn.initializers.glorot_uniform()))
    learner = policy_gradient(
        policy_problem(policy, environment, inner=optax.sgd(0.1), num_steps=1, num_trajectories=2)
    )
    params = learner.init(KEY, jnp.zeros((1, 17)))
    task = jax.tree.map(lambda x: x[0], half_cheetah.sample_tasks(KEY, "velocity", num_tasks=1))
    meta_grad = jax.jit(learner.meta_grad)
    grads, info = meta_grad(params, task, KEY, 0)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert info.query_loss > 0
    jax.tree.map(np.testing.assert_array_equal, meta_grad(params, task, KEY, 0)[0], grads)


@WITHOUT_WARNINGS
@pytest.mark.slow
def test_brax():
    """A rollout, which compiles for long enough."""
    pytest.importorskip("brax", reason=BRAX)
    environment = half_cheetah.brax_half_cheetah("velocity", horizon=3)
    policy = gaussian_policy(mlp([8, 6]))
    params = policy.init(KEY, jnp.zeros((1, 17)))
    with jax.numpy_rank_promotion("allow"):
        seen = jax.jit(partial(rollout, environment, policy, num_trajectories=2))(params, 1.0, KEY)
    assert seen.observations.shape == (3, 2, 17) and jnp.isfinite(seen.observations).all()
    cost = 0.05 * jnp.sum(jnp.clip(seen.actions, -1, 1) ** 2, axis=-1)
    assert (seen.rewards + cost <= 0).all() and seen.mask.all()


@WITHOUT_WARNINGS
def test_mujoco():
    pytest.importorskip("gymnasium", reason=MUJOCO)
    pytest.importorskip("mujoco", reason=MUJOCO)
    adapts(half_cheetah.mujoco_half_cheetah("velocity", horizon=3))


@WITHOUT_WARNINGS
def test_mujoco_from_several_threads():
    pytest.importorskip("gymnasium", reason=MUJOCO)
    pytest.importorskip("mujoco", reason=MUJOCO)
    environment = half_cheetah.mujoco_half_cheetah("velocity")

    @jax.jit
    def roll(key):
        state, _ = environment.reset(key, 1.0)
        actions = jax.random.uniform(key, (100, 6), minval=-1, maxval=1)
        return jax.lax.scan(lambda s, a: (environment.step(s, a, 1.0)[0], None), state, actions)[0]

    keys = list(jax.random.split(KEY, 4))
    expected = [np.asarray(roll(key)) for key in keys]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda key: np.asarray(roll(key)), keys))
    np.testing.assert_array_equal(found, expected)


@WITHOUT_WARNINGS
def test_mujoco_is_gymnasium_step_by_step():
    gymnasium = pytest.importorskip("gymnasium", reason=MUJOCO)
    pytest.importorskip("mujoco", reason=MUJOCO)
    ours = half_cheetah.mujoco_half_cheetah("direction")
    with jax.enable_x64(True):
        state, observation = ours.reset(KEY, -1.0)
        theirs = gymnasium.make("HalfCheetah-v5")
        theirs.reset(seed=0)
        theirs.unwrapped.set_state(np.array(state[:9]), np.array(state[9:]))
        for action in np.random.default_rng(0).uniform(-1, 1, size=(5, 6)):
            state, observation, gain, done = jax.jit(ours.step)(state, jnp.array(action), -1.0)
            expected, _, _, _, info = theirs.step(action)
            np.testing.assert_allclose(observation, expected, rtol=1e-3, atol=1e-3)
            velocity = info["x_velocity"]
            cost = 0.05 * np.sum(np.square(action))
            np.testing.assert_allclose(gain, -velocity - cost, atol=1e-3)
            assert not done


@pytest.mark.parametrize(
    "call, words",
    [
        (partial(half_cheetah.sample_tasks, KEY, "speed", num_tasks=1), "goal='speed'"),
        (partial(half_cheetah.sample_tasks, KEY, "velocity", num_tasks=0), "num_tasks=0"),
        (
            partial(half_cheetah.sample_tasks, KEY, "velocity", num_tasks=1, max_velocity=jnp.inf),
            "max_velocity=inf above 0 and finite",
        ),
        (partial(half_cheetah.brax_half_cheetah, "jump"), "goal='jump'"),
        (partial(half_cheetah.brax_half_cheetah, "velocity", horizon=0), "horizon=0"),
        (partial(half_cheetah.mujoco_half_cheetah, "velocity", horizon=1.5), "horizon=1.5"),
        (partial(half_cheetah.mujoco_half_cheetah, "jump"), "goal='jump'"),
    ],
)
def test_bad_inputs_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
