"""Implicit derivatives of whole bilevel problems, and through solvers of other kinds."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from jax.flatten_util import ravel_pytree

from imaml_jax.bilevel.curvature import damped, hessian
from imaml_jax.bilevel.dense import solve_dense
from imaml_jax.bilevel.implicit import custom_argmin
from imaml_jax.bilevel.inner import adaptive_gd, minimize, proximal_objective
from imaml_jax.networks import conv4
from tests.bilevel.ridge import INPUTS, TARGETS, TIGHT, newton, ridge, ridge_closed_form

pytestmark = pytest.mark.usefixtures("x64")


def test_a_scan_of_hypergradient_steps_learns_the_strength():
    """A bilevel problem: the ridge strength that fits other data best."""
    noise = np.random.default_rng(1).normal(size=(8, 4))
    others = (INPUTS + 0.3 * noise[:, :3], TARGETS + noise[:, 3])

    def outer(log_strength, solver):
        w = solver(jnp.exp(log_strength), INPUTS, TARGETS)
        return jnp.mean((others[0] @ w - others[1]) ** 2)

    @partial(jax.jit, static_argnums=0)
    def learn(solver):
        def step(log_strength, _):
            value, slope = jax.value_and_grad(outer)(log_strength, solver)
            return log_strength - slope, value

        return jax.lax.scan(step, 0.0, length=20)

    log_strength, values = learn(partial(ridge(TIGHT["cg"]), jnp.zeros(3)))
    expected, _ = learn(ridge_closed_form)
    np.testing.assert_allclose(log_strength, expected, rtol=1e-8)
    assert values[-1] < values[0]


def test_an_argmin_within_an_argmin():
    def inner_objective(y, x):
        return jnp.sum((y - 2 * x) ** 2 + 0.1 * y**4)

    inner = custom_argmin(inner_objective, TIGHT["dense"])(newton(inner_objective, steps=30))

    def outer_objective(x, a):
        return jnp.sum((inner(jnp.zeros(2), x) - a) ** 2 + x**2)

    outer = custom_argmin(outer_objective, TIGHT["dense"])(newton(outer_objective, steps=30))
    solver = jax.jit(partial(outer, jnp.zeros(2)))
    a, direction, step = jnp.array([1.5, -0.3]), jnp.array([1.0, 2.0]), 1e-5
    slope = jax.jit(jax.jacrev(solver))(a) @ direction
    expected = (solver(a + step * direction) - solver(a - step * direction)) / (2 * step)
    np.testing.assert_allclose(jax.jit(jax.grad(outer_objective))(solver(a), a), 0, atol=1e-12)
    np.testing.assert_allclose(slope, expected, rtol=1e-8)


def test_a_scipy_solver_behind_a_callback():
    def host_minimise(init, a):
        def value_and_grad(x):
            return np.sum((x - a) ** 4 + (x - a) ** 2), 4 * (x - a) ** 3 + 2 * (x - a)

        result = scipy.optimize.minimize(
            value_and_grad, init, jac=True, method="BFGS", options={"gtol": 1e-12}
        )
        return np.asarray(result.x, init.dtype)

    @custom_argmin(lambda x, a: jnp.sum((x - a) ** 4 + (x - a) ** 2), TIGHT["cg"])
    def solver(init, a):
        shape = jax.ShapeDtypeStruct(init.shape, init.dtype)
        return jax.pure_callback(host_minimise, shape, init, a, vmap_method="sequential")

    points = jnp.array([[1.0, 2.0], [-1.0, 0.5]])
    gradients = jax.jit(jax.vmap(jax.grad(lambda a: jnp.sum(solver(jnp.zeros(2), a) ** 2))))(points)
    np.testing.assert_allclose(gradients, 2 * points, atol=1e-7)


def test_vmap_of_grad_through_an_inner_problem_on_a_conv_net():
    """Two tasks, weights adapted for each; what should solve the linear systems solves them."""
    network = conv4(3, filters=4, num_blocks=2, activation=jnp.tanh)
    local_rng = np.random.default_rng(2)
    inputs = jnp.asarray(local_rng.normal(size=(2, 3, 8, 8, 1)))
    shapes = jax.eval_shape(network.init, jax.random.key(0), inputs[0])
    anchor = jax.tree.map(lambda s: jnp.asarray(local_rng.normal(0, 0.3, s.shape)), shapes)
    strength = 2.0

    def loss(params, x):
        return -jnp.diag(jax.nn.log_softmax(network.apply(params, x))).mean()

    objective = proximal_objective(loss)

    @custom_argmin(objective, TIGHT["cg"], has_aux=True)
    def adapt(init, anchor, strength, x):
        return minimize(objective, init, anchor, strength, x, tx=adaptive_gd(0.1), num_steps=20)

    def outer(anchor, strength, x):
        adapted, info = adapt(anchor, anchor, strength, x)
        return jnp.sum(ravel_pytree(adapted)[0] ** 3), (adapted, info)

    @jax.jit
    @jax.vmap
    def solve_and_check(x):
        gradient = jax.grad(outer, (0, 1), has_aux=True)
        (in_anchor, in_strength), (adapted, info) = gradient(anchor, strength, x)
        u = jax.tree.map(lambda g: g / strength, in_anchor)
        product = hessian(lambda p: objective(p, anchor, strength, x), adapted).matvec(u)
        moved = jax.tree.map(jnp.subtract, adapted, anchor)
        right = jax.tree.map(lambda p: 3 * p**2, adapted)
        expected_in_strength = -ravel_pytree(moved)[0] @ ravel_pytree(u)[0]
        return (product, in_strength), (right, expected_in_strength), info

    found, expected, info = solve_and_check(inputs)
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, atol=1e-9), found, expected)
    assert (info.relative_residual < 1).all()


def test_damping_in_the_solver_is_a_bias_of_the_derivative_alone():
    """A solver may damp: another linear system, the same root."""

    def solve_damped(operator, b, *, key=None):
        return solve_dense(damped(operator, 1.0), b, key=key)

    @custom_argmin(lambda x, a: 0.5 * jnp.sum((x - a) ** 2), solve_damped)
    def solver(init, a):
        return a

    value, slope = jax.value_and_grad(lambda a: solver(jnp.zeros(1), a)[0])(jnp.ones(1))
    assert value == 1
    np.testing.assert_allclose(slope, 0.5)
