"""Settings of the algorithms that adapt policies, and their list."""

import dataclasses
from typing import Any, ClassVar, Literal

from imaml_jax.learners.algorithm import make_inner
from imaml_jax.learners.settings import Count, Positive, Record, Steps
from imaml_jax.policies.losses import Estimator
from imaml_jax.policies.policy import Policy
from imaml_jax.policies.problem import PolicyProblem, policy_problem
from imaml_jax.types import Environment


@dataclasses.dataclass(frozen=True)
class PolicySettings(Record):
    """Settings of `policy_problem`, whose other arguments are those of `build`.

    Attributes:
      algorithm: its name in `policy_problem`.
    """

    algorithm: ClassVar[Literal["fomaml", "imaml", "maml", "reptile"]]

    inner: Literal["adaptive_gd", "sgd"] = "sgd"
    """Inner optimiser."""
    inner_rate: Positive = 0.5
    """Learning rate of the inner loop."""
    num_steps: Steps = 1
    """Inner steps in training."""
    eval_num_steps: Count = 3
    """Updates at test, each of one inner step."""

    def build(
        self, policy: Policy, environment: Environment, *, shrink: float = 1.0, **trajectories: Any
    ) -> PolicyProblem:
        """The adaptation of a policy to tasks of an environment.

        Args:
          policy: what acts.
          environment: where.
          shrink: multiplies the rate of an inner step.
          **trajectories: `num_trajectories` and `eval_num_trajectories`.
        """
        return policy_problem(
            policy,
            environment,
            algorithm=self.algorithm,
            inner=make_inner(self.inner, self.inner_rate * shrink),
            num_steps=self.num_steps,
            eval_num_steps=1,
            **self._own,
            **trajectories,
        )

    @property
    def _own(self) -> dict[str, Any]:
        return {}


@dataclasses.dataclass(frozen=True)
class MamlPolicySettings(PolicySettings):
    """Settings of MAML."""

    algorithm: ClassVar = "maml"

    estimator: Estimator = "naive"
    """Surrogate of the inner step; naive is the published one, emaml is not for TRPO."""

    @property
    def _own(self) -> dict[str, Any]:
        return {"estimator": self.estimator}


@dataclasses.dataclass(frozen=True)
class FomamlPolicySettings(PolicySettings):
    """Settings of first-order MAML."""

    algorithm: ClassVar = "fomaml"


@dataclasses.dataclass(frozen=True)
class ReptilePolicySettings(PolicySettings):
    """Settings of Reptile."""

    algorithm: ClassVar = "reptile"


@dataclasses.dataclass(frozen=True)
class ImamlPolicySettings(PolicySettings):
    """Settings of implicit MAML, whose update is a solution of its proximal problem."""

    algorithm: ClassVar = "imaml"

    reg_strength: Positive = 1.0
    """Lambda, the strength of the proximal term; after the first update at test it is doubled."""
    temperature: Positive = 1.0
    """Of the weights in the inner problem; the lower, the more its best actions count."""

    def build(
        self, policy: Policy, environment: Environment, *, shrink: float = 1.0, **trajectories: Any
    ) -> PolicyProblem:
        """The adaptation, as of the others; `shrink` divides lambda."""
        return policy_problem(
            policy,
            environment,
            algorithm=self.algorithm,
            inner=make_inner(self.inner, self.inner_rate),
            num_steps=self.num_steps,
            reg_strength=self.reg_strength / shrink,
            temperature=self.temperature,
            **trajectories,
        )


_ALL = (MamlPolicySettings, FomamlPolicySettings, ReptilePolicySettings, ImamlPolicySettings)
POLICY_ALGORITHMS: dict[str, type[PolicySettings]] = {kind.algorithm: kind for kind in _ALL}
"""The settings of each algorithm by its name."""
