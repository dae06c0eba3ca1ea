"""Reptile against a loop written out, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from imaml_jax import Batch, Task, mean_squared_error, reptile
from imaml_jax.bilevel.inner import mini_batches
from imaml_jax.networks import Network, mlp

pytestmark = pytest.mark.usefixtures("x64_module")

KEY = jax.random.key(0)
ADAM = optax.adam(0.05, b1=0.0)


@pytest.fixture(scope="module")
def problem(x64_module):
    """`(network, params, task)`: a linear model, whose gradient can be written down."""
    rng = np.random.default_rng(0)
    network = Network(
        lambda key, inputs: {"kernel": jnp.ones((3, 1)), "bias": jnp.zeros(1)},
        lambda p, x: x @ p["kernel"] + p["bias"][None],
    )
    support, query = (Batch(rng.normal(size=(n, 3)), rng.normal(size=(n, 1))) for n in (6, 4))
    params = {"kernel": rng.normal(size=(3, 1)), "bias": rng.normal(size=1)}
    return network, *jax.tree.map(jnp.asarray, (params, Task(support, query)))


def adam_by_hand(params, batches, rate=0.05, b2=0.999, eps=1e-8):
    """Adam with beta1 = 0 on the mean squared error of the linear model, in NumPy."""
    w = np.concatenate([np.ravel(params["kernel"]), params["bias"]])
    second = np.zeros_like(w)
    for t, (inputs, targets) in enumerate(batches, start=1):
        x = np.hstack([inputs, np.ones((len(inputs), 1))])
        g = 2 / len(x) * x.T @ (x @ w - np.ravel(targets))
        second = b2 * second + (1 - b2) * g**2
        w = w - rate * g / (np.sqrt(second / (1 - b2**t)) + eps)
    return {"kernel": w[:3, None], "bias": w[3:]}


def assert_close(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-9, atol=1e-12)


def test_the_gradient_is_the_displacement(problem):
    network, params, task = problem
    learner = reptile(network, mean_squared_error, inner=ADAM, num_steps=7)
    grads, info = jax.jit(learner.meta_grad)(params, task, KEY, 0)
    expected = adam_by_hand(params, [task.support] * 7)
    assert_close(grads, jax.tree.map(jnp.subtract, params, expected))
    outputs = task.query.inputs @ expected["kernel"] + expected["bias"][None]
    np.testing.assert_allclose(info.query_loss, jnp.mean((outputs - task.query.targets) ** 2))


def test_the_query_set_takes_no_part(problem):
    network, params, task = problem
    learner = reptile(network, mean_squared_error, inner=ADAM, num_steps=2)
    meta_grad = jax.jit(learner.meta_grad)
    grads, _ = meta_grad(params, task, KEY, 0)
    other = Task(task.support, jax.tree.map(lambda x: x + 1, task.query))
    assert_close(meta_grad(params, other, KEY, 0)[0], grads)


def test_mini_batches_are_what_the_loop_sees(problem):
    network, params, task = problem
    learner = reptile(
        network,
        mean_squared_error,
        inner=ADAM,
        num_steps=5,
        batch_size=4,
        eval_num_steps=3,
        eval_batch_size=2,
    )

    def batches(key, num_batches, size):
        drawn = jax.jit(mini_batches, static_argnums=(2, 3))(key, task.support, num_batches, size)
        return list(zip(*map(np.asarray, drawn), strict=True))

    meta_grad = jax.jit(learner.meta_grad)
    for seed in (1, 2):
        key = jax.random.key(seed)
        grads, _ = meta_grad(params, task, key, 0)
        expected = adam_by_hand(params, batches(key, 5, 4))
        assert_close(grads, jax.tree.map(jnp.subtract, params, expected))
    adapted, _ = jax.jit(learner.adapt)(params, task.support, KEY)
    assert_close(adapted.params, adam_by_hand(params, batches(KEY, 3, 2)))
    one, two = (meta_grad(params, task, jax.random.key(s), 0)[0]["bias"] for s in (1, 2))
    assert (one != two).all()


def test_slow_parameters_stay(problem):
    network, params, task = problem
    learner = reptile(
        network,
        mean_squared_error,
        inner=optax.sgd(0.1),
        num_steps=3,
        fast=lambda path: path == "kernel",
    )
    grads, _ = jax.jit(learner.meta_grad)(params, task, KEY, 0)
    assert (grads["bias"] == 0).all()
    assert (grads["kernel"] != 0).all()
    adapted, _ = jax.jit(learner.adapt)(params, task.support, KEY)
    np.testing.assert_array_equal(adapted.params["bias"], params["bias"])
    assert_close(
        ravel_pytree(adapted.params["kernel"] + grads["kernel"])[0], params["kernel"][:, 0]
    )


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(num_steps=0), "num_steps=0"),
        (dict(num_steps=-1), "num_steps=-1"),
        (dict(num_steps=2.5), "num_steps=2.5"),
        (dict(batch_size=0), "batch_size=0"),
        (dict(eval_num_steps=0), "eval_num_steps=0"),
        (dict(eval_batch_size=-2), "eval_batch_size=-2"),
        (dict(statistics="running"), "statistics='running'"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        reptile(mlp([1]), mean_squared_error, **{"inner": ADAM, "num_steps": 5, **settings})
