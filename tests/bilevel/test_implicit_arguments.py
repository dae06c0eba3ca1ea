"""What may be an argument of a differentiable solver, and what is said of the rest."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from imaml_jax import (
    LinearOperator,
    LinearSolveError,
    custom_argmin,
    custom_root,
    damped,
    gauss_newton,
    hessian,
    minimize,
    nystrom_preconditioner,
    root_jvp,
    root_vjp,
    solve_auto,
    solve_cg_steihaug,
    solve_dense,
    solve_gmres,
    solve_lsmr,
    solve_lstsq,
    solve_nystrom,
    solve_right_preconditioned,
    solve_woodbury,
    transpose,
)
from imaml_jax.bilevel.arguments import Skeleton, depends_on_tracers

pytestmark = pytest.mark.usefixtures("x64")

INDEFINITE = np.array([2.0, -1.0, 0.5])


@partial(jax.tree_util.register_dataclass, data_fields=["weight"], meta_fields=["activation"])
class Layer:
    """A module as model libraries make them: arrays beside a function."""

    def __init__(self, weight, activation):
        self.weight, self.activation = weight, activation


def scaled_square(x, a, kind, layer, *, power=2, shift=0.0):
    assert kind == "square"
    return layer.activation(x**power) - layer.activation(layer.weight * a + shift)


@custom_root(scaled_square)
def find_square(init, a, kind, layer, *, power=2, shift=0.0):
    return (layer.weight * a + shift) ** (1 / power)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_strings_modules_and_keywords(wrap):
    def loss(a, weight, shift):
        layer = Layer(weight, jnp.sinh)
        return find_square(1.0, a, "square", layer, power=2, shift=shift)

    found = wrap(jax.grad(loss, (0, 1, 2)))(2.0, 3.0, 0.5)
    root = 6.5**0.5
    np.testing.assert_allclose(found, [3 / (2 * root), 2 / (2 * root), 1 / (2 * root)], rtol=1e-12)


def test_what_cannot_be_hashed_is_an_argument():
    settings = {"scale"}  # a set
    solver = custom_root(lambda x, a, s: x - a * len(s))(lambda init, a, s: a * len(s))
    assert jax.grad(solver, 1)(0.0, 2.0, settings) == 1


def test_a_tree_without_its_arrays():
    tree = ({"a": np.ones(2), "n": 3}, "word", 1.5)
    skeleton = Skeleton(tree)
    assert [np.shape(x) for x in skeleton.arrays(tree)] == [(2,), ()]
    again = skeleton.merge([np.zeros(2), 2.5])
    assert again[1:] == ("word", 2.5) and again[0]["n"] == 3
    assert skeleton.others == (3, "word")


@pytest.mark.parametrize("outer", [jax.grad, lambda f: jax.grad(jax.jit(f)), jax.jacfwd])
@pytest.mark.parametrize("who", ["both", "optimality"])
def test_closed_over_values_are_differentiated(outer, who):
    def cube_root(theta):
        @custom_root(lambda x, a: x**3 - theta * a)
        def find(init, a):
            return jnp.cbrt((theta if who == "both" else 3.0) * a)

        return find(1.0, 2.0)

    expected = 2 / (3 * 6.0 ** (2 / 3))
    np.testing.assert_allclose(outer(cube_root)(3.0), expected, rtol=1e-12)
    if who == "both":
        second = -2 / 9 * 2**2 / 6.0 ** (5 / 3)
        np.testing.assert_allclose(outer(outer(cube_root))(3.0), second, rtol=1e-12)


def test_a_curvature_that_closes_over_a_traced_value_is_refused():
    def loss(theta):
        curvature = lambda x, a: LinearOperator(lambda v: theta * v)  # noqa: E731
        return custom_root(lambda x, a: theta * x - a, curvature=curvature)(lambda i, a: a / 3)(
            0.0, 1.0
        )

    with pytest.raises(TypeError, match="as arguments of the solver"):
        jax.grad(loss)(3.0)


def test_closures_are_looked_into():
    seen = []

    def probe(theta):
        inner = lambda x: x * theta  # noqa: E731
        holders = (
            inner,
            partial(inner, 1.0),
            lambda x: inner(x),
            partial(max, theta),
            jax.jit(inner),
        )
        seen.extend(depends_on_tracers(holder) for holder in (*holders, (inner, None)))
        return theta

    jax.grad(probe)(1.0)
    assert all(seen)
    assert not any(map(depends_on_tracers, (None, np.sum, jnp.sum, partial(max, 1), lambda x: x)))


SLOPE = 2.0


def sloped(x, a):
    return SLOPE * x - a


def test_what_changes_between_calls_is_seen(monkeypatch):
    """Globals, arrays of NumPy changed in place, objects and mutable arguments."""
    slopes, holder, given = np.array([2.0]), {"slope": 2.0}, [2.0]

    class Model:
        slope = 2.0

        def optimality(self, x, a):
            return self.slope * x - a

    model = Model()
    cases = {
        "global": (sloped, ()),
        "in place": (lambda x, a: slopes[0] * x - a, ()),
        "dictionary": (lambda x, a: holder["slope"] * x - a, ()),
        "object": (model.optimality, ()),
        "class": (lambda x, a: Model.slope * x - a, ()),
        "bound method": (lambda x, a, get=holder.get: get("slope") * x - a, ()),
        "argument": (lambda x, a, given: given[0] * x - a, (given,)),
    }
    solvers = {
        name: (custom_root(fun)(lambda init, a, *args: 0 * a), args)
        for name, (fun, args) in cases.items()
    }
    for slope in (2.0, 4.0, 2.0):
        monkeypatch.setitem(globals(), "SLOPE", slope)
        slopes[0] = holder["slope"] = Model.slope = given[0] = slope
        for name, (solver, args) in solvers.items():
            assert jax.grad(solver, 1)(None, 1.0, *args) == 1 / slope, name


class Hidden:
    def __init__(self, slope):
        self.slope = slope

    def optimality(self, x, a):
        return x - a * self.slope

    def solve(self, init, a):
        return a * self.slope


def test_a_traced_attribute_is_differentiated():
    def root(slope):
        model = Hidden(slope)
        return custom_root(model.optimality)(model.solve)(0.0, 2.0)

    assert jax.grad(root)(3.0) == jax.grad(jax.jit(root))(3.0) == 2


def test_roots_of_linear_equations_to_second_order():
    solver = partial(custom_root(lambda x, a: x - 2 * a)(lambda init, a: 2 * a), 0.0)
    for second in (jax.grad(jax.grad(solver)), jax.hessian(solver), jax.jacrev(jax.jacrev(solver))):
        assert second(1.0) == jax.jit(second)(1.0) == 0


def test_no_system_is_solved_for_the_init():
    solver = custom_root(lambda x, a: 0 * x)(lambda init, a: a)
    assert jax.grad(solver)(1.0, 2.0) == 0


@pytest.mark.parametrize("solve", [None, solve_gmres, solve_lsmr])
def test_a_zero_cotangent_of_a_singular_system_gives_zero(solve):
    solver = custom_root(lambda x, h, a: h * (x - a), solve)(lambda init, h, a: a)

    @jax.grad
    def masked(a):
        h = jnp.array([1.0, 0.0])
        return jnp.sum(jnp.where(h > 0, jax.vmap(partial(solver, None))(h, a), 0))

    np.testing.assert_allclose(jax.jit(masked)(jnp.ones(2)), [1, 0])


@pytest.mark.parametrize("scale", [1e-160, 1e160])
def test_lsmr_where_squares_leave_the_range(scale):
    matrix = np.array([[2.0, 1, 0], [0, 3, 1], [1, 0, 4]])
    x, info = solve_lsmr(matrix * scale, np.ones(3) * scale)
    np.testing.assert_allclose(x, np.linalg.solve(matrix, np.ones(3)), rtol=1e-9)
    assert info.converged


def both_derivatives(solver, dtype=None):
    a = jnp.asarray([1.0, 2.0, 4.0], dtype)
    return jax.jacfwd(solver)(a), jax.jacrev(solver)(a)


def test_float32_roots_of_float64_arguments():
    solver = custom_root(lambda x, a: 2 * x - a)(lambda init, a: (a / 2).astype(jnp.float32))
    for found in both_derivatives(partial(solver, None), jnp.float64):
        np.testing.assert_allclose(found, np.eye(3) / 2, rtol=1e-6)


@pytest.mark.parametrize("solve", [None, solve_gmres, solve_lsmr, solve_cg_steihaug])
def test_half_precision(solve):
    solver = custom_root(lambda x, a: 3 * x - a, solve)(lambda init, a: a / 3)
    for found in both_derivatives(partial(solver, None), jnp.bfloat16):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(found.astype(float), np.eye(3) / 3, rtol=1e-2)


def test_integer_leaves_of_the_root_are_named():
    solver = custom_root(lambda x, a: {"n": x["n"], "x": x["x"] - a})
    solver = solver(lambda init, a: {"n": jnp.int32(3), "x": a})
    assert solver(None, 1.0)["x"] == 1
    with pytest.raises(TypeError, match=r"\['n'\] has dtype int32.*has_aux=True"):
        jax.grad(lambda a: solver(None, a)["x"])(1.0)


def test_integer_right_hand_sides_are_floats():
    x, info = solve_auto(np.diag([2, 4]), np.array([1, 2]))
    np.testing.assert_array_equal(x, [0.5, 0.5])
    assert info.converged and x.dtype == np.float64
    tree, _ = solve_cg_steihaug(lambda v: v, {"a": jnp.array([3]), "b": jnp.array([0.5])})
    np.testing.assert_array_equal(tree["a"], [3.0])


def test_root_vjp_passes_integers_by():
    args = (jnp.array([1.0, 2.0]), jnp.array([1, 2]))
    cotangents, info = root_vjp(lambda x, a, n: x - n * a, jnp.array([1.0, 4.0]), args, jnp.ones(2))
    np.testing.assert_array_equal(cotangents[0], [1, 2])
    assert cotangents[1].dtype == jax.dtypes.float0 and info.converged


def test_complex_roots_in_both_modes():
    """Of an equation that is not holomorphic, against the closed form in real numbers."""
    solver = custom_root(lambda z, a: z + z.conj() / 3 - a**2)
    solver = partial(solver(lambda init, a: (a**2 - (a**2).conj() / 3) * 9 / 8), None)

    def exact(a):
        return (a**2 - (a**2).conj() / 3) * 9 / 8

    a, t = jnp.array([1.0 + 2j, -0.5 + 1j]), jnp.array([1j, 2.0 - 1j])
    for f, g in ((solver, exact),):
        np.testing.assert_allclose(jax.jvp(f, (a,), (t,))[1], jax.jvp(g, (a,), (t,))[1], rtol=1e-12)
        np.testing.assert_allclose(jax.vjp(f, a)[1](t)[0], jax.vjp(g, a)[1](t)[0], rtol=1e-12)


@pytest.mark.parametrize("solve", [None, solve_cg_steihaug])
def test_complex_minima(solve):
    """`|z - a|^2 + |z|^2`, minimal at `a / 2`."""
    solver = custom_argmin(lambda z, a: jnp.sum(jnp.abs(z - a) ** 2 + jnp.abs(z) ** 2), solve)
    solver = partial(solver(lambda init, a: a / 2), None)
    a = jnp.array([1.0 + 2j, -0.5j])
    np.testing.assert_allclose(jax.jvp(solver, (a,), (a,))[1], a / 2, rtol=1e-12)
    np.testing.assert_allclose(jax.vjp(solver, a)[1](a)[0], a / 2, rtol=1e-12)


def test_a_complex_hessian_is_symmetric_over_the_reals():
    fun = lambda z: jnp.sum(jnp.abs(z) ** 2 + (z**2).real / 2)  # noqa: E731
    operator = hessian(fun, jnp.array([1.0 + 1j]))  # 3 and 1 in the two parts
    np.testing.assert_allclose(operator.matvec(jnp.array([1.0 + 1j])), [3 + 1j])
    with pytest.raises(TypeError, match="real"):
        solve_woodbury(damped(operator, 1.0), jnp.array([1j]))


TALL = np.random.default_rng(0).normal(size=(5, 3))


@pytest.mark.parametrize("solve", [solve_lstsq, solve_lsmr])
def test_more_equations_than_unknowns(solve):
    """To second order; and the error that names the solvers."""

    def optimality(x, a):
        return {"first": TALL[:2] @ (x - a**2), "second": TALL[2:] @ (x - a**2)}

    solver = partial(custom_root(optimality, solve)(lambda init, a: a**2), None)
    for found in both_derivatives(solver):
        np.testing.assert_allclose(found, np.diag([2, 4, 8]), atol=1e-8)
    second = jax.jit(jax.hessian(lambda a: jnp.sum(solver(a) ** 2)))(jnp.array([1.0, 2, 4]))
    np.testing.assert_allclose(second, np.diag([12, 48, 192]), atol=1e-6)
    with pytest.raises(ValueError, match=r"5 numbers for 3 unknowns.*solve_lstsq or solve_lsmr"):
        jax.grad(lambda a: custom_root(optimality)(lambda i, a: a**2)(None, a).sum())(jnp.ones(3))


@pytest.mark.parametrize("solve", [solve_lstsq, solve_lsmr])
def test_a_freedom_that_does_not_matter(solve):
    """Only the differences of `x` are determined, and only they are used."""
    differences = jnp.array([[1.0, -1, 0], [0, 1, -1], [-1, 0, 1]])
    solver = custom_root(lambda x, a: differences @ x - differences @ a**2, solve)
    solver = solver(lambda init, a: a**2 + 7)
    loss = lambda a: jnp.sum((differences @ solver(None, a))[:2])  # noqa: E731
    np.testing.assert_allclose(jax.grad(loss)(jnp.array([1.0, 2, 3])), [2, 0, -6], atol=1e-9)


def test_a_solver_without_init_is_told_what_to_write():
    with pytest.raises(
        TypeError, match=r"missing a required argument: 'a'.*solver\(init, \*args\)"
    ):
        custom_root(lambda x, a: x - a)(lambda a: a)(1.0)


def test_a_pair_without_has_aux_is_told():
    objective = lambda x, a: jnp.sum((x - a) ** 2)  # noqa: E731
    find = partial(minimize, objective, tx=optax.sgd(0.1), num_steps=2)
    with pytest.raises(TypeError, match="has_aux=True"):
        jax.grad(lambda a: custom_argmin(objective)(find)(jnp.zeros(2), a)[0].sum())(jnp.ones(2))


def test_the_transpose_of_a_preconditioner():
    """`M^-1` is exact and not symmetric: one step in either mode."""
    matrix = jnp.asarray(np.triu(np.random.default_rng(0).normal(size=(30, 30)) + 5 * np.eye(30)))
    solve = partial(
        solve_right_preconditioned,
        solve=partial(solve_gmres, restart=2, max_restarts=1),
        inverse=partial(jnp.linalg.solve, matrix),
    )
    solver = custom_root(lambda x, a: matrix @ x - a, solve)(
        lambda i, a: jnp.linalg.solve(matrix, a)
    )
    a = jnp.arange(30.0)
    _, pull = jax.vjp(partial(solver, None), a)
    np.testing.assert_allclose(pull(a)[0], np.linalg.solve(matrix.T, a), rtol=1e-9)
    tangent = jax.jvp(partial(solver, None), (a,), (a,))[1]
    np.testing.assert_allclose(tangent, np.linalg.solve(matrix, a), rtol=1e-9)


def test_the_transpose_keeps_what_is_symmetric():
    operator = damped(LinearOperator(lambda v: {"a": 2 * v["a"] + v["b"], "b": v["b"]}), 0.5)
    b = {"a": jnp.ones(2), "b": jnp.ones(2)}
    turned = transpose(operator, b)
    assert turned.transposed and turned.dampings == (0.5,)
    assert not transpose(turned, b).transposed
    found = turned.matvec({"a": jnp.array([1.0, 2]), "b": jnp.array([3.0, 4])})
    np.testing.assert_array_equal(found["b"], [1 + 4.5, 2 + 6])


INPUTS = np.random.default_rng(1).normal(size=(4, 6))


def model(w):
    return INPUTS @ w


def outputs_loss(outputs):
    return jnp.sum(outputs**2 + outputs) / 2


def ridge(w, strength):
    return outputs_loss(model(w)) + strength * jnp.sum(w**2) / 2


def ridge_curvature(w, strength):
    return damped(gauss_newton(model, outputs_loss, w), strength)


@pytest.mark.parametrize(
    "solve",
    [
        solve_woodbury,
        partial(solve_nystrom, rank=6),
        partial(solve_cg_steihaug, precondition=partial(nystrom_preconditioner, rank=4)),
        solve_dense,
    ],
)
def test_a_curvature_with_its_structure(solve):
    """The Gauss-Newton matrix is the Hessian here."""

    def fit(init, strength):
        matrix = INPUTS.T @ INPUTS + strength * jnp.eye(6)
        return -jnp.linalg.solve(matrix, INPUTS.T @ jnp.ones(4)) / 2

    solver = custom_argmin(ridge, solve, curvature=ridge_curvature)(fit)
    expected = jax.jacobian(partial(fit, None))(0.5)
    for mode in (jax.jacfwd, jax.jacrev):
        np.testing.assert_allclose(jax.jit(mode(partial(solver, None)))(0.5), expected, rtol=1e-8)
    root = fit(None, 0.5)
    optimality = jax.grad(ridge)
    settings = {"symmetric": True, "operator": ridge_curvature(root, 0.5)}
    tangent = root_jvp(optimality, root, (0.5,), (1.0,), solve, **settings)
    np.testing.assert_allclose(tangent, expected, rtol=1e-8)
    (cotangent,), info = root_vjp(optimality, root, (0.5,), jnp.ones(6), solve, **settings)
    np.testing.assert_allclose(cotangent, expected.sum(), rtol=1e-8)
    assert info.converged


def saddle(on_failure, solve=solve_cg_steihaug):
    objective = lambda x, a: x @ (INDEFINITE * x) / 2 - a @ x  # noqa: E731
    solver = custom_argmin(objective, solve, on_failure=on_failure)(lambda init, a: a / INDEFINITE)
    return jax.grad(lambda a: solver(None, a).sum())


def test_a_failure_is_told_as_asked():
    a = jnp.ones(3)
    with pytest.raises(
        LinearSolveError, match=r"curvature met -.*not positive definite.*solve_minres"
    ):
        saddle("raise")(a)
    for gradient in (jax.jit(saddle("raise")), saddle("nan"), jax.jit(saddle("nan"))):
        assert np.isnan(gradient(a)).all()
    np.testing.assert_allclose(saddle("accept")(a), [2, 2, 2])
    np.testing.assert_allclose(saddle("raise", None)(a), 1 / INDEFINITE)
    reports = []
    for gradient in (saddle(reports.append), jax.jit(saddle(reports.append))):
        assert np.isnan(gradient(a)).all()
    jax.effects_barrier()
    assert len(reports) == 2 and all(r.min_curvature < 0 for r in reports)
    with pytest.raises(ValueError, match="on_failure='shout' must be"):
        saddle("shout")


def test_a_batch_says_how_many_failed():
    values = jnp.array([[1.0, 2.0], [1.0, -2.0], [1.0, 3.0]])
    solver = custom_root(lambda x, h, a: h * x - a, solve_cg_steihaug)(lambda init, h, a: a / h)
    gradient = jax.vmap(jax.grad(lambda a, h: solver(None, h, a).sum()), (None, 0))
    with pytest.raises(LinearSolveError, match=r"1 of 3 in the batch"):
        gradient(jnp.ones(2), values)
    with pytest.raises(TypeError, match=r"return \(x, SolveInfo\)"):
        bare = custom_root(lambda x, a: x - a, lambda operator, b: (b, None))
        jax.grad(bare(lambda init, a: a), 1)(0.0, 1.0)
    found = jax.jit(gradient)(jnp.ones(2), values)
    assert np.isnan(found[1]).all()
    np.testing.assert_allclose(found[::2], 1 / values[::2])


def test_the_remedy_fits_what_was_met():
    singular = jnp.array([[1.0, 2.0], [2.0, 4.0]])
    for matrix, match in ((singular, "singular.*solve_lstsq"), (jnp.nan * singular, "not finite")):
        solver = custom_root(lambda x, a, m=matrix: m @ x - a)(lambda init, a: jnp.zeros(2))
        with pytest.raises(LinearSolveError, match=match):
            jax.vjp(partial(solver, None), jnp.ones(2))[1](jnp.ones(2))
    solver = custom_root(lambda x, a: jnp.roll(x, 1) - a, partial(solve_gmres, restart=3))(
        lambda init, a: jnp.roll(a, -1)
    )
    with pytest.raises(LinearSolveError, match="more steps"):
        jax.grad(lambda a: solver(None, a)[0])(jnp.arange(8.0))


def test_forward_mode_where_there_is_no_reverse_mode():
    def cube(x):
        return jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1] * x), (0, 1.0))[1]

    solver = partial(custom_root(lambda x, a: cube(x) - a)(lambda init, a: jnp.cbrt(a)), None)
    np.testing.assert_allclose(jax.jit(jax.jacfwd(solver))(8.0), 1 / 12)


def test_eager_derivatives_compile_once():
    compiled = itertools.count()
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *unused, **more: "backend_compile" in name and next(compiled)
    )
    matrix = jnp.asarray(np.random.default_rng(2).normal(size=(4, 4)))
    solver = custom_root(lambda x, a: matrix @ x - a)(lambda init, a: jnp.linalg.solve(matrix, a))
    derivatives = (
        jax.grad(lambda a: solver(None, a).sum()),
        lambda a: jax.jvp(partial(solver, None), (a,), (a,)),
    )
    first, *points = jnp.asarray(np.random.default_rng(3).normal(size=(4, 4)))
    for derivative in derivatives:
        derivative(first)
        before = next(compiled)
        for point in points:
            derivative(point)
        assert next(compiled) == before + 1


def test_operators_of_the_wrong_kind_are_refused():
    with pytest.raises(TypeError, match="LinearOperator, a function v -> A v"):
        solve_dense("matrix", jnp.ones(2))
    with pytest.raises(ValueError, match=r"\[m, n\] with b an array \[m\]"):
        solve_dense(np.eye(3), jnp.ones(2))
    with pytest.raises(ValueError, match=r"3 equations for 2 unknowns.*solve_lstsq"):
        solve_gmres(np.ones((3, 2)), jnp.ones(3))
    with pytest.raises(ValueError, match="maps 2 numbers to 1"):
        solve_dense(lambda v: v[:1], jnp.ones(2))
    for settings in ({"restart": 0}, {"max_restarts": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            solve_gmres(np.eye(2), jnp.ones(2), **settings)
