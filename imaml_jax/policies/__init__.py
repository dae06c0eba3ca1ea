"""Meta-learning of policies by reinforcement: returns, losses, the problem, its outer steps, tasks.

Imports the toolbox, `learners/base.py` and `training`. Read `problem.py` first: it is the
`Problem` of a policy, and `gradient.py` its learner.
"""

from imaml_jax.policies.gradient import policy_gradient
from imaml_jax.policies.policy import (
    Gaussian,
    GaussianParams,
    Policy,
    categorical_policy,
    gaussian_policy,
)
from imaml_jax.policies.problem import policy_problem

__all__ = [
    "Gaussian",
    "GaussianParams",
    "Policy",
    "categorical_policy",
    "gaussian_policy",
    "policy_gradient",
    "policy_problem",
]
