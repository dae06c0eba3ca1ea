"""Meta-reinforcement learning: policies, returns, losses, adaptation, outer steps, environments.

Imports `bilevel`, `training`, `types`, and of `learners` what is no algorithm. Read `problem.py`
first: `policy_problem` is the adaptation of a policy; `gradient.py` makes a `MetaLearner` of it.
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
