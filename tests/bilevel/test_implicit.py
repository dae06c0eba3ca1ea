"""Implicit derivatives against closed forms, unrolled code and finite differences."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from imaml_jax.bilevel.curvature import hessian
from imaml_jax.bilevel.dense import solve_dense
from imaml_jax.bilevel.implicit import custom_argmin, custom_root, root_jvp, root_vjp
from tests.bilevel.ridge import (
    INPUTS,
    MATRIX,
    TARGETS,
    TIGHT,
    diagonal_strength,
    newton,
    ridge,
    ridge_closed_form,
    ridge_objective,
)

pytestmark = pytest.mark.usefixtures("x64")

STRENGTHS = {"scalar": 0.7, "one for each feature": np.array([0.7, 0.2, 1.5])}


@pytest.mark.parametrize(
    "name, kind",
    [("cg", "scalar"), ("cg", "one for each feature"), ("cg_steihaug", "one for each feature")],
)
def test_ridge_regression_has_the_derivatives_of_its_closed_form(name, kind):
    """In the strength, the inputs and the targets, in forward and reverse mode."""
    solve, args = TIGHT[name], (jnp.asarray(STRENGTHS[kind]), INPUTS, TARGETS)

    @jax.jit
    def jacobians(*args):
        found = partial(ridge(solve), jnp.zeros(3))
        return [jacobian(found, (0, 1, 2))(*args) for jacobian in (jax.jacfwd, jax.jacrev)]

    def closed_form(strength, *data):
        return ridge_closed_form(diagonal_strength(strength), *data)

    expected = jax.jit(jax.jacobian(closed_form, (0, 1, 2)))(*args)
    for found in jacobians(*args):
        jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, atol=1e-9), found, expected)


def test_second_derivatives_equal_those_of_the_closed_form():
    strength = jnp.asarray(STRENGTHS["one for each feature"])

    def closed_form(s):
        return ridge_closed_form(diagonal_strength(s), INPUTS, TARGETS)

    def solver(s):
        return ridge(TIGHT["cg"])(jnp.zeros(3), s, INPUTS, TARGETS)

    @jax.jit
    def second_derivatives(s):
        return jax.hessian(solver)(s), jax.hessian(closed_form)(s)

    found, expected = second_derivatives(strength)
    np.testing.assert_allclose(found, expected, atol=1e-10)


def test_ridge_regression_passes_check_grads_to_order_two():
    strength = jnp.asarray(STRENGTHS["one for each feature"])
    solver = jax.jit(lambda s: ridge(solve_dense)(jnp.zeros(3), s, INPUTS, TARGETS))
    check_grads(solver, (strength,), order=2, modes=["fwd", "rev"], rtol=1e-5, atol=1e-5)


def test_the_iterations_of_a_solver_are_not_differentiated():
    """Reverse mode through a while loop raises; with the implicit rule it is never reached."""
    plain = newton(ridge_objective)
    solver = custom_argmin(ridge_objective, TIGHT["cg"])(plain)
    with pytest.raises(ValueError, match="everse-mode"):
        jax.grad(lambda s: plain(jnp.zeros(3), s, INPUTS, TARGETS).sum())(0.7)
    found = jax.jit(jax.grad(lambda s: solver(jnp.zeros(3), s, INPUTS, TARGETS).sum()))(0.7)
    expected = jax.jit(jax.grad(lambda s: ridge_closed_form(s, INPUTS, TARGETS).sum()))(0.7)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def tree_objective(params, data, weights):
    """Minimised at `a = data["x"] * weights[0]`, `b = sum(data["y"]) + weights[1]`."""
    gap_a = params["a"] - data["x"] * weights[0]
    gap_b = params["b"] - data["y"].sum() - weights[1]
    return jnp.sum(gap_a**2 + gap_a**4) + gap_b**2


def tree_minimiser(init, data, weights):
    del init
    return {"a": data["x"] * weights[0], "b": data["y"].sum() + weights[1], "none": None}


def test_trees_as_solution_and_as_arguments():
    init = {"a": jnp.zeros(2), "b": jnp.zeros(()), "none": None}
    data = {"x": jnp.array([1.0, -2.0]), "y": jnp.ones((2, 2)), "none": None}
    weights = (jnp.array(3.0), jnp.array(0.5))
    solver = custom_argmin(tree_objective, TIGHT["cg"])(tree_minimiser)
    found = jax.jit(jax.jacrev(solver, (1, 2)))(init, data, weights)
    expected = jax.jit(jax.jacrev(tree_minimiser, (1, 2)))(init, data, weights)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, atol=1e-12), found, expected)


@custom_argmin(lambda x, n, mask, a: 0.5 * jnp.sum(jnp.where(mask, x - n * a, x) ** 2))
def scaled(init, n, mask, a):
    """Integer and boolean arguments stand before the one that is differentiated."""
    return jnp.where(mask, n * a, 0.0)


def test_integer_and_boolean_arguments():
    n, mask, a = jnp.array([1, 2, 3]), jnp.array([True, False, True]), jnp.ones(3)
    expected = np.diag([1.0, 0.0, 3.0])
    for jacobian in (jax.jacfwd, jax.jacrev):
        found = jax.jit(jacobian(scaled, argnums=3))(jnp.zeros(3), n, mask, a)
        np.testing.assert_allclose(found, expected, atol=1e-10)
    no_tangent = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), (n, mask))
    _, tangent = jax.jvp(scaled, (a, n, mask, a), (a, *no_tangent, a))
    np.testing.assert_allclose(tangent, [1, 0, 3], atol=1e-10)


def test_integers_among_the_leaves_of_an_argument():
    def objective(x, batch):
        return 0.5 * jnp.sum((x - batch["values"][batch["index"]]) ** 2)

    @custom_argmin(objective)
    def gather(init, batch):
        return batch["values"][batch["index"]]

    def loss(values):
        return gather(jnp.zeros(2), {"values": values, "index": jnp.array([2, 0])}) @ jnp.ones(2)

    found = jax.grad(loss)(jnp.ones(3))
    np.testing.assert_allclose(found, [1, 0, 1], atol=1e-10)


def test_aux_of_any_dtype_is_returned_and_not_differentiated():
    @custom_argmin(lambda x, a: 0.5 * jnp.sum((x - a**2) ** 2), has_aux=True)
    def solver(init, a):
        aux = {"steps": jnp.array(7), "loss": jnp.sum(a), "ok": jnp.array(True), "none": None}
        return a**2, aux

    def loss(a):
        x, aux = solver(jnp.zeros(2), a)
        return jnp.sum(x) + 100 * aux["loss"], aux

    a = jnp.array([1.0, 3.0])
    for differentiate in (jax.grad, jax.jacfwd):
        gradient, aux = jax.jit(differentiate(loss, has_aux=True))(a)
        np.testing.assert_allclose(gradient, 2 * a, atol=1e-10)
        assert (int(aux["steps"]), float(aux["loss"]), bool(aux["ok"])) == (7, 4.0, True)
    lanes = jax.vmap(jax.grad(lambda a: loss(a)[0]))(jnp.stack([a, 2 * a]))
    np.testing.assert_allclose(lanes, [2 * a, 4 * a], atol=1e-10)


def test_unused_arguments_and_the_start_have_zero_derivatives():
    @custom_argmin(lambda x, a, unused: 0.5 * jnp.sum((x - a) ** 2))
    def solver(init, a, unused):
        return a + 0 * init + 5 * unused  # what the solver does with them does not matter

    args = (jnp.ones(2), jnp.ones(2), jnp.zeros(2))
    found = jax.jit(jax.jacrev(solver, (0, 1, 2)))(*args)
    for jacobian, expected in zip(found, (np.zeros(2), np.ones(2), np.zeros(2)), strict=True):
        np.testing.assert_allclose(jacobian, np.diag(expected), atol=1e-12)
    np.testing.assert_array_equal(jax.grad(lambda i: solver(i, *args[1:]).sum())(args[0]), 0)
    np.testing.assert_array_equal(jax.jvp(lambda i: solver(i, *args[1:]), args[:1], args[:1])[1], 0)


def test_keyword_arguments_are_differentiated():
    solver = custom_root(lambda x, a: x - 3 * a)(lambda init, a: 3 * a)
    np.testing.assert_allclose(jax.grad(lambda a: solver(0.0, a=a))(1.0), 3)


def test_the_decorated_solver_keeps_its_name_and_docstring():
    assert scaled.__name__ == "scaled"
    assert scaled.__doc__.startswith("Integer and boolean")


def test_derivatives_inside_vmap_and_scan():
    solver = partial(ridge(TIGHT["cg"]), jnp.zeros(3))
    strengths = jnp.array([0.3, 0.7, 2.0])

    def loss(strength):
        return jnp.sum(solver(strength, INPUTS, TARGETS) ** 2)

    def closed_form(strength):
        return jnp.sum(ridge_closed_form(strength, INPUTS, TARGETS) ** 2)

    @jax.grad
    def through_a_scan(strengths):
        return jax.lax.scan(lambda total, s: (total + loss(s), None), 0.0, strengths)[0]

    @jax.jit
    def gradients(strengths):
        return jax.vmap(jax.grad(loss))(strengths), through_a_scan(strengths)

    expected = jax.jit(jax.vmap(jax.grad(closed_form)))(strengths)
    for found in gradients(strengths):
        np.testing.assert_allclose(found, expected, rtol=1e-9)


def rotation_like(x, matrix, a):
    """A root condition whose Jacobian is not symmetric."""
    return matrix @ x + 0.3 * x**3 - jnp.sin(a)


@custom_root(rotation_like, solve_dense)
def find_rotation_like(init, matrix, a):
    def step(_, x):
        jacobian = jax.jacobian(rotation_like)(x, matrix, a)
        return x - jnp.linalg.solve(jacobian, rotation_like(x, matrix, a))

    return jax.lax.fori_loop(0, 20, step, init)


def test_nonsymmetric_roots_pass_check_grads():
    a = jnp.array([0.3, -1.0, 0.5])
    root = find_rotation_like(jnp.zeros(3), MATRIX, a)
    np.testing.assert_allclose(rotation_like(root, MATRIX, a), 0, atol=1e-14)
    solver = jax.jit(partial(find_rotation_like, jnp.zeros(3), MATRIX))
    check_grads(solver, (a,), order=2, modes=["rev"], rtol=1e-5, atol=1e-5)


def test_nonsymmetric_roots_in_every_argument_and_both_modes():
    """GMRES, with the transposed system in reverse mode, against a step of the exact theorem."""
    args = (jnp.asarray(MATRIX), jnp.array([0.3, -1.0, 0.5]))
    solver = custom_root(rotation_like, TIGHT["gmres"])(find_rotation_like)

    @jax.jit
    def jacobians(*args):
        x = find_rotation_like(jnp.zeros(3), *args)
        in_x, *in_args = jax.jacobian(rotation_like, (0, 1, 2))(x, *args)
        found = [mode(solver, (1, 2))(jnp.zeros(3), *args) for mode in (jax.jacfwd, jax.jacrev)]
        return found, jax.tree.map(lambda j: -jnp.tensordot(jnp.linalg.inv(in_x), j, 1), in_args)

    found, expected = jacobians(*args)
    for one in found:
        jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, atol=1e-10), list(one), expected)


def test_root_jvp_and_root_vjp_are_the_two_halves_of_one_derivative():
    args = (jnp.asarray(MATRIX), jnp.array([0.3, -1.0, 0.5]))
    tangents, cotangent = (jnp.ones((3, 3)), jnp.ones(3)), jnp.array([1.0, 2.0, -1.0])

    @jax.jit
    def both(*args):
        root = find_rotation_like(jnp.zeros(3), *args)
        pushed = root_jvp(rotation_like, root, args, tangents, solve_dense)
        return pushed, root_vjp(rotation_like, root, args, cotangent, solve_dense)

    pushed, (pulled, info) = both(*args)
    assert info.converged
    matched = sum(jnp.vdot(p, t) for p, t in zip(pulled, tangents, strict=True))
    np.testing.assert_allclose(matched, pushed @ cotangent, rtol=1e-10)


def test_root_vjp_equals_the_gradient_of_custom_argmin():
    args = (jnp.asarray(0.7), INPUTS, TARGETS)
    v = jnp.array([1.0, -1.0, 2.0])

    @jax.jit
    def both(*args):
        root, pullback = jax.vjp(partial(ridge(TIGHT["cg"]), jnp.zeros(3)), *args)
        operator = hessian(lambda w: ridge_objective(w, *args), root)
        optimality = jax.grad(ridge_objective)
        found, info = root_vjp(
            *(optimality, root, args, v, TIGHT["cg_steihaug"]),
            symmetric=True,
            operator=operator,
            key=jax.random.key(0),
        )
        return pullback(v), found, info

    expected, found, info = both(*args)
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-10), found, expected)
    assert info.converged
    assert info.min_curvature > 0.7


def test_a_solver_that_brings_its_own_rule_gets_ours():
    @jax.custom_jvp
    def solver(init, a):
        return jnp.sqrt(a)

    solver.defjvp(lambda primals, tangents: (solver(*primals), jnp.zeros(())))
    root = custom_root(lambda x, a: x**2 - a)(solver)
    np.testing.assert_allclose(jax.grad(root, argnums=1)(1.0, 4.0), 0.25, rtol=1e-6)
