"""The bilevel problems of the experiments: what they claim, at a small size."""

import json
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import distillation, equilibrium, feature_weights, hyper_cleaning, market
from experiments.shared import bundled, linear_model
from imaml_jax import Batch


@pytest.fixture
def report(tmp_path, capsys):
    """`report(module, **settings)`: the results of `main`, which are those of the files."""

    def call(module, **settings):
        results = module.main(module.Config(output=tmp_path / "report", **settings))
        written = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
        assert written == json.loads(json.dumps(results, default=str))
        assert (tmp_path / "report.png").stat().st_size > 0
        assert module.table(results) in capsys.readouterr().out
        assert jnp.ones(()).dtype == jnp.float32
        return results

    return call


def test_a_weight_a_feature_beats_the_best_common_one_where_it_was_trained(report):
    results = report(feature_weights, datasets=("diabetes",), probes=(10,), splits=2, steps=20)
    (row,) = results["rows"]
    assert row["features"] == 10 and np.shape(row["log_weights_learned"]) == (2, 20)
    assert max(row["gradient_error"]) < 1e-6
    assert all(np.less(row["validation_learned"], row["validation_common"]))
    assert all(np.less(row["test_learned"], row["test_common"]))
    assert max(row["inner_residual_learned"]) < 1e-10


def test_the_weights_of_a_logistic_regression_have_the_gradient_of_differences(x64):
    rng = np.random.default_rng(0)
    split = feature_weights._prepare("breast_cancer", bundled.load("breast_cancer"), 0, rng)
    fit = feature_weights.make_fit(feature_weights.logistic_loss)

    def loss(log_weights):
        zeros = {"kernel": jnp.zeros(30), "bias": jnp.zeros(())}
        params, _ = fit(zeros, log_weights, split.train)
        outputs = linear_model.predict(params, split.validation.inputs)
        return feature_weights.logistic_loss(outputs, split.validation.targets)

    program = jax.jit(jax.value_and_grad(loss))
    start, direction = jnp.full(30, -3.0), jnp.asarray(rng.normal(size=30))
    moved = [program(start + step * direction)[0] for step in (1e-4, -1e-4)]
    implicit = program(start)[1] @ direction
    assert implicit == pytest.approx(float(moved[0] - moved[1]) / 2e-4, rel=1e-6)


def test_wrong_labels_get_small_weights(report):
    results = report(
        hyper_cleaning,
        train_examples=200,
        validation_examples=100,
        steps=60,
        outer_rate=0.3,
        repeats=1,
    )
    assert results["is_clean"].count(0.0) == 100
    assert results["auroc"][0] > 0.9
    accuracy = {way: own[0] for way, own in results["test_accuracy"].items()}
    assert accuracy[hyper_cleaning.LEARNED] > accuracy[hyper_cleaning.ALL]
    assert results["largest_inner_residual"] < 1e-2


def test_wrong_labels_are_wrong():
    config = hyper_cleaning.Config(corrupted=0.25, train_examples=400)
    data = Batch(np.arange(1000.0)[:, None], np.arange(1000) % 10)
    problem = hyper_cleaning.corrupt(config, data, np.random.default_rng(0))
    right = problem.train.inputs[:, 0] % 10 == problem.train.targets
    assert (right == (problem.is_clean == 1)).all() and right.sum() == 300
    assert len(problem.test.targets) == 400


def test_auroc():
    positive = np.array([True, True, False, False])
    assert hyper_cleaning.auroc(np.array([3.0, 2.0, 1.0, 0.0]), positive) == 1
    assert hyper_cleaning.auroc(np.array([0.0, 2.0, 1.0, 3.0]), positive) == 0.25
    assert hyper_cleaning.auroc(np.zeros(4), positive) == 0.5


@pytest.mark.slow
def test_distilled_images_beat_real_ones(report):
    results = report(distillation, train_examples=300, steps=60, outer_rate=0.03, draws=3)
    accuracy = results["test_accuracy"]
    assert accuracy["distilled"] > max(results["random_test_accuracy"])
    assert accuracy["distilled"] > accuracy["class means"]
    assert np.shape(results["images"]) == (10, 64)
    assert results["largest_inner_residual"] < 1e-2


def test_more_images_than_a_class_has_are_refused(tmp_path):
    config = distillation.Config(per_class=50, train_examples=100, output=tmp_path / "d")
    with pytest.raises(ValueError, match=r"per_class=50 must be at most \d+"):
        distillation.main(config)


def test_a_classifier_is_a_minimum_and_its_derivative_that_of_differences(x64):
    rng = np.random.default_rng(0)
    inputs, labels = jnp.asarray(rng.normal(size=(12, 3))), jnp.arange(12) % 4
    params = linear_model.init(3, 4)

    def fitted(weights):
        found, info = linear_model.fit(params, inputs, labels, weights, 0.1)
        return jnp.sum(found["kernel"] ** 2), info

    start, direction = jnp.ones(12), jnp.asarray(rng.normal(size=12))
    program = jax.jit(jax.value_and_grad(fitted, has_aux=True))
    (_, info), grads = program(start)
    moved = [program(start + step * direction)[0][0] for step in (1e-4, -1e-4)]
    assert info.relative_residual < 1e-8
    assert grads @ direction == pytest.approx(float(moved[0] - moved[1]) / 2e-4, rel=1e-3)


@pytest.mark.slow
def test_unrolling_tends_to_the_implicit_gradient_and_takes_more_memory(report):
    results = report(equilibrium, width=10, steps=60, unrolled=(2, 16, 200), contraction=0.8)
    errors, memory = results["gradient_difference"], results["temporary_bytes"]
    assert errors[2] > errors[16] > 1e-6 and errors[200] < 1e-11
    assert memory["implicit"] < memory[200]
    assert results["test_accuracy"]["implicit"] > 0.5


def test_the_recurrence_contracts():
    config = equilibrium.Config(width=6, contraction=0.5)
    matrix = jax.random.normal(jax.random.key(0), (6, 6))
    found = []

    def record(recurrent, drive):
        found.append(recurrent)
        return drive

    params = {"input": jnp.ones((2, 6)), "bias": jnp.zeros((1, 6)), "recurrent": matrix}
    params |= {"readout": jnp.ones((6, 10)), "readout_bias": jnp.zeros((1, 10))}
    equilibrium.logits(config, record, params, jnp.ones((1, 2)))
    assert 0.4 < jnp.linalg.norm(found[0], 2) <= 0.5


def test_markets_have_their_closed_forms(report):
    results = report(market, firms=3, consumers=4, goods=3, elasticity=1.5, seed=1)
    assert list(results["markets"]) == ["Cournot", "exchange"]
    for own in results["markets"].values():
        assert own["root_error"] < 1e-12
        for jacobian in own["jacobians"].values():
            assert jacobian["forward_error"] < 1e-10 and jacobian["reverse_error"] < 1e-10
    assert results["tax_error"] < 1e-8


def test_a_missing_library_is_named():
    with (
        mock.patch.dict(sys.modules, sklearn=None),
        pytest.raises(ValueError, match=r"'digits' comes with scikit-learn, .* pip install"),
    ):
        bundled.load("digits")


@pytest.mark.parametrize("sizes", [(0, 5), (5, 5), (11,)])
def test_parts_that_leave_nothing_for_the_test_are_refused(sizes):
    data = Batch(np.zeros((10, 2)), np.zeros(10))
    with pytest.raises(ValueError, match="10 for the test: lower the sizes"):
        bundled.split(data, sizes, np.random.default_rng(0))
