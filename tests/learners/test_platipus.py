"""PLATIPUS against its loss written out, finite differences, MAML and dense solves, in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from imaml_jax import (
    Batch,
    Task,
    adaptive_gd,
    cross_entropy,
    custom_argmin,
    imaml,
    maml,
    mean_outputs,
    mean_squared_error,
    mixture_logits,
    platipus,
    solve_cg_steihaug,
    solve_dense,
)
from imaml_jax.learners.base import is_head
from imaml_jax.learners.platipus import Gaussian, kl_divergence
from imaml_jax.networks import conv4, mlp
from tests.learners.conftest import relative_error

pytestmark = pytest.mark.usefixtures("x64_module")

KEY = jax.random.key(0)
RATE, STRENGTH, SAMPLES, KL_WEIGHT = 0.2, 2.0, 2, 0.05
converged = dict(
    inner=adaptive_gd(0.1),
    num_steps=80,
    adaptation=partial(
        imaml, reg_strength=STRENGTH, solve=partial(solve_cg_steihaug, tol=1e-12, max_steps=50)
    ),
)
settings = dict(inner=optax.sgd(RATE), num_steps=3, average=None, num_samples=SAMPLES)
settings |= dict(kl_weight=KL_WEIGHT, prior_rate=0.15, posterior_rate=0.1)
settings |= dict(prior_variance=0.03, posterior_variance=0.02, eval_num_samples=4)
degenerate = dict(prior_variance=1e-40, posterior_variance=1e-40, kl_weight=0.0)
degenerate |= dict(prior_rate=1e-40, posterior_rate=1e-40)


@pytest.fixture(scope="module")
def problem(x64_module):
    """`(network, meta-parameters of no two equal entries, task)`, a tanh network."""
    network = mlp([3, 1], activation=jnp.tanh, kernel_init=jax.nn.initializers.glorot_uniform())
    rng = np.random.default_rng(1)
    x = rng.normal(size=(12, 2))
    y = np.sin(2 * x[:, :1]) + x[:, 1:]
    task = jax.tree.map(jnp.asarray, Task(Batch(x[:6], y[:6]), Batch(x[6:], y[6:])))
    network = network._replace(
        init=lambda key, x, init=network.init: jax.tree.map(jnp.float64, init(key, x))
    )
    learner = platipus(network, mean_squared_error, **settings)
    params = jax.jit(learner.init)(jax.random.key(2), x)
    params = jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape), params)
    return network, params, task


def loss_of(network, params, batch):
    return jnp.mean((network.apply(params, batch.inputs) - batch.targets) ** 2)


def unroll(network, theta, support, num_steps=3):
    def step(_, theta):
        return stepped(network, theta, RATE, support)

    return jax.lax.fori_loop(0, num_steps, step, theta)


def argmin(network, theta, support):
    """By Newton's method on the assembled Hessian; differentiated by `custom_argmin`."""
    flat, unravel = ravel_pytree(theta)

    def objective(phi, theta):
        return loss_of(network, unravel(phi), support) + STRENGTH / 2 * jnp.sum((phi - theta) ** 2)

    @custom_argmin(objective, solve_dense)
    def newton(init, theta):
        def step(_, phi):
            grad, hessian = (d(objective)(phi, theta) for d in (jax.grad, jax.hessian))
            return phi - jnp.linalg.solve(hessian, grad)

        return jax.lax.fori_loop(0, 8, step, init)

    return unravel(newton(jax.lax.stop_gradient(flat), flat))


def stepped(network, mean, rate, batch):
    grads = jax.grad(lambda p: loss_of(network, p, batch))(mean)
    return jax.tree.map(lambda m, g: m - rate * g, mean, grads)


def draw(mean, log_variance, key, num):
    """From the first half of the key, as the learner does; `[num, ...]`."""
    keys = jax.random.split(jax.random.split(key)[0], num)
    noise = jax.vmap(lambda key: optax.tree.random_like(key, mean))(keys)
    return jax.tree.map(
        lambda m, v, e: m[None] + jnp.sqrt(jnp.exp(v))[None] * e, mean, log_variance, noise
    )


def training_loss(network, params, task, adaptation):
    q_mean = stepped(network, params.mean, jnp.exp(params.log_posterior_rate), task.query)
    p_mean = stepped(network, params.mean, jnp.exp(params.log_prior_rate), task.support)
    m_q, m_p, v_q, v_p = (
        ravel_pytree(x)[0]
        for x in (q_mean, p_mean, params.log_posterior_variance, params.log_prior_variance)
    )
    v_q, v_p = jnp.exp(v_q), jnp.exp(v_p)
    kl = 0.5 * jnp.sum(jnp.log(v_p / v_q) - 1 + (v_q + (m_q - m_p) ** 2) / v_p)

    def loss_after(theta):
        return loss_of(network, adaptation(network, theta, task.support), task.query)

    thetas = draw(q_mean, params.log_posterior_variance, KEY, SAMPLES)
    query_loss = jax.vmap(loss_after)(thetas).mean()
    return query_loss + KL_WEIGHT * kl, (query_loss, kl)


VARIANTS = {"unrolled": ({}, unroll, 1e-10), "implicit": (converged, argmin, 1e-7)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_written_out_and_finite_differences(problem, variant):
    network, params, task = problem
    own, adaptation, tolerance = VARIANTS[variant]
    learner = platipus(network, mean_squared_error, **(settings | own))
    grads, info = jax.jit(learner.meta_grad)(params, task, KEY, 0)

    flat, unravel = ravel_pytree(params)

    def loss(x):
        return training_loss(network, unravel(x), task, adaptation)

    loss = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, (query_loss, kl)), expected = loss(flat)
    np.testing.assert_allclose([info.query_loss, info.kl_divergence], [query_loss, kl], rtol=1e-9)
    np.testing.assert_allclose(info.meta_loss, value, rtol=1e-9)
    steps = 1e-5 * np.eye(flat.size)
    slopes = [(loss(flat + step)[0][0] - loss(flat - step)[0][0]) / 2e-5 for step in steps]
    expected, slopes = unravel(expected), unravel(jnp.stack(slopes))
    for part in params._fields:
        assert relative_error(getattr(grads, part), getattr(expected, part)) < tolerance, part
        assert relative_error(getattr(grads, part), getattr(slopes, part)) < 1e-6, part
    assert all(jnp.abs(g).min() > 0 for g in jax.tree.leaves(grads))
    if variant == "implicit":
        assert info.inner_residual < 1e-8 and info.solve_residual < 1e-10
        assert info.min_curvature > 0


@pytest.mark.parametrize(
    "own, same",
    [
        (dict(fast=is_head), partial(maml, inner=optax.sgd(RATE), num_steps=3, fast=is_head)),
        (converged, partial(converged["adaptation"], inner=adaptive_gd(0.1), num_steps=80)),
    ],
    ids=["maml", "imaml"],
)
def test_without_variance_it_is_its_adaptation(problem, own, same):
    network, params, task = problem
    learner = platipus(network, mean_squared_error, **(settings | own | degenerate))
    params = jax.jit(learner.init)(KEY, task.support.inputs)._replace(mean=params.mean)
    same = same(network, mean_squared_error)

    @jax.jit
    def outcome(params):
        results = []
        for each, p in ((learner, params), (same, params.mean)):
            adapted, _ = each.adapt(p, task.support, KEY)
            outputs = each.predict(adapted, task.query.inputs)
            results.append((each.meta_grad(p, task, KEY, 0), outputs))
        return results

    ((grads, info), outputs), ((expected, same_info), same_outputs) = outcome(params)
    assert relative_error(grads.mean, expected) < 1e-12
    np.testing.assert_allclose(info.query_loss, same_info.query_loss, rtol=1e-12)
    np.testing.assert_allclose(info.support_loss, same_info.support_loss, rtol=1e-12)
    assert np.abs(ravel_pytree(grads[1:])[0]).max() < 1e-15
    for sample in outputs:
        np.testing.assert_allclose(sample, same_outputs, rtol=1e-12)


def test_divergence_is_the_integral_and_zero_for_equals(x64_module):
    rng = np.random.default_rng(0)
    q, p = (
        Gaussian({"a": rng.normal(size=(2, 2)), "b": rng.normal(size=3)}, log_variance)
        for log_variance in (
            {"a": rng.normal(size=(2, 2)), "b": rng.normal(size=3)},
            {"a": rng.normal(size=(2, 2)), "b": rng.normal(size=3)},
        )
    )

    def log_density(x, mean, log_variance):
        return -0.5 * ((x - mean) ** 2 / np.exp(log_variance) + log_variance + np.log(2 * np.pi))

    flat = [np.asarray(ravel_pytree(x)[0]) for x in (*q, *p)]
    expected = 0.0
    for q_mean, q_log_variance, p_mean, p_log_variance in zip(*flat, strict=True):
        half_width = 10 * np.exp(q_log_variance / 2)
        x = np.linspace(q_mean - half_width, q_mean + half_width, 20_001)
        in_q, in_p = (
            log_density(x, *moments)
            for moments in ((q_mean, q_log_variance), (p_mean, p_log_variance))
        )
        expected += np.trapezoid(np.exp(in_q) * (in_q - in_p), x)
    np.testing.assert_allclose(kl_divergence(q, p), expected, rtol=1e-10)
    assert kl_divergence(q, q) == 0


def test_test_time_is_a_loop_over_samples_of_the_prior(problem):
    network, params, task = problem
    learner = platipus(network, mean_squared_error, **settings, eval_num_steps=5)
    averaging = platipus(network, mean_squared_error, **(settings | dict(average=mean_outputs)))

    @jax.jit
    def actual_and_expected(params):
        adapted, info = learner.adapt(params, task.support, KEY)
        outputs, mean = (each.predict(adapted, task.query.inputs) for each in (learner, averaging))
        prior_mean = stepped(network, params.mean, jnp.exp(params.log_prior_rate), task.support)
        phis = jax.vmap(lambda theta: unroll(network, theta, task.support, num_steps=5))(
            draw(prior_mean, params.log_prior_variance, KEY, 4)
        )
        expected = jax.vmap(lambda p: network.apply(p, task.query.inputs))(phis)
        loss = jax.vmap(lambda p: loss_of(network, p, task.support))(phis).mean()
        return (outputs, mean, info.support_loss), (expected, expected.mean(0), loss)

    for actual, expected in zip(*actual_and_expected(params), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-10)


def test_training_sees_the_posterior_and_testing_the_prior(problem):
    network, params, task = problem
    learner = platipus(network, mean_squared_error, **settings)

    @jax.jit
    def outcome(params, key):
        adapted, _ = learner.adapt(params, task.support, key)
        _, info = learner.meta_grad(params, task, key, 0)
        return info.query_loss, learner.predict(adapted, task.query.inputs)

    def changed(**parts):
        return params._replace(
            **{name: jax.tree.map(lambda x: x + 0.5, getattr(params, name)) for name in parts}
        )

    trained, tested = outcome(params, KEY)
    for name in ("log_posterior_variance", "log_posterior_rate"):
        after_training, after_testing = outcome(changed(**{name: 1}), KEY)
        assert abs(after_training - trained) > 1e-3
        np.testing.assert_array_equal(after_testing, tested)
    for name in ("log_prior_variance", "log_prior_rate"):
        after_training, after_testing = outcome(changed(**{name: 1}), KEY)
        assert after_training == trained
        assert np.abs(after_testing - tested).min() > 1e-6
    other_training, other_testing = outcome(params, jax.random.key(9))
    assert other_training != trained and (other_testing != tested).all()


def test_only_fast_parameters_are_random(problem):
    network, params, task = problem
    learner = platipus(network, mean_squared_error, **settings, fast=is_head)
    params = jax.jit(learner.init)(KEY, task.support.inputs)._replace(mean=params.mean)
    assert ravel_pytree(params.log_prior_variance)[0].size == 4
    adapted, _ = jax.jit(learner.adapt)(params, task.support, KEY)
    for after, before in zip(
        *(jax.tree.leaves(x["Dense_0"]) for x in (adapted.params, params.mean)), strict=True
    ):
        np.testing.assert_array_equal(after, np.broadcast_to(before, after.shape))
    assert (np.std(adapted.params["head"]["kernel"], axis=0) > 0).all()


def test_classifiers_with_batch_norm(x64_module):
    network = conv4(2, filters=2, num_blocks=1)
    images, labels = jnp.ones((4, 4, 4, 1)), jnp.arange(4) % 2
    task = Task(Batch(images, labels), Batch(images, labels))
    learner = platipus(
        network,
        cross_entropy,
        **(settings | dict(average=mixture_logits)),
        statistics="support",
    )
    params = jax.eval_shape(learner.init, KEY, images)
    grads, info = jax.eval_shape(learner.meta_grad, params, task, KEY, 0)
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, params)
    assert info.query_accuracy.shape == ()
    adapted, _ = jax.eval_shape(learner.adapt, params, task.support, KEY)
    assert jax.eval_shape(learner.predict, adapted, images).shape == (4, 2)


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(num_steps=0), "num_steps=0"),
        (dict(eval_num_steps=-1), "eval_num_steps=-1"),
        (dict(num_samples=0), "num_samples=0"),
        (dict(num_samples=None), "num_samples=None"),
        (dict(eval_num_samples=2.5), "eval_num_samples=2.5"),
        (dict(kl_weight=-0.1), "kl_weight=-0.1"),
        (dict(kl_weight=float("nan")), "kl_weight=nan"),
        (dict(prior_rate=float("inf")), "prior_rate=inf"),
        (dict(posterior_rate=float("nan")), "posterior_rate=nan"),
        (dict(prior_rate=-0.1), "prior_rate=-0.1"),
        (dict(prior_variance=0.0), "prior_variance=0.0"),
        (dict(posterior_variance=-1.0), "posterior_variance=-1.0"),
        (dict(statistics="running"), "statistics='running'"),
        (dict(adaptation=partial(imaml, reg_strength=0.0)), "reg_strength=0.0"),
    ],
)
def test_bad_settings_are_named(bad, message):
    with pytest.raises(ValueError, match=message):
        platipus(mlp([1]), mean_squared_error, **(settings | bad))


def test_an_adaptation_with_meta_parameters_of_its_own_is_refused():
    learner = platipus(
        mlp([1]),
        mean_squared_error,
        **(settings | dict(adaptation=partial(imaml, learn_reg_strength=True))),
    )
    with pytest.raises(ValueError, match="must be the network's"):
        learner.init(KEY, jnp.ones((1, 1)))
