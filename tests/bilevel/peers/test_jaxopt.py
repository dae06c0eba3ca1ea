"""What jaxopt tests of its implicit differentiation and linear solvers, asked of the toolbox.

Peer: google/jaxopt 0.8.5, commit 2de13bf01fd29e22862236a0d869f2b14e1629d4,
`tests/implicit_diff_test.py` and `tests/linear_solve_test.py`.

Counting rule: a case is one assertion of theirs, in float64. Their solvers stand for ours by the
systems that they are for: `solve_lu`, `solve_inv` and `solve_cholesky` for `solve_dense`,
`solve_qr` for `solve_lstsq`, `solve_normal_cg` for `solve_lsmr`, `solve_cg` and `solve_gmres` for
those of the same names. As pytest counts: 34 cases.

Left out on purpose:

- iterative refinement (3 assertions) and BiCGSTAB (2): GMRES, and LU in float64, serve the same
  systems.
- assembling a matrix (2) and the product with the normal matrix (1): private helpers of jaxopt.
- `custom_fixed_point` as a decorator of its own: a fixed point of `T` is the root of `T(x) - x`,
  and is tested as that.
"""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imaml_jax import (
    LinearOperator,
    custom_root,
    root_jvp,
    root_vjp,
    solve_cg,
    solve_dense,
    solve_gmres,
    solve_lsmr,
    solve_lstsq,
)

pytestmark = pytest.mark.usefixtures("x64")

rng = np.random.default_rng(0)
INPUTS, TARGETS, STRENGTH = rng.normal(size=(10, 3)), rng.normal(size=10), 5.0
SQUARE, RIGHT = rng.normal(size=(5, 5)), rng.normal(size=5)
TENSOR, RIGHT_TENSOR = rng.normal(size=(5, 3, 5, 3)), rng.normal(size=(5, 3))
TIGHT = 1e-12

SOLVERS: dict[str, Any] = {
    "dense": solve_dense,
    "lstsq": solve_lstsq,
    "lsmr": partial(solve_lsmr, tol=TIGHT),
    "gmres": partial(solve_gmres, tol=TIGHT),
    "cg": partial(solve_cg, tol=TIGHT),
}
# What jaxopt solves, and by which of our solvers.
LINEAR = [
    ("square", "dense"),
    ("square", "lstsq"),
    ("square", "lsmr"),
    ("square", "gmres"),
    ("tensor", "dense"),
    ("tensor", "gmres"),
    ("definite", "dense"),
    ("definite", "lstsq"),
    ("definite", "cg"),
    ("ridge", "dense"),
    ("ridge", "gmres"),
    ("gram with ridge", "cg"),
    ("gram with ridge", "lsmr"),
    ("one number", "dense"),
    ("wide", "lsmr"),
]
DERIVATIVES = ["custom_root", "with aux", "fixed point", "keywords", "keywords, unordered"]

close = partial(np.testing.assert_allclose, rtol=0, atol=1e-9)


def ridge_loss(weights, strength, inputs, targets):
    residuals = inputs @ weights - targets
    return jnp.mean(residuals**2) / 2 + strength * jnp.sum(weights**2) / 2


optimality = jax.grad(ridge_loss)


def step(weights, strength, inputs, targets):
    """Gradient descent, of which the minimum is a fixed point."""
    return weights - optimality(weights, strength, inputs, targets)


def fixed_point_residual(weights, strength, inputs, targets):
    return step(weights, strength, inputs, targets) - weights


def ridge(init, strength, inputs, targets):
    gram = inputs.T @ inputs + strength * len(targets) * jnp.eye(inputs.shape[1])
    return jnp.linalg.solve(gram, inputs.T @ targets)


def ridge_of_keywords(init, **arguments):
    return ridge(init, arguments["strength"], arguments["inputs"], arguments["targets"])


@cache
def expected():
    """The solution, and its derivative in the strength."""
    gram = INPUTS.T @ INPUTS + STRENGTH * len(TARGETS) * np.eye(3)
    solution = np.linalg.solve(gram, INPUTS.T @ TARGETS)
    return solution, -len(TARGETS) * np.linalg.solve(gram, solution)


def decorated(kind):
    """`strength -> weights`."""
    start = jnp.zeros(3)
    if kind == "with aux":

        @custom_root(optimality, has_aux=True)
        def with_aux(init, *arguments):
            return ridge(init, *arguments), None

        return lambda strength: with_aux(start, strength, INPUTS, TARGETS)[0]
    if kind.startswith("keywords"):
        solver = custom_root(optimality)(ridge_of_keywords)
        if "unordered" in kind:
            return lambda strength: solver(start, targets=TARGETS, strength=strength, inputs=INPUTS)
        return lambda strength: solver(start, strength=strength, inputs=INPUTS, targets=TARGETS)
    residual = fixed_point_residual if kind == "fixed point" else optimality
    solver = custom_root(residual)(ridge)
    return lambda strength: solver(start, strength, inputs=INPUTS, targets=TARGETS)


def test_root_vjp():
    weights, arguments = expected()[0], (STRENGTH, INPUTS, TARGETS)

    @jax.jit
    @jax.vmap
    def of_strength(cotangent):
        return root_vjp(optimality, weights, arguments, cotangent, solve_dense)[0][0]

    close(of_strength(np.eye(3)), expected()[1])


def test_root_jvp():
    arguments = (STRENGTH, INPUTS, TARGETS)
    tangents = (1.0, np.zeros_like(INPUTS), np.zeros_like(TARGETS))
    found = jax.jit(lambda w: root_jvp(optimality, w, arguments, tangents, solve_dense))(
        expected()[0]
    )
    close(found, expected()[1])


@pytest.mark.parametrize("kind", DERIVATIVES)
def test_value(kind):
    close(decorated(kind)(STRENGTH), expected()[0])


@pytest.mark.parametrize("kind", DERIVATIVES)
def test_jacobian(kind):
    close(jax.jacrev(decorated(kind))(STRENGTH), expected()[1])


@pytest.mark.parametrize("kind", DERIVATIVES[-2:])
def test_compiled_value(kind):
    close(jax.jit(decorated(kind))(STRENGTH), expected()[0])


@pytest.mark.parametrize("kind", DERIVATIVES[-2:])
def test_compiled_jacobian(kind):
    close(jax.jit(jax.jacrev(decorated(kind)))(STRENGTH), expected()[1])


def linear_system(kind, name):
    """An operator, its matrix, and a right-hand side."""
    gram, ridge = SQUARE.T @ SQUARE, np.eye(5)
    if kind == "tensor":
        matrix = TENSOR.reshape(15, 15)
        return lambda v: jnp.tensordot(TENSOR, v, 2), matrix, RIGHT_TENSOR
    if kind == "wide":
        domain = jax.ShapeDtypeStruct((5,), jnp.float64)
        operator = LinearOperator(lambda v: SQUARE[:3] @ v, domain=domain)
        return operator, SQUARE[:3], RIGHT[:3]
    matrix, right = {
        "square": (SQUARE, RIGHT),
        "definite": (gram, RIGHT),
        "ridge": (SQUARE + ridge, RIGHT),
        "gram with ridge": (gram + ridge, SQUARE.T @ RIGHT if name == "lsmr" else RIGHT),
        "one number": (SQUARE[:1, :1], RIGHT[:1]),
    }[kind]
    return lambda v: matrix @ v, matrix, right


@pytest.mark.parametrize("kind, name", LINEAR)
def test_linear(kind, name):
    operator, matrix, right = linear_system(kind, name)
    x, info = jax.jit(partial(SOLVERS[name], operator))(right)
    assert info.converged
    close(np.ravel(x), np.linalg.pinv(matrix) @ right.ravel(), atol=1e-8)


@pytest.mark.parametrize("kind", ["square", "wide"])
def test_the_transposed_system(kind):
    """Whose right-hand side has the shape of the unknowns of the other."""
    matrix = SQUARE if kind == "square" else SQUARE[:3]
    back = jax.linear_transpose(lambda v: matrix @ v, RIGHT)
    shape = jax.ShapeDtypeStruct((len(matrix),), jnp.float64)
    x, _ = jax.jit(partial(solve_lstsq, LinearOperator(lambda v: back(v)[0], domain=shape)))(RIGHT)
    close(x, np.linalg.pinv(matrix.T) @ RIGHT)


def test_a_rectangular_function_without_its_domain_is_refused():
    with pytest.raises((TypeError, ValueError)):
        solve_lsmr(lambda v: SQUARE[:3] @ v, RIGHT[:3])
