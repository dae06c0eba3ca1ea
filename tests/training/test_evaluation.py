"""Evaluation: every learner meets the same tasks, and the statistics are those of its scores."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imaml_jax import mean_squared_error
from imaml_jax.training import evaluation, mapping, metrics
from imaml_jax.types import Batch, MetaLearner, Task


class Info(NamedTuple):
    support_loss: Any
    min_seen: Any
    nothing: Any = None


def adapt(meta_params, support, key):
    del key
    adapted = meta_params["w"] * jnp.mean(support.targets)
    return adapted, Info(jnp.mean(support.targets**2), jnp.min(support.targets))


MEAN_LEARNER = MetaLearner(
    init=lambda key, inputs: {"w": jnp.float32(1)},
    adapt=adapt,
    predict=lambda adapted, inputs: jnp.full(inputs.shape, adapted),
    meta_grad=lambda *args: pytest.fail("evaluation must not train"),
)


def sample(key):
    targets = jax.random.normal(key, (4, 2, 5))
    return Task(
        Batch(jnp.zeros((4, 5)), targets[:, 0]),
        Batch(jnp.zeros((4, 5)), targets[:, 1]),
    )


def expected_tasks(key, num_calls):
    draw = jax.jit(partial(mapping.draw_tasks, sample))
    tasks = [draw(key, i)[0] for i in range(num_calls)]
    return jax.tree.map(lambda *x: np.concatenate(x), *tasks)


@pytest.mark.parametrize("num_tasks", [1, 4, 10])
@pytest.mark.parametrize("map_tasks", ["map", "vmap", 3])
def test_scores_of_the_tasks_that_the_key_names(key, num_tasks, map_tasks):
    result = evaluation.evaluate(
        MEAN_LEARNER,
        {"w": jnp.float32(0.5)},
        sample,
        key,
        num_tasks=num_tasks,
        score_fn=mean_squared_error,
        map_tasks=map_tasks,
    )
    tasks = expected_tasks(key, math.ceil(num_tasks / 4))
    support, query = tasks.support.targets[:num_tasks], tasks.query.targets[:num_tasks]
    errors = ((0.5 * support.mean(axis=1)[:, None] - query) ** 2).mean(axis=1)
    assert isinstance(result.per_task, np.ndarray) and result.per_task.shape == (num_tasks,)
    np.testing.assert_allclose(result.per_task, errors, rtol=1e-5)
    mean, ci95 = metrics.mean_ci95(result.per_task)
    assert result.mean == mean
    assert result.ci95 == ci95 or (num_tasks == 1 and math.isnan(result.ci95))
    assert set(result.info) == {"support_loss", "min_seen"}
    np.testing.assert_allclose(result.info["support_loss"], (support**2).mean(), rtol=1e-5)
    np.testing.assert_allclose(result.info["min_seen"], support.min(), rtol=1e-6)


def test_fewer_tasks_are_the_first_of_more(key):
    run = [
        evaluation.make_evaluate(MEAN_LEARNER, sample, num_tasks=n, score_fn=mean_squared_error)
        for n in (6, 9)
    ]
    few, many = (evaluate({"w": jnp.float32(1)}, key) for evaluate in run)
    np.testing.assert_array_equal(few.per_task, many.per_task[:6])


def test_compiles_once(key):
    traces = []
    learner = MEAN_LEARNER._replace(
        adapt=lambda *args: traces.append(1) or MEAN_LEARNER.adapt(*args)
    )
    run = evaluation.make_evaluate(learner, sample, num_tasks=8, score_fn=mean_squared_error)
    first = run({"w": jnp.float32(1)}, key)
    num_traces = len(traces)
    second = run({"w": jnp.float32(2)}, jax.random.key(1))
    assert len(traces) == num_traces and first.mean != second.mean


def test_devices_do_not_change_the_result(key):
    arguments = dict(num_tasks=8, score_fn=mean_squared_error)
    params = MEAN_LEARNER.init(key, None)
    plain = evaluation.make_evaluate(MEAN_LEARNER, sample, **arguments)(params, key)
    sharded = evaluation.make_evaluate(
        MEAN_LEARNER, sample, devices=jax.devices()[:1], **arguments
    )(params, key)
    np.testing.assert_allclose(plain.per_task, sharded.per_task, rtol=1e-6)


@pytest.mark.parametrize("num_tasks", [0, -3, 2.5, "all"])
def test_nonsense_is_refused(num_tasks):
    with pytest.raises(ValueError, match="num_tasks") as error:
        evaluation.make_evaluate(MEAN_LEARNER, sample, num_tasks=num_tasks)
    assert repr(num_tasks) in str(error.value)


def collect(learner, params, key, **settings):
    return evaluation.make_predictions(learner, sample, **settings)(params, key)


@pytest.mark.parametrize("num_tasks", [3, 6])
def test_predictions_are_those_of_the_tasks_that_are_scored(key, num_tasks):
    params = {"w": jnp.float32(0.5)}
    outputs, targets, _ = collect(MEAN_LEARNER, params, key, num_tasks=num_tasks)
    tasks = expected_tasks(key, 2)
    support, query = tasks.support.targets[:num_tasks], tasks.query.targets[:num_tasks]
    np.testing.assert_array_equal(targets, query)
    expected = np.broadcast_to(0.5 * support.mean(axis=1, keepdims=True), (num_tasks, 5))
    np.testing.assert_allclose(outputs, expected, rtol=1e-5)
    scores = evaluation.evaluate(
        MEAN_LEARNER, params, sample, key, num_tasks=num_tasks, score_fn=mean_squared_error
    )
    np.testing.assert_allclose(((outputs - targets) ** 2).mean(1), scores.per_task, rtol=1e-5)


def test_predictions_of_stacked_samples_keep_their_axes(key):
    learner = MEAN_LEARNER._replace(
        predict=lambda adapted, inputs: jnp.full((3, *inputs.shape), adapted)
    )
    outputs, targets, _ = collect(
        learner, {"w": jnp.float32(1)}, key, num_tasks=6, map_tasks="vmap"
    )
    assert outputs.shape == (6, 3, 5) and targets.shape == (6, 5)
    with pytest.raises(ValueError, match="num_tasks"):
        collect(learner, {"w": jnp.float32(1)}, key, num_tasks=0)


def test_an_ensemble_of_none_is_refused():
    with pytest.raises(ValueError, match="members must hold"):
        evaluation.stack_members([])


def test_an_ensemble_of_one_is_the_learner_and_of_two_the_mean(key):
    members = [{"w": jnp.float32(w)} for w in (0.5, 2.0)]
    support, inputs = Batch(jnp.zeros(5), jnp.arange(5.0)), jnp.zeros(3)

    def outcome(learner, params):
        adapted, info = learner.adapt(params, support, key)
        return learner.predict(adapted, inputs), info

    singles = [outcome(MEAN_LEARNER, params)[0] for params in members]
    both = evaluation.ensemble(MEAN_LEARNER)
    one, info = outcome(both, evaluation.stack_members(members[:1]))
    np.testing.assert_array_equal(one, singles[0])
    assert info == outcome(MEAN_LEARNER, members[0])[1]
    two = evaluation.stack_members(members)
    np.testing.assert_allclose(outcome(both, two)[0], np.mean(singles, axis=0), rtol=1e-6)
    largest = evaluation.ensemble(MEAN_LEARNER, average=lambda outputs: outputs.max(0))
    np.testing.assert_allclose(outcome(largest, two)[0], singles[1], rtol=1e-6)


def test_an_ensemble_is_evaluated_like_any_learner(key):
    members = evaluation.stack_members([{"w": jnp.float32(w)} for w in (0.5, 2.0)])
    arguments = dict(num_tasks=4, score_fn=mean_squared_error)
    both = evaluation.evaluate(evaluation.ensemble(MEAN_LEARNER), members, sample, key, **arguments)
    mean = evaluation.evaluate(MEAN_LEARNER, {"w": jnp.float32(1.25)}, sample, key, **arguments)
    np.testing.assert_allclose(both.per_task, mean.per_task, rtol=1e-5)
    assert both.info == pytest.approx(mean.info, rel=1e-6)
