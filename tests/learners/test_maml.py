"""MAML against finite differences and a loop written out, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from imaml_jax import Batch, Task, cross_entropy, fomaml, maml, mean_squared_error
from imaml_jax.learners.base import is_head
from imaml_jax.networks import Network, conv4, mlp
from tests.learners.conftest import relative_error

pytestmark = pytest.mark.usefixtures("x64_module")

KEY = jax.random.key(0)
RATE = 0.2


@pytest.fixture(scope="module")
def problem(x64_module):
    """`(network, params, task)`, a tanh network."""
    network = mlp([3, 1], activation=jnp.tanh, kernel_init=jax.nn.initializers.glorot_uniform())
    x = np.random.default_rng(1).normal(size=(12, 2))
    y = np.sin(2 * x[:, :1]) + x[:, 1:]
    params = jax.jit(network.init)(jax.random.key(2), x)
    params = jax.tree.map(lambda p: p.astype(jnp.float64), params)
    task = Task(Batch(x[:6], y[:6]), Batch(x[6:], y[6:]))
    return network, params, jax.tree.map(jnp.asarray, task)


def adapt_by_hand(network, params, support, num_steps, adapted=("Dense_0", "head")):
    """Gradient descent in a Python loop on the named modules."""

    def loss(p):
        return jnp.mean((network.apply(p, support.inputs) - support.targets) ** 2)

    for _ in range(num_steps):
        grads = jax.grad(loss)(params)
        params = {
            name: jax.tree.map(lambda p, g: p - RATE * g, params[name], grads[name])
            if name in adapted
            else params[name]
            for name in params
        }
    return params


def query_loss(network, params, task):
    return jnp.mean((network.apply(params, task.query.inputs) - task.query.targets) ** 2)


@pytest.mark.parametrize("fast, adapted", [(None, ("Dense_0", "head")), (is_head, ("head",))])
def test_finite_differences_and_an_unrolled_loop(problem, finite_differences, fast, adapted):
    network, params, task = problem
    flat, unravel = ravel_pytree(params)

    def meta_loss(p):
        return query_loss(network, adapt_by_hand(network, p, task.support, 3, adapted), task)

    learner = maml(
        network, mean_squared_error, inner=optax.sgd(RATE), num_steps=3, fast=fast, remat=False
    )
    grads, info = jax.jit(learner.meta_grad)(params, task, KEY, 0)
    value, expected = jax.jit(jax.value_and_grad(meta_loss))(params)
    assert relative_error(grads, expected) < 1e-12
    np.testing.assert_allclose(info.query_loss, value, rtol=1e-12)
    slopes = finite_differences(lambda x: meta_loss(unravel(x)), flat)
    assert relative_error(grads, slopes) < 1e-7


@pytest.mark.parametrize("fast, adapted", [(None, ("Dense_0", "head")), (is_head, ("head",))])
def test_first_order_is_the_query_gradient_at_the_adapted_parameters(problem, fast, adapted):
    network, params, task = problem
    learner = fomaml(network, mean_squared_error, inner=optax.sgd(RATE), num_steps=3, fast=fast)
    grads, _ = jax.jit(learner.meta_grad)(params, task, KEY, 0)

    def expected(params):
        after = adapt_by_hand(network, params, task.support, 3, adapted)
        return jax.grad(lambda p: query_loss(network, p, task))(after)

    assert relative_error(grads, jax.jit(expected)(params)) < 1e-12


@pytest.mark.parametrize(
    "inner", [optax.sgd(0.1, momentum=0.9, nesterov=True), optax.adam(0.05), optax.rmsprop(0.05)]
)
def test_other_inner_transforms_against_finite_differences(problem, finite_differences, inner):
    network, params, task = problem
    flat, unravel = ravel_pytree(params)
    learner = maml(network, mean_squared_error, inner=inner, num_steps=3)

    def meta_loss(x):
        adapted, _ = learner.adapt(unravel(x), task.support, KEY)
        return query_loss(network, adapted.params, task)

    grads, _ = jax.jit(learner.meta_grad)(params, task, KEY, 0)
    assert relative_error(grads, finite_differences(meta_loss, flat)) < 1e-5


def test_norm_parameters_that_are_not_adapted_are_meta_learned(finite_differences):
    """As in MAML's own code; on a small convolutional net with batch norm."""
    network = conv4(2, filters=2, num_blocks=1, activation=jnp.tanh)
    x, y = jnp.asarray(np.random.default_rng(1).normal(size=(8, 4, 4, 1))), jnp.arange(4) % 2
    task = Task(Batch(x[:4], y), Batch(x[4:], y))
    params = jax.jit(network.init)(jax.random.key(2), x)
    params = jax.tree.map(lambda p: p.astype(jnp.float64) + 0.1, params)
    learner = maml(
        network,
        cross_entropy,
        inner=optax.sgd(0.4),
        num_steps=2,
        fast=lambda path: "scale" not in path and "offset" not in path,
    )
    flat, unravel = ravel_pytree(params)
    grads, _ = jax.jit(learner.meta_grad)(params, task, KEY, 0)

    def meta_loss(x):
        adapted, _ = learner.adapt(unravel(x), task.support, KEY)
        logits = network.apply(adapted.params, task.query.inputs)
        return -jax.nn.log_softmax(logits)[jnp.arange(4), task.query.targets].mean()

    assert relative_error(grads, finite_differences(meta_loss, flat)) < 1e-6


def test_remat_changes_nothing(problem):
    network, params, task = problem
    results = [
        jax.jit(
            maml(
                network, mean_squared_error, inner=optax.sgd(RATE), num_steps=4, remat=remat
            ).meta_grad
        )(params, task, KEY, 0)
        for remat in (True, False)
    ]
    assert relative_error(*results) < 1e-12


def test_one_step_on_a_quadratic_is_a_product_with_one_minus_rate_times_hessian(x64_module):
    rng = np.random.default_rng(0)
    x, z, y, t, w = (rng.normal(size=s) for s in [(6, 3), (5, 3), (6, 1), (5, 1), (3, 1)])
    network = Network(lambda key, inputs: w, lambda p, inputs: inputs @ p)
    learner = maml(network, mean_squared_error, inner=optax.sgd(RATE), num_steps=1)
    task = jax.tree.map(jnp.asarray, Task(Batch(x, y), Batch(z, t)))
    grads, _ = jax.jit(learner.meta_grad)(jnp.asarray(w), task, KEY, 0)
    hessian = 2 / 6 * x.T @ x
    adapted = w - RATE * 2 / 6 * x.T @ (x @ w - y)
    v = 2 / 5 * z.T @ (z @ adapted - t)
    np.testing.assert_allclose(grads, (np.eye(3) - RATE * hessian) @ v, rtol=1e-12)


def test_a_perfect_fit_of_the_support_set_gives_finite_gradients(problem):
    """The norm of a zero gradient, which is reported, must not reach the derivative."""
    network, params, task = problem
    fitted = Batch(task.support.inputs, network.apply(params, task.support.inputs))
    learner = maml(network, mean_squared_error, inner=optax.sgd(RATE), num_steps=2)
    grads, info = jax.jit(learner.meta_grad)(params, Task(fitted, task.query), KEY, 0)
    assert jnp.isfinite(ravel_pytree(grads)[0]).all()
    assert jnp.isfinite(info.inner_residual)


def test_adapt_uses_the_evaluation_settings(problem):
    network, params, task = problem
    learner = maml(
        network, mean_squared_error, inner=optax.sgd(RATE), num_steps=1, eval_num_steps=4
    )
    adapted, info = jax.jit(learner.adapt)(params, task.support, KEY)
    expected = jax.jit(lambda p: adapt_by_hand(network, p, task.support, 4))(params)
    assert relative_error(adapted.params, expected) < 1e-12
    outputs = network.apply(expected, task.support.inputs)
    np.testing.assert_allclose(info.support_loss, jnp.mean((outputs - task.support.targets) ** 2))


@pytest.mark.parametrize("factory", [maml, fomaml])
@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(num_steps=0), "num_steps=0"),
        (dict(num_steps=-1), "num_steps=-1"),
        (dict(num_steps=2.5), "num_steps=2.5"),
        (dict(num_steps=float("inf")), "num_steps=inf"),
        (dict(num_steps=None), "num_steps=None"),
        (dict(eval_num_steps=-3), "eval_num_steps=-3"),
        (dict(statistics="running"), "statistics='running'"),
    ],
)
def test_bad_settings_are_named(factory, settings, message):
    with pytest.raises(ValueError, match=message):
        factory(
            mlp([1]), mean_squared_error, **{"inner": optax.sgd(0.1), "num_steps": 5, **settings}
        )
