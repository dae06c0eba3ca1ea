"""Implicit Bayesian MAML against iMAML, dense solves, unrolling and finite differences."""

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
    cross_entropy,
    custom_root,
    imaml,
    implicit_bmaml,
    learned_precisions,
    likelihood,
    mean_squared_error,
    minimize,
    newton_cg,
    solve_cg,
    solve_dense,
    solve_gmres,
    svgd_direction,
    svgd_objective,
)
from imaml_jax.networks import Network
from tests.learners.conftest import relative_error

pytestmark = pytest.mark.usefixtures("x64_module")

KEY = jax.random.key(0)
M, N, RATE, STRENGTH, STEPS = 3, 6, 0.15, 4.0, 600
exact_gmres = partial(solve_gmres, tol=1e-12, max_restarts=20)


def apply(params, inputs):
    return jnp.tanh(inputs @ params["body"]) @ params["head"]


def init(key, inputs):
    keys = jax.random.split(key)
    shapes = {"body": (inputs.shape[1], 2), "head": (2, 1)}
    return {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}


NETWORK = Network(init, apply)


def is_head(path):
    return path.startswith("head")


@pytest.fixture(scope="module")
def task(x64_module):
    x = np.random.default_rng(1).normal(size=(N + 5, 2))
    y = np.sin(2 * x[:, :1]) + x[:, 1:]
    return jax.tree.map(jnp.asarray, Task(Batch(x[:N], y[:N]), Batch(x[N:], y[N:])))


def make(**settings):
    defaults = dict(
        num_particles=M,
        inner=optax.sgd(RATE),
        num_steps=STEPS,
        reg_strength=STRENGTH,
        bandwidth=3.0,
        solve=exact_gmres,
    )
    return implicit_bmaml(NETWORK, mean_squared_error, **{**defaults, **settings})


@pytest.fixture(scope="module")
def params(task):
    return make().init(jax.random.key(2), task.support.inputs)


def log_densities(particles, anchors, support):
    """Of particles of all parameters, by the definition."""

    def log_density(particle, anchor):
        errors = apply(particle, support.inputs) - support.targets
        distance = sum(jnp.sum((particle[n] - anchor[n]) ** 2) for n in particle)
        return -jnp.sum(errors**2) - STRENGTH / 2 * distance

    return jax.vmap(log_density)(particles, anchors)


def direction(particles, anchors, support):
    scores = jax.grad(lambda p: log_densities(p, anchors, support).sum())(particles)
    return svgd_direction(scores, particles, bandwidth=3.0)


def query_loss(particles, query):
    outputs = jax.vmap(apply, in_axes=(0, None))(particles, query.inputs)
    return jnp.mean((outputs.mean(0) - query.targets) ** 2)


def test_one_particle_is_imaml(task):
    one = make(num_particles=1, inner=optax.sgd(RATE / N), reg_strength=N * STRENGTH)
    learner = imaml(
        NETWORK,
        mean_squared_error,
        inner=optax.sgd(RATE),
        num_steps=STEPS,
        reg_strength=STRENGTH,
        solve=partial(solve_cg, tol=1e-12),
    )
    single = NETWORK.init(KEY, task.support.inputs)
    params = {n: p[None] for n, p in single.items()}
    grads, info = jax.jit(one.meta_grad)(params, task, KEY, 0)
    expected, expected_info = jax.jit(learner.meta_grad)(single, task, KEY, 0)
    assert relative_error(grads, expected) < 1e-9
    np.testing.assert_allclose(info.query_loss, expected_info.query_loss, rtol=1e-12)
    np.testing.assert_allclose(info.support_loss, N * expected_info.support_loss, rtol=1e-12)


def test_dense_solve_custom_root_and_unrolling(task, params):
    learner = make()
    grads, info = jax.jit(learner.meta_grad)(params, task, KEY, 0)
    assert info.inner_residual < 1e-10 and info.solve_residual < 1e-10
    objective = svgd_objective(
        lambda p, anchors: log_densities(p, anchors, task.support), bandwidth=3.0
    )

    def settle(start, anchors):
        return minimize(objective, start, anchors, tx=optax.sgd(RATE), num_steps=STEPS)[0]

    def unrolled(anchors):
        return query_loss(settle(anchors, anchors), task.query)

    def rooted(anchors):
        root = custom_root(lambda p, a: direction(p, a, task.support), exact_gmres)(settle)
        return query_loss(root(anchors, anchors), task.query)

    assert relative_error(grads, jax.jit(jax.grad(unrolled))(params)) < 1e-9
    assert relative_error(grads, jax.jit(jax.grad(rooted))(params)) < 1e-9

    flat, unravel = ravel_pytree(params)
    root = ravel_pytree(jax.jit(settle)(params, params))[0]

    def flat_direction(p, anchors):
        return ravel_pytree(direction(unravel(p), unravel(anchors), task.support))[0]

    a, b = jax.jit(jax.jacfwd(flat_direction, argnums=(0, 1)))(root, flat)
    assert jnp.abs(a - a.T).max() > 0.01 * jnp.abs(a).max()
    v = jax.jit(jax.grad(lambda p: query_loss(unravel(p), task.query)))(root)
    expected = -b.T @ np.linalg.solve(a.T, v)
    assert relative_error(grads, unravel(expected)) < 1e-9


@pytest.mark.parametrize(
    "bandwidth, meta_loss",
    [
        (None, "particles"),
        (3.0, "query"),
        pytest.param(None, "query", marks=pytest.mark.slow),
        pytest.param(3.0, "particles", marks=pytest.mark.slow),
    ],
)
def test_finite_differences_with_slow_parameters_and_a_prior(
    task, finite_differences, bandwidth, meta_loss
):
    """The median bandwidth moves with the particles, and its derivative is there."""
    prior = likelihood(mean_squared_error, prior_precision=0.5)
    learner = make(fast=is_head, posterior=prior, bandwidth=bandwidth, meta_loss=meta_loss)
    params = learner.init(jax.random.key(2), task.support.inputs)
    flat, unravel = ravel_pytree(params)
    grads, info = jax.jit(learner.meta_grad)(params, task, KEY, 0)
    assert info.inner_residual < 1e-9

    def loss(x):
        (particles, _), body = learner.adapt(unravel(x), task.support, KEY)[0], unravel(x)["body"]
        outputs = jax.vmap(lambda h: apply({"body": body, "head": h}, task.query.inputs))(
            particles["head"]
        )
        if meta_loss == "query":
            outputs = outputs.mean(0, keepdims=True)
        return jnp.mean((outputs - task.query.targets[None]) ** 2)

    value = info.query_loss if meta_loss == "query" else info.meta_loss
    np.testing.assert_allclose(value, loss(flat), rtol=1e-12)
    assert relative_error(grads, finite_differences(loss, flat)) < 1e-6


def test_what_is_not_solved_is_reported(task, params):
    loose = make(num_steps=3, solve=partial(solve_gmres, restart=2, max_restarts=1))
    _, info = jax.jit(loose.meta_grad)(params, task, KEY, 0)
    assert 1e-3 < info.inner_residual < 1
    assert 1e-3 < info.solve_residual < 1


def test_the_preconditioner_leaves_the_gradient(task):
    make_one = partial(make, posterior=learned_precisions(noise_precision=2.0), bandwidth=None)
    params = make_one().init(jax.random.key(2), task.support.inputs)
    with_it, without = (
        jax.jit(make_one(inner=optax.sgd(0.02), precondition=p).meta_grad)(params, task, KEY, 0)
        for p in (True, False)
    )
    assert max(with_it[1].solve_residual, without[1].solve_residual) < 1e-10
    assert relative_error(with_it[0], without[0]) < 1e-9


@pytest.mark.parametrize("loss_fn", [cross_entropy, mean_squared_error])
@pytest.mark.parametrize("precondition", [True, False])
def test_the_preconditioner_is_the_inverse_for_heads_far_apart(task, loss_fn, precondition):
    """Gauss-Newton is the Hessian there, and the kernel's matrix the identity."""
    labels = loss_fn is cross_entropy
    batches = [Batch(x, (y[:, 0] > 0).astype(int) if labels else y) for x, y in task]
    task = Task(*batches)
    learner = implicit_bmaml(
        NETWORK,
        loss_fn,
        num_particles=M,
        inner=optax.sgd(0.05),
        num_steps=5,
        reg_strength=STRENGTH,
        bandwidth=1e-5,
        solve=partial(solve_gmres, restart=1, max_restarts=1),
        fast=is_head,
        precondition=precondition,
    )
    params = learner.init(jax.random.key(2), task.support.inputs)
    shape = (M, 2, 2 if labels else 1)
    params = params | {"head": jax.random.normal(jax.random.key(3), shape)}
    _, info = jax.jit(learner.meta_grad)(params, task, KEY, 0)
    if precondition:
        assert info.solve_residual < 1e-11  # rounding, which processors differ in
    else:
        assert info.solve_residual > 1e-2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_preconditioner_in_low_precision(task, dtype):
    params, task = jax.tree.map(
        lambda x: x.astype(dtype), (make().init(jax.random.key(2), task.support.inputs), task)
    )
    few = partial(solve_gmres, restart=4, max_restarts=1)
    learner = make(num_steps=20, inner=optax.sgd(0.05), precondition=True, solve=few)
    grads, info = jax.eval_shape(learner.meta_grad, params, task, KEY, 0)
    assert all(g.dtype == dtype for g in jax.tree.leaves(grads))


def test_permuting_the_particles_permutes_the_gradient(task):
    learner = make(bandwidth=None, solve=solve_dense, fast=is_head, num_steps=100)
    params = learner.init(jax.random.key(2), task.support.inputs)
    order = jnp.array([2, 0, 1])
    permuted = {**params, "head": params["head"][order]}
    meta_grad = jax.jit(learner.meta_grad)
    expected, _ = meta_grad(params, task, KEY, 0)
    actual, _ = meta_grad(permuted, task, KEY, 0)
    assert relative_error(actual, {**expected, "head": expected["head"][order]}) < 1e-9


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(reg_strength=0.0), "reg_strength=0.0"),
        (dict(reg_strength=-1.0), "reg_strength=-1.0"),
        (dict(reg_strength=float("nan")), "reg_strength=nan"),
        (dict(num_steps=0), "num_steps=0"),
        (dict(meta_loss="chaser"), "meta_loss='chaser'"),
        (dict(eval_num_steps=0), "eval_num_steps=0"),
        (dict(num_particles=0), "num_particles=0"),
        (dict(kernel="rbf"), "kernel='rbf'"),
        (dict(num_particles=1, bandwidth=None), "give more particles, or a bandwidth"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_a_transform_that_evaluates_a_function_is_refused(task, params):
    with pytest.raises(ValueError, match="implicit_bmaml: inner and leader must need gradients"):
        jax.eval_shape(make(inner=newton_cg()).adapt, params, task.support, KEY)
