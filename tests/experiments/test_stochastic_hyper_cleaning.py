"""The stochastic bilevel methods on a problem with a known answer, and their command."""

import json
import math
from functools import cache
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import hyper_cleaning
from experiments.shared import bundled, stochastic_bilevel, stochastic_cleaning
from experiments.shared.stochastic_bilevel import Problem, Rates, Sizes
from imaml_jax import hessian
from imaml_jax.types import Batch

METHODS = {
    "implicit": stochastic_bilevel.IMPLICIT,
    "soba": stochastic_bilevel.SOBA,
    "amigo": stochastic_bilevel.AMIGO,
    "stocbio": stochastic_bilevel.STOCBIO,
}
NUM_INNER, NUM_OUTER, NUM_FEATURES = 16, 12, 4
FULL = Sizes(batch=100, inner_steps=10, solve_steps=60, solve_batch=100)
BATCHES = Sizes(batch=6, inner_steps=5, solve_steps=20, solve_batch=12, average=0.5)
SEEDS = np.arange(200)


def ridge():
    """Weighted least squares; the outer loss depends on the weights' logits itself, too."""
    rng = np.random.default_rng(0)
    inputs, others = (rng.normal(size=(n, NUM_FEATURES)) for n in (NUM_INNER, NUM_OUTER))
    coefficients = rng.normal(size=NUM_FEATURES)
    targets = inputs @ coefficients + rng.normal(size=NUM_INNER)
    inputs, others, targets = map(jnp.asarray, (inputs, others, targets))

    def inner(params, logits, rows):
        errors = inputs[rows] @ params - targets[rows]
        fit = 0.5 * jnp.mean(jax.nn.sigmoid(logits[rows]) * errors**2)
        return fit + 0.25 * jnp.sum(params**2)

    def outer(params, logits, rows):
        errors = others[rows] @ (params - coefficients)
        return 0.5 * jnp.mean(errors**2) + 0.05 * jnp.sum(logits**2)

    def curvature(params, logits, rows):
        return hessian(lambda x: inner(x, logits, rows), params)

    return Problem(inner, outer, curvature, NUM_INNER, NUM_OUTER)


@cache
def exact_hypergradient():
    """`logits ->` that of the outer loss at the inner solution, which one Newton step finds."""
    problem = ridge()
    rows, outer_rows = jnp.arange(NUM_INNER), jnp.arange(NUM_OUTER)
    zeros = jnp.zeros(NUM_FEATURES)

    def outer_loss(logits):
        gradient = jax.grad(problem.inner)
        matrix = jax.jacobian(gradient)(zeros, logits, rows)
        params = -jnp.linalg.solve(matrix, gradient(zeros, logits, rows))
        return problem.outer(params, logits, outer_rows)

    return jax.jit(jax.grad(outer_loss))


@cache
def method_run(name, sizes):
    """`(rates, state, seeds, num_steps) -> states`, a run for each of the seeds."""
    problem = ridge()

    def run(rates, state, seed, num_steps):
        key = jax.random.key(seed)
        return stochastic_bilevel.run(METHODS[name], problem, sizes, rates, state, key, num_steps)

    return jax.jit(jax.vmap(run, (None, None, 0, None)))


def begin(logits):
    """With parameters of zero."""
    zeros = np.zeros(NUM_FEATURES)
    return stochastic_bilevel.State(zeros, zeros, zeros, logits, 0)


def run_full(name, rates, state, num_steps):
    """Meta-steps with all examples, in which nothing is random."""
    states = method_run(name, FULL)(rates, state, np.zeros(1, int), num_steps)
    return jax.tree.map(lambda x: np.asarray(x)[0], states)


@cache
def settled(name):
    """Logits, and the state that parameters and adjoint converge to while these stay."""
    logits = np.linspace(-1, 1, NUM_INNER)
    state = begin(logits)
    found = run_full(name, Rates(0.6, 0.0), state, 3000 if name == "soba" else 100)
    return logits, found._replace(num_steps=0)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", METHODS)
def test_the_step_follows_the_implicit_gradient(name):
    logits, state = settled(name)
    moved = run_full(name, Rates(0.6, 1.0), state, 1)
    exact = exact_hypergradient()(logits)
    np.testing.assert_allclose(logits - moved.hyperparams, exact, rtol=1e-6, atol=1e-9)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", METHODS)
def test_steps_of_mini_batches_follow_it_on_average(name):
    logits, state = settled(name)
    moved = np.asarray(method_run(name, BATCHES)(Rates(0.1, 1.0), state, SEEDS, 1).hyperparams)
    assert np.all(np.std(moved, 0) > 0)
    found, exact = logits - moved.mean(0), exact_hypergradient()(logits)
    assert found @ exact > 0.95 * np.linalg.norm(found) * np.linalg.norm(exact)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", METHODS)
def test_all_methods_find_the_same_minimum(name):
    state = begin(np.zeros(NUM_INNER))
    num_steps = 4000 if name == "soba" else 400
    found = run_full(name, Rates(0.6, 1.5), state, num_steps).hyperparams
    assert np.linalg.norm(exact_hypergradient()(found)) < 1e-7 and np.linalg.norm(found) > 0.1


@pytest.mark.usefixtures("x64")
def test_a_run_goes_on_where_another_ended():
    state, rates = begin(np.zeros(NUM_INNER)), Rates(0.1, 1.0)

    def run(state, num_steps):
        states = method_run("implicit", BATCHES)(rates, state, SEEDS, num_steps)
        return jax.tree.map(lambda x: np.asarray(x)[0], states)

    whole, parts = run(state, 3), run(run(state, 1), 2)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12), whole, parts)


def test_evaluations():
    problem = Problem(*[mock.Mock()] * 3, num_inner=800, num_outer=100)
    counts = {
        name: method.evaluations(problem, Sizes(64, 5, 3, 128)) for name, method in METHODS.items()
    }
    two_loops = (5 + 3 + 1) * 64 + 64
    assert counts == {
        "implicit": 5 * 64 + (3 + 1) * 128 + 800 + 100,
        "soba": 4 * 64,
        "amigo": two_loops,
        "stocbio": two_loops,
    }


@pytest.mark.parametrize(
    ("best", "found"),
    [
        ((0.3, 1000.0), (0.3, 1000.0)),
        ((1.0, 300.0), (1.0, 300.0)),
        ((0.03, 1000.0), (0.03, 1000.0)),
        ((0.1, 3000.0), (0.1, 3000.0)),
        ((10.0, 1e6), (10.0, 100_000.0)),  # the last rates
    ],
)
def test_the_search_of_the_rates(best, found):
    def loss(rates):
        if rates.inner > best[0]:
            return math.inf
        return sum(abs(math.log(rate / goal)) for rate, goal in zip(rates, best, strict=True))

    losses = stochastic_cleaning.compass_search(loss)
    assert len(losses) <= stochastic_cleaning.TRIES
    assert min(losses, key=losses.__getitem__) == found
    assert all(losses[rates] == loss(rates) for rates in losses)


def test_the_search_ends_at_the_last_rates():
    with (
        mock.patch.object(stochastic_cleaning, "INNER_RATES", (0.3,)),
        mock.patch.object(stochastic_cleaning, "OUTER_RATES", (300.0, 1000.0)),
    ):
        losses = stochastic_cleaning.compass_search(lambda rates: rates.outer)
    assert losses == {(0.3, 1000.0): 1000.0, (0.3, 300.0): 300.0}


def test_the_command(tmp_path, capsys):
    """With two methods, of which one diverges when it is measured, and easy data."""
    labels = np.arange(400) % 10
    noise = np.random.default_rng(0).normal(size=(400, 64))
    inputs = np.tile(np.eye(10), (40, 7))[:, :64] + 0.1 * noise
    data = Batch(jnp.asarray(inputs), jnp.asarray(labels))
    config = hyper_cleaning.Config(
        train_examples=100,
        validation_examples=50,
        repeats=1,
        stochastic=True,
        width=8,
        evaluations=6000,
        output=tmp_path / "report",
    )
    ours, other = stochastic_cleaning.OURS, "SOBA"
    two = {name: stochastic_cleaning.CONTENDERS[name] for name in (ours, other)}
    measure = stochastic_cleaning.measure

    def measure_one_diverging(contest, split, rates, key):
        return measure(contest, split, {**rates, other: Rates(1e30, 1.0)}, key)

    with (
        mock.patch.object(bundled, "load", lambda _: data),
        mock.patch.object(stochastic_cleaning, "CONTENDERS", two),
        mock.patch.object(stochastic_cleaning, "INNER_RATES", (0.3, 1e30)),
        mock.patch.object(stochastic_cleaning, "measure", measure_one_diverging),
    ):
        results = hyper_cleaning.main(config)
    text = (tmp_path / "report.json").read_text(encoding="utf-8")
    written = json.loads(text, parse_constant=pytest.fail)
    assert written == json.loads(json.dumps(results, default=str))
    assert (tmp_path / "report.png").stat().st_size > 0
    table = hyper_cleaning.stochastic_table(results)
    assert table in capsys.readouterr().out and table.count("diverged") == 4
    assert results["num_params"] == 64 * 8 + 8 + 8 * 8 + 8 + 8 * 10 + 10
    for name, found in results["methods"].items():
        assert found["rates"]["inner"] == 0.3 and [1e30, 1000.0, None] in map(list, found["tried"])
        (losses,), (seconds,) = found["validation_loss"], found["seconds"]
        counts = found["evaluations"]
        assert len(counts) == len(losses) == len(seconds)
        assert 5000 < counts[-1] <= 6000
        assert seconds == sorted(seconds) and seconds[0] == 0
        if name == ours:
            assert losses[-1] < losses[0] and found["auroc"][0] > 0.5
        else:
            assert losses[0] and losses[-1] is found["auroc"][0] is None
            assert found["retrained_accuracy"] == [None]
    assert {len(values) for values in results["trained_accuracy"].values()} == {1}


def test_a_million_parameters_by_default():
    width = hyper_cleaning.Config(stochastic=True).width
    assert 64 * width + width**2 + 10 * width >= 1_000_000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stochastic": True, "steps": 10}, "steps=10 has no effect"),
        ({"stochastic": True, "outer_rate": 1.0}, "outer_rate=1.0 has no effect"),
        ({"width": 10}, "width=10 has no effect"),
        ({"evaluations": 10}, "evaluations=10 has no effect"),
        ({"stochastic": True, "width": 0}, "width=0 must be"),
        ({"stochastic": True, "evaluations": 0}, "evaluations=0 must be"),
        ({"stochastic": 1}, "stochastic=1 must be True or False"),
        ({"repeats": 0}, "repeats=0 must be"),
    ],
)
def test_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        hyper_cleaning.Config(**settings)
