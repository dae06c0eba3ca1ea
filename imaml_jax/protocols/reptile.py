"""Reptile's protocol, by its code."""

from dataclasses import replace
from typing import Any

from imaml_jax.learners.registry import settings_class
from imaml_jax.protocols.protocol import (
    Conv4Settings,
    ImageTasks,
    OmniglotTasks,
    OuterSettings,
    Protocol,
)

COVERS = ("reptile", "reptile_transductive")


def make(algorithm: str, ways: int, shots: int, photographs: bool) -> Protocol:
    """The protocol; see `protocols.get`."""
    few = ways <= 5
    learner = settings_class(algorithm)().with_settings(
        {
            "inner": "adam",
            "inner_rate": 1e-3 if few else 5e-4,
            "num_steps": 5 if few else 10,
            "eval_num_steps": 50,
            "batch_size": 10 if few else 20,
            "eval_batch_size": 5 if few else 10,
        }
    )
    outer = OuterSettings(
        outer="sgd",
        outer_rate=1.0,
        schedule="linear",
        meta_steps=100_000 if few else 200_000,
    )
    # The algorithm uses no queries in training.
    tasks: dict[str, Any] = {
        "meta_batch": 5,
        "train_queries": 1,
        "test_queries": 1,
        "test_tasks": 10_000,
    }
    source = "Nichol et al., 2018, and its code openai/supervised-reptile"
    if not photographs:
        return Protocol(
            "reptile",
            source,
            OmniglotTasks(split="reptile", train_rotations="classes", train_shots=10, **tasks),
            Conv4Settings(conv_bias=True, head_init="xavier"),
            outer,
            learner,
        )
    # The code has no command for ten ways: that for five stands in.
    return Protocol(
        "reptile",
        source,
        ImageTasks("mini_imagenet", train_shots=15, **tasks),
        Conv4Settings(
            filters=32,
            downsample="max_pool",
            pool_padding="same",
            conv_bias=True,
            head_init="xavier",
        ),
        replace(outer, meta_steps=100_000),
        learner.with_settings(
            {
                "inner_rate": 1e-3,
                "num_steps": 8,
                "batch_size": 10,
                "eval_batch_size": 5 if shots == 1 else 15,
            }
        ),
    )
