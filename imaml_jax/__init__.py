"""Gradient-based meta-learning by implicit differentiation.

The light modules' names; networks, data, training, evaluation and checkpoints are imported by
module, so that the toolbox needs neither flax nor orbax.
"""

from imaml_jax.adaptive import AdaptiveInfo, adaptive_gradient
from imaml_jax.curvature import damped, gauss_newton, ggnvp, ggnvp_fn, hessian, hvp, hvp_fn
from imaml_jax.diagonal import estimate_diagonal, jacobi_preconditioner
from imaml_jax.gradient_error import (
    GradientError,
    implicit_gradient_bound,
    implicit_gradient_error,
)
from imaml_jax.implicit import custom_argmin, custom_root, root_jvp, root_vjp
from imaml_jax.inner import MinimizeInfo, adaptive_gd, minimize, newton_cg, proximal_objective
from imaml_jax.learners import (
    cross_entropy,
    fomaml,
    imaml,
    imaml_dev,
    leo,
    maml,
    mean_squared_error,
    nearest_centroid,
    reptile,
)
from imaml_jax.linear_solve import (
    SolveInfo,
    solve_cg,
    solve_cg_steihaug,
    solve_dense,
    solve_gmres,
    solve_neumann,
)
from imaml_jax.low_rank import nystrom_preconditioner, solve_nystrom, solve_woodbury
from imaml_jax.minres import solve_minres
from imaml_jax.types import Batch, LinearOperator, LowRank, MetaLearner, Task

__version__ = "0.1.0"

__all__ = [
    "AdaptiveInfo",
    "Batch",
    "GradientError",
    "LinearOperator",
    "LowRank",
    "MetaLearner",
    "MinimizeInfo",
    "SolveInfo",
    "Task",
    "adaptive_gd",
    "adaptive_gradient",
    "cross_entropy",
    "custom_argmin",
    "custom_root",
    "damped",
    "estimate_diagonal",
    "fomaml",
    "gauss_newton",
    "ggnvp",
    "ggnvp_fn",
    "hessian",
    "hvp",
    "hvp_fn",
    "imaml",
    "imaml_dev",
    "implicit_gradient_bound",
    "implicit_gradient_error",
    "jacobi_preconditioner",
    "leo",
    "maml",
    "mean_squared_error",
    "minimize",
    "nearest_centroid",
    "newton_cg",
    "nystrom_preconditioner",
    "proximal_objective",
    "reptile",
    "root_jvp",
    "root_vjp",
    "solve_cg",
    "solve_cg_steihaug",
    "solve_dense",
    "solve_gmres",
    "solve_minres",
    "solve_neumann",
    "solve_nystrom",
    "solve_woodbury",
]
