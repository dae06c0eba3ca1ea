"""MAML's protocol, by its code; ANIL goes by it too."""

from typing import Any

from imaml_jax.learners.registry import settings_class
from imaml_jax.learners.settings import values_of
from imaml_jax.protocols.protocol import (
    Conv4Settings,
    ImageTasks,
    OmniglotTasks,
    OuterSettings,
    Protocol,
)

COVERS = ("anil", "fomaml", "maml")


def make(algorithm: str, ways: int, shots: int, photographs: bool) -> Protocol:
    """The protocol; see `protocols.get`."""
    few = ways <= 5
    # The code's loss is the sum over examples divided by the shots, that is `ways` times the mean.
    learner = settings_class(algorithm)().with_settings(
        {
            "inner_rate": (0.4 if few else 0.1) * ways,
            "num_steps": 1 if few else 5,
            "eval_num_steps": 10,
        }
    )
    if values_of(learner)["adapts"] == "all":
        learner = learner.with_settings({"adapts": "not_norms"})
    tasks: dict[str, Any] = {"train_shots": shots, "test_tasks": 600}
    source = "Finn et al., ICML 2017, and its code cbfinn/maml"
    if not photographs:
        return Protocol(
            "finn",
            source,
            OmniglotTasks(
                split="finn",
                invert=True,
                train_rotations="augment",
                test_rotations="augment",
                meta_batch=32 if few else 16,
                train_queries=shots,
                test_queries=shots,
                **tasks,
            ),
            Conv4Settings(readout="mean", conv_bias=True, head_init="normal"),
            OuterSettings(),
            learner,
        )
    return Protocol(
        "finn",
        source,
        ImageTasks("mini_imagenet", test_queries=shots, **tasks),
        Conv4Settings(filters=32, downsample="max_pool", conv_bias=True, head_init="xavier"),
        # 10 on its sum over the queries divided by the shots
        OuterSettings(outer_clip=10 * shots / (15 * ways)),
        learner.with_settings({"inner_rate": 0.01 * ways, "num_steps": 5}),
    )
