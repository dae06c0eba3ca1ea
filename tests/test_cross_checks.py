"""The toolbox against lineax, optimistix and jaxopt, in float64: `pip install -e .[crosscheck]`."""

import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imaml_jax.bilevel.dense import solve_dense
from imaml_jax.bilevel.gmres import solve_gmres
from imaml_jax.bilevel.implicit import custom_argmin, custom_root
from imaml_jax.bilevel.linear_solve import solve_cg, solve_cg_steihaug
from imaml_jax.bilevel.minres import solve_minres
from imaml_jax.types import LinearOperator

pytestmark = pytest.mark.usefixtures("x64")

SIZE, AGREEMENT, TIGHT = 12, 1e-8, 1e-13
rng = np.random.default_rng(0)
INPUTS, TARGETS = rng.normal(size=(30, SIZE)), rng.normal(size=30)
LABELS = np.sign(TARGETS)
COUPLING = rng.normal(size=(SIZE, SIZE)) / 8
BASIS = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))[0]
RIGHT, WEIGHTS, ARGUMENT = rng.normal(size=SIZE), rng.normal(size=SIZE), rng.uniform(0.5, 2, SIZE)

MATRICES = {
    "positive definite": (BASIS * np.linspace(1, 50, SIZE)) @ BASIS.T,
    "indefinite": (BASIS * np.linspace(-3, 5.5, SIZE)) @ BASIS.T,
    "not symmetric": 4 * np.eye(SIZE) + 8 * COUPLING,
}
SOLVERS = {
    "cg": partial(solve_cg, tol=TIGHT),
    "cg_steihaug": partial(solve_cg_steihaug, tol=TIGHT),
    "gmres": partial(solve_gmres, tol=TIGHT),
    "minres": partial(solve_minres, tol=TIGHT),
    "dense": solve_dense,
}
# Ours, the matrix, and theirs by the names in `lineax` and in `jaxopt.linear_solve`.
LINEAR = [
    ("cg", "positive definite", "CG", "solve_cg"),
    ("cg_steihaug", "positive definite", "CG", "solve_cg"),
    ("gmres", "not symmetric", "GMRES", "solve_gmres"),
    ("minres", "indefinite", "GMRES", "solve_normal_cg"),
    ("dense", "not symmetric", "LU", "solve_lu"),
    ("dense", "indefinite", "LU", "solve_lu"),
]


class Problem(NamedTuple):
    """`fun(x, argument)`: minimised in x, zero, or equal to x."""

    kind: str
    fun: Callable[[Any, Any], Any]


def ridge(x, strength):
    return jnp.sum((INPUTS @ x - TARGETS) ** 2) / 2 + jnp.sum(strength * x**2) / 2


def logistic(x, strength):
    return jnp.sum(jax.nn.softplus(-LABELS * (INPUTS @ x))) + jnp.sum(strength * x**2) / 2


def coupled(x, offset):
    return x + jnp.tanh(COUPLING @ x) - offset


def recurrent(x, offset):
    return jnp.tanh(COUPLING @ x + offset)


PROBLEMS = {
    "ridge regression": Problem("argmin", ridge),
    "logistic regression": Problem("argmin", logistic),
    "root, not symmetric": Problem("root", coupled),
    "fixed point": Problem("fixed point", recurrent),
}


def peer(name):
    """A library, or a skip. jaxopt warns at its import that it is no longer maintained."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "JAXopt is no longer maintained", DeprecationWarning)
        return pytest.importorskip(name, reason=f"no {name}: pip install -e .[crosscheck]")


def optimality(problem):
    """What is zero at the solution of a problem."""
    if problem.kind == "argmin":
        return jax.grad(problem.fun)
    if problem.kind == "root":
        return problem.fun
    return lambda x, argument: problem.fun(x, argument) - x


def newton(problem):
    """A solver of our own, for the libraries that differentiate any."""
    residual = optimality(problem)

    def solver(init, argument):
        def step(_, x):
            return x - jnp.linalg.solve(jax.jacobian(residual)(x, argument), residual(x, argument))

        return jax.lax.fori_loop(0, 12, step, init)

    return solver


def ours(problem):
    if problem.kind == "argmin":
        return custom_argmin(problem.fun, SOLVERS["cg"])(newton(problem))
    solve = SOLVERS["gmres" if problem.kind == "root" else "dense"]
    return custom_root(optimality(problem), solve)(newton(problem))


def theirs_jaxopt(problem):
    implicit, linear = peer("jaxopt").implicit_diff, peer("jaxopt").linear_solve
    if problem.kind == "argmin":
        solve = partial(linear.solve_cg, tol=TIGHT)
        return implicit.custom_root(jax.grad(problem.fun), solve=solve)(newton(problem))
    if problem.kind == "root":
        solve = partial(linear.solve_gmres, tol=TIGHT)
        return implicit.custom_root(problem.fun, solve=solve)(newton(problem))
    return implicit.custom_fixed_point(problem.fun, solve=linear.solve_lu)(newton(problem))


def theirs_optimistix(problem):
    optimistix, lineax = peer("optimistix"), peer("lineax")
    tight = {"rtol": 1e-12, "atol": 1e-12}
    find, solver, linear = {
        "argmin": (optimistix.minimise, optimistix.BFGS, lineax.CG(**tight)),
        "root": (optimistix.root_find, optimistix.Newton, lineax.GMRES(**tight)),
        "fixed point": (optimistix.fixed_point, optimistix.FixedPointIteration, lineax.LU()),
    }[problem.kind]
    adjoint = optimistix.ImplicitAdjoint(linear)
    definite = problem.kind == "argmin"
    tags = frozenset({lineax.positive_semidefinite_tag} if definite else ())

    def solve(init, argument):
        settings = {"adjoint": adjoint, "max_steps": 1000, "tags": tags}
        return find(problem.fun, solver(**tight), init, argument, **settings).value

    return solve


@cache
def gradient(make, name):
    """Of a weighted sum of the solution, in the argument."""
    solver = make(PROBLEMS[name])
    return jax.jit(jax.grad(lambda a: WEIGHTS @ solver(jnp.zeros(SIZE), a)))(ARGUMENT)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("theirs", [theirs_optimistix, theirs_jaxopt])
def test_implicit_gradients_agree(theirs, name):
    expected = gradient(theirs, name)
    np.testing.assert_allclose(gradient(ours, name), expected, rtol=0, atol=AGREEMENT)
    assert np.abs(expected).max() > 1e-3


@pytest.mark.parametrize("ours, kind, theirs, _", LINEAR)
def test_linear_solutions_agree_with_lineax(ours, kind, theirs, _):
    lineax = peer("lineax")
    definite = kind == "positive definite"
    tags = lineax.positive_semidefinite_tag if definite else ()
    settings = {} if theirs == "LU" else {"rtol": TIGHT, "atol": TIGHT}
    operator = lineax.MatrixLinearOperator(jnp.asarray(MATRICES[kind]), tags)
    solver = getattr(lineax, theirs)(**settings)
    found = jax.jit(lambda b: lineax.linear_solve(operator, b, solver).value)(jnp.asarray(RIGHT))
    check_linear(ours, kind, found)


@pytest.mark.parametrize("ours, kind, _, theirs", LINEAR)
def test_linear_solutions_agree_with_jaxopt(ours, kind, _, theirs):
    solver = getattr(peer("jaxopt").linear_solve, theirs)
    settings = {} if theirs == "solve_lu" else {"tol": TIGHT}
    matrix = jnp.asarray(MATRICES[kind])
    found = jax.jit(lambda b: solver(lambda v: matrix @ v, b, **settings))(jnp.asarray(RIGHT))
    check_linear(ours, kind, found)


@cache
def solution(name, kind):
    operator = LinearOperator(lambda v: MATRICES[kind] @ v)
    return jax.jit(partial(SOLVERS[name], operator))(jnp.asarray(RIGHT))


def check_linear(name, kind, expected):
    x, info = solution(name, kind)
    np.testing.assert_allclose(x, expected, rtol=0, atol=AGREEMENT)
    assert info.relative_residual < 1e-11
