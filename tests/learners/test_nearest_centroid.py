"""The nearest class mean against a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imaml_jax import Batch, Task, nearest_centroid
from imaml_jax.data import episodes
from imaml_jax.training.evaluation import evaluate

RNG = np.random.default_rng(0)


def test_it_is_the_loop_and_has_nothing_to_learn():
    labels = np.array([2, 0, 1, 0, 2, 2])
    support = Batch(jnp.asarray(RNG.normal(size=(6, 1, 1, 4))), jnp.asarray(labels))
    query = Batch(jnp.asarray(RNG.normal(size=(5, 1, 1, 4))), jnp.arange(5) % 3)
    learner = nearest_centroid(ways=3)
    adapted, _ = learner.adapt({}, support, jax.random.key(0))
    x, q = (np.asarray(batch.inputs).reshape(-1, 4) for batch in (support, query))
    expected = [[-((row - x[labels == c].mean(0)) ** 2).sum() for c in range(3)] for row in q]
    np.testing.assert_allclose(learner.predict(adapted, query.inputs), expected, rtol=1e-5)

    grads, info = learner.meta_grad({}, Task(support, query), jax.random.key(0), jnp.int32(0))
    assert grads == learner.init(jax.random.key(0), support.inputs) == {}
    share = np.mean(np.argmax(expected, 1) == np.asarray(query.targets))
    np.testing.assert_allclose(info.query_accuracy, share, rtol=1e-6)
    assert info.query_loss > 0


def test_evaluate_scores_it():
    centres = 10 * RNG.normal(size=(4, 1, 1, 1, 3))
    drawn = (centres + RNG.normal(size=(4, 6, 1, 1, 3)) / 10).astype(np.float32)
    dataset = episodes.from_class_arrays(list(drawn))

    def sample(key):
        return episodes.sample_tasks(key, dataset, num_tasks=5, ways=3, shots=2, queries=4)

    assert evaluate(nearest_centroid(ways=3), {}, sample, jax.random.key(1), num_tasks=5).mean == 1


def test_the_means_keep_their_digits_on_a_gpu():
    adapt, support = nearest_centroid(ways=4).adapt, Batch(jnp.ones((4, 3)), jnp.arange(4))
    with jax.default_matmul_precision("default"):
        program = str(jax.make_jaxpr(adapt)({}, support, jax.random.key(0)))
    assert program.count("dot_general[") == program.count("precision=(Precision.HIGHEST") == 1


@pytest.mark.parametrize("ways", [0, None])
def test_ways_are_checked(ways):
    with pytest.raises(ValueError, match=f"nearest_centroid: ways={ways}"):
        nearest_centroid(ways=ways)
