"""Sinusoid regression: MAML's first experiment, and BMAML's.

In setting maml, MAML and first-order MAML have the settings of Finn et al., ICML 2017; all others
were chosen on validation tasks of setting maml, with 5 points.
"""

import dataclasses
import math
from typing import Annotated, Any, Literal

from imaml_jax.learners.algorithm import LearnerSettings
from imaml_jax.learners.base import LossFn, mean_squared_error
from imaml_jax.learners.bmaml import BmamlSettings
from imaml_jax.learners.imaml import ImamlSettings
from imaml_jax.learners.imaml_variants import ImplicitAnilSettings
from imaml_jax.learners.implicit_bmaml import ImplicitBmamlSettings
from imaml_jax.learners.implicit_platipus import ImplicitPlatipusSettings
from imaml_jax.learners.maml import AnilSettings, FomamlSettings, MamlSettings
from imaml_jax.learners.mamlpp import MamlppSettings
from imaml_jax.learners.platipus import PlatipusSettings
from imaml_jax.learners.registry import settings_class
from imaml_jax.learners.reptile import ReptileSettings
from imaml_jax.learners.settings import Count, Fixed, NotNegative, Record
from imaml_jax.protocols.protocol import MlpSettings, OuterSettings, Protocol

Setting = Literal["bmaml", "maml"]


@dataclasses.dataclass(frozen=True)
class SinusoidTasks(Record):
    """A distribution of tasks, see `imaml_jax.data.sinusoid.sample_tasks`."""

    phase: Annotated[tuple[float, float], Fixed()] = (0.0, math.pi)
    """Bounds of the phases."""
    frequency: Annotated[tuple[float, float], Fixed()] = (1.0, 1.0)
    """Bounds of the frequencies."""
    relative_noise: NotNegative = 0.0
    """Standard deviation of the noise on the targets, as a share of the amplitude."""
    train_tasks: Count | None = None
    """How many tasks there are to train on; None for unlimited."""
    meta_batch: Count = 25
    """Tasks a meta-step."""
    train_queries: Count = 10
    """Query points in training."""
    test_queries: Count = 100
    """Query points at validation and test."""

    def check_together(self) -> None:
        """Raises ValueError for fewer tasks than a meta-step takes."""
        if self.train_tasks is not None and self.train_tasks < self.meta_batch:
            raise ValueError(
                f"train_tasks={self.train_tasks} must be at least meta_batch={self.meta_batch}"
            )

    @property
    def loss_fn(self) -> LossFn:
        """The loss of a batch."""
        return mean_squared_error


_SHORT, _LONG = OuterSettings(outer_rate=3e-3, meta_steps=5_000), OuterSettings(meta_steps=20_000)
_MAML = OuterSettings(meta_steps=70_000)
_EXACT: dict[str, Any] = {"curvature": "gauss_newton", "solve": "woodbury"}
_PARTICLES: dict[str, Any] = {"adapts": "all", "meta_loss": "particles"}
_SETTINGS: tuple[tuple[LearnerSettings, OuterSettings], ...] = (
    (MamlSettings(inner_rate=0.01, num_steps=1, eval_num_steps=10), _MAML),
    (FomamlSettings(inner_rate=0.01, num_steps=1, eval_num_steps=10), _MAML),
    (
        ReptileSettings(statistics="batch", inner_rate=0.02, num_steps=5, eval_num_steps=32),
        OuterSettings(outer="sgd", outer_rate=1.0, schedule="linear", meta_steps=15_000),
    ),
    (
        ImamlSettings(
            inner="adaptive_gd", inner_rate=0.01, num_steps=8, eval_num_steps=16, **_EXACT
        ),
        _SHORT,
    ),
    # Adam at the weights' own pace would double a learned rate of 0.01 in ten meta-steps, and the
    # largest sinusoids then diverge.
    (
        MamlppSettings(inner_rate=0.01, epoch_length=500),
        dataclasses.replace(_LONG, relative_rates=True),
    ),
    (AnilSettings(inner_rate=0.01, eval_num_steps=5), _LONG),
    (
        ImplicitAnilSettings(
            num_steps=2, eval_num_steps=2, reg_strength=0.1, cg_steps=20, **_EXACT
        ),
        _LONG,
    ),
    (
        PlatipusSettings(inner_rate=0.01, eval_num_steps=10),
        dataclasses.replace(_LONG, outer_rate=3e-3),
    ),
    (
        ImplicitPlatipusSettings(inner_rate=0.01, num_steps=8, eval_num_steps=16, kl_weight=0.03),
        _SHORT,
    ),
    (
        BmamlSettings(
            inner_rate=0.003, eval_num_steps=5, num_samples=10, remat=False, **_PARTICLES
        ),
        dataclasses.replace(_LONG, outer_rate=3e-3, schedule="cosine"),
    ),
    (
        ImplicitBmamlSettings(
            inner="adaptive_gd", inner_rate=0.001, num_steps=30, eval_num_steps=60, **_PARTICLES
        ),
        dataclasses.replace(_SHORT, schedule="cosine"),
    ),
)
SETTINGS = {learner.algorithm: (learner, outer) for learner, outer in _SETTINGS}
# One step in training and ten at test diverge on BMAML's frequencies.
_FIVE_STEPS = {"num_steps": 5, "eval_num_steps": 5}
_ON_BMAMLS_TASKS: dict[str, dict[str, Any]] = {
    "maml": _FIVE_STEPS,
    "fomaml": _FIVE_STEPS,
    "bmaml": {"inner_rate": 1e-3, "outer_rate": 1e-3, "posterior": "learned_precisions"},
}


def get(setting: Setting, algorithm: str) -> Protocol:
    """The protocol of an algorithm on the tasks of MAML's experiment, or of BMAML's.

    An algorithm that was never chosen for here has its settings' defaults.

    Raises:
      ValueError: an unknown algorithm.
    """
    learner, outer = SETTINGS.get(algorithm) or (settings_class(algorithm)(), _LONG)
    source = "Finn et al., ICML 2017; settings of other algorithms: this library"
    protocol = Protocol("maml", source, SinusoidTasks(), MlpSettings(), outer, learner)
    if setting == "maml":
        return protocol
    protocol = dataclasses.replace(
        protocol,
        name="bmaml",
        source="Yoon et al., NeurIPS 2018; settings of other algorithms: this library",
        tasks=SinusoidTasks(
            phase=(0.0, 2 * math.pi),
            frequency=(0.5, 2.0),
            relative_noise=0.01,
            train_tasks=1000,
            meta_batch=10,
        ),
        network=MlpSettings(hidden_layers=3, kernel_init="xavier"),  # its code's
    )
    return protocol.with_settings(_ON_BMAMLS_TASKS.get(algorithm, {}))
