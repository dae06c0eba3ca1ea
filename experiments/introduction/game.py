"""The 5-way 1-shot game on glyphs: tasks for the reader, and a model's answers to them."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import imaml_jax
from imaml_jax.data import episodes, glyphs
from imaml_jax.learners.base import is_head
from imaml_jax.networks import conv4
from imaml_jax.training import mapping, metrics, train
from imaml_jax.training.evaluation import make_predictions

WAYS, QUERIES = 5, 5


class Sizes(NamedTuple):
    """How much is computed.

    Attributes:
      filters: of the network.
      meta_steps: of meta-training.
      rounds: tasks of the game, one query each.
      test_tasks: tasks over which the model's accuracy is measured, those of the game first.
    """

    filters: int = 32
    meta_steps: int = 300
    rounds: int = 20
    test_tasks: int = 300


def make_learner(filters: int) -> imaml_jax.MetaLearner:
    """Implicit MAML of the head alone: a convex inner problem, solved by Newton's method."""
    return imaml_jax.imaml(
        conv4(WAYS, filters=filters),
        imaml_jax.cross_entropy,
        fast=is_head,
        inner=imaml_jax.newton_cg(max_cg_steps=20),
        num_steps=3,
        reg_strength=0.1,
        curvature="gauss_newton",
        solve=imaml_jax.solve_woodbury,
    )


def play(sizes: Sizes, seed: int) -> dict[str, Any]:
    """Trains on the training characters, plays on characters of the test split.

    Returns:
      `images [rounds, ways + 1, 28, 28]` uint8, the support images and last the query; `answers`
      `[rounds]`, the label of the query; the model's `probabilities [rounds, ways]`; its `accuracy`
      and the half-width `ci95` over test tasks.
    """
    splits, learner = glyphs.load(), make_learner(sizes.filters)
    draw = partial(episodes.sample_tasks, ways=WAYS, shots=1, queries=QUERIES, invert=True)
    key = jax.random.key(seed)
    theta = train(
        learner,
        optax.adam(3e-3),
        partial(draw, dataset=splits.train, num_tasks=8),
        key=key,
        num_steps=sizes.meta_steps,
        example_inputs=jnp.zeros((1, glyphs.SIDE, glyphs.SIDE, 1)),
        log_every=sizes.meta_steps,
        progress=False,
    ).meta_params
    test_key, choice_key = jax.random.split(jax.random.fold_in(key, 1))
    sample = partial(draw, dataset=splits.test, num_tasks=sizes.rounds)
    test = make_predictions(learner, sample, num_tasks=sizes.test_tasks)(theta, test_key)
    mean, ci95 = metrics.mean_ci95(jax.vmap(metrics.accuracy)(test.outputs, test.targets))
    tasks, _ = mapping.draw_tasks(sample, test_key, 0)  # the first of those
    rounds = np.arange(sizes.rounds)
    chosen = np.asarray(jax.random.randint(choice_key, rounds.shape, 0, WAYS * QUERIES))
    order = np.argsort(np.asarray(tasks.support.targets), axis=1)
    support = np.asarray(tasks.support.inputs)[rounds[:, None], order]
    query = np.asarray(tasks.query.inputs)[rounds, chosen]
    images = 1 - np.concatenate([support, query[:, None]], 1)[..., 0]
    return {
        "images": np.round(255 * images).astype(np.uint8),
        "answers": np.asarray(tasks.query.targets)[rounds, chosen],
        "probabilities": np.asarray(jax.nn.softmax(test.outputs))[rounds, chosen],
        "accuracy": mean,
        "ci95": ci95,
    }
