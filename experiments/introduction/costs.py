"""Memory and time of a meta-gradient against the number of inner steps, on this machine."""

import statistics
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import imaml_jax
from experiments.shared import reports
from imaml_jax import Batch, MetaLearner, Task
from imaml_jax.networks import mlp

WAYS, SHOTS, WIDTH, PIXELS = 5, 5, 64, 784
CALLS = 5  # one takes a millisecond or so


class Sizes(NamedTuple):
    """How much is measured.

    Attributes:
      num_steps: inner steps, each at least 2: a loop of one is compiled away.
      rounds: interleaved rounds of the timing.
    """

    num_steps: tuple[int, ...] = (2, 4, 8, 16, 32)
    rounds: int = 5


def learners(num_steps: int) -> dict[str, MetaLearner]:
    """Those that are measured, by name."""
    network, loss = mlp([WIDTH, WIDTH, WAYS]), imaml_jax.cross_entropy
    settings: dict[str, Any] = {"inner": optax.sgd(0.05), "num_steps": num_steps}
    return {
        "maml": imaml_jax.maml(network, loss, **settings, remat=False),
        "maml_recomputed": imaml_jax.maml(network, loss, **settings),
        "fomaml": imaml_jax.fomaml(network, loss, **settings),
        "reptile": imaml_jax.reptile(network, loss, **settings, statistics="batch"),
        "imaml": imaml_jax.imaml(network, loss, **settings),
    }


def measure(sizes: Sizes, seed: int) -> dict[str, dict[str, list[float]]]:
    """For each learner its temporary `bytes` and the median `seconds`, over the inner steps."""
    keys = jax.random.split(jax.random.key(seed), 3)
    labels = jnp.tile(jnp.arange(WAYS), SHOTS)
    images = jax.random.uniform(keys[0], (2, WAYS * SHOTS, PIXELS))
    task = Task(Batch(images[0], labels), Batch(images[1], labels))
    theta = mlp([WIDTH, WIDTH, WAYS]).init(keys[1], images[0])
    programs: dict[tuple[str, int], Any] = {
        (name, steps): jax.jit(learner.meta_grad).lower(theta, task, keys[2], 0).compile()
        for steps in sizes.num_steps
        for name, learner in learners(steps).items()
    }

    def run(program):
        return [program(theta, task, keys[2], 0) for _ in range(CALLS)]

    runs = {cell: partial(run, program) for cell, program in programs.items()}
    times = reports.seconds_in_rounds(runs, sizes.rounds)
    return {
        name: {
            "bytes": [
                programs[name, steps].memory_analysis().temp_size_in_bytes
                for steps in sizes.num_steps
            ],
            "seconds": [statistics.median(times[name, steps]) / CALLS for steps in sizes.num_steps],
        }
        for name in learners(2)
    }
