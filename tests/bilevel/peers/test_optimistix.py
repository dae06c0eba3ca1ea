"""What optimistix tests of the derivatives of its solutions, asked of the toolbox, in float64.

Peer: patrick-kidger/optimistix 0.1.0, commit 6415ab15480ebdb7386e17850105ce0dba6786ec, `tests/`
(`test_root_find.py`, `test_fixed_point.py`, `test_minimise.py`, `test_least_squares.py`,
`test_solve.py`, `test_ad.py`).

Counting rule: a case is one problem, with real numbers (and an auxiliary output, which optimistix
draws by lot) or complex ones, or one test of theirs. Roots and fixed points are the same ten
problems, `T(x) = x`, and are counted once; of the three forms of the midpoint rule one is solved in
complex numbers. Which nonlinear solver found the solution does not matter to its derivative and is
not counted; forward and reverse mode are checked in each case. As pytest counts: 35 cases.

Left out on purpose:

- whether the nonlinear solvers converge (`test_root_find`, `test_fixed_point`, `test_minimise`,
  `test_least_squares`, `test_bisection*`, `test_newton_bounded`, `test_golden_search`,
  `test_nonlinear_cg_methods`, `test_best_so_far.py`, `test_cauchy_point.py`, `test_compat.py`): the
  toolbox differentiates the solution of any solver and has few of its own.
- the derivatives of `simple_nn` and of the diagonal bowl in `test_least_squares_jvp`: optimistix
  leaves them out too.
- `test_lbfgs_linear_operator.py`, `test_misc.py`, `test_residual_jac`: private helpers.
- `PiggybackAdjoint`, the derivative of the iterations: that is JAX's own.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from imaml_jax import (
    LinearOperator,
    custom_argmin,
    custom_root,
    root_vjp,
    solve_auto,
    solve_lsmr,
    solve_lstsq,
)

pytestmark = pytest.mark.usefixtures("x64")

MINIMA = ("bowl", "Himmelblau", "Matyas", "Beale", "without arguments")
LEAST_SQUARES = {"two numbers": solve_lstsq, "a tree": partial(solve_lsmr, tol=1e-12)}
CLOSURES = ("minimise", "least squares", "root", "fixed point")

rng = np.random.default_rng(0)
TREE = ({"a": 0.5 * np.ones((2, 2))}, 0.5 * np.ones(2))
MATRIX = rng.normal(size=(6, 6))
LAYERS = tuple(rng.normal(size=shape) for shape in [(4, 6), 4, (6, 4), 6])
KINETICS = (0.04, 3e7, 1e4)
AUX = (np.ones((2, 3)), {"kind": np.ones(2)})

close = partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-9)


def flat(fun):
    """A function of vectors as one of trees."""

    def of_trees(tree, args):
        vector, unravel = ravel_pytree(tree)
        return unravel(fun(vector, args))

    return of_trees


def network(x, layers):
    first, first_bias, second, second_bias = layers
    hidden = jnp.log1p(jnp.exp(first @ x + first_bias))
    return 0.1 * (second @ hidden + second_bias)


def heat(y, scale):
    """Crank and Nicolson's step of `dy/dt = (1 - y) y''`."""
    grid = np.linspace(-1, 1, len(y))

    def slope(y):
        inner = (y[2:] - 2 * y[1:-1] + y[:-2]) / (grid[1] - grid[0])
        return (1 - y) * jnp.pad(inner, 1)

    start = grid**2
    return scale * (start + 0.05 * (slope(y) + slope(start)))


def robertson(y, rates):
    """Chemical kinetics, stiff."""
    slow, fast, middle = rates
    first = slow * y[0] - middle * y[1] * y[2]
    second = fast * y[1] ** 2
    return jnp.stack([-first, first - second, second])


def midpoint(field, form, step, start):
    """A step of the implicit midpoint rule, in the state, its slope, or its increment."""

    def in_state(y, args):
        return start + step * field((start + y) / 2, args)

    def in_slope(slope, args):
        return field(start + step * slope / 2, args)

    def in_increment(increment, args):
        return step * field(start + increment / 2, args)

    return flat({"state": in_state, "slope": in_slope, "increment": in_increment}[form])


class Problem(NamedTuple):
    """The fixed point `x = map(x, args)`, from a start near it."""

    map: Callable[[Any, Any], Any]
    start: Any
    args: Any


linear, kinetic = partial(midpoint, lambda x, matrix: matrix @ x), partial(midpoint, robertson)
START, CHEMICALS = np.linspace(-1, 1, 6), np.array([1.0, 2e-5, 0.1])
KINETIC_TREE = (CHEMICALS[:2], {"b": CHEMICALS[2]})
PROBLEMS = {
    "cosine": Problem(flat(lambda x, a: jnp.cos(a * x)), TREE, 1.0),
    "exponential": Problem(flat(lambda x, a: jnp.exp(-a * x)), TREE, 1.0),
    "network": Problem(flat(network), TREE, LAYERS),
    "heat": Problem(heat, np.linspace(-1, 1, 12) ** 2, 1.0),
    "linear, state": Problem(linear("state", 1 / 16, START), TREE, MATRIX),
    "linear, slope": Problem(linear("slope", 1 / 16, START), TREE, MATRIX),
    "linear, increment": Problem(linear("increment", 1 / 16, START), TREE, MATRIX),
    "kinetics, state": Problem(kinetic("state", 1e-4, CHEMICALS), KINETIC_TREE, KINETICS),
    "kinetics, slope": Problem(kinetic("slope", 1e-4, CHEMICALS), KINETIC_TREE, KINETICS),
    "kinetics, increment": Problem(kinetic("increment", 1e-4, CHEMICALS), KINETIC_TREE, KINETICS),
}


def cast(tree, dtype):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)


def draw(tree, seed):
    """A tangent of a tree."""
    normal = np.random.default_rng(seed).normal

    def one(leaf):
        real, imaginary = normal(size=(2, *np.shape(leaf)))
        return real + 1j * imaginary if jnp.iscomplexobj(leaf) else real

    return jax.tree.map(one, tree)


def find_root(residual, start, args, steps=12):
    """Newton's method in NumPy: the root, and its derivative in the raveled arguments."""
    (x, unravel), (a, unravel_args) = ravel_pytree(start), ravel_pytree(args)

    def of_vectors(x, a):
        return ravel_pytree(residual(unravel(x), unravel_args(a)))[0]

    jacobian = jax.jacfwd(of_vectors, (0, 1), holomorphic=jnp.iscomplexobj(x))
    jacobians = jax.jit(lambda x, a: (of_vectors(x, a), *jacobian(x, a)))
    for _ in range(steps):
        value, in_x, in_args = jacobians(x, a)
        x = x - np.linalg.solve(in_x, value)
    np.testing.assert_allclose(value, 0, atol=1e-7)
    return unravel(x), -np.linalg.solve(in_x, in_args)


def check_derivative(solution, args, jacobian):
    """Tangents and cotangents of a solution against its Jacobian, of raveled trees."""
    tangent = draw(args, 1)

    @jax.jit
    def both(args):
        root, push = jax.linearize(solution, args)
        cotangent = draw(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), root), 2)
        (pulled,) = jax.linear_transpose(push, args)(cotangent)
        return [ravel_pytree(piece)[0] for piece in (push(tangent), pulled, cotangent)]

    pushed, pulled, cotangent = both(args)
    close(pushed, jacobian @ ravel_pytree(tangent)[0])
    close(pulled, cotangent @ jacobian)
    assert np.abs(pushed).max() > 1e-6


CASES = [(name, "float64") for name in PROBLEMS]
CASES += [(name, "complex128") for name in PROBLEMS if not name.endswith(("slope", "increment"))]


@pytest.mark.parametrize("name, dtype", CASES)
def test_roots_and_fixed_points(name, dtype):
    """The real ones with an auxiliary output."""
    problem, has_aux = PROBLEMS[name], dtype == "float64"
    start, args = cast(problem[1:], dtype)

    def residual(x, args):
        return jax.tree.map(jnp.subtract, problem.map(x, args), x)

    root, jacobian = find_root(residual, start, args)

    @custom_root(residual, has_aux=has_aux)
    def solver(init, args):
        return (root, AUX) if has_aux else root

    def solution(args):
        return solver(start, args)[0] if has_aux else solver(start, args)

    check_derivative(solution, args, jacobian)


def himmelblau(point, args):
    (x, y), (a, b) = point, args
    return (x**2 + y - a) ** 2 + (x + y**2 - b) ** 2


def matyas(point, args):
    """With a term that moves its minimum away from the origin."""
    (x, y), (a, b) = point, args
    return a * (x**2 + y**2) - b * x * y - a * x


def beale(point, args):
    x, y = point
    return sum((a - x + x * y**power) ** 2 for power, a in enumerate(args, 1))


def bowl(point, args):
    """A quadratic form, at a distance from a centre."""
    (vector, _), (matrix, centre) = ravel_pytree(point), args
    return (vector - centre) @ (matrix.T @ matrix + np.eye(6)) @ (vector - centre)


OBJECTIVES = {
    "bowl": (bowl, TREE, (MATRIX, START)),
    "Himmelblau": (himmelblau, [3.0, 2.0], (11.0, 7.0)),
    "Matyas": (matyas, [1.0, 1.0], (0.26, 0.48)),
    "Beale": (beale, [2.8, 0.45], (1.5, 2.25, 2.625)),
    "without arguments": (lambda x, args: jnp.sum(x**2) - 1, 1.0, None),
}


@pytest.mark.parametrize("name", MINIMA)
def test_minima(name):
    objective, start, args = OBJECTIVES[name]
    start, args = cast((start, args), "float64")
    if args is None:
        solver = custom_argmin(objective)(lambda init, args: jnp.zeros_like(init))
        value, slope = jax.jvp(lambda init: solver(init, None), (start,), (start,))
        assert (value, slope, jax.grad(solver)(start, None)) == (0, 0, 0)
    else:
        minimum, jacobian = find_root(jax.grad(objective), start, args, 30)
        solver = custom_argmin(objective)(lambda init, args: minimum)
        check_derivative(partial(solver, start), args, jacobian)


@pytest.mark.parametrize("name", LEAST_SQUARES)
def test_least_squares(name):
    """Rosenbrock's residuals, more than there are unknowns, all zero where every one is `a`."""
    shapes = ((), ()) if name == "two numbers" else ((2, 2), (3,))

    def residuals(x, a):
        x = ravel_pytree(x)[0]
        return 100 * (x[1:] - x[:-1]), a - x[:-1]

    def overdetermined(x, a):
        """And `a` itself, so that the last unknown is bound as often as the others."""
        return *residuals(x, a), a - ravel_pytree(x)[0][-1:]

    @custom_root(overdetermined, LEAST_SQUARES[name])
    def solver(init, a):
        return [jnp.full(shape, a) for shape in shapes]

    start = [np.zeros(shape) for shape in shapes]
    size = sum(leaf.size for leaf in start)
    check_derivative(partial(solver, start), jnp.array(1.3), np.ones((size, 1)))


@pytest.mark.parametrize("kind", CLOSURES)
def test_closures(kind):
    """The argument is closed over by what is solved and by the solver."""

    def solution(offset):
        if kind == "minimise":
            solver = custom_argmin(lambda x: (x - offset**2) ** 2)(lambda init: offset**2)
        elif kind == "least squares":
            find = custom_root(
                lambda x: jnp.stack([x - offset**2, 2 * x - 2 * offset**2]), solve_lstsq
            )
            solver = find(lambda init: offset**2)
        elif kind == "root":
            solver = custom_root(lambda x: x - offset**2)(lambda init: offset**2)
        else:
            solver = custom_root(lambda x: offset**2 - x)(lambda init: offset**2)
        return solver(0.0)

    for mode in (jax.grad, jax.jacfwd):
        close(jax.jit(mode(solution))(1.5), 3.0)


def test_forward_mode_where_reverse_mode_is_impossible():
    """The conditions hold a loop of unknown length."""

    def power(x, n):
        return jax.lax.while_loop(lambda s: s[0] < n, lambda s: (s[0] + 1, s[1] * x), (0, 1.0))[1]

    @custom_root(lambda x, a: power(x, 3) - a)
    def cube_root(init, a):
        return jnp.cbrt(a)

    close(jax.jit(jax.jacfwd(partial(cube_root, 1.0)))(8.0), 1 / 12)


def test_reverse_mode_where_forward_mode_is_impossible():
    """The conditions have a rule for their cotangents only."""

    @jax.custom_vjp
    def square(x):
        return x**2

    square.defvjp(lambda x: (x**2, x), lambda x, w: (2 * x * w,))
    root, cotangent = np.array([1.0, 2.0]), np.array([1.0, 1.0])
    operator = LinearOperator(lambda v: 2 * root * v)
    (found,), info = jax.jit(
        lambda w: root_vjp(
            lambda x, a: square(x) - square(a), root, (root,), w, solve_auto, operator=operator
        )
    )(cotangent)
    assert info.converged
    close(found, cotangent)


def test_float32_where_float64_is_on():
    matrix = np.eye(5, dtype="float32") * 2

    @custom_root(lambda x, b: matrix @ x - b)
    def solver(init, b):
        return b / 2

    b = np.ones(5, "float32")
    found = jax.jit(jax.jacrev(partial(solver, b)))(b)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.eye(5) / 2, atol=1e-6)


def test_a_solution_that_is_not_finite_has_no_derivative():
    solver = custom_root(lambda x, a: x**2 - a)(lambda init, a: jnp.sqrt(a))
    value, slope = jax.jit(jax.value_and_grad(partial(solver, 1.0)))(-1.0)
    assert np.isnan(value) and np.isnan(slope)


def test_an_auxiliary_output_that_is_no_array():
    """Without jit."""

    @custom_root(lambda x, a: x - a**2, has_aux=True)
    def solver(init, a):
        return a**2, 5

    close(jax.grad(lambda a: sum(solver(None, a)))(4.0), 8.0)


@pytest.mark.parametrize("kind", ["a word", "a function"])
def test_arguments_that_are_no_arrays(kind):
    given = "square" if kind == "a word" else jnp.square

    def power(a, given):
        return a**2 if given == "square" else given(a)

    @custom_root(lambda x, given, a: x - power(a, given))
    def solver(init, given, a):
        return power(a, given)

    close(jax.jit(jax.grad(lambda a: solver(None, given, a)))(4.0), 8.0)


def test_a_solver_of_another_problem_is_differentiated_as_a_root():
    """A minimiser of the squares finds the root; the tangent system is that of the root."""

    def residual(x, a):
        return jnp.tanh(x - a)

    @custom_root(residual)
    def by_least_squares(init, a):
        def descend(_, x):
            return x - 0.5 * jax.grad(lambda x: residual(x, a) ** 2)(x)

        return jax.lax.fori_loop(0, 20, descend, init)

    close(jax.jit(jax.grad(lambda a: by_least_squares(a + 0.1, a) ** 2))(1.0), 2.0)
