"""Ridge regression as a bilevel problem with a closed form, and solvers without a derivative."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from imaml_jax.bilevel.dense import solve_dense
from imaml_jax.bilevel.gmres import solve_gmres
from imaml_jax.bilevel.implicit import custom_argmin
from imaml_jax.bilevel.linear_solve import solve_cg, solve_cg_steihaug

TIGHT = {
    "cg": partial(solve_cg, tol=1e-13),
    "cg_steihaug": partial(solve_cg_steihaug, tol=1e-13),
    "gmres": partial(solve_gmres, tol=1e-13),
    "dense": solve_dense,
}
rng = np.random.default_rng(0)
INPUTS, TARGETS = rng.normal(size=(8, 3)), rng.normal(size=8)
MATRIX = 3 * np.eye(3) + rng.normal(size=(3, 3))  # for roots that are no minima


def ridge_objective(w, strength, inputs, targets):
    return 0.5 * jnp.sum((inputs @ w - targets) ** 2) + 0.5 * jnp.sum(strength * w**2)


def ridge_closed_form(strength, inputs, targets):
    matrix = inputs.T @ inputs + strength * jnp.eye(inputs.shape[1])
    return jnp.linalg.solve(matrix, inputs.T @ targets)


def newton(objective, steps=1):
    """A solver that reverse mode could not unroll: Newton's method in a while loop."""

    def solver(init, *args):
        def step(carry):
            x, k = carry
            h, g = (f(objective)(x, *args) for f in (jax.hessian, jax.grad))
            return x - jnp.linalg.solve(h, g), k + 1

        return jax.lax.while_loop(lambda carry: carry[1] < steps, step, (init, 0))[0]

    return solver


def diagonal_strength(strength):
    """A scalar strength as it is, one for each feature as a row that scales columns of `eye`."""
    return strength if jnp.ndim(strength) == 0 else strength[None, :]


def ridge(solve):
    """The closed form with its derivatives replaced by implicit ones."""

    def solver(init, strength, inputs, targets):
        del init
        return ridge_closed_form(diagonal_strength(strength), inputs, targets)

    return custom_argmin(ridge_objective, solve)(solver)
