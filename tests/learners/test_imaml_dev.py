"""The published code's meta-gradient against its definition, on a dense Hessian, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from imaml_jax import Batch, Task, fomaml, imaml_dev, mean_squared_error
from imaml_jax.networks import mlp

pytestmark = pytest.mark.usefixtures("x64_module")

RATE, STEPS, STRENGTH = 0.1, 6, 2.0
NETWORK = mlp([4, 1], activation=jnp.tanh, kernel_init=jax.nn.initializers.normal(1.0))


@pytest.fixture(scope="module")
def problem(x64_module):
    """The start and a task."""
    rng = np.random.default_rng(0)
    support, query = (Batch(rng.normal(size=(8, 2)), rng.normal(size=(8, 1))) for _ in range(2))
    return NETWORK.init(jax.random.key(1), support.inputs), Task(support, query)


def gradient_of(learner, problem):
    return jax.jit(learner.meta_grad)(*problem, jax.random.key(0), 0)


def test_it_solves_the_system_of_the_published_code(problem):
    start, task = problem
    theta, unravel = ravel_pytree(start)

    def loss(flat, batch):
        return mean_squared_error(NETWORK.apply(unravel(flat), batch.inputs), batch.targets)

    phi = theta
    for _ in range(STEPS):
        phi = phi - RATE * jax.grad(loss)(phi, task.support)
    phi = phi - RATE * STRENGTH * (phi - theta)
    matrix = 2.0 * jnp.eye(theta.size) + jax.hessian(loss)(phi, task.support) / 12.0
    expected = jnp.linalg.solve(matrix, jax.grad(loss)(phi, task.query))
    learner = imaml_dev(
        NETWORK, mean_squared_error, inner_rate=RATE, num_steps=STEPS, cg_steps=theta.size
    )
    grads, info = gradient_of(learner, problem)
    np.testing.assert_allclose(ravel_pytree(grads)[0], expected, rtol=1e-10)
    np.testing.assert_allclose(info.query_loss, loss(phi, task.query), rtol=1e-12)
    assert info.solve_residual < 1e-12


def test_adaptation_is_plain_descent(problem):
    start, task = problem
    learner = imaml_dev(
        NETWORK, mean_squared_error, inner_rate=RATE, num_steps=2, eval_num_steps=STEPS
    )
    adapted, _ = learner.adapt(start, task.support, jax.random.key(0))
    phi = start
    for _ in range(STEPS):
        grads = jax.grad(
            lambda p: mean_squared_error(
                NETWORK.apply(p, task.support.inputs), task.support.targets
            )
        )(phi)
        phi = jax.tree.map(lambda p, g: p - RATE * g, phi, grads)
    np.testing.assert_allclose(ravel_pytree(adapted.params)[0], ravel_pytree(phi)[0], rtol=1e-12)


def test_a_strong_damping_leaves_a_multiple_of_first_order_maml(problem):
    settings = {"num_steps": STEPS}
    damping = 1e8
    own = imaml_dev(
        NETWORK,
        mean_squared_error,
        inner_rate=RATE,
        reg_strength=0.0,
        cg_damping=damping,
        **settings,
    )
    first_order = fomaml(NETWORK, mean_squared_error, inner=optax.sgd(RATE), **settings)
    (found, _), (expected, _) = (gradient_of(learner, problem) for learner in (own, first_order))
    scaled = jax.tree.map(lambda g: g / (1 + damping), expected)
    np.testing.assert_allclose(ravel_pytree(found)[0], ravel_pytree(scaled)[0], rtol=1e-6)


@pytest.mark.parametrize(
    "name, value",
    [
        ("inner_rate", 0.0),
        ("num_steps", 0),
        ("cg_steps", 1),
        ("inner_rate", float("inf")),
        ("eval_num_steps", 1.5),
        ("reg_strength", -1.0),
        ("cg_damping", float("nan")),
    ],
)
def test_settings_out_of_range_are_refused(name, value):
    settings = {"inner_rate": RATE, "num_steps": STEPS, name: value}
    with pytest.raises(ValueError, match=f"imaml_dev: {name}="):
        imaml_dev(NETWORK, mean_squared_error, **settings)
