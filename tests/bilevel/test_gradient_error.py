"""The estimated error of an implicit gradient against the true one, in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from imaml_jax import (
    adaptive_gd,
    adaptive_gradient,
    damped,
    gauss_newton,
    implicit_gradient_bound,
    implicit_gradient_error,
    minimize,
    solve_cg_steihaug,
    solve_dense,
    solve_minres,
)

pytestmark = pytest.mark.usefixtures("x64_module")

SIZE, STRENGTH = 8, 0.05
rng = np.random.default_rng(0)
INPUTS = rng.normal(size=(30, SIZE)) * np.logspace(0, -1, SIZE)
LABELS = np.sign(INPUTS @ rng.normal(size=SIZE) + 0.3 * rng.normal(size=30))
CG = partial(solve_cg_steihaug, tol=0.0, max_steps=SIZE)
START = np.zeros(SIZE)


def logistic(weight, rows):
    return jnp.mean(jax.nn.softplus(-LABELS[rows] * (INPUTS[rows] @ weight)))


def objective(weight, anchor, log_strength):
    pull = jnp.sum(jnp.exp(log_strength) * (weight - anchor) ** 2)
    return logistic(weight, slice(20)) + 0.5 * pull


def outer(weight, anchor, log_strength):
    return logistic(weight, slice(20, 30)) + 0.01 * jnp.sum(anchor**2) + 0.0 * log_strength


ARGS = (np.linspace(-1, 1, SIZE), np.log(STRENGTH))


def gradient_at(weight, adjoint):
    direct = jax.grad(outer, (1, 2))(weight, *ARGS)
    _, pullback = jax.vjp(lambda *a: jax.grad(objective)(weight, *a), *ARGS)
    return optax.tree.sub(direct, pullback(adjoint))


def matrix(weight):
    return jax.hessian(objective)(weight, *ARGS)


@pytest.fixture(scope="module")
def exact(x64_module):
    """The minimiser, the adjoint there, and the gradient."""
    weight = jnp.asarray(START)
    for _ in range(30):
        weight = weight - jnp.linalg.solve(matrix(weight), jax.grad(objective)(weight, *ARGS))
    adjoint = jnp.linalg.solve(matrix(weight), jax.grad(outer)(weight, *ARGS))
    return weight, adjoint, gradient_at(weight, adjoint)


def estimate(weight, adjoint, strong_convexity=STRENGTH, **settings):
    @jax.jit
    def call(weight, adjoint):
        return implicit_gradient_error(
            outer, objective, weight, ARGS, adjoint, strong_convexity=strong_convexity, **settings
        )

    return call(weight, adjoint)


def distance(a, b):
    return float(optax.tree.norm(optax.tree.sub(a, b)))


@pytest.mark.parametrize("size", [1e-1, 1e-3, 1e-5])
def test_the_estimate_is_the_error_to_first_order(exact, size):
    weight, adjoint, grads = exact
    moves = size * np.random.default_rng(1).normal(size=(2, SIZE))
    near = weight + moves[0], adjoint + moves[1] * jnp.linalg.norm(adjoint)
    found = estimate(*near, solve=solve_dense)
    computed = gradient_at(*near)
    error = distance(computed, grads)
    assert error <= found.estimate <= 5 * error
    assert distance(optax.tree.add(computed, found.correction), grads) < 3 * size * error
    assert found.unresolved < 1e-8 * error


def test_what_the_solver_leaves_open_counts(exact):
    weight, adjoint, grads = exact
    near = weight + 0.1, adjoint * 1.1
    error = distance(gradient_at(*near), grads)
    for steps in (1, 2, 4):
        solve = partial(solve_cg_steihaug, tol=0.0, max_steps=steps)
        found = estimate(*near, solve=solve)
        assert found.estimate >= max(error, found.unresolved)
        assert found.unresolved > 0


def test_a_solver_that_does_nothing_leaves_the_error_unknown(exact):
    weight, adjoint, _ = exact
    idle = partial(solve_cg_steihaug, max_steps=0)
    assert estimate(weight + 0.1, adjoint, solve=idle).estimate == jnp.inf
    _, _, _, info = adaptive_gradient(
        lambda x, a: jnp.sum(x * a),
        lambda x, a: jnp.sum((x**2 - 1) ** 2) + 0 * a.sum(),  # curved downwards at the start
        jnp.full(3, 0.1),
        (jnp.ones(3),),
        accuracy=0.1,
        strong_convexity=1.0,
        inner=optax.sgd(1e-4),
        num_steps=1,
        solve=CG,
        max_rounds=2,
    )
    assert not info.converged and info.error == jnp.inf


def test_an_exact_gradient_has_no_error(exact):
    weight, adjoint, grads = exact
    found = estimate(weight, adjoint, solve=solve_dense)
    assert found.estimate < 1e-11 * optax.tree.norm(grads)


def test_another_matrix_has_a_limit_of_its_own(exact):
    weight, _, _ = exact

    def curvature(x, anchor, log_strength):
        del anchor
        operator = gauss_newton(
            lambda p: 2 * (INPUTS[:20] @ p),
            lambda outputs: jnp.mean(jax.nn.softplus(-LABELS[:20] * outputs / 2)),
            x,
        )
        return damped(operator, 2 * jnp.exp(log_strength))  # not the Hessian's damping

    near = weight + 1e-4
    right = jax.grad(outer)(weight, *ARGS), jax.grad(outer)(near, *ARGS)
    adjoints = [
        solve_dense(curvature(x, *ARGS), v)[0] for x, v in zip((weight, near), right, strict=True)
    ]
    limit, computed = gradient_at(weight, adjoints[0]), gradient_at(near, adjoints[1])
    found = estimate(near, adjoints[1], 2 * STRENGTH, solve=solve_dense, curvature=curvature)
    error = distance(computed, limit)
    assert 0.5 * error < found.estimate < 10 * error


@pytest.mark.parametrize("accuracy", [1e-1, 1e-3, 1e-6, 1e-10])
def test_an_adaptive_gradient_is_as_exact_as_asked(exact, accuracy):
    _, _, grads = exact
    value, found, weight, info = jax.jit(
        lambda accuracy: adaptive_gradient(
            outer,
            objective,
            START,
            ARGS,
            accuracy=accuracy,
            strong_convexity=STRENGTH,
            inner=adaptive_gd(0.1),
            num_steps=5,
            solve=CG,
        )
    )(accuracy)
    assert info.converged and info.error <= accuracy
    assert distance(found, grads) <= accuracy * optax.tree.norm(grads)
    np.testing.assert_allclose(value, outer(weight, *ARGS))


def test_more_accuracy_takes_more_rounds_and_few_rounds_do_not_converge():
    def rounds(accuracy, most):
        return adaptive_gradient(
            outer,
            objective,
            START,
            ARGS,
            accuracy=accuracy,
            strong_convexity=STRENGTH,
            inner=optax.sgd(0.5),
            num_steps=2,
            solve=CG,
            max_rounds=most,
        )[3]

    run = jax.jit(jax.vmap(rounds))
    info = run(jnp.array([1e-1, 1e-3, 1e-3]), jnp.array([200, 200, 3]))
    assert 0 < info.num_rounds[0] < info.num_rounds[1]
    assert info.num_rounds[2] == 3
    assert info.converged.tolist() == [True, True, False]
    assert info.error[2] > 1e-3


def test_the_bound_holds_where_its_constants_do(exact):
    weight, adjoint, _ = exact
    features = np.linalg.norm(INPUTS, axis=1)
    constants = dict(
        strong_convexity=STRENGTH,
        hessian_lipschitz=float(np.mean(features[:20] ** 3) / (6 * np.sqrt(3))),
        outer_lipschitz=float(np.mean(features[20:] ** 2) / 4),
    )
    for steps in (1, 5, 25):
        near, _ = minimize(objective, START, *ARGS, tx=optax.sgd(0.5), num_steps=steps)
        right = jax.grad(outer)(near, *ARGS)
        approximate = jnp.linalg.solve(matrix(near), right) * (1 + 0.1 / steps)
        residual = jnp.linalg.norm(right - matrix(near) @ approximate)
        slope = jnp.linalg.norm(jax.grad(objective)(near, *ARGS))
        bound = implicit_gradient_bound(slope, residual, jnp.linalg.norm(approximate), **constants)
        assert jnp.linalg.norm(approximate - adjoint) <= bound


def test_the_bound_is_tight_for_a_residual_along_the_flattest_direction():
    bound = implicit_gradient_bound(
        0.3, 0.2, 5.0, strong_convexity=0.5, hessian_lipschitz=0.0, outer_lipschitz=0.0
    )
    assert bound == 0.2 / 0.5
    bound = implicit_gradient_bound(
        0.3, 0.0, 5.0, strong_convexity=0.5, hessian_lipschitz=2.0, outer_lipschitz=1.0
    )
    np.testing.assert_allclose(bound, (1 + 2 * 5) * (0.3 / 0.5) / 0.5)


@pytest.mark.parametrize("changes", [{"strong_convexity": 0.0}, {"hessian_lipschitz": -1.0}])
def test_constants_out_of_range_are_refused(changes):
    constants = {"strong_convexity": 1.0, "hessian_lipschitz": 1.0, "outer_lipschitz": 1.0}
    with pytest.raises(ValueError, match=f"implicit_gradient_bound: {next(iter(changes))}="):
        implicit_gradient_bound(1.0, 1.0, 1.0, **{**constants, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"accuracy": 0},
        {"num_steps": 0.5},
        {"max_rounds": float("nan")},
        {"strong_convexity": -1},
    ],
)
def test_settings_out_of_range_are_refused(changes):
    settings = dict(accuracy=0.1, strong_convexity=1.0, num_steps=1, max_rounds=1) | changes
    with pytest.raises(ValueError, match=f"{next(iter(changes))}="):
        adaptive_gradient(outer, objective, START, ARGS, inner=optax.sgd(0.1), solve=CG, **settings)


def test_no_gradient_converges_where_the_hessian_curves_downwards():
    for start in (0.0, 1e-3):
        _, _, _, info = adaptive_gradient(
            lambda x, a: jnp.sum(x),
            lambda x, a: jnp.sum(x**4 / 4 - x**2 / 2 - a * x),  # a maximum near 0
            jnp.full(1, start),
            (jnp.zeros(1),),
            accuracy=0.1,
            strong_convexity=0.1,
            inner=optax.sgd(1e-6),
            num_steps=1,
            solve=solve_minres,
            max_rounds=2,
        )
        assert not info.converged and info.error == jnp.inf
