"""This library's own protocol: the same tasks for all, settings chosen on validation characters.

It covers every registered algorithm; one without an entry here has its settings' defaults. Not
tuned: the settings for photographs, and those of implicit BMAML and implicit PLATIPUS.
"""

from dataclasses import replace
from typing import Any

from imaml_jax.learners.algorithm import LearnerSettings
from imaml_jax.learners.bmaml import BmamlSettings
from imaml_jax.learners.imaml import ImamlSettings
from imaml_jax.learners.imaml_variants import HessianFreeSettings, ImplicitAnilSettings
from imaml_jax.learners.implicit_bmaml import ImplicitBmamlSettings
from imaml_jax.learners.implicit_platipus import ImplicitPlatipusSettings
from imaml_jax.learners.maml import AnilSettings, FomamlSettings, MamlSettings
from imaml_jax.learners.mamlpp import MamlppSettings
from imaml_jax.learners.platipus import PlatipusSettings
from imaml_jax.learners.registry import ALGORITHMS, settings_class
from imaml_jax.learners.reptile import ReptileSettings, TransductiveReptileSettings
from imaml_jax.protocols.protocol import (
    Conv4Settings,
    ImageTasks,
    OmniglotTasks,
    OuterSettings,
    Protocol,
)

COVERS = ALGORITHMS

_IMPLICIT: dict[str, Any] = {"curvature": "gauss_newton", "solve": "cg_steihaug"}
_REPTILE: dict[str, Any] = {
    "inner": "adam",
    "inner_rate": 3e-3,
    "num_steps": 5,
    "eval_num_steps": 50,
    "batch_size": 10,
    "eval_batch_size": 5,
}
_LEARNERS: tuple[LearnerSettings, ...] = (
    MamlSettings(inner_rate=0.03, eval_num_steps=5),
    FomamlSettings(inner_rate=0.03, eval_num_steps=5),
    ReptileSettings(**_REPTILE),
    TransductiveReptileSettings(**_REPTILE),
    ImamlSettings(
        reg_strength=0.03,
        inner="adaptive_gd",
        inner_rate=0.05,
        num_steps=8,
        eval_num_steps=8,
        cg_steps=8,
        **_IMPLICIT,
    ),
    HessianFreeSettings(reg_strength=0.1, num_steps=3, eval_num_steps=3, cg_steps=8, **_IMPLICIT),
    MamlppSettings(inner_rate=0.1),
    AnilSettings(inner_rate=0.1, eval_num_steps=5),
    # A head is a convex problem, cheap beside the features: both solves run to float32 precision.
    ImplicitAnilSettings(
        reg_strength=0.03, num_steps=10, eval_num_steps=10, cg_steps=50, **_IMPLICIT
    ),
    PlatipusSettings(inner_rate=0.03, eval_num_steps=5),
    ImplicitPlatipusSettings(inner_rate=0.05, num_steps=8, eval_num_steps=8, reg_strength=0.03),
    BmamlSettings(inner_rate=0.03, eval_num_steps=5),
    ImplicitBmamlSettings(inner="adaptive_gd", inner_rate=0.03, num_steps=10, reg_strength=1.0),
)
LEARNERS = {learner.algorithm: learner for learner in _LEARNERS}
_SGD = OuterSettings(outer="sgd", outer_rate=1.0, schedule="linear", meta_steps=5_000)
_ADAM = OuterSettings(outer_rate=2e-3, schedule="cosine", meta_steps=5_000)
_OUTER = {
    "anil": replace(_ADAM, outer_rate=1e-3),
    "reptile": _SGD,
    "reptile_transductive": _SGD,
}
_TASKS = {
    name: {"train_shots": 10, "train_queries": 1} for name in ("reptile", "reptile_transductive")
}


def make(algorithm: str, ways: int, shots: int, photographs: bool) -> Protocol:
    """The protocol; see `protocols.get`."""
    del ways
    learner = LEARNERS.get(algorithm) or settings_class(algorithm)()
    tasks: dict[str, Any] = {"train_shots": shots, "train_queries": 15 if photographs else 5}
    tasks |= _TASKS.get(algorithm, {})
    outer = _OUTER.get(algorithm, _ADAM)
    if not photographs:
        return Protocol(
            "common",
            "this library, chosen on validation characters",
            OmniglotTasks(
                split="finn",
                invert=True,
                train_rotations="augment",
                test_rotations="augment",
                meta_batch=8,
                test_queries=5,
                **tasks,
            ),
            Conv4Settings(),
            outer,
            learner,
        )
    return Protocol(
        "common",
        "this library's settings for Omniglot, not tuned on photographs",
        ImageTasks("mini_imagenet", **tasks),
        Conv4Settings(filters=32, downsample="max_pool"),
        outer,
        learner,
    )
