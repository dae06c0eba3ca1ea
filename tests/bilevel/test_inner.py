"""Inner solvers: they reach the minimiser, at the known rates, and report the truth."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from imaml_jax import adaptive_gd, custom_argmin, minimize, newton_cg, proximal_objective
from imaml_jax.bilevel.inner import mini_batches
from imaml_jax.types import Batch

pytestmark = pytest.mark.usefixtures("x64")

rng = np.random.default_rng(0)
INPUTS = rng.normal(size=(10, 3))
LABELS = np.sign(rng.normal(size=10))
EIGENVALUES = np.array([0.5, 1.0, 2.0, 4.0])
TARGET = np.array([1.0, -2.0, 3.0, -4.0])


def logistic_loss(params, inputs, labels):
    margins = labels * (inputs @ params["w"] + params["b"])
    return jnp.mean(jnp.logaddexp(0.0, -margins))


def quadratic(x, target=TARGET):
    return 0.5 * jnp.sum(EIGENVALUES * (x - target) ** 2)


def rosenbrock(x):
    return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2


TRANSFORMS = {
    "sgd": (lambda: optax.sgd(1.0), 150),
    "momentum": (lambda: optax.sgd(0.3, momentum=0.7), 250),
    "nesterov": (lambda: optax.sgd(0.5, momentum=0.6, nesterov=True), 200),
    "adam": (lambda: optax.adam(0.02), 2000),
    "lbfgs": (lambda: optax.lbfgs(), 20),
    "adaptive_gd": (lambda: adaptive_gd(0.01), 200),
    "newton_cg": (lambda: newton_cg(), 10),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_transform_reaches_the_same_minimiser(name):
    """Path independence: an implicit gradient does not depend on the inner solver."""
    make, num_steps = TRANSFORMS[name]
    objective = proximal_objective(logistic_loss)
    anchor = {"w": jnp.array([1.0, -1.0, 0.5]), "b": jnp.array(0.2)}

    @jax.jit
    def solve(anchor, strength):
        return minimize(
            objective, anchor, anchor, strength, INPUTS, LABELS, tx=make(), num_steps=num_steps
        )

    @jax.jit
    def reference(anchor, strength):
        def step(flat, _):
            def flat_objective(p):
                tree = {"w": p[:3], "b": p[3]}
                return objective(tree, anchor, strength, INPUTS, LABELS)

            h, g = jax.hessian(flat_objective)(flat), jax.grad(flat_objective)(flat)
            return flat - jnp.linalg.solve(h, g), None

        return jax.lax.scan(step, jnp.append(anchor["w"], anchor["b"]), length=20)[0]

    found, info = solve(anchor, 0.5)
    expected = reference(anchor, 0.5)
    np.testing.assert_allclose(found["w"], expected[:3], rtol=0, atol=1e-8)
    np.testing.assert_allclose(found["b"], expected[3], rtol=0, atol=1e-8)
    assert info.relative_residual < 1e-7


@pytest.mark.parametrize("rate", [0.05, 0.3])
def test_gradient_descent_converges_at_the_known_rate(rate):
    """`max(|1 - eta (lambda + mu)|, |1 - eta (lambda + L)|)` for the regularised problem."""
    strength, start, steps = 1.0, jnp.ones(4), 15
    objective = proximal_objective(lambda x: 0.5 * jnp.sum(EIGENVALUES * x**2))
    solution = strength * start / (strength + EIGENVALUES)
    solve = partial(minimize, objective, start, start, tx=optax.sgd(rate), num_steps=steps)
    ratios = (jax.jit(solve)(strength)[0] - solution) / (start - solution)
    np.testing.assert_allclose(ratios, (1 - rate * (strength + EIGENVALUES)) ** steps, atol=1e-14)
    low, high = EIGENVALUES[0] + strength, EIGENVALUES[-1] + strength
    known = max(abs(1 - rate * low), abs(1 - rate * high))
    np.testing.assert_allclose(np.abs(ratios).max() ** (1 / steps), known, rtol=1e-6)


def test_proximal_term_counts_one_half_of_the_strength():
    loss = proximal_objective(lambda p, scale: scale * p["a"].sum())
    params = {"a": jnp.array([1.0, 3.0]), "b": jnp.array(2.0)}
    anchor = {"a": jnp.zeros(2), "b": jnp.zeros(())}
    for strength, expected in [
        (2.0, 14.0),
        ({"a": 2.0, "b": 1.0}, 12.0),
        ({"a": jnp.array([2.0, 0.0]), "b": 0.0}, 1.0),
    ]:
        np.testing.assert_allclose(loss(params, anchor, strength, 10.0), 40 + expected)


def test_batches_are_used_in_order():
    def objective(x, offset, batch):
        return 0.5 * (x - batch["target"] - offset) ** 2

    targets = np.array([1.0, -3.0, 5.0])
    expected = 0.0
    for target in targets:
        expected -= 0.25 * (expected - target - 10)
    solve = partial(minimize, objective, tx=optax.sgd(0.25), num_steps=3)
    found, info = jax.jit(lambda x, o, b: solve(x, o, batches=b))(0.0, 10.0, {"target": targets})
    np.testing.assert_allclose(found, expected)
    # The report is for the last batch, relative to the gradient of the first step.
    np.testing.assert_allclose(info.loss, 0.5 * (expected - 15) ** 2)
    np.testing.assert_allclose(info.relative_residual, abs(expected - 15) / 11)


def test_no_steps_leave_the_start():
    found, info = minimize(quadratic, jnp.zeros(4), tx=optax.sgd(0.1), num_steps=0)
    np.testing.assert_array_equal(found, 0)
    np.testing.assert_allclose(info.loss, quadratic(np.zeros(4)))
    np.testing.assert_allclose(info.relative_residual, 1)


@pytest.mark.parametrize("num_steps", [1, 7])
def test_the_report_is_of_the_last_point(num_steps):
    solve = jax.jit(partial(minimize, quadratic, tx=optax.sgd(0.1), num_steps=num_steps))
    found, info = solve(jnp.zeros(4))
    np.testing.assert_allclose(info.loss, quadratic(found))
    last, first = (np.linalg.norm(EIGENVALUES * (x - TARGET)) for x in (found, np.zeros(4)))
    np.testing.assert_allclose(info.relative_residual, last / first)


def test_the_residual_of_a_start_that_is_stationary_is_zero():
    found, info = minimize(quadratic, jnp.asarray(TARGET), tx=optax.sgd(0.1), num_steps=2)
    np.testing.assert_array_equal(found, TARGET)
    assert info.relative_residual == 0


@pytest.mark.parametrize("name", ["sgd", "lbfgs", "adaptive_gd", "newton_cg"])
def test_a_tolerance_stops_the_same_steps(name):
    tx = optax.sgd(0.3) if name == "sgd" else TRANSFORMS[name][0]()
    solve = partial(minimize, quadratic, tx=tx)
    found, info = jax.jit(partial(solve, num_steps=500, tol=1e-6))(jnp.zeros(4))
    assert info.relative_residual <= 1e-6 and 0 < info.num_steps < 500
    expected, before = (
        jax.jit(partial(solve, num_steps=int(info.num_steps) - k))(jnp.zeros(4)) for k in (0, 1)
    )
    np.testing.assert_allclose(found, expected[0], rtol=1e-12)
    np.testing.assert_allclose(info.loss, expected[1].loss, rtol=1e-9, atol=1e-20)
    assert before[1].relative_residual > 1e-6


def test_each_of_many_problems_stops_by_itself():
    solve = partial(minimize, quadratic, tx=optax.sgd(0.3), num_steps=20, tol=1e-4)
    starts = jnp.stack([jnp.zeros(4), TARGET + jnp.array([0, 0, 0, 1.0]), jnp.asarray(TARGET)])
    found, info = jax.jit(jax.vmap(solve))(starts)
    for i, start in enumerate(starts):
        one, one_info = solve(start)
        np.testing.assert_allclose(found[i], one, rtol=1e-12)
        assert info.num_steps[i] == one_info.num_steps
    assert info.num_steps[0] == 20 > info.num_steps[1] > info.num_steps[2] == 0


def test_an_implicit_gradient_through_a_loop_that_stops():
    def solver(init, target):
        return minimize(quadratic, init, target, tx=newton_cg(), num_steps=30, tol=1e-10)

    of_target = custom_argmin(quadratic, has_aux=True)(solver)
    jacobian = jax.jacrev(lambda target: of_target(jnp.zeros(4), target)[0])(jnp.asarray(TARGET))
    np.testing.assert_allclose(jacobian, np.eye(4), atol=1e-9)
    with pytest.raises(ValueError, match="while_loop"):
        jax.grad(lambda target: solver(jnp.zeros(4), target)[0].sum())(jnp.asarray(TARGET))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tol": -1e-3}, r"tol=-0\.001 must be at least 0"),
        ({"tol": float("nan")}, "tol=nan must be at least 0"),
        ({"tol": 0.1, "batches": jnp.ones((3, 4))}, r"tol=0\.1 .*drop batches"),
    ],
)
def test_a_tolerance_that_cannot_be_met_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        minimize(quadratic, jnp.zeros(4), tx=optax.sgd(0.1), num_steps=3, **settings)


@pytest.mark.parametrize("momentum", [None, 0.5])
def test_reverse_mode_equals_unrolling_by_hand(momentum):
    def objective(x, scale):
        return jnp.sum(jnp.cos(scale * x) + 0.1 * x**4)

    def by_hand(start, scale):
        x, velocity = start, jnp.zeros_like(start)
        for _ in range(4):
            velocity = (momentum or 0) * velocity + jax.grad(objective)(x, scale)
            x = x - 0.1 * velocity
        return jnp.sum(x**3)

    def through_minimize(start, scale, remat):
        tx = optax.sgd(0.1, momentum)
        found, _ = minimize(objective, start, scale, tx=tx, num_steps=4, remat=remat)
        return jnp.sum(found**3)

    args = (jnp.array([0.3, -1.2]), jnp.array([1.0, 2.0]))
    gradient = partial(jax.grad, argnums=(0, 1))
    expected = jax.jit(gradient(by_hand))(*args)
    for remat in (True, False):
        found = jax.jit(gradient(partial(through_minimize, remat=remat)))(*args)
        np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("remat", [True, False])
def test_a_stationary_start_has_finite_derivatives(remat):
    """The norms in the report have no derivative at zero; they must not leak into the result."""

    @jax.jit
    def solve(start, target):
        return minimize(quadratic, start, target, tx=optax.sgd(0.1), num_steps=3, remat=remat)

    def outer(start, target):
        found, info = solve(start, target)
        return found.sum(), info

    found, _ = jax.grad(outer, argnums=(0, 1), has_aux=True)(TARGET, TARGET)
    kept = (1 - 0.1 * EIGENVALUES) ** 3
    np.testing.assert_allclose(found, [kept, 1 - kept], rtol=1e-12)


def test_minimize_maps_over_tasks():
    targets = np.stack([TARGET, -2 * TARGET])
    for tx, steps in ((adaptive_gd(0.1), 60), (newton_cg(), 3)):
        solve = partial(minimize, quadratic, tx=tx, num_steps=steps)
        found, info = jax.jit(jax.vmap(solve))(0 * targets, targets)
        np.testing.assert_allclose(found, targets, atol=1e-6)
        assert info.relative_residual.shape == (2,)


def test_newton_cg_solves_a_quadratic_in_one_step():
    tx = newton_cg(max_cg_steps=4, cg_tol=1e-14)
    found, info = jax.jit(partial(minimize, quadratic, tx=tx, num_steps=1))(jnp.zeros(4))
    np.testing.assert_allclose(found, TARGET, rtol=1e-12)
    assert info.relative_residual < 1e-12


def values_along(tx, fun, start, num_steps):
    """The iterates and their losses."""
    tx = optax.with_extra_args_support(tx)

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(fun)(params)
        updates, state = tx.update(grads, state, params, value=value, value_fn=fun)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, fun(params))

    return jax.jit(lambda x: jax.lax.scan(step, (x, tx.init(x)), length=num_steps)[1])(start)


@pytest.mark.parametrize("start", [(-1.2, 1.0), (0.0, 2.0)])
def test_newton_cg_descends_monotonically_on_a_nonconvex_function(start):
    start = jnp.array(start)
    points, values = values_along(newton_cg(cg_tol=1e-10), rosenbrock, start, 60)
    assert (np.diff(np.append(rosenbrock(start), values)) <= 0).all()
    np.testing.assert_allclose(points[-1], 1, atol=1e-8)


def test_newton_cg_descends_from_negative_curvature():
    """At a point where the Hessian is negative in the gradient's direction, Newton would climb."""

    def double_well(x):
        return jnp.sum(x**4 - x**2)

    start = jnp.array([0.1, -0.05])
    assert (jnp.diag(jax.hessian(double_well)(start)) < 0).all()
    points, values = values_along(newton_cg(), double_well, start, 15)
    assert values[0] < double_well(start)
    np.testing.assert_allclose(points[-1], np.sqrt(0.5) * np.array([1, -1]), atol=1e-8)


def test_newton_cg_does_not_move_where_no_step_helps():
    """The line search gives up at a value that is not finite, or where the loss does not fall."""
    tx = newton_cg(max_backtracks=3)
    state = tx.init(jnp.ones(1))
    for value_fn in (lambda x: jnp.full((), jnp.nan), lambda x: jnp.sum(x**2) * 0 + 5.0):
        updates, _ = tx.update(
            jnp.ones(1), state, jnp.zeros(1), value=jnp.ones(()), value_fn=value_fn
        )
        np.testing.assert_array_equal(updates, 0)


@pytest.mark.parametrize("name", ["newton_cg", "adaptive_gd"])
def test_steps_past_convergence_in_float32_stay_at_the_minimum(name):
    """From afar, from the minimiser, and from one rounding error beside it: no NaN, no leap."""
    target = jnp.asarray(TARGET, jnp.float32)
    eigenvalues = jnp.asarray(EIGENVALUES, jnp.float32)

    def objective(x):
        return 0.5 * jnp.sum(eigenvalues * (x - target) ** 2) + 0.1

    beside = target * (1 + 2 * jnp.finfo(jnp.float32).eps)
    starts = jnp.stack([jnp.zeros_like(target), target, beside])
    tx = {"newton_cg": newton_cg(), "adaptive_gd": adaptive_gd(0.05)}[name]
    solve = jax.jit(jax.vmap(partial(minimize, objective, tx=tx, num_steps=100)))
    found, info = solve(starts)
    assert found.dtype == jnp.float32
    assert np.isfinite(info.relative_residual).all()
    np.testing.assert_allclose(found, np.stack([target] * 3), rtol=1e-4)


def test_adaptive_gd_converges_where_the_same_constant_rate_diverges():
    def stiff(x):
        return 0.5 * jnp.sum(np.array([1.0, 100.0]) * x**2)

    start = jnp.ones(2)
    for tx, converges in ((optax.sgd(0.1), False), (adaptive_gd(0.1), True)):
        _, info = jax.jit(partial(minimize, stiff, tx=tx, num_steps=300))(start)
        assert (info.relative_residual < 1e-6) == converges
        assert (info.relative_residual > 1e6) != converges


def test_adaptive_gd_keeps_its_rate_where_gradients_do_not_change():
    """On a linear function no curvature is met, so that nothing would bound the rate."""
    points, _ = values_along(adaptive_gd(0.1), lambda x: 3 * x.sum(), jnp.zeros(1), 5)
    np.testing.assert_allclose(points[:, 0], -0.3 * np.arange(1, 6))


def test_adaptive_gd_keeps_below_its_largest_rate():
    points, _ = values_along(adaptive_gd(0.1, max_rate=0.15), quadratic, jnp.zeros(4), 5)
    before = np.concatenate([np.zeros((1, 4)), points[:-1]])
    rates = (before - np.asarray(points)) / (EIGENVALUES * (before - TARGET))
    np.testing.assert_allclose(rates, np.tile(rates[:, :1], 4), rtol=1e-9)
    assert rates.max() == pytest.approx(0.15)


def test_adaptive_gd_follows_its_published_rule():
    points, _ = values_along(adaptive_gd(0.01), quadratic, jnp.zeros(4), 8)
    x, previous, rate, growth = np.zeros(4), None, 0.01, np.inf
    for k in range(8):
        gradient = EIGENVALUES * (x - TARGET)
        if previous is not None:
            moved, changed = x - previous[0], gradient - previous[1]
            bound = np.linalg.norm(moved) / (2 * np.linalg.norm(changed))
            new_rate = min(np.sqrt(1 + growth) * rate, bound)
            rate, growth = new_rate, new_rate / rate
        previous = (x, gradient)
        x = x - rate * gradient
        np.testing.assert_allclose(points[k], x, rtol=1e-12)


@pytest.mark.parametrize(
    "make, value",
    [
        (lambda: adaptive_gd(0.0), "learning_rate=0.0"),
        (lambda: adaptive_gd(-1.0), "learning_rate=-1.0"),
        (lambda: adaptive_gd(float("nan")), "learning_rate=nan"),
        (lambda: adaptive_gd(0.1, max_rate=0.01), "max_rate=0.01"),
        (lambda: newton_cg(max_cg_steps=0), "max_cg_steps=0"),
        (lambda: newton_cg(max_backtracks=-1), "max_backtracks=-1"),
    ],
)
def test_settings_out_of_range_are_named(make, value):
    with pytest.raises(ValueError, match=value):
        make()


def test_unrolled_adaptive_steps_at_a_stationary_point_have_a_derivative():
    def adapted(anchor):
        def loss(x, anchor):
            return 0.5 * jnp.sum((x - anchor) ** 2)

        return minimize(loss, anchor, anchor, tx=adaptive_gd(0.1), num_steps=3)[0]

    np.testing.assert_allclose(jax.jacobian(adapted)(jnp.arange(3.0)), np.eye(3), atol=1e-6)


@pytest.mark.parametrize("num_batches, size", [(3, 2), (6, 3), (5, 4), (1, 6), (2, 9), (7, 1)])
def test_every_pass_covers_every_example_once(num_batches, size):
    examples = Batch(jnp.arange(6), 10 * jnp.arange(6))
    draw = jax.jit(mini_batches, static_argnums=(2, 3))
    drawn = draw(jax.random.key(0), examples, num_batches, size)
    assert drawn.inputs.shape == (num_batches, size)
    np.testing.assert_array_equal(drawn.targets, 10 * drawn.inputs)
    order = np.asarray(drawn.inputs).ravel()
    passes = [order[i : i + 6] for i in range(0, len(order), 6)]
    for examples_of_pass in passes[:-1]:
        assert sorted(examples_of_pass) == list(range(6))
    assert len(set(passes[-1])) == len(passes[-1])
    if len(order) >= 12:
        assert (passes[0] != passes[1]).any()
