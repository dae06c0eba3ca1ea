"""MAML++'s protocols: that of its code, and that of its paper.

Not followed: the code's schedule moves once an epoch, ours always.
"""

from dataclasses import replace

from imaml_jax.learners.mamlpp import MamlppSettings
from imaml_jax.protocols.protocol import (
    Conv4Settings,
    ImageTasks,
    OmniglotTasks,
    OuterSettings,
    Protocol,
)

COVERS = ("mamlpp",)


def make_code(algorithm: str, ways: int, shots: int, photographs: bool) -> Protocol:
    """The protocol by the code's configurations; see `protocols.get`."""
    del algorithm, ways
    characters = Protocol(
        "mamlpp_code",
        "the code of Antoniou et al., 2019, AntreasAntoniou/HowToTrainYourMAMLPytorch",
        OmniglotTasks(
            split="mamlpp",
            train_rotations="augment",
            meta_batch=8,
            train_shots=shots,
            train_queries=1,
            test_queries=1,
            ensemble=5,
        ),
        Conv4Settings(
            downsample="max_pool",
            conv_bias=True,
            norm_epsilon=1e-5,
            head_init="xavier",
            activation="leaky_relu",
        ),
        OuterSettings(schedule="cosine", final_outer_rate=1e-5, meta_steps=50_000),
        MamlppSettings(adapts="not_norms"),
    )
    if not photographs:
        return characters
    return replace(
        characters,
        tasks=ImageTasks("mini_imagenet", meta_batch=2, train_shots=shots, ensemble=5),
        network=replace(characters.network, filters=48),
        outer=OuterSettings(outer_clip=10.0, meta_steps=50_000, final_outer_rate=1e-5),
        learner=replace(characters.learner, multi_step_epochs=15),
    )


def make_paper(algorithm: str, ways: int, shots: int, photographs: bool) -> Protocol:
    """The paper's protocol; see `protocols.get`."""
    code = make_code(algorithm, ways, shots, photographs)
    return replace(
        code,
        name="mamlpp_paper",
        source="Antoniou et al., ICLR 2019; what it leaves open from its code",
        tasks=replace(code.tasks, ensemble=3),
        outer=replace(code.outer, schedule="cosine"),
        learner=code.learner.with_settings(
            {"first_order_epochs": 50, "inner_rate": 0.01 if photographs else 0.1}
        ),
    )
