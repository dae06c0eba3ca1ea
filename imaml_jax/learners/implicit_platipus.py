"""PLATIPUS whose samples are adapted by implicit MAML."""

import dataclasses
from functools import partial
from typing import Any, ClassVar

from imaml_jax.bilevel.low_rank import solve_woodbury
from imaml_jax.learners.algorithm import Descent
from imaml_jax.learners.imaml import imaml
from imaml_jax.learners.platipus import PlatipusSettings
from imaml_jax.learners.settings import Positive


@dataclasses.dataclass(frozen=True)
class ImplicitPlatipusSettings(PlatipusSettings):
    """Settings of `platipus` with `imaml` as the adaptation, its system solved exactly."""

    algorithm: ClassVar[str] = "implicit_platipus"
    title: ClassVar[str] = "implicit PLATIPUS"

    inner: Descent = "adaptive_gd"
    """Inner optimiser; nesterov is SGD with momentum 0.8."""
    reg_strength: Positive = 2.0
    """Lambda, the strength of the proximal term."""

    def arguments(self) -> dict[str, Any]:
        """The arguments of the factory."""
        values = super().arguments()
        adaptation = partial(
            imaml,
            reg_strength=values.pop("reg_strength"),
            curvature="gauss_newton",
            solve=solve_woodbury,
        )
        return {**values, "adaptation": adaptation}
