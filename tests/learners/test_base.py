"""What learners share: losses, the fast/slow split, the batch-norm modes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from imaml_jax import Batch, Task, cross_entropy, fomaml, imaml, maml, mean_squared_error, reptile
from imaml_jax.learners.base import Adapted, combine, partition
from imaml_jax.learners.supervised import supervised
from imaml_jax.networks import Network, mlp

KEY = jax.random.key(0)
MODES = ("batch", "support", "joint", "support_and_one")
PARAMS = {
    "body": [{"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}, (jnp.ones(2), jnp.zeros(1))],
    "head": {"kernel": jnp.full((3, 1), 2.0)},
}


def test_losses_against_numpy():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(5, 3)).astype(np.float32), np.array([0, 2, 1, 1, 0])
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = -np.log(probabilities[np.arange(5), labels]).mean()
    assert cross_entropy(jnp.asarray(logits), jnp.asarray(labels)) == pytest.approx(expected, 1e-5)
    a, b = rng.normal(size=(2, 5, 3)).astype(np.float32)
    expected = ((a - b) ** 2).mean()
    assert mean_squared_error(jnp.asarray(a), jnp.asarray(b)) == pytest.approx(expected, 1e-5)


def test_mean_squared_error_refuses_to_broadcast():
    assert mean_squared_error(jnp.array([[1.0], [3.0]]), jnp.zeros((2, 1))) == 5.0
    with pytest.raises(ValueError, match=r"one shape; got \(2, 1\) and \(2,\)"):
        mean_squared_error(jnp.ones((2, 1)), jnp.ones(2))


def test_cross_entropy_of_large_logits_is_finite():
    logits = jnp.array([[1e4, 0.0], [0.0, 1e4]])
    assert cross_entropy(logits, jnp.array([0, 1])) == 0
    assert cross_entropy(logits, jnp.array([1, 0])) == 1e4


@pytest.mark.parametrize(
    "fast, paths",
    [
        (lambda path: True, 5),
        (lambda path: False, 0),
        (lambda path: path.startswith("head"), 1),
        (lambda path: path.endswith("kernel"), 2),
        (lambda path: path in ("body/0/bias", "body/1/0"), 2),
    ],
)
def test_combine_is_the_inverse_of_partition(fast, paths):
    chosen, rest = partition(PARAMS, fast)
    assert len(jax.tree.leaves(chosen)) == paths
    assert len(jax.tree.leaves(rest)) == 5 - paths
    back = combine(chosen, rest)
    assert jax.tree.structure(back) == jax.tree.structure(PARAMS)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(PARAMS), strict=True):
        assert a is b


def test_the_predicate_sees_paths_with_slashes():
    seen = []
    partition(PARAMS, lambda path: bool(seen.append(path)))
    expected = {"body/0/kernel", "body/0/bias", "body/1/0", "body/1/1", "head/kernel"}
    assert set(seen) == expected


@pytest.mark.parametrize("factory", [maml, fomaml, imaml, reptile])
def test_a_predicate_that_selects_nothing_is_an_error(factory):
    learner = factory(
        mlp([2, 1]),
        mean_squared_error,
        inner=optax.sgd(0.1),
        num_steps=1,
        fast=lambda path: path.startswith("Head"),
    )
    with pytest.raises(ValueError, match=r"fast selects no parameter.*Dense_0/bias.*head/kernel"):
        learner.init(KEY, jnp.ones((1, 2)))


# A network of nothing but batch norm, so that every mode can be written down.


def normalise(params, inputs, statistics_weights=None):
    weights = jnp.ones(len(inputs)) if statistics_weights is None else statistics_weights
    weights = (weights / weights.sum())[:, None]
    mean = (weights * inputs).sum(0, keepdims=True)
    variance = (weights * (inputs - mean) ** 2).sum(0, keepdims=True)
    return params["scale"][None] * (inputs - mean) / jnp.sqrt(variance + 1e-3)


NORM = Network(lambda key, inputs: {"scale": jnp.ones(inputs.shape[-1])}, normalise)


@pytest.fixture(scope="module")
def images():
    """`(support [5, 2], query [4, 2])`, of different location and scale."""
    support, query = (jax.random.normal(jax.random.key(i), (n, 2)) for i, n in ((1, 5), (2, 4)))
    return support, 3 * query + 1


def predict(mode, support, query, scale=2.0):
    problem = supervised(NORM, mean_squared_error, statistics=mode)
    params = {"scale": jnp.full(2, scale)}
    adapted = problem.finish(*problem.split(params), Batch(support, support))
    return problem.predict(adapted, query)


def by_hand(statistics, inputs, scale=2.0):
    statistics, inputs = np.asarray(statistics), np.asarray(inputs)
    return scale * (inputs - statistics.mean(0)) / np.sqrt(statistics.var(0) + 1e-3)


def test_predict_in_every_mode_against_numpy(images):
    support, query = images
    expected = {
        "batch": by_hand(query, query),
        "support": by_hand(support, query),
        "joint": by_hand(np.concatenate(images), query),
        "support_and_one": np.concatenate(
            [by_hand(np.concatenate([support, q[None]]), q[None]) for q in query]
        ),
    }
    for mode in MODES:
        np.testing.assert_allclose(predict(mode, *images), expected[mode], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode, depends", [(m, m in ("batch", "joint")) for m in MODES])
def test_whether_an_output_depends_on_the_other_queries(images, mode, depends):
    support, query = images
    alone = predict(mode, support, query[:2])
    together = predict(mode, support, query)[:2]
    assert bool(jnp.allclose(alone, together, atol=1e-5)) is not depends


@pytest.mark.parametrize("mode", MODES)
def test_the_query_loss_is_that_of_predict(images, mode):
    support, query = images
    problem = supervised(NORM, mean_squared_error, statistics=mode)
    params = {"scale": jnp.full(2, 2.0)}
    task = Task(Batch(support, support), Batch(query, query))
    loss, accuracy = problem.query_loss(*problem.split(params), task)
    np.testing.assert_allclose(loss, mean_squared_error(predict(mode, *images), query), rtol=1e-6)
    assert accuracy is None
    # the support examples are normalised by their own statistics in every mode
    np.testing.assert_allclose(
        problem.support_loss(*problem.split(params), task.support),
        np.mean((by_hand(support, support) - support) ** 2),
        rtol=1e-4,
    )


def test_support_inputs_are_kept_only_where_prediction_needs_them(images):
    support, _ = images
    for mode in MODES:
        problem = supervised(NORM, mean_squared_error, statistics=mode)
        adapted = problem.finish({"scale": jnp.ones(2)}, {"scale": None}, Batch(support, support))
        assert isinstance(adapted, Adapted)
        assert (adapted.support_inputs is None) == (mode == "batch")


def test_accuracy_of_integer_targets():
    network = Network(lambda key, x: jnp.ones(1), lambda p, x: x * p[None])
    problem = supervised(network, cross_entropy)
    logits = jnp.array([[2.0, 1.0], [0.0, 3.0], [5.0, 4.0], [1.0, 0.0]])
    batch = Batch(logits, jnp.array([0, 1, 1, 1]))
    _, accuracy = problem.query_loss(jnp.ones(1), None, Task(batch, batch))
    assert accuracy == 0.5


@pytest.mark.parametrize("factory", [maml, fomaml, imaml, reptile, partial(maml, remat=False)])
def test_an_unknown_mode_is_named(factory):
    with pytest.raises(ValueError, match=r"statistics='running' must be one of.*support_and_one"):
        factory(
            mlp([1]), mean_squared_error, inner=optax.sgd(0.1), num_steps=1, statistics="running"
        )


def test_support_statistics_need_a_network_that_weighs_them():
    with pytest.raises(ValueError, match="statistics_weights"):
        supervised(mlp([1]), mean_squared_error, statistics="support")
