"""A sinusoid fitted by a few gradient steps, from three initialisations."""

import itertools
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import imaml_jax
from experiments.introduction import plane
from imaml_jax.data import sinusoid
from imaml_jax.networks import mlp
from imaml_jax.training import train

NETWORK = mlp([40, 40, 1])
RATE = 0.02
STRENGTH = 0.5
STEPS = 10
SHOTS = 5


class Sizes(NamedTuple):
    """How much is computed.

    Attributes:
      meta_steps: of meta-training.
      points: inputs of the support points.
      levels: targets that each of them may have.
      inputs: points of a curve.
    """

    meta_steps: int = 1500
    points: tuple[float, ...] = (-3.0, 0.5, 3.0)
    levels: tuple[float, ...] = (-4.0, -2.0, 0.0, 2.0, 4.0)
    inputs: int = 41


def curve_inputs(sizes: Sizes) -> np.ndarray:
    return np.linspace(-5, 5, sizes.inputs)


def learners() -> dict[str, imaml_jax.MetaLearner]:
    """The two that are meta-trained."""
    settings: dict[str, Any] = {"inner": optax.sgd(RATE), "num_steps": STEPS // 2}
    loss = imaml_jax.mean_squared_error
    return {
        "maml": imaml_jax.maml(NETWORK, loss, **settings),
        "imaml": imaml_jax.imaml(
            NETWORK,
            loss,
            **settings,
            reg_strength=STRENGTH,
            curvature="gauss_newton",
            solve=imaml_jax.solve_woodbury,
        ),
    }


def meta_params(sizes: Sizes, seed: int) -> dict[str, Any]:
    """The fresh initialisation, and what each learner makes of it."""
    example = jnp.zeros((1, 1))
    found = {"none": NETWORK.init(jax.random.key(seed), example)}
    for name, learner in learners().items():
        found[name] = train(
            learner,
            optax.adam(2e-3),
            partial(sinusoid.sample_tasks, num_tasks=16, shots=SHOTS, queries=10),
            key=jax.random.key(seed),
            num_steps=sizes.meta_steps,
            example_inputs=example,
            log_every=sizes.meta_steps,
            map_tasks="vmap",
            progress=False,
        ).meta_params
    return found


def fits(sizes: Sizes, seed: int) -> dict[str, np.ndarray]:
    """What each initialisation predicts after 0 to 10 inner steps on every set of support points.

    Returns:
      `fits [initialisations, sets, steps + 1, inputs]`, and the support `losses` of each. Sets run
      through the levels with the last point fastest.
    """
    trained = meta_params(sizes, seed)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *trained.values())
    strengths = jnp.asarray([STRENGTH if name == "imaml" else 0.0 for name in trained])
    targets = jnp.asarray(list(itertools.product(sizes.levels, repeat=len(sizes.points))))
    inputs, of_curve = (jnp.asarray(x)[:, None] for x in (sizes.points, curve_inputs(sizes)))

    def loss(params, batch):
        return imaml_jax.mean_squared_error(NETWORK.apply(params, batch.inputs), batch.targets)

    def fit(start, targets):
        theta, strength = start
        support = imaml_jax.Batch(inputs, targets[:, None])

        def shown(params):
            predictions = NETWORK.apply(params, of_curve)[:, 0]
            return {"fits": predictions, "losses": loss(params, support)}

        return plane.descent(loss, theta, strength, support, RATE, STEPS, shown)

    run = jax.jit(partial(plane.at_all, fit))
    return jax.device_get(run((stacked, strengths), targets))
