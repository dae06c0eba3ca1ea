"""MAML++ against MAML, a loop written out and finite differences, in float64."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from imaml_jax import Batch, Task, cross_entropy, maml, mamlpp, protocols
from imaml_jax.learners.base import combine, is_norm, partition
from imaml_jax.learners.mamlpp import LearnedRates, multi_step_weights
from imaml_jax.networks import Network
from tests.learners.conftest import relative_error

pytestmark = pytest.mark.usefixtures("x64_module")

KEY = jax.random.key(0)
RATE, STEPS = 0.3, 3
SWITCHES_OFF = dict(learn_rates=False, multi_step_epochs=0, per_step=None)


def apply(params, inputs):
    """A dense layer, batch norm, tanh and the head."""
    x = inputs @ params["block_0"]["kernel"]
    x = (x - x.mean(0)[None]) / jnp.sqrt(x.var(0) + 1e-3)[None]
    x = jnp.tanh(x * params["block_0"]["scale"][None] + params["block_0"]["offset"][None])
    return x @ params["head"]["kernel"] + params["head"]["bias"][None]


def init(key, inputs):
    del key
    rng = np.random.default_rng(1)
    shapes = {"block_0": {"kernel": (2, 4), "scale": (4,), "offset": (4,)}}
    shapes["head"] = {"kernel": (4, 3), "bias": (3,)}
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), inputs.dtype),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


@pytest.fixture(scope="module")
def problem(x64_module):
    """`(network, params, task)`."""
    rng = np.random.default_rng(2)
    inputs, labels = jnp.asarray(rng.normal(size=(15, 2))), jnp.tile(jnp.arange(3), 5)
    task = Task(Batch(inputs[:6], labels[:6]), Batch(inputs[6:], labels[6:]))
    return Network(init, apply), init(KEY, inputs), task


@pytest.fixture(scope="module")
def moved(problem):
    """Meta-parameters with another norm and another rate at every step."""
    network, _, task = problem
    learner = mamlpp(network, cross_entropy, inner_rate=RATE, num_steps=STEPS)
    rng = np.random.default_rng(3)
    meta_params = learner.init(KEY, task.support.inputs)
    return jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape), meta_params)


def loop(network, meta_params, task, weights):
    """The outer loss in a Python loop."""
    fast, slow = partition(meta_params.params, lambda path: not is_norm(path))
    total = 0.0

    def loss(fast, row, batch):
        return cross_entropy(network.apply(combine(fast, row), batch.inputs), batch.targets)

    for i, weight in enumerate(weights):
        row = jax.tree.map(lambda x: x[i], slow)  # noqa: B023
        grads = jax.grad(loss)(fast, row, task.support)
        fast = jax.tree.map(lambda p, g, r: p - r[i] * g, fast, grads, meta_params.rates)  # noqa: B023
        total += weight * loss(fast, row, task.query)
    return total


def test_weights_of_the_steps():
    np.testing.assert_allclose(multi_step_weights(0, 5, 10), [0.2] * 5)
    np.testing.assert_allclose(multi_step_weights(9, 5, 10), [0.02] * 4 + [0.92])
    np.testing.assert_allclose(multi_step_weights(10, 5, 10), [0, 0, 0, 0, 1])
    np.testing.assert_allclose(multi_step_weights(99, 5, 100)[:4], 0.03 / 5)  # the floor
    for epoch in range(12):
        np.testing.assert_allclose(multi_step_weights(epoch, 4, 10).sum(), 1)


@pytest.mark.parametrize("first_order", [False, True])
def test_with_everything_off_it_is_maml(problem, first_order):
    network, params, task = problem
    plain = maml(
        network, cross_entropy, inner=optax.sgd(RATE), num_steps=STEPS, first_order=first_order
    )
    off = mamlpp(
        network,
        cross_entropy,
        inner_rate=RATE,
        num_steps=STEPS,
        first_order_epochs=int(first_order),
        **SWITCHES_OFF,
    )
    tx = optax.adam(1e-3)

    def step(learner, params):
        grads, info = learner.meta_grad(params, task, KEY, 0)
        updates, _ = tx.update(grads, tx.init(params), params)
        adapted, _ = learner.adapt(params, task.support, KEY)
        return grads, info[:2], updates, learner.predict(adapted, task.query.inputs)

    found, expected = (jax.jit(partial(step, learner))(params) for learner in (off, plain))
    assert relative_error(found, expected) < 1e-12


def test_learned_rates_begin_at_the_given_one(problem):
    """So the first update is MAML's, but for the norms, which are not adapted."""
    network, _, task = problem
    learner = mamlpp(network, cross_entropy, inner_rate=RATE, num_steps=1)
    plain = maml(
        network,
        cross_entropy,
        inner=optax.sgd(RATE),
        num_steps=1,
        fast=lambda path: not is_norm(path),
    )
    start = learner.init(KEY, task.support.inputs)
    assert {x.shape for x in jax.tree.leaves(start.rates)} == {(1,)}
    assert len(jax.tree.leaves(start.rates)) == 3  # two kernels and a bias
    adapted = jax.jit(learner.adapt)(start, task.support, KEY)[0].params
    expected = jax.jit(plain.adapt)(plain.init(KEY, task.support.inputs), task.support, KEY)[
        0
    ].params
    assert relative_error(adapted, expected) < 1e-12


def test_the_loss_is_that_of_a_loop_and_the_gradient_its_own(problem, moved):
    network, _, task = problem
    learner = mamlpp(
        network,
        cross_entropy,
        inner_rate=RATE,
        num_steps=STEPS,
        multi_step_epochs=2,
        epoch_length=5,
        remat=False,
    )
    meta_grad = jax.jit(learner.meta_grad)
    of_loop = jax.jit(jax.value_and_grad(lambda m, weights: loop(network, m, task, weights)))
    adapted, _ = jax.jit(learner.adapt)(moved, task.support, KEY)
    last = cross_entropy(learner.predict(adapted, task.query.inputs), task.query.targets)
    for step in (0, 7, 10, 25):  # at 10, after two epochs of five, only the last loss counts
        grads, info = meta_grad(moved, task, KEY, step)
        weights = multi_step_weights(step // 5, STEPS, 2)
        value, expected = of_loop(moved, weights)
        assert relative_error(grads, expected) < 1e-11
        np.testing.assert_allclose(info.meta_loss, value, rtol=1e-12)
        np.testing.assert_allclose(info.query_loss, last, rtol=1e-12)
    np.testing.assert_allclose(value, last, rtol=1e-12)


def test_finite_differences_in_parameters_rates_scales_and_offsets(
    problem, moved, finite_differences
):
    network, _, task = problem
    learner = mamlpp(network, cross_entropy, inner_rate=RATE, num_steps=STEPS)
    grads, _ = jax.jit(learner.meta_grad)(moved, task, KEY, 0)
    flat, unravel = ravel_pytree(moved)
    slopes = finite_differences(
        lambda x: loop(network, unravel(x), task, [1 / STEPS] * STEPS), flat
    )
    slopes = unravel(jnp.asarray(slopes))
    paths = jax.tree_util.tree_leaves_with_path(grads)
    for (path, grad), slope in zip(paths, jax.tree.leaves(slopes), strict=True):
        assert jnp.abs(grad).max() > 1e-6, path
        np.testing.assert_allclose(grad, slope, rtol=1e-4, atol=1e-8, err_msg=str(path))


def test_first_order_epochs_cut_the_inner_gradients_but_not_the_rates(problem, moved):
    network, _, task = problem
    make = partial(mamlpp, network, cross_entropy, inner_rate=RATE, num_steps=STEPS)
    first = make(first_order_epochs=2, epoch_length=5, multi_step_epochs=0)
    early, late = (jax.jit(first.meta_grad)(moved, task, KEY, step)[0] for step in (9, 10))
    second = jax.jit(make(multi_step_epochs=0).meta_grad)(moved, task, KEY, 0)[0]
    assert relative_error(late, second) < 1e-12
    assert relative_error(early, second) > 1e-2
    assert all(jnp.abs(x).min() > 0 for x in jax.tree.leaves(early.rates))
    norms = jax.tree.leaves(partition(early.params, is_norm)[0])
    assert all((x[:-1] == 0).all() and (x[-1] != 0).any() for x in norms)


def test_rows_and_rates_can_be_off_one_by_one(problem):
    network, _, task = problem
    make = partial(mamlpp, network, cross_entropy, inner_rate=RATE, num_steps=STEPS)
    with_rows = make(learn_rates=False).init(KEY, task.support.inputs)
    assert with_rows["block_0"]["scale"].shape == (STEPS, 4)
    assert with_rows["head"]["bias"].shape == (3,)
    with_rates = make(per_step=None).init(KEY, task.support.inputs)
    assert isinstance(with_rates, LearnedRates)
    assert with_rates.params["block_0"]["scale"].shape == (4,)
    assert with_rates.rates["block_0"]["scale"].shape == (STEPS,)


def test_learned_rates_are_not_clipped():
    protocol = protocols.get("mamlpp_code", algorithm="mamlpp", ways=5, shots=1)
    changes = {"outer": "sgd", "outer_rate": 1.0, "schedule": "constant", "outer_clip": 2.0}
    outer = protocol.with_settings(changes).build_outer()
    grads = LearnedRates({"w": np.array([5.0])}, {"w": np.array([5.0])})
    updates, _ = outer.update(grads, outer.init(grads))
    assert updates.params["w"] == -2 and updates.rates["w"] == -5


@pytest.mark.parametrize("switches", [{}, {"learn_rates": False}, {"per_step": None}])
@pytest.mark.parametrize("steps", [STEPS - 1, STEPS + 1])
def test_parameters_of_another_number_of_steps_are_refused(problem, switches, steps):
    network, _, task = problem
    make = partial(mamlpp, network, cross_entropy, inner_rate=RATE, **switches)
    params, learner = make(num_steps=STEPS).init(KEY, task.support.inputs), make(num_steps=steps)
    for call in (
        partial(learner.adapt, params, task.support, KEY),
        partial(learner.meta_grad, params, task, KEY, 0),
    ):
        with pytest.raises(ValueError, match=rf"num_steps={steps} must .*\({STEPS},.* Train with"):
            jax.eval_shape(call)


@pytest.mark.parametrize("learn_rates", [True, False])
def test_parameters_with_rates_where_there_are_none_and_the_reverse_are_refused(
    problem, learn_rates
):
    network, _, task = problem
    make = partial(mamlpp, network, cross_entropy, inner_rate=RATE, num_steps=STEPS)
    params = make(learn_rates=not learn_rates).init(KEY, task.support.inputs)
    expected = "LearnedRates" if learn_rates else "the network's parameters"
    with pytest.raises(ValueError, match=f"learn_rates={learn_rates} takes {expected}"):
        make(learn_rates=learn_rates).adapt(params, task.support, KEY)


def test_where_no_step_has_its_own_evaluation_has_any_number(problem):
    network, params, task = problem
    make = partial(mamlpp, network, cross_entropy, inner_rate=RATE, **SWITCHES_OFF)
    learner = make(num_steps=STEPS, eval_num_steps=STEPS + 2)
    programs = [
        str(jax.make_jaxpr(each.adapt)(params, task.support, KEY))
        for each in (learner, make(num_steps=STEPS + 2), make(num_steps=STEPS))
    ]
    assert programs[0] == programs[1] != programs[2]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"eval_num_steps": 4}, "eval_num_steps=4 must be num_steps=3.* as many as you evaluate"),
        ({"num_steps": 0}, "num_steps=0 must be an integer, at least 1"),
        ({"inner_rate": 0.0}, "inner_rate=0.0 must be a finite number, above 0"),
        ({"inner_rate": float("nan")}, "inner_rate=nan must be a finite number, above 0"),
        ({"multi_step_epochs": -1}, "multi_step_epochs=-1"),
        ({"first_order_epochs": 1.5}, "first_order_epochs=1.5"),
        ({"epoch_length": 0}, "epoch_length=0"),
        ({"epoch_length": None}, "epoch_length=None must be an integer, at least 1"),
    ],
)
def test_bad_settings_are_refused(problem, changes, message):
    settings = {"inner_rate": RATE, "num_steps": STEPS, **changes}
    with pytest.raises(ValueError, match=re.compile(message)):
        mamlpp(problem[0], cross_entropy, **settings)
