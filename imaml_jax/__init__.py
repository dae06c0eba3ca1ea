"""Gradient-based meta-learning by implicit differentiation.

Re-exports the names of the modules that need only JAX and Optax. Import `networks`, `data`,
`training` and `protocols` by name, so that `import imaml_jax` loads neither flax nor orbax.
"""

from imaml_jax.bilevel.adaptive import AdaptiveInfo, adaptive_gradient
from imaml_jax.bilevel.curvature import (
    damped,
    gauss_newton,
    ggnvp,
    ggnvp_fn,
    hessian,
    hvp,
    hvp_fn,
)
from imaml_jax.bilevel.dense import solve_dense, solve_lstsq
from imaml_jax.bilevel.diagonal import estimate_diagonal, jacobi_preconditioner
from imaml_jax.bilevel.failure import LinearSolveError
from imaml_jax.bilevel.gmres import solve_gmres
from imaml_jax.bilevel.gradient_error import (
    GradientError,
    implicit_gradient_bound,
    implicit_gradient_error,
)
from imaml_jax.bilevel.implicit import custom_argmin, custom_root, root_jvp, root_vjp
from imaml_jax.bilevel.inner import (
    MinimizeInfo,
    adaptive_gd,
    minimize,
    newton_cg,
    proximal_objective,
)
from imaml_jax.bilevel.linear_solve import (
    solve_auto,
    solve_cg,
    solve_cg_steihaug,
    solve_neumann,
    solve_right_preconditioned,
)
from imaml_jax.bilevel.linear_system import SolveInfo, transpose
from imaml_jax.bilevel.low_rank import nystrom_preconditioner, solve_nystrom, solve_woodbury
from imaml_jax.bilevel.lsmr import solve_lsmr
from imaml_jax.bilevel.minres import solve_minres
from imaml_jax.learners import (
    PlatipusParams,
    bmaml,
    cross_entropy,
    fomaml,
    imaml,
    imaml_dev,
    implicit_bmaml,
    learned_precisions,
    leo,
    likelihood,
    maml,
    mamlpp,
    mean_outputs,
    mean_squared_error,
    mixture_logits,
    nearest_centroid,
    platipus,
    reptile,
)
from imaml_jax.learners.svgd import median_bandwidth, svgd_direction, svgd_objective
from imaml_jax.policies import categorical_policy, gaussian_policy, policy_gradient, policy_problem
from imaml_jax.types import (
    Batch,
    Environment,
    LinearOperator,
    LowRank,
    MetaLearner,
    Task,
)

__version__ = "0.1.0"

__all__ = [
    "AdaptiveInfo",
    "Batch",
    "Environment",
    "GradientError",
    "LinearOperator",
    "LinearSolveError",
    "LowRank",
    "MetaLearner",
    "MinimizeInfo",
    "PlatipusParams",
    "SolveInfo",
    "Task",
    "adaptive_gd",
    "adaptive_gradient",
    "bmaml",
    "categorical_policy",
    "cross_entropy",
    "custom_argmin",
    "custom_root",
    "damped",
    "estimate_diagonal",
    "fomaml",
    "gauss_newton",
    "gaussian_policy",
    "ggnvp",
    "ggnvp_fn",
    "hessian",
    "hvp",
    "hvp_fn",
    "imaml",
    "imaml_dev",
    "implicit_bmaml",
    "implicit_gradient_bound",
    "implicit_gradient_error",
    "jacobi_preconditioner",
    "learned_precisions",
    "leo",
    "likelihood",
    "maml",
    "mamlpp",
    "mean_outputs",
    "mean_squared_error",
    "median_bandwidth",
    "minimize",
    "mixture_logits",
    "nearest_centroid",
    "newton_cg",
    "nystrom_preconditioner",
    "platipus",
    "policy_gradient",
    "policy_problem",
    "proximal_objective",
    "reptile",
    "root_jvp",
    "root_vjp",
    "solve_auto",
    "solve_cg",
    "solve_cg_steihaug",
    "solve_dense",
    "solve_gmres",
    "solve_lsmr",
    "solve_lstsq",
    "solve_minres",
    "solve_neumann",
    "solve_nystrom",
    "solve_right_preconditioned",
    "solve_woodbury",
    "svgd_direction",
    "svgd_objective",
    "transpose",
]
