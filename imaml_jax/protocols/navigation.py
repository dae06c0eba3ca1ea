"""2D navigation: MAML's third experiment."""

import dataclasses
from typing import Annotated, Literal

from imaml_jax.learners.settings import Count, Positive, Record, When, check_choice
from imaml_jax.policies.settings import (
    FomamlPolicySettings,
    ImamlPolicySettings,
    MamlPolicySettings,
    ReptilePolicySettings,
)
from imaml_jax.protocols.protocol import MlpSettings, OuterSettings, Protocol

# Returns after 0, 1, 2 and 3 updates, published with the code of Finn et al.
PUBLISHED = {
    "published, MAML": (-40.4, -11.7, -3.3, -3.2),
    "published, random initialisation": (-82.7, -58.0, -54.0, -47.0),
}
ORACLE = -2.3
AFTER_ONE_UPDATE = {"maml": PUBLISHED["published, MAML"][1]}
"""The published return after one update by algorithm."""


@dataclasses.dataclass(frozen=True)
class NavigationTasks(Record):
    """Goals, see `imaml_jax.policies.navigation`."""

    meta_batch: Count = 20
    """Tasks a meta-step; 40 in the paper."""
    horizon: Count = 100
    """Most steps of a trajectory."""


_OF_ADAM = When(lambda own: own.outer == "adam", "outer=trpo")


@dataclasses.dataclass(frozen=True)
class PolicyOuterSettings(OuterSettings):
    """The outer optimiser of a policy."""

    outer: Literal["adam", "trpo"] = "trpo"
    """Outer optimiser; TRPO has no outer rate, and does not serve Reptile."""
    outer_rate: Annotated[Positive, _OF_ADAM] = 1e-2
    """Learning rate of Adam at the start."""
    outer_clip: Annotated[Positive | None, _OF_ADAM] = None
    """Bound on each entry of the meta-gradient; None for none."""
    schedule: Annotated[Literal["constant", "cosine", "linear"], _OF_ADAM] = "constant"
    """Schedule of Adam's rate; linear ends at 0."""
    meta_steps: Count = 100
    """Meta-steps in all."""


_TRPO, _ADAM = PolicyOuterSettings(), PolicyOuterSettings(outer="adam")
_SETTINGS = (
    (MamlPolicySettings(), _TRPO),
    (FomamlPolicySettings(), _TRPO),
    (ReptilePolicySettings(num_steps=3), _ADAM),
    (ImamlPolicySettings("adaptive_gd", inner_rate=0.1, num_steps=10, temperature=0.3), _ADAM),
)
SETTINGS = {learner.algorithm: (learner, outer) for learner, outer in _SETTINGS}


def get(algorithm: str) -> Protocol:
    """The protocol of an algorithm.

    Raises:
      ValueError: an unknown algorithm.
    """
    check_choice("algorithm", algorithm, SETTINGS)
    learner, outer = SETTINGS[algorithm]
    return Protocol(
        "navigation",
        "Finn et al., ICML 2017; settings of other algorithms: this library",
        NavigationTasks(),
        MlpSettings(hidden_units=100, kernel_init="xavier"),
        outer,
        learner,
    )
