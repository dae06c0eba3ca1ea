"""Policies that adapt, against the exact objectives of a tabular problem, in float64.

The problem has two states, two actions and three steps, so that an expectation is a sum over 64
trajectories: trajectories side by side whose mask holds their probabilities.
"""

import itertools
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from imaml_jax import (
    Environment,
    Task,
    categorical_policy,
    gaussian_policy,
    policy_gradient,
    policy_problem,
    solve_cg_steihaug,
    solve_dense,
)
from imaml_jax.networks import Network, mlp
from imaml_jax.policies.gradient import meta_gradient
from imaml_jax.policies.losses import surrogate_loss, weighted_regression
from imaml_jax.policies.navigation import navigation, sample_tasks
from imaml_jax.policies.problem import Adaptation
from imaml_jax.policies.returns import Experience, discounted_sums, estimate_advantages
from imaml_jax.policies.trajectories import Trajectories, mean_return, rollout

pytestmark = pytest.mark.usefixtures("x64_module")

KEY = jax.random.key(0)
HORIZON, RATE = 3, 0.8
raw_returns = partial(estimate_advantages, discount=1.0, linear_baseline=False, standardise=False)


class Tables(NamedTuple):
    """A task: chances of the first state, of the next state `[state, action, next]`, rewards."""

    start: jax.Array
    transitions: jax.Array
    rewards: jax.Array


def tabular():
    def see(state):
        return jax.nn.one_hot(state, 2)

    def reset(key, tables):
        key, own = jax.random.split(key)
        state = jax.random.categorical(own, jnp.log(tables.start))
        return (state, key), see(state)

    def step(state, action, tables):
        state, key = state
        key, own = jax.random.split(key)
        following = jax.random.categorical(own, jnp.log(tables.transitions[state, action]))
        reward = tables.rewards[state, action]
        return (following, key), see(following), reward, jnp.array(False)

    return Environment(reset, step, HORIZON)


POLICY = categorical_policy(
    Network(lambda key, x: jnp.zeros((2, 2)), lambda logits, states: states @ logits)
)


def tabular_problem(estimator="naive", **settings):
    # A loss is a mean over three timesteps, hence the rate.
    settings = dict(inner=optax.sgd(HORIZON * RATE), num_steps=1, estimate=raw_returns) | settings
    return policy_problem(POLICY, tabular(), estimator=estimator, **settings)


class Exact(NamedTuple):
    """Everything that can happen, and the exact expected return."""

    tables: Tables
    theta: jax.Array
    states: jax.Array
    actions: jax.Array

    def chances(self, theta):
        """`[64]`, those of the trajectories."""
        logs = jax.nn.log_softmax(theta)[self.states, self.actions].sum(0)
        dynamics = self.tables.start[self.states[0]]
        for t in range(HORIZON - 1):
            dynamics *= self.tables.transitions[self.states[t], self.actions[t], self.states[t + 1]]
        return jnp.exp(logs) * dynamics

    def rewards(self):
        return self.tables.rewards[self.states, self.actions]

    def expected_return(self, theta):
        return self.chances(theta) @ self.rewards().sum(0)

    def experience(self, theta):
        """All trajectories, weighted by their chances, as `[3, 64]` experience."""
        logs = jax.nn.log_softmax(theta)[self.states, self.actions]
        mask = jnp.broadcast_to(self.chances(theta), self.states.shape)
        found = Trajectories(
            jax.nn.one_hot(self.states, 2), self.actions, logs, self.rewards(), mask
        )
        advantages = discounted_sums(self.rewards(), 1.0)
        return jax.lax.stop_gradient(Experience(found, advantages, jnp.ones(())))

    def single(self, theta, i):
        """Trajectory `i` alone, as `[3, 1]` experience."""
        trajectories, advantages, scale = self.experience(theta)
        trajectories = jax.tree.map(lambda x: x[:, i][:, None], trajectories)
        mask = jnp.ones((HORIZON, 1))
        return Experience(trajectories._replace(mask=mask), advantages[:, i][:, None], scale)


@pytest.fixture(scope="module")
def exact(x64_module):
    tables = Tables(
        start=jnp.array([0.6, 0.4]),
        transitions=jnp.array([[[0.7, 0.3], [0.2, 0.8]], [[0.4, 0.6], [0.9, 0.1]]]),
        rewards=jnp.array([[1.0, 0.2], [-0.5, 1.5]]),
    )
    all_of_them = np.array(list(itertools.product([0, 1], repeat=2 * HORIZON))).T
    states, actions = jnp.asarray(all_of_them[:HORIZON]), jnp.asarray(all_of_them[HORIZON:])
    exact = Exact(tables, jnp.array([[0.3, -0.4], [-0.2, 0.5]]), states, actions)
    np.testing.assert_allclose(exact.chances(exact.theta).sum(), 1, rtol=1e-12)
    return exact


def add_axis(experience):
    return jax.tree.map(lambda x: x[None], experience)


def relative(found, expected):
    return float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))


def test_the_policy_gradient_is_exact(exact):
    expected = jax.jit(jax.grad(exact.expected_return))(exact.theta) / HORIZON
    for estimator in ("naive", "lvc", "loaded_dice", "emaml"):
        grad = jax.jit(jax.grad(partial(surrogate_loss, POLICY, estimator)))
        found = grad(exact.theta, exact.experience(exact.theta))
        np.testing.assert_allclose(found, -expected, rtol=1e-10)


def test_the_derivative_of_an_exact_step(exact):
    """Of `J(theta + alpha grad J)`, which needs the Hessian of J."""
    theta = exact.theta

    def after_a_step(theta):
        step = jax.grad(exact.expected_return)(theta)
        return exact.expected_return(theta + RATE * step)

    expected = jax.jit(jax.grad(after_a_step))(theta)
    supports = add_axis(exact.experience(theta))
    errors = {}
    stepped = theta + RATE * jax.grad(exact.expected_return)(theta)
    cotangent = jax.grad(exact.expected_return)(stepped)
    for estimator in ("naive", "lvc", "loaded_dice"):
        problem = tabular_problem(estimator)
        adapted = jax.jit(problem.repeat)(theta, supports)
        np.testing.assert_allclose(adapted, stepped, rtol=1e-10)
        adaptation = Adaptation(supports, adapted, None)
        found, _ = jax.jit(problem.pull_back)(theta, adaptation, cotangent)
        errors[estimator] = relative(found, expected)
    assert errors["loaded_dice"] < 1e-10
    assert errors["lvc"] < errors["naive"] / 3
    assert errors["naive"] > 0.1


@pytest.fixture(scope="module")
def sampled_objective(exact):
    """The mean reward after a step on one sampled trajectory, its gradient, and its estimates."""
    theta, number = exact.theta, exact.states.shape[1]

    def adapt(theta, i):
        """A step on trajectory `i`, written out."""
        logs = jnp.log(jax.nn.softmax(theta))[exact.states[:, i], exact.actions[:, i]]
        to_go = jnp.cumsum(exact.rewards()[::-1, i])[::-1]
        return logs @ to_go

    def objective(theta):
        step = jax.vmap(jax.grad(adapt), in_axes=(None, 0))(theta, jnp.arange(number))
        after = jax.vmap(exact.expected_return)(theta[None] + RATE * step)
        return exact.chances(theta) @ after / HORIZON

    def estimate(estimator):
        problem = tabular_problem(estimator)

        def of_one(i):
            supports = add_axis(exact.single(theta, i))
            adapted = problem.repeat(theta, supports)
            adaptation = Adaptation(supports, adapted, None)
            return meta_gradient(problem, theta, adaptation, exact.experience(adapted))[0]

        grads = jax.vmap(of_one)(jnp.arange(number))
        return -jnp.tensordot(exact.chances(theta), grads, axes=1)

    names = ("naive", "lvc", "loaded_dice", "emaml")
    return jax.jit(jax.grad(objective))(theta), {
        name: jax.jit(partial(estimate, name))() for name in names
    }


def test_the_score_term_makes_the_sampled_objective_exact(sampled_objective):
    expected, found = sampled_objective
    assert relative(found["emaml"], expected) < 1e-10
    assert relative(found["naive"], expected) > 0.1


@pytest.mark.parametrize("estimator", ["lvc", "loaded_dice"])
def test_the_score_term_with_another_surrogate_counts_twice(sampled_objective, estimator):
    expected, found = sampled_objective
    score = found["emaml"] - found["naive"]
    assert relative(found[estimator] + score, expected) > 0.02


def test_sampled_meta_gradients_average_to_the_exact_one(exact, sampled_objective):
    """Rollouts, advantages and keys included."""
    learner = policy_gradient(tabular_problem("emaml", num_trajectories=1))
    task = Task(exact.tables, exact.tables)
    keys = jax.random.split(KEY, 20_000)
    grads, info = jax.jit(jax.vmap(lambda k: learner.meta_grad(exact.theta, task, k, 0)))(keys)
    error = grads.std(0) / np.sqrt(len(keys))
    assert (jnp.abs(-grads.mean(0) - sampled_objective[0]) < 4 * error).all()
    assert jnp.abs(grads.mean(0)).max() > 10 * error.max()
    before = exact.expected_return(exact.theta)
    np.testing.assert_allclose(info.support_loss.mean(), -before, atol=0.05)
    assert info.query_loss.mean() < info.support_loss.mean() - 0.1


def test_the_policy_gradient_of_normal_actions_by_finite_differences():
    """With common random numbers, under which the return is smooth: nothing ends or is clipped."""

    def step(state, action, goal):
        state = state + action
        return state, state, -jnp.sum(jnp.square(state - goal)), jnp.array(False)

    environment = Environment(lambda key, goal: (jnp.zeros(1), jnp.zeros(1)), step, 2)
    network = Network(lambda key, x: jnp.array([[0.3], [-0.2]]), lambda p, x: x * p[:1] + p[1:])
    policy = gaussian_policy(network, init_log_std=-1.0)
    flat, unravel = ravel_pytree(policy.init(KEY, jnp.zeros((1, 1))))

    def returns(flat):
        trajectories = rollout(environment, policy, unravel(flat), 1.0, KEY, 40_000)
        return trajectories.rewards.sum(0)

    by_difference = []
    for unit in np.eye(flat.size):
        forward, backward = (jax.jit(returns)(flat + s * 1e-4 * unit) for s in (1, -1))
        by_difference.append((forward - backward) / 2e-4)

    def per_trajectory(trajectories):
        def loss(params, one):
            one = jax.tree.map(lambda x: x[:, None], one)
            return surrogate_loss(policy, "naive", params, raw_returns(one))

        grads = jax.vmap(jax.grad(loss), in_axes=(None, 1))(unravel(flat), trajectories)
        return -2 * jnp.concatenate([g.reshape(40_000, -1) for g in jax.tree.leaves(grads)], 1)

    estimates = jax.jit(
        lambda f: per_trajectory(rollout(environment, policy, unravel(f), 1.0, KEY, 40_000))
    )(flat)
    difference = estimates - jnp.stack(by_difference, axis=1)
    error = difference.std(0) / np.sqrt(40_000)
    assert (jnp.abs(difference.mean(0)) < 4 * error).all()
    assert jnp.abs(estimates.mean(0)).max() > 20 * error.max()


# The algorithms on short navigation.

NAVIGATION = navigation(horizon=6)
GAUSSIAN = gaussian_policy(
    mlp([5, 2], activation=jnp.tanh, kernel_init=jax.nn.initializers.glorot_uniform())
)
ALGORITHMS = {
    "maml": dict(inner=optax.sgd(0.5), num_steps=2),
    "lvc": dict(algorithm="maml", estimator="lvc", inner=optax.sgd(0.5), num_steps=1),
    "loaded_dice": dict(
        algorithm="maml", estimator="loaded_dice", inner=optax.sgd(0.5), num_steps=1
    ),
    "emaml": dict(algorithm="maml", estimator="emaml", inner=optax.sgd(0.5), num_steps=1),
    "fomaml": dict(inner=optax.adam(0.05), num_steps=2),
    "reptile": dict(inner=optax.sgd(0.5), num_steps=3),
    "imaml": dict(inner=optax.sgd(0.2), num_steps=60, reg_strength=2.0),
}


def make_problem(name, **settings):
    settings = dict(algorithm=name, num_trajectories=4) | ALGORITHMS[name] | settings
    return policy_problem(GAUSSIAN, NAVIGATION, **settings)


@pytest.fixture(scope="module")
def params(x64_module):
    return GAUSSIAN.init(KEY, jnp.zeros((1, 2)))


@pytest.fixture(scope="module")
def tasks(x64_module):
    return sample_tasks(jax.random.key(1), num_tasks=3)


def first(tree):
    return jax.tree.map(lambda x: x[0], tree)


def assert_close(actual, expected, rtol=1e-8):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=rtol, atol=rtol * (1e-3 + float(jnp.abs(e).max())))


@pytest.mark.parametrize("name", ["maml", "reptile", "imaml"])
def test_the_contract(name, params, tasks):
    """Of `test_contract.py`, whose learners take a network and a loss."""
    learner = policy_gradient(make_problem(name))
    keys = jax.random.split(KEY, 3)
    mapped = jax.jit(jax.vmap(learner.meta_grad, in_axes=(None, 0, 0, None)))
    grads, info = mapped(params, tasks, keys, 0)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    for g, p in zip(jax.tree.leaves(grads), jax.tree.leaves(params), strict=True):
        assert g.shape == (3, *p.shape) and g.dtype == p.dtype and jnp.isfinite(g).all()
    for value in info:
        assert value is None or (value.shape == (3,) and jnp.isfinite(value).all())
    assert (info.query_loss > 0).all() and (info.support_loss > 0).all()

    jax.tree.map(np.testing.assert_array_equal, mapped(params, tasks, keys, 0), (grads, info))
    others = jax.random.split(jax.random.key(9), 3)
    other_grads, _ = mapped(params, tasks, others, 0)
    assert not jnp.allclose(ravel_pytree(other_grads)[0], ravel_pytree(grads)[0])
    rolled = jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), (tasks, keys, grads))
    assert_close(mapped(params, *rolled[:2], 0)[0], rolled[2])

    adapted, adapt_info = jax.eval_shape(learner.adapt, params, tasks.support[0], KEY)
    assert jax.tree.map(jnp.shape, adapted) == jax.tree.map(jnp.shape, params)
    assert hasattr(adapt_info, "_fields")
    outputs = jax.eval_shape(learner.predict, adapted, jnp.zeros((7, 2)))
    assert all(x.shape == (7, 2) for x in outputs)
    with jax.checking_leaks():
        jax.make_jaxpr(learner.meta_grad)(params, first(tasks), KEY, 0)
        jax.make_jaxpr(learner.adapt)(params, tasks.support[0], KEY)


@pytest.fixture(scope="module")
def collect(params, tasks):
    def call(problem):
        return jax.jit(problem.collect)(params, first(tasks), KEY)

    return call


@pytest.mark.parametrize("name", ["maml", "imaml"])
def test_the_adaptation_can_be_repeated_from_its_experience(name, params, collect):
    problem = make_problem(name)
    adaptation, _ = collect(problem)
    assert_close(jax.jit(problem.repeat)(params, adaptation.support), adaptation.params)


@pytest.mark.parametrize("name", ["maml", "loaded_dice", "imaml"])
def test_the_derivative_of_the_adaptation(name, params, collect, finite_differences):
    """With its experience fixed; that of implicit MAML both by `repeat` and by `pull_back`."""
    exact = partial(solve_dense, diagnose=True)
    exact_solve = {"solve": exact, "num_steps": 400} if name == "imaml" else {}
    problem = make_problem(name, **exact_solve)
    adaptation, query = collect(problem)
    flat, unravel = ravel_pytree(params)

    def loss(adapted):
        return surrogate_loss(GAUSSIAN, "lvc", adapted, query)

    def after(flat):
        return loss(problem.repeat(unravel(flat), adaptation.support))

    expected = finite_differences(after, flat)
    pulled, info = jax.jit(problem.pull_back)(
        params, adaptation, jax.jit(jax.grad(loss))(adaptation.params)
    )
    np.testing.assert_allclose(ravel_pytree(pulled)[0], expected, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(jax.jit(jax.grad(after))(flat), expected, rtol=1e-4, atol=1e-7)
    if name == "imaml":
        assert info.inner_residual < 1e-6 and info.solve_residual < 1e-6
        assert info.min_curvature > 0


def test_first_order_is_the_query_gradient_and_reptile_the_displacement(params, collect):
    def gradients(name):
        problem = make_problem(name)
        adaptation, query = collect(problem)
        grads, _ = jax.jit(partial(meta_gradient, problem))(params, adaptation, query)
        return grads, adaptation.params, query

    grads, adapted, query = gradients("fomaml")
    assert_close(
        grads, jax.jit(jax.grad(partial(surrogate_loss, GAUSSIAN, "naive")))(adapted, query)
    )
    grads, adapted, _ = gradients("reptile")
    assert_close(grads, jax.tree.map(jnp.subtract, params, adapted))


def test_inner_steps_by_a_loop(params, tasks):
    """Each has new trajectories, and evaluation its own settings."""
    problem = make_problem("maml", eval_num_steps=3, eval_num_trajectories=5)
    adaptation = jax.jit(problem.adapt)(params, tasks.support[0], KEY)
    assert adaptation.support.advantages.shape == (3, 6, 5)

    @jax.jit
    def step(params, key):
        trajectories = rollout(NAVIGATION, GAUSSIAN, params, tasks.support[0], key, 5)
        experience = estimate_advantages(trajectories)
        grads = jax.grad(partial(surrogate_loss, GAUSSIAN, "naive"))(params, experience)
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, grads), experience

    looped = params
    for i, key in enumerate(jax.random.split(KEY, 3)):
        looped, experience = step(looped, key)
        assert_close(jax.tree.map(lambda x, i=i: x[i], adaptation.support), experience, 1e-6)
    assert_close(adaptation.params, looped, 1e-6)
    info = jax.jit(policy_gradient(problem).adapt)(params, tasks.support[0], KEY)[1]
    np.testing.assert_allclose(info.support_loss, -mean_return(experience.trajectories), rtol=1e-6)


def test_the_proximal_problem_is_solved_and_has_no_negative_weight(params, collect):
    problem = make_problem("imaml", num_steps=400)
    adaptation, _ = collect(problem)
    experience = first(adaptation.support)
    trajectories, advantages, _ = experience
    weights = np.exp(advantages) * trajectories.mask
    weights = weights / weights.sum()

    def objective(p):
        steps, n = weights.shape
        means = GAUSSIAN.apply(p, trajectories.observations.reshape(-1, 2))
        logs = GAUSSIAN.log_prob(means, trajectories.actions.reshape(-1, 2)).reshape(steps, n)
        distance = optax.tree.norm(optax.tree.sub(p, params), squared=True)
        return -jnp.sum(weights * logs) + 2.0 / 2 * distance

    np.testing.assert_allclose(
        weighted_regression(GAUSSIAN, 1.0, params, experience), objective(params), rtol=1e-9
    )
    gradient = optax.tree.norm(jax.grad(objective)(adaptation.params))
    assert gradient < 1e-6 * optax.tree.norm(jax.grad(objective)(params))


def test_implicit_maml_reports_curvature_that_its_strength_does_not_lift(params, tasks):
    learner = policy_gradient(
        make_problem(
            "imaml",
            num_steps=1,
            reg_strength=1e-3,
            solve=partial(solve_cg_steihaug, tol=0.0, max_steps=20),
        )
    )
    info = jax.jit(learner.meta_grad)(params, first(tasks), KEY, 0)[1]
    assert info.min_curvature < 0 and info.inner_residual > 0.1


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(algorithm="trpo"), "algorithm='trpo' must be one of"),
        (dict(estimator="dice"), "estimator='dice' must be one of"),
        (dict(algorithm="fomaml", estimator="lvc"), "estimator='lvc' differs"),
        (dict(algorithm="imaml", estimator="emaml"), "estimator='emaml' differs"),
        (dict(estimator="emaml", num_steps=2), "num_steps=2 must be 1"),
        (dict(num_steps=0), "num_steps=0"),
        (dict(eval_num_steps=1.5), "eval_num_steps=1.5"),
        (dict(num_trajectories=0), "num_trajectories=0"),
        (dict(eval_num_trajectories=-1), "eval_num_trajectories=-1"),
        (dict(reg_strength=0.0), "reg_strength=0.0"),
        (dict(temperature=float("inf")), "temperature=inf"),
        (dict(num_trajectories=None), "num_trajectories=None"),
        (dict(temperature=0.5), "temperature and solve are settings of algorithm='imaml', not"),
        (dict(algorithm="fomaml", solve=solve_dense), "not of 'fomaml'; leave them out"),
    ],
)
def test_bad_settings_are_named(settings, words):
    settings = dict(inner=optax.sgd(0.5), num_steps=1) | settings
    with pytest.raises(ValueError, match=words):
        policy_problem(GAUSSIAN, NAVIGATION, **settings)
