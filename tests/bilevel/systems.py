"""Linear systems and the solvers that the tests of the toolbox share."""

from functools import partial

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

from imaml_jax.bilevel.curvature import damped, gauss_newton
from imaml_jax.bilevel.dense import solve_dense
from imaml_jax.bilevel.gmres import solve_gmres
from imaml_jax.bilevel.linear_solve import solve_cg, solve_cg_steihaug, solve_neumann
from imaml_jax.bilevel.low_rank import nystrom_preconditioner, solve_nystrom, solve_woodbury
from imaml_jax.bilevel.minres import solve_minres
from imaml_jax.types import LinearOperator

SIZE = 9
WAYS = 3


def make_solvers(size, preconditioner_rank, **neumann):
    """Every solver by its name, for systems of a size and with settings of `solve_neumann`."""
    nystrom = partial(nystrom_preconditioner, rank=preconditioner_rank)
    return {
        "cg": solve_cg,
        "cg_steihaug": solve_cg_steihaug,
        "gmres": solve_gmres,
        "dense": partial(solve_dense, diagnose=True),
        "minres": solve_minres,
        "neumann": partial(solve_neumann, **neumann),
        "nystrom": partial(solve_nystrom, rank=size),
        "woodbury": solve_woodbury,
        "preconditioned": partial(solve_cg_steihaug, precondition=nystrom),
    }


def as_tree(vector):
    """A vector of nine numbers as a tree with a matrix, a vector, a scalar and a None."""
    return {"a": vector[:6].reshape(3, 2), "b": (vector[6:8], None), "c": vector[8]}


def flatten(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def matrix_operator(matrix):
    return LinearOperator(lambda v: as_tree(matrix @ ravel_pytree(v)[0]))


def spectrum_matrix(rng, eigenvalues):
    """A symmetric matrix with these eigenvalues in a random basis."""
    basis = np.linalg.qr(rng.normal(size=(len(eigenvalues), len(eigenvalues))))[0]
    return (basis * eigenvalues) @ basis.T


def make_system(kind, rng, dtype=np.float64):
    """`(pieces, dense matrix)`; `make_operator(kind, pieces)` gives the operator."""
    if kind == "low_rank":
        jacobian = rng.normal(size=(2 * WAYS, SIZE))
        point, damping = rng.normal(size=SIZE), rng.uniform(0.5, 2, size=SIZE)
        logits = (jacobian @ point).reshape(2, WAYS)
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        output_hessian = np.zeros((2 * WAYS, 2 * WAYS))
        for i, q in enumerate(p):
            block = slice(WAYS * i, WAYS * (i + 1))
            output_hessian[block, block] = np.diag(q) - np.outer(q, q)
        matrix = jacobian.T @ output_hessian @ jacobian + np.diag(damping)
        pieces = (jacobian, point, damping)
    elif kind == "spd":
        matrix = spectrum_matrix(rng, np.linspace(1, 10, SIZE))
        pieces = (matrix,)
    elif kind == "indefinite":
        matrix = spectrum_matrix(rng, np.linspace(-3, 5.5, SIZE))
        pieces = (matrix,)
    elif kind == "nonsymmetric":
        matrix = 4 * np.eye(SIZE) + rng.normal(size=(SIZE, SIZE))
        pieces = (matrix,)
    return tuple(np.asarray(piece, dtype) for piece in pieces), matrix


def make_operator(kind, pieces):
    if kind != "low_rank":
        return matrix_operator(*pieces)
    jacobian, point, damping = pieces

    def apply_fn(params):
        return {"logits": (jacobian @ ravel_pytree(params)[0]).reshape(2, WAYS)}

    def loss_fn(outputs):  # the Hessian of the log-partition function is singular in each row
        return jax.nn.logsumexp(outputs["logits"], axis=1).sum()

    return damped(gauss_newton(apply_fn, loss_fn, as_tree(point)), as_tree(damping))
