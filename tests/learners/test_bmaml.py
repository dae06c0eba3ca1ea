"""Bayesian MAML against MAML, loops and finite differences, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from imaml_jax import (
    Batch,
    Task,
    bmaml,
    cross_entropy,
    learned_precisions,
    likelihood,
    maml,
    mean_squared_error,
    newton_cg,
    svgd_direction,
)
from imaml_jax.learners.base import mean_outputs, mixture_logits
from imaml_jax.networks import Network, conv4
from tests.learners.conftest import relative_error

pytestmark = pytest.mark.usefixtures("x64_module")

KEY = jax.random.key(0)
M, RATE, N = 3, 0.02, 6


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
    defaults = dict(num_particles=M, inner=optax.sgd(RATE), num_steps=2, bandwidth=3.0)
    return bmaml(NETWORK, mean_squared_error, **{**defaults, **settings})


def start(learner, task):
    """Initial particles, none of them small."""
    return learner.init(jax.random.key(2), task.support.inputs)


def follow(particles, slow, batch, steps, precision=0.0, rate=RATE):
    """SVGD in a Python loop, for the sum of squares and a Gaussian prior."""

    def log_density(particle):
        errors = apply({**slow, **particle}, batch.inputs) - batch.targets
        prior = sum(jnp.sum(p**2) for p in particle.values())
        return -jnp.sum(errors**2) - precision / 2 * prior

    for _ in range(steps):
        scores = jax.vmap(jax.grad(log_density))(particles)
        direction = svgd_direction(scores, particles, bandwidth=3.0)
        particles = {n: particles[n] + rate * direction[n] for n in particles}
    return particles


def separate(params):
    """`(fast, slow)` where the head is adapted."""
    return {"head": params["head"]}, {"body": params["body"]}


@pytest.mark.parametrize("fast, bandwidth", [(None, 0.1), (is_head, 10.0)])
def test_one_particle_with_a_flat_prior_and_the_query_loss_is_maml(task, fast, bandwidth):
    settings = dict(num_steps=3, fast=fast)
    one = make(
        num_particles=1,
        inner=optax.sgd(RATE / N),
        meta_loss="query",
        bandwidth=bandwidth,
        **settings,
    )
    single = NETWORK.init(KEY, task.support.inputs)
    is_fast = fast or (lambda path: True)
    params = {n: p[None] if is_fast(n) else p for n, p in single.items()}
    learner = maml(NETWORK, mean_squared_error, inner=optax.sgd(RATE), **settings)
    grads, info = jax.jit(one.meta_grad)(params, task, KEY, 0)
    expected, expected_info = jax.jit(learner.meta_grad)(single, task, KEY, 0)
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, params)
    assert relative_error(grads, expected) < 1e-12
    np.testing.assert_allclose(info.query_loss, expected_info.query_loss, rtol=1e-12)
    np.testing.assert_allclose(info.support_loss, N * expected_info.support_loss, rtol=1e-12)
    np.testing.assert_allclose(info.inner_residual, expected_info.inner_residual, rtol=1e-10)
    assert info.meta_loss is None


def test_chaser_loss_against_a_loop_and_finite_differences(task, finite_differences):
    learner = make(
        fast=is_head,
        leader=optax.sgd(2 * RATE),
        leader_steps=2,
        posterior=likelihood(mean_squared_error, prior_precision=0.7),
    )
    params = start(learner, task)
    flat, unravel = ravel_pytree(params)
    both = Batch(*(jnp.concatenate(pair) for pair in zip(*task, strict=True)))

    def chase(params):
        return follow(*separate(params), task.support, 2, 0.7)

    frozen = jax.jit(lambda p: follow(chase(p), separate(p)[1], both, 2, 0.7, 2 * RATE))(params)

    def loss(params):
        chaser = chase(params)
        return jnp.sum((chaser["head"] - frozen["head"]) ** 2)

    grads, info = jax.jit(learner.meta_grad)(params, task, KEY, 0)
    value, expected = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(info.meta_loss, value, rtol=1e-11)
    assert relative_error(grads, expected) < 1e-11
    assert relative_error(grads, finite_differences(lambda x: loss(unravel(x)), flat)) < 1e-6


def test_query_loss_against_finite_differences(task, finite_differences):
    learner = make(fast=is_head, meta_loss="query")
    params = start(learner, task)
    flat, unravel = ravel_pytree(params)

    def loss(x):
        particles, slow = separate(unravel(x))
        adapted = follow(particles, slow, task.support, 2)
        outputs = jax.vmap(lambda p: apply({**slow, **p}, task.query.inputs))(adapted)
        return jnp.mean((outputs.mean(0) - task.query.targets) ** 2)

    grads, info = jax.jit(learner.meta_grad)(params, task, KEY, 0)
    np.testing.assert_allclose(info.query_loss, loss(flat), rtol=1e-12)
    assert relative_error(grads, finite_differences(loss, flat)) < 1e-6


def test_particles_far_apart_with_their_own_losses_are_as_many_times_maml(task):
    """The kernel is the identity there, and the mean over particles divides rate and gradient."""
    learner = make(bandwidth=1e-5, meta_loss="particles", inner=optax.sgd(M * RATE / N))
    single = maml(NETWORK, mean_squared_error, inner=optax.sgd(RATE), num_steps=2)
    params = start(learner, task)
    grads, info = jax.jit(learner.meta_grad)(params, task, KEY, 0)
    expected, expected_info = jax.jit(jax.vmap(lambda p: single.meta_grad(p, task, KEY, 0)))(params)
    assert relative_error(grads, jax.tree.map(lambda g: g / M, expected)) < 1e-12
    np.testing.assert_allclose(info.meta_loss, expected_info.query_loss.mean(), rtol=1e-12)
    assert info.query_loss < info.meta_loss


def test_a_leader_that_does_not_move_leaves_nothing_to_learn(task):
    learner = make(leader_steps=0, bandwidth=None)
    grads, info = jax.jit(learner.meta_grad)(start(learner, task), task, KEY, 0)
    assert info.meta_loss == 0 and info.query_loss > 0
    assert all((g == 0).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("meta_loss", ["chaser", "particles", "query"])
def test_permuting_the_particles_permutes_the_gradient(task, meta_loss):
    learner = make(bandwidth=None, meta_loss=meta_loss, fast=is_head)
    params = start(learner, task)
    order = jnp.array([2, 0, 1])

    def permute(tree):
        return {**tree, "head": tree["head"][order]}

    meta_grad, adapt = jax.jit(learner.meta_grad), jax.jit(learner.adapt)
    grads, info = meta_grad(params, task, KEY, 0)
    permuted, permuted_info = meta_grad(permute(params), task, KEY, 0)
    assert relative_error(permuted, permute(grads)) < 1e-11
    assert relative_error(permuted_info, info) < 1e-11
    one, other = (adapt(p, task.support, KEY)[0] for p in (params, permute(params)))
    inputs = task.query.inputs
    np.testing.assert_allclose(learner.predict(one, inputs), learner.predict(other, inputs))


def test_adapt_uses_the_evaluation_settings(task):
    learner = make(num_steps=1, eval_num_steps=3)
    params = start(learner, task)
    adapted, info = jax.jit(learner.adapt)(params, task.support, KEY)
    expected = jax.jit(lambda p: follow(p, {}, task.support, 3))(params)
    assert relative_error(adapted.params, expected) < 1e-12
    assert 0 < info.inner_residual < 1


def test_how_outputs_become_a_prediction(task):
    learner = make(average=None)
    adapted, _ = jax.jit(learner.adapt)(start(learner, task), task.support, KEY)
    stacked = learner.predict(adapted, task.query.inputs)
    assert stacked.shape == (M, 5, 1)
    particles = [jax.tree.map(lambda x, i=i: x[i], adapted.params) for i in range(M)]
    by_hand = jnp.stack([apply(p, task.query.inputs) for p in particles])
    np.testing.assert_allclose(stacked, by_hand, rtol=1e-12)
    for average, expected in (("auto", by_hand.mean(0)), (lambda outputs: outputs[1], by_hand[1])):
        actual = make(average=average).predict(adapted, task.query.inputs)
        np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_the_query_loss_of_a_classifier_is_that_of_the_mean_probability(task):
    """And its parameters that all start equal do not stay so."""
    network = Network(lambda key, inputs: jnp.zeros((2, 3)), lambda p, inputs: inputs @ p)
    labels = [jnp.arange(len(batch.inputs)) % 3 for batch in task]
    task = Task(*(Batch(batch.inputs, y) for batch, y in zip(task, labels, strict=True)))
    learner = bmaml(network, cross_entropy, num_particles=M, inner=optax.sgd(1.0), num_steps=2)
    params = jax.tree.map(lambda p: 30 * p, start(learner, task))
    _, info = jax.jit(learner.meta_grad)(params, task, KEY, 0)
    adapted, _ = jax.jit(learner.adapt)(params, task.support, KEY)
    assert jnp.abs(adapted.params[0] - adapted.params[1]).max() > 0.05
    probabilities = jax.nn.softmax(task.query.inputs[None] @ adapted.params).mean(0)
    log_likelihood = jnp.log(probabilities)[jnp.arange(5), labels[1]]
    np.testing.assert_allclose(info.query_loss, -log_likelihood.mean(), rtol=1e-10)
    logits = learner.predict(adapted, task.query.inputs)
    np.testing.assert_allclose(jnp.exp(logits), probabilities, rtol=1e-10)
    np.testing.assert_allclose(
        info.query_accuracy, (probabilities.argmax(-1) == labels[1]).mean(), rtol=1e-6
    )


def test_averages():
    logits = jnp.array([[[0.0, jnp.log(3.0)]], [[5.0, 5.0]]])
    np.testing.assert_allclose(jnp.exp(mixture_logits(logits)), [[0.375, 0.625]])
    np.testing.assert_allclose(mean_outputs(jnp.array([[1.0], [4.0]])), [2.5])


def test_published_regression_learns_precisions_that_it_does_not_compare(task):
    posterior = learned_precisions()
    learner = make(posterior=posterior, num_steps=1, inner=optax.sgd(1e-4), init_spread=0.0)
    params = start(learner, task)
    np.testing.assert_allclose(jnp.exp(params.log_noise_precision), 100 * np.ones(M))
    np.testing.assert_allclose(jnp.exp(params.log_weight_precision), np.ones(M))
    both = Batch(*(jnp.concatenate(pair) for pair in zip(*task, strict=True)))

    def moved(particles, batch):
        def log_density(particle):
            return posterior.log_density(
                particle, apply(particle.params, batch.inputs), batch.targets
            )

        direction = svgd_direction(
            jax.vmap(jax.grad(log_density))(particles), particles, bandwidth=3.0
        )
        return jax.tree.map(lambda p, d: p + 1e-4 * d, particles, direction)

    def loss(params):
        chaser = moved(params, task.support)
        leader = jax.lax.stop_gradient(moved(chaser, both))
        return sum(jnp.sum((chaser.params[n] - leader.params[n]) ** 2) for n in NETWORK_NAMES)

    grads, info = jax.jit(learner.meta_grad)(params, task, KEY, 0)
    value, expected = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(info.meta_loss, value, rtol=1e-11)
    assert relative_error(grads, expected) < 1e-11
    assert (jnp.abs(grads.log_noise_precision) > 0).all()


NETWORK_NAMES = ("body", "head")


@pytest.mark.parametrize("statistics", ["batch", "support", "joint", "support_and_one"])
def test_every_batch_norm_mode_is_accepted(statistics):
    network = conv4(3, filters=2, num_blocks=1)
    x, y = jnp.zeros((6, 4, 4, 1)), jnp.arange(6) % 3
    task = Task(Batch(x, y), Batch(x, y))
    learner = bmaml(
        network,
        cross_entropy,
        num_particles=2,
        inner=optax.sgd(0.1),
        num_steps=1,
        statistics=statistics,
        fast=is_head,
    )
    params = jax.eval_shape(learner.init, KEY, x)
    assert params["head"]["kernel"].shape == (2, 8, 3)
    assert params["block_0"]["scale"].shape == (2,)
    grads, _ = jax.eval_shape(learner.meta_grad, params, task, KEY, 0)
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, params)
    adapted, _ = jax.eval_shape(learner.adapt, params, task.support, KEY)
    assert jax.eval_shape(learner.predict, adapted, x).shape == (6, 3)


def test_one_particle_with_the_median_kernel_is_told_what_to_do():
    with pytest.raises(ValueError, match=r"bmaml: the median kernel .* give more particles, or a"):
        make(num_particles=1, bandwidth=None)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(num_particles=0), "num_particles=0"),
        (dict(num_particles=2.5), "num_particles=2.5"),
        (dict(num_particles=None), "num_particles=None"),
        (dict(leader_steps=None), "leader_steps=None"),
        (dict(meta_loss="query", leader_steps=7), "leader_steps are settings of meta_loss"),
        (dict(meta_loss="particles", leader_steps=7), "leader_steps are settings of meta_loss"),
        (dict(meta_loss="query", leader=optax.sgd(0.1)), "leader and .*; leave them out"),
        (dict(num_steps=0), "num_steps=0"),
        (dict(num_steps=None), "num_steps=None"),
        (dict(eval_num_steps=-1), "eval_num_steps=-1"),
        (dict(leader_steps=-1), "leader_steps=-1"),
        (dict(leader_steps=1.5), "leader_steps=1.5"),
        (dict(meta_loss="leader"), "meta_loss='leader'"),
        (dict(bandwidth=0.0), "bandwidth=0.0"),
        (dict(kernel="rbf"), "kernel='rbf'"),
        (dict(average="mean"), "average='mean'"),
        (dict(init_spread=-0.1), "init_spread=-0.1"),
        (dict(init_spread=float("nan")), "init_spread=nan"),
        (dict(statistics="running"), "statistics='running'"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


@pytest.mark.parametrize(
    "settings",
    [dict(inner=newton_cg()), dict(inner=optax.lbfgs()), dict(leader=newton_cg())],
    ids=["newton_cg", "lbfgs", "leader"],
)
def test_a_transform_that_evaluates_a_function_is_refused(task, settings):
    learner = make(**settings)
    with pytest.raises(ValueError, match="bmaml: inner and leader must need gradients alone"):
        jax.eval_shape(learner.meta_grad, start(learner, task), task, KEY, 0)


def test_the_average_of_an_unknown_loss_must_be_given():
    def loss(outputs, targets):
        return jnp.abs(outputs - targets).mean()

    with pytest.raises(ValueError, match="with another loss give a function"):
        bmaml(NETWORK, loss, num_particles=2, inner=optax.sgd(0.1), num_steps=1)
    bmaml(NETWORK, loss, num_particles=2, inner=optax.sgd(0.1), num_steps=1, average=mean_outputs)
