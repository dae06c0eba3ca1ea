"""TRPO: its matrix against the dense Fisher, its line search, and the meta-step."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from imaml_jax import Environment, Task, gaussian_policy, policy_gradient, policy_problem
from imaml_jax.bilevel.curvature import gauss_newton
from imaml_jax.networks import mlp
from imaml_jax.policies.losses import distributions, log_probs
from imaml_jax.policies.navigation import navigation, sample_tasks
from imaml_jax.policies.trajectories import masked_mean
from imaml_jax.policies.trpo import make_trpo_train_step, trpo_step
from imaml_jax.training import train
from imaml_jax.training.non_finite import NonFiniteError
from imaml_jax.training.step import init_state

pytestmark = pytest.mark.usefixtures("x64_module")

KEY = jax.random.key(0)
POLICY = gaussian_policy(
    mlp([3, 2], activation=jnp.tanh, kernel_init=jax.nn.initializers.glorot_uniform())
)
sample = partial(sample_tasks, num_tasks=3)


def make_problem(environment=None, **settings):
    settings = dict(inner=optax.sgd(0.5), num_steps=1, num_trajectories=4) | settings
    return policy_problem(POLICY, environment or navigation(horizon=3), **settings)


@pytest.fixture(scope="module")
def one_task(x64_module):
    """Functions of the raveled parameters: the adapted policy's outputs, loss and divergence."""
    problem = make_problem(num_steps=2)
    params = POLICY.init(KEY, jnp.zeros((1, 2)))
    task = jax.tree.map(lambda x: x[0], sample(KEY))
    adaptation, query = jax.jit(problem.collect)(params, task, KEY)
    flat, unravel = ravel_pytree(params)
    seen, mask = query.trajectories, query.trajectories.mask

    def outputs(flat):
        return distributions(POLICY, problem.repeat(unravel(flat), adaptation.support), seen)

    def loss(outputs):
        actions = seen.actions.reshape(-1, 2)
        logs = POLICY.log_prob(outputs, actions).reshape(mask.shape)
        return -masked_mean(jnp.exp(logs - seen.log_probs) * query.advantages, mask)

    def divergence(old, outputs):
        return masked_mean(POLICY.kl(old, outputs).reshape(mask.shape), mask)

    adapted = problem.repeat(params, adaptation.support)
    np.testing.assert_allclose(log_probs(POLICY, adapted, seen), seen.log_probs, rtol=1e-9)
    return SimpleNamespace(flat=flat, outputs=outputs, loss=loss, divergence=divergence)


@pytest.fixture(scope="module")
def dense_fisher(one_task):
    """The Hessian of the divergence through the adaptation, by three derivatives."""
    old = one_task.outputs(one_task.flat)
    return jax.jit(jax.hessian(lambda f: one_task.divergence(old, one_task.outputs(f))))(
        one_task.flat
    )


def test_products_with_the_fisher_matrix(one_task, dense_fisher):
    @jax.jit
    def product(v):
        old = one_task.outputs(one_task.flat)
        divergence = partial(one_task.divergence, old)
        return gauss_newton(one_task.outputs, divergence, one_task.flat).matvec(v)

    assert np.linalg.eigvalsh(dense_fisher).min() > -1e-12
    for v in np.random.default_rng(0).normal(size=(3, one_task.flat.size)):
        np.testing.assert_allclose(product(v), dense_fisher @ v, rtol=1e-8, atol=1e-10)


def test_a_step_is_the_natural_gradient_of_its_length(one_task, dense_fisher):
    damping, max_kl = 1e-2, 1e-3
    step = partial(trpo_step, one_task.outputs, one_task.loss, one_task.divergence)
    moved, info = jax.jit(partial(step, damping=damping, max_kl=max_kl, cg_steps=60))(one_task.flat)

    matrix = dense_fisher + damping * np.eye(one_task.flat.size)
    grads = jax.jit(jax.grad(lambda f: one_task.loss(one_task.outputs(f))))(one_task.flat)
    natural = np.linalg.solve(matrix, grads)
    full = np.sqrt(2 * max_kl / (natural @ matrix @ natural))
    np.testing.assert_allclose(info.grads, grads, rtol=1e-9, atol=1e-12)
    expected = one_task.flat - info.step_fraction * full * natural
    np.testing.assert_allclose(moved, expected, rtol=1e-3, atol=1e-4)
    assert info.solve_residual < 1e-4 and info.min_curvature > 0

    old, new = map(jax.jit(one_task.outputs), (one_task.flat, moved))
    np.testing.assert_allclose(info.kl, one_task.divergence(old, new), rtol=1e-9)
    assert 0 < info.kl <= max_kl
    fall = one_task.loss(old) - one_task.loss(new)
    np.testing.assert_allclose(info.improvement, fall, rtol=1e-9)
    assert info.improvement > 0


def bowl(outputs):
    return jnp.sum(outputs)


def steep(strength, old, outputs):
    """Twice as curved as told by its second derivative, from some distance on."""
    square = jnp.sum(jnp.square(outputs - old))
    return square / 2 + strength * square**2


def test_the_line_search_shrinks_until_the_divergence_is_within_its_bound():
    step = partial(trpo_step, lambda p: p, bowl, partial(steep, 200.0), damping=0.0)
    moved, info = step(jnp.ones(3))
    fraction = float(info.step_fraction)
    # The full step has square 0.02, that of a fraction f divergence f^2/100 + 200 (f^2/50)^2.
    tries = [f for f in 0.8 ** np.arange(15) if f**2 / 100 + 200 * (f**2 / 50) ** 2 <= 0.01]
    np.testing.assert_allclose(fraction, tries[0], rtol=1e-9)
    assert info.kl <= 0.01 and info.improvement > 0
    np.testing.assert_allclose(jnp.sum((moved - 1) ** 2), 0.02 * fraction**2, rtol=1e-9)


def test_nothing_moves_where_no_try_is_accepted():
    step = partial(trpo_step, lambda p: p, bowl, partial(steep, 1e9), max_tries=3)
    moved, info = step(jnp.ones(3))
    np.testing.assert_array_equal(moved, 1)
    assert info.step_fraction == info.kl == info.improvement == 0


def test_nothing_moves_where_there_is_no_gradient():
    moved, info = trpo_step(
        lambda p: p, lambda outputs: 0 * jnp.sum(outputs), partial(steep, 0.0), jnp.ones(3)
    )
    np.testing.assert_array_equal(moved, 1)
    assert info.step_fraction == 0


@pytest.mark.parametrize(
    "algorithm", [pytest.param("maml", marks=pytest.mark.slow), "fomaml", "imaml"]
)
def test_the_meta_step_keeps_the_divergence_and_lowers_the_surrogate(algorithm):
    settings = dict(inner=optax.sgd(0.2), num_steps=3) if algorithm == "imaml" else {}
    problem = make_problem(algorithm=algorithm, **settings)
    step = jax.jit(make_trpo_train_step(problem, sample))
    state = init_state(optax.identity(), POLICY.init(KEY, jnp.zeros((1, 2))))
    for _ in range(2):
        state, row = step(state, KEY)
        assert 0 < row["kl"] <= 0.01 and row["improvement"] > 0 and row["step_fraction"] > 0
        assert row["query_loss"] > 0 and row["support_loss"] > 0 and row["gradient_norm"] > 0
    assert state.step == 2 and state.failed_step == -1


@pytest.mark.slow
def test_a_reward_that_is_not_a_number_stops_the_run():
    calm = navigation(horizon=3)

    def step(state, action, goal):
        state, observation, reward, done = calm.step(state, action, goal)
        return state, observation, jnp.where(goal[0] > 0, jnp.nan, reward), done

    def goals(key):
        return Task(*2 * [jnp.array([[-0.1, 0.2], [0.1, 0.2]])])

    problem = make_problem(Environment(calm.reset, step, 3))
    with pytest.raises(NonFiniteError, match="task 1 of meta-step 0"):
        train(
            policy_gradient(problem),
            optax.identity(),
            goals,
            key=KEY,
            num_steps=1,
            log_every=1,
            example_inputs=jnp.zeros((1, 2)),
            train_step=make_trpo_train_step(problem, goals),
            progress=False,
        )


@pytest.mark.parametrize(
    "setting",
    [
        dict(max_kl=0.0),
        dict(max_kl=float("inf")),
        dict(damping=-1.0),
        dict(damping=float("inf")),
        dict(shrink=1.0),
        dict(cg_steps=0),
        dict(cg_steps=1.5),
        dict(max_tries=0),
        dict(max_tries=1.5),
    ],
)
def test_bad_settings_are_named(setting):
    with pytest.raises(ValueError, match=f"{next(iter(setting))}="):
        trpo_step(lambda p: p, bowl, partial(steep, 0.0), jnp.ones(3), **setting)
    with pytest.raises(ValueError, match=f"{next(iter(setting))}="):
        make_trpo_train_step(make_problem(), sample, **setting)


@pytest.mark.parametrize("settings", [dict(algorithm="reptile"), dict(estimator="emaml")])
def test_what_it_cannot_serve_is_named(settings):
    with pytest.raises(ValueError, match=next(iter(settings.values()))):
        make_trpo_train_step(make_problem(**settings), sample)
