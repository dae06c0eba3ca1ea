"""Reptile's inner-gradient experiment: gradients, combinations and the Taylor argument."""

import itertools
import json
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import imaml_jax
from experiments import gradient_combinations
from experiments.shared import common, inner_gradients
from imaml_jax.data import episodes, glyphs, omniglot
from imaml_jax.networks import mlp
from imaml_jax.training import mapping
from imaml_jax.types import Batch, Task

NETWORK = mlp([3, 4, 2], activation=jnp.tanh)
RATE = 0.3
ADAPTING = imaml_jax.reptile(
    NETWORK, imaml_jax.cross_entropy, inner=optax.sgd(RATE), num_steps=4, statistics="batch"
)


def loss(params, batch):
    return imaml_jax.cross_entropy(NETWORK.apply(params, batch.inputs), batch.targets)


def at(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


def by_hand(params, batches, rate):
    """The gradients of plain SGD, step by step."""
    grads = []
    for i in range(4):
        grads.append(jax.grad(loss)(params, at(batches, i)))
        params = jax.tree.map(lambda p, g: p - rate * g, params, grads[-1])
    return grads


@pytest.fixture
def task(x64, key):
    """Fifteen support and five query examples, all different."""
    inputs, labels = jax.random.normal(key, (20, 3)), jnp.arange(20) % 2
    assert inputs.dtype == jnp.float64
    return Task(Batch(inputs[:15], labels[:15]), Batch(inputs[15:], labels[15:]))


@pytest.fixture
def params(x64, key):
    return NETWORK.init(jax.random.fold_in(key, 1), jnp.zeros((1, 3)))


def test_inner_gradients_are_those_of_hand_written_steps(task, params, key):
    batches = inner_gradients.task_batches(key, task, 5)
    grads, losses = inner_gradients.inner_gradients(loss, params, batches, RATE)
    expected = by_hand(params, batches, RATE)
    for i, own in enumerate(expected):
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12), own, at(grads, i))
    first = loss(params, at(batches, 0))
    np.testing.assert_allclose(losses[0], first, rtol=1e-12)


def test_mini_batches_share_no_example_and_leave_none_out(task, key):
    batches = inner_gradients.task_batches(key, task, 5)
    assert batches.inputs.shape == (4, 5, 3)
    pooled = np.concatenate([task.support.inputs, task.query.inputs])
    drawn = np.asarray(batches.inputs).reshape(20, 3)
    np.testing.assert_array_equal(np.sort(drawn, 0), np.sort(pooled, 0))
    other = inner_gradients.task_batches(jax.random.fold_in(key, 1), task, 5)
    assert not np.array_equal(other.inputs, batches.inputs)


@pytest.mark.parametrize("name", gradient_combinations.COMBINATIONS)
def test_a_combination_weighs_the_gradients(task, params, key, name):
    weights = gradient_combinations.COMBINATIONS[name]
    learner = inner_gradients.combination(ADAPTING, loss, weights, RATE, 5)
    assert learner[:3] == ADAPTING[:3]
    grads, info = learner.meta_grad(params, task, key, jnp.int32(0))
    inner = by_hand(params, inner_gradients.task_batches(key, task, 5), RATE)
    terms = [term.split("·") for term in name.split("+")]
    expected = jax.tree.map(jnp.zeros_like, params)
    for *factor, gradient in terms:
        scale = float(factor[0]) if factor else 1.0
        number = int(gradient.removeprefix("g")) - 1
        expected = jax.tree.map(lambda e, g, s=scale: e + s * g, expected, inner[number])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-14), grads, expected)
    assert info.support_loss.shape == ()


def test_the_sum_is_reptiles_displacement(task, params, key):
    batches = inner_gradients.task_batches(key, task, 5)
    adapted, _ = imaml_jax.minimize(loss, params, tx=optax.sgd(RATE), num_steps=4, batches=batches)
    learner = inner_gradients.combination(ADAPTING, loss, (1, 1, 1, 1), RATE, 5)
    grads, _ = learner.meta_grad(params, task, key, jnp.int32(0))
    moved = jax.tree.map(lambda p, a: (p - a) / RATE, params, adapted)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-13), grads, moved)


# The Taylor argument; expectations are exact: over all orders of the mini-batches of three tasks.

ORDERS = np.array(list(itertools.permutations(range(4))))


def expected_gradients(loss, params, tasks, rate):
    """`[4, size of params]`, the means of g1 to g4; `tasks` has leaves `[tasks, 4, ...]`."""

    def of_order(batches, order):
        grads, _ = inner_gradients.inner_gradients(loss, params, at(batches, order), rate)
        return jax.vmap(lambda g: ravel_pytree(g)[0])(grads)

    of_task = jax.vmap(of_order, in_axes=(None, 0))
    return jax.vmap(of_task, in_axes=(0, None))(tasks, ORDERS).mean((0, 1))


def avg_grad_inner(loss, params, tasks):
    """Half the gradient of the mean inner product over pairs of mini-batches of one task."""

    def product(params, batches):
        grads = jax.vmap(jax.grad(loss), in_axes=(None, 0))(params, batches)
        flat = jax.vmap(lambda g: ravel_pytree(g)[0])(grads)
        gram = flat @ flat.T
        return (gram.sum() - jnp.trace(gram)) / 12

    mean = jax.grad(lambda p: jax.vmap(product, in_axes=(None, 0))(p, tasks).mean())
    return 0.5 * ravel_pytree(mean(params))[0]


def relative(error, reference):
    return float(jnp.linalg.norm(error) / jnp.linalg.norm(reference))


@pytest.mark.slow
def test_gradients_differ_by_alpha_avg_grad_inner_to_first_order(params, key):
    inputs = jax.random.normal(key, (3, 4, 5, 3))
    labels = jax.random.randint(jax.random.fold_in(key, 1), (3, 4, 5), 0, 2)
    tasks = Batch(inputs, labels)
    inner = avg_grad_inner(loss, params, tasks)
    rates = (0.08, 0.04, 0.02)
    means = jax.jit(lambda rate: expected_gradients(loss, params, tasks, rate))
    found = [means(rate) for rate in rates]
    for i in (1, 2, 3):
        errors = [
            relative((mean[i] - mean[0]) / (-i * rate) - inner, inner)
            for rate, mean in zip(rates, found, strict=True)
        ]
        assert errors[-1] < 0.1
        np.testing.assert_allclose(errors[0] / errors[1], 2, rtol=0.15)
        np.testing.assert_allclose(errors[1] / errors[2], 2, rtol=0.08)
    average = found[-1][0]
    for weights in gradient_combinations.COMBINATIONS.values():
        combined = sum(w * mean for w, mean in zip(weights, found[-1], strict=False))
        claim = average - rates[-1] * inner_gradients.taylor(weights) * inner
        error = relative(combined / sum(weights) - claim, rates[-1] * inner)
        assert error < 0.1 * max(inner_gradients.taylor(weights), 1e-9)


def test_on_quadratics_the_second_gradient_is_exactly_linear_in_alpha(x64, key):
    roots = jax.random.normal(key, (3, 4, 6, 6))
    offsets = jax.random.normal(jax.random.fold_in(key, 1), (3, 4, 6))
    tasks = (jnp.einsum("tbij,tbkj->tbik", roots, roots), offsets)
    params = jax.random.normal(jax.random.fold_in(key, 2), (6,))

    def quadratic(params, batch):
        matrix, offset = batch
        return 0.5 * params @ matrix @ params - offset @ params

    inner = avg_grad_inner(quadratic, params, tasks)
    means = expected_gradients(quadratic, params, tasks, 0.1)
    np.testing.assert_allclose(means[1] - means[0], -0.1 * inner, rtol=1e-9, atol=1e-11)
    assert relative(means[2] - means[0] + 0.2 * inner, 0.2 * inner) > 0.01


def test_the_weights_of_avg_grad_inner_are_those_of_the_paper():
    table = [inner_gradients.taylor(w) for w in gradient_combinations.COMBINATIONS.values()]
    assert table == [0, 1, 0.5, 2, 1, 3, 1.5]  # k - 1 for the last gradient, (k - 1) / 2 for sums


def test_products_are_means_over_pairs(x64, task, params, key):
    tasks = jax.tree.map(lambda x: jnp.stack([x, x[::-1], jnp.roll(x, 3, 0)]), task)
    found = inner_gradients.make_measure(loss, lambda key: tasks, 5)(params, key)
    keys = mapping.draw_tasks(lambda key: tasks, key, 0)[1]
    flat = []
    for t in range(3):
        batches = inner_gradients.task_batches(keys[t], at(tasks, t), 5)
        flat += [
            (t, np.asarray(ravel_pytree(jax.grad(loss)(params, at(batches, i)))[0]))
            for i in range(4)
        ]
    pairs = [(a, b) for a, b in itertools.permutations(flat, 2)]
    for name, same in (("within", True), ("between", False)):
        chosen = [(g, h) for (t, g), (u, h) in pairs if (t == u) is same]
        assert len(chosen) == (36 if same else 96)
        np.testing.assert_allclose(found[name], np.mean([g @ h for g, h in chosen]), rtol=1e-9)
        cosines = [g @ h / np.linalg.norm(g) / np.linalg.norm(h) for g, h in chosen]
        np.testing.assert_allclose(found[f"{name}_cosine"], np.mean(cosines), rtol=1e-9)


# The experiment.


def noise():
    images = np.random.default_rng(0).integers(0, 256, (6, 20, 28, 28, 1), np.uint8)
    dataset = episodes.from_class_arrays(images)
    return episodes.Splits(dataset, dataset, dataset)


TINY = {"dataset": "glyphs", "meta_steps": 4, "eval_every": 2, "test_tasks": 2, "ways": 2}
TINY |= {"product_tasks": 2, "shots": 1, "filters": 2}


@pytest.mark.slow
def test_the_experiment(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(omniglot, "load", lambda data_dir, split: noise())
    few = {"g1": (1,), "g1 again": (1, 0), "2·g2": (0, 2)}
    monkeypatch.setattr(gradient_combinations, "COMBINATIONS", few)
    output = tmp_path / "out" / "figure"
    config = gradient_combinations.Config(
        **TINY | {"dataset": "omniglot"}, average=True, output=output
    )
    with mock.patch.object(common, "cache_compilations"):
        results = gradient_combinations.main(config)
    written = json.loads(output.with_name("figure.json").read_text())["combinations"]
    assert written == results["combinations"]
    assert output.with_name("figure.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert (
        "2·g2" in printed
        and "95% CI over 2 tasks of unseen classes" in printed
        and "rotated" in printed
    )
    curves = {name: row["curve"] for name, row in written.items()}
    assert [row["step"] for row in curves["g1"]] == [0, 2, 4]
    assert curves["g1"][0] == curves["2·g2"][0] and curves["g1"][1] != curves["2·g2"][1]
    # One and the same combination, written in two ways: all that is sampled must be the same.
    for row, again in zip(curves["g1"], curves["g1 again"], strict=True):
        np.testing.assert_allclose(list(row.values()), list(again.values()), rtol=1e-3, atol=1e-5)
    assert written["2·g2"]["weights"] == [0, 1] and written["2·g2"]["taylor"] == 1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"meta_steps": 3}, "meta_steps=3 must be a multiple of eval_every=2"),
        ({"eval_every": 0}, "eval_every=0 must be an integer, at least 1"),
        ({"test_tasks": 1}, "test_tasks=1 must be an integer, at least 2"),
        ({"product_tasks": 1}, "product_tasks=1 must be an integer, at least 2"),
        ({"ways": 1}, "ways=1 must be an integer, at least 2"),
        ({"filters": 0}, "filters=0 must be an integer, at least 1"),
        ({"inner_rate": 0.0}, "inner_rate=0.0 must be a finite number, above 0"),
        ({"outer_rate": float("nan")}, "outer_rate=nan must be a finite number, above 0"),
        ({"seed": -1}, "seed=-1"),
        ({"ways": 7}, "ways=7; allowed: 1 to 6"),
        ({"shots": 6}, r"shots \+ queries = 6 \+ 15"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_compiled(
    changes, message, tmp_path, monkeypatch
):
    monkeypatch.setattr(glyphs, "load", noise)
    with (
        mock.patch.object(jax, "jit", side_effect=AssertionError("compiled before the check")),
        mock.patch.object(common, "cache_compilations", side_effect=AssertionError("too late")),
        pytest.raises(ValueError, match=message),
    ):
        config = gradient_combinations.Config(**TINY | changes, output=tmp_path / "figure")
        gradient_combinations.main(config)
