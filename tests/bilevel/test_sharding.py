"""Solvers and implicit derivatives inside `shard_map` with its check on, and on explicit meshes.

One device shows it: JAX checks what varies over an axis, and how arrays are sharded, by name.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import imaml_jax
from imaml_jax import LinearOperator, custom_root
from imaml_jax.bilevel.curvature import damped
from tests.bilevel.systems import make_solvers

pytestmark = pytest.mark.usefixtures("x64")
SIZE = 6
SOLVERS = make_solvers(SIZE, 3, step_size=0.05, max_steps=2000) | {
    "auto": imaml_jax.solve_auto,
    "dense": imaml_jax.solve_dense,
    "lsmr": imaml_jax.solve_lsmr,
    "lstsq": imaml_jax.solve_lstsq,
}
del SOLVERS["woodbury"]  # needs a factor


def system():
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(SIZE, SIZE))
    return jnp.asarray(matrix @ matrix.T + 2 * np.eye(SIZE)), jnp.asarray(rng.normal(size=SIZE))


def mesh_of(axis_type):
    return jax.make_mesh((1,), ("i",), devices=jax.devices()[:1], axis_types=(axis_type,))


@pytest.mark.parametrize("b_varies", [True, False])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_in_shard_map(name, b_varies):
    matrix, b = system()

    def solve(matrix, b):
        matrix, b = matrix[0], b[0] if b_varies else b
        return SOLVERS[name](damped(LinearOperator(lambda v: matrix @ v), 1.0), b)[0][None]

    in_specs = P("i"), P("i") if b_varies else P()
    run = jax.shard_map(solve, mesh=mesh_of(AxisType.Auto), in_specs=in_specs, out_specs=P("i"))
    found = jax.jit(run)(matrix[None], b[None] if b_varies else b)
    np.testing.assert_allclose(found[0], np.linalg.solve(matrix + np.eye(SIZE), b), rtol=1e-6)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_on_an_explicit_mesh(name):
    matrix, b = system()
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        matrix = jax.device_put(matrix, NamedSharding(mesh, P("i", None)))
        b = jax.device_put(b, NamedSharding(mesh, P("i")))

        def matvec(v):
            return jnp.matmul(matrix, jax.sharding.reshard(v, P()), out_sharding=P("i"))

        found, _ = jax.jit(lambda b: SOLVERS[name](damped(LinearOperator(matvec), 1.0), b))(b)
    np.testing.assert_allclose(found, np.linalg.solve(matrix + np.eye(SIZE), b), rtol=1e-6)


def cubic(x, a):
    return x**3 + x - a


def test_an_implicit_gradient_on_both_meshes():
    a = jnp.linspace(1.0, 2.0, SIZE)
    root_of = custom_root(cubic)(lambda init, a: jnp.sqrt(a) / 2)
    expected = 1 / (3 * a / 4 + 1)
    gradient = jax.grad(lambda a: root_of(None, a).sum())
    sharded = jax.shard_map(
        gradient, mesh=mesh_of(AxisType.Auto), in_specs=P("i"), out_specs=P("i")
    )
    np.testing.assert_allclose(jax.jit(sharded)(a), expected, rtol=1e-9)
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        given = jax.device_put(a, NamedSharding(mesh, P("i")))
        np.testing.assert_allclose(jax.jit(gradient)(given), expected, rtol=1e-9)
