"""LEO's published constants and accuracies, by data set and shots."""

import dataclasses
from typing import Any

from imaml_jax.learners.leo import LeoSettings
from imaml_jax.learners.settings import Count, Positive, Record

META_STEPS = 100_000
PUBLISHED = {1: (61.76, 0.08), 5: (77.59, 0.12)}
"""5-way, on the authors' mini-ImageNet features: mean in per cent and half-width, by shots."""


@dataclasses.dataclass(frozen=True)
class LeoOuterSettings(Record):
    """Adam at a constant rate, after two clippings."""

    outer_rate: Positive
    """Learning rate of the outer optimiser."""
    meta_steps: Count = META_STEPS
    """Meta-steps in all."""


def _constants(
    outer_rate: float,
    l2_penalty: float,
    orthogonality_penalty: float,
    dropout: float,
    kl_weight: float,
    encoder_penalty: float,
) -> tuple[LeoSettings, LeoOuterSettings]:
    penalties: dict[str, Any] = {
        "l2_penalty": l2_penalty,
        "orthogonality_penalty": orthogonality_penalty,
        "dropout": dropout,
        "kl_weight": kl_weight,
        "encoder_penalty": encoder_penalty,
    }
    return LeoSettings(**penalties), LeoOuterSettings(outer_rate)


CONSTANTS = {
    ("mini_imagenet", 1): _constants(
        2.739071e-4, 3.623413e-10, 0.188103, 0.307651, 0.756143, 5.756821e-6
    ),
    ("mini_imagenet", 5): _constants(
        4.102361e-4, 8.540338e-9, 1.523998e-3, 0.300299, 0.466387, 2.661608e-7
    ),
    ("tiered_imagenet", 1): _constants(
        8.659053e-4, 4.148858e-10, 5.451078e-3, 0.475126, 2.034189e-3, 8.302962e-5
    ),
    ("tiered_imagenet", 5): _constants(
        6.110314e-4, 1.690399e-10, 2.481216e-2, 0.415158, 1.622811, 2.672450e-5
    ),
}
