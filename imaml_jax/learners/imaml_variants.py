"""Variants of implicit MAML: Hessian-free, and of the head alone."""

import dataclasses
from typing import Annotated, ClassVar, Literal

from imaml_jax.learners.algorithm import Adapts, AnyInner
from imaml_jax.learners.imaml import ImamlSettings
from imaml_jax.learners.settings import Fixed, When


@dataclasses.dataclass(frozen=True)
class HessianFreeSettings(ImamlSettings):
    """Settings of `imaml` with the Hessian-free inner solver."""

    algorithm: ClassVar[str] = "imaml_hf"
    title: ClassVar[str] = "iMAML, Hessian-free"

    inner: Literal["newton_cg"] = "newton_cg"
    """Inner optimiser."""
    inner_rate: Annotated[float, Fixed(), When(lambda own: False, "inner=newton_cg")] = 0.1
    """None that has an effect."""


@dataclasses.dataclass(frozen=True)
class ImplicitAnilSettings(ImamlSettings):
    """Settings of implicit ANIL, which is `imaml` with the head alone adapted."""

    algorithm: ClassVar[str] = "implicit_anil"
    title: ClassVar[str] = "implicit ANIL"

    adapts: Adapts = "head"
    """Parameters that the inner loop adapts: the head, or others."""
    inner: AnyInner = "newton_cg"
    """Inner optimiser; newton_cg is Hessian-free, nesterov is SGD with momentum 0.8."""
