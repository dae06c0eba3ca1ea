"""The contract that every learner keeps. A new algorithm is one row of `LEARNERS`."""

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from imaml_jax import (
    Batch,
    MetaLearner,
    Task,
    adaptive_gd,
    bmaml,
    cross_entropy,
    fomaml,
    imaml,
    imaml_dev,
    implicit_bmaml,
    leo,
    maml,
    mamlpp,
    mean_squared_error,
    newton_cg,
    platipus,
    reptile,
    solve_cg,
    solve_cg_steihaug,
    solve_woodbury,
)
from imaml_jax.learners.base import is_head
from imaml_jax.networks import Network, conv4, mlp
from imaml_jax.training.mapping import map_over_tasks

sgd = optax.sgd(0.1)
gauss_newton_cg = dict(solve=partial(solve_cg_steihaug, max_steps=5), curvature="gauss_newton")
woodbury = dict(solve=solve_woodbury, curvature="gauss_newton")
INIT_KEY = jax.random.key(3)
both, only_mlp, only_features = ("mlp", "conv"), ("mlp",), ("features",)


def leo_on_features(network, loss_fn, **settings):
    """LEO brings its own network and loss."""
    del network, loss_fn
    sizes = dict(num_latents=4, num_steps=2, num_finetuning_steps=2)
    return leo(ways=3, latent_rate=0.1, **sizes, **settings)


class Row(NamedTuple):
    """One learner: its name, its factory, its settings, and what it is tried on.

    `problems` and `without_jit` leave out what takes long where a like row already does it.
    """

    name: str
    factory: Callable[..., MetaLearner]
    settings: dict[str, Any]
    problems: tuple[str, ...] = both
    without_jit: bool = True


three_particles = dict(num_particles=3, inner=optax.sgd(0.05))
published_adam = optax.adam(0.01, b1=0.0)
LEARNERS = [
    Row("maml", maml, dict(inner=sgd, num_steps=2, eval_num_steps=5)),
    Row("maml_head", maml, dict(inner=sgd, num_steps=3, fast=is_head), only_mlp, False),
    Row("mamlpp", mamlpp, dict(inner_rate=0.1, num_steps=2), both, False),
    Row(
        "mamlpp_first_order",
        mamlpp,
        dict(inner_rate=0.1, num_steps=2, first_order_epochs=1, multi_step_epochs=0),
        only_mlp,
    ),
    Row("fomaml", fomaml, dict(inner=sgd, num_steps=3), only_mlp, False),
    Row("reptile", reptile, dict(inner=published_adam, num_steps=5), both, False),
    Row(
        "reptile_mini_batches",
        reptile,
        dict(inner=published_adam, num_steps=5, batch_size=4),
        only_mlp,
        False,
    ),
    Row(
        "reptile_transduction",
        reptile,
        dict(inner=published_adam, num_steps=5, statistics="batch"),
        only_mlp,
        False,
    ),
    Row("imaml", imaml, dict(inner=sgd, num_steps=8), only_mlp),
    Row(
        "imaml_cg",
        imaml,
        dict(inner=sgd, num_steps=8, solve=partial(solve_cg, max_steps=5)),
        both,
        False,
    ),
    Row("imaml_woodbury", imaml, dict(inner=sgd, num_steps=8, **woodbury), only_mlp, False),
    Row("imaml_newton_cg", imaml, dict(inner=newton_cg(), num_steps=2), only_mlp, False),
    Row("imaml_head", imaml, dict(inner=sgd, num_steps=8, fast=is_head), only_mlp, False),
    Row(
        "imaml_learned_strength",
        imaml,
        dict(inner=sgd, num_steps=8, learn_reg_strength=True),
        only_mlp,
        False,
    ),
    Row(
        "imaml_adaptive",
        imaml,
        dict(inner=sgd, num_steps=8, accuracy=1e-2, max_rounds=5),
        only_mlp,
        False,
    ),
    Row("bmaml", bmaml, dict(num_steps=2, eval_num_steps=5, **three_particles), only_mlp, False),
    Row("bmaml_head", bmaml, dict(num_steps=2, fast=is_head, **three_particles), ("conv",), False),
    Row(
        "implicit_bmaml",
        implicit_bmaml,
        dict(num_steps=8, reg_strength=2.0, **three_particles),
        only_mlp,
        False,
    ),
    Row(
        "platipus",
        platipus,
        dict(inner=sgd, num_steps=2, eval_num_samples=3),
        only_mlp,
        False,
    ),
    Row(
        "platipus_implicit",
        platipus,
        dict(inner=sgd, num_steps=8, adaptation=partial(imaml, **woodbury)),
        only_mlp,
        False,
    ),
    Row("imaml_dev", imaml_dev, dict(inner_rate=0.1, num_steps=8), only_mlp, False),
    Row("leo", leo_on_features, dict(dropout=0.2), only_features, False),
    Row(
        "imaml_tree_strength",
        imaml,
        dict(inner=sgd, num_steps=8, reg_strength={"Dense_0": 2.0, "head": 1.0}),
        only_mlp,
        False,
    ),
]

# Every way of solving the inner problem and every way of solving the linear system.
INNERS = {
    "sgd": (sgd, 30),
    "momentum": (optax.sgd(0.05, momentum=0.5), 40),
    "nesterov": (optax.sgd(0.05, momentum=0.5, nesterov=True), 40),
    "adaptive_gd": (adaptive_gd(0.05), 30),
    "newton_cg": (newton_cg(), 5),
    "lbfgs": (optax.lbfgs(), 8),
}
SOLVES = {
    "cg": dict(solve=partial(solve_cg, max_steps=20)),
    "steihaug": dict(solve=partial(solve_cg_steihaug, max_steps=20)),
    "gauss_newton_woodbury": woodbury,
    "gauss_newton_steihaug": gauss_newton_cg,
}
PAIRS = [(inner, "steihaug") for inner in INNERS if inner != "sgd"]
PAIRS += [("sgd", solve) for solve in SOLVES]
PAIRS += [("nesterov", "gauss_newton_woodbury"), ("newton_cg", "cg")]
PAIRS += [("newton_cg", "gauss_newton_woodbury")]


class Setting(NamedTuple):
    """A network, a loss and three tasks, stacked."""

    network: Network
    loss_fn: Callable[..., jax.Array]
    params: Any
    tasks: Task


def regression() -> Setting:
    network = mlp([8, 1], activation=jnp.tanh, kernel_init=jax.nn.initializers.glorot_uniform())
    rng = np.random.default_rng(1)
    inputs = rng.normal(size=(3, 14, 2)).astype(np.float32)
    slopes = 1 + rng.normal(size=(3, 2, 1)).astype(np.float32) / 2
    tasks = split(Batch(inputs, np.sin(inputs @ slopes)))
    params = jax.jit(network.init)(INIT_KEY, inputs[0])
    return Setting(network, mean_squared_error, params, tasks)


def classification() -> Setting:
    network = conv4(3, filters=4, num_blocks=2)
    rng = np.random.default_rng(1)
    prototypes = rng.normal(size=(3, 1, 3, 8, 8, 1))
    images = prototypes + rng.normal(size=(3, 4, 3, 8, 8, 1)) / 2
    images = images.reshape(3, 12, 8, 8, 1).astype(np.float32)
    labels = np.tile(np.arange(3, dtype=np.int32), (3, 4))
    params = jax.jit(network.init)(INIT_KEY, images[0])
    return Setting(network, cross_entropy, params, split(Batch(images, labels)))


def features() -> Setting:
    network = mlp([3])
    rng = np.random.default_rng(1)
    centres = rng.normal(size=(3, 1, 3, 6))
    inputs = centres + rng.normal(size=(3, 4, 3, 6)) / 4
    inputs = inputs.reshape(3, 12, 6).astype(np.float32)
    inputs /= np.linalg.norm(inputs, axis=-1, keepdims=True)
    labels = np.tile(np.arange(3, dtype=np.int32), (3, 4))
    params = jax.jit(network.init)(INIT_KEY, inputs[0])
    return Setting(network, cross_entropy, params, split(Batch(inputs, labels)))


PARTS = (slice(6), slice(6, None))


def split(data: Batch) -> Task:
    """Of each task, the first six examples are its support set."""
    support, query = (Batch(*(jnp.asarray(x[:, part]) for x in data)) for part in PARTS)
    return Task(support, query)


class Case:
    """A learner on a problem, with the compiled programs that its tests share."""

    def __init__(self, row: Row, setting: Setting):
        self.network, self.loss_fn, self.network_params, self.tasks = setting
        self.learner = row.factory(self.network, self.loss_fn, **row.settings)
        self.params = jax.jit(self.learner.init)(INIT_KEY, first(self.tasks).support.inputs)
        self.fast = row.settings.get("fast")
        self.keys = jax.random.split(jax.random.key(4), 3)
        self.task = jax.tree.map(lambda x: x[0], self.tasks)

    @cached_property
    def meta_grads(self):
        """Over the tasks: `(params, tasks, keys) -> (grads, info)`."""
        mapped = jax.jit(jax.vmap(self.learner.meta_grad, in_axes=(None, 0, 0, None)))
        return lambda params, tasks, keys: mapped(params, tasks, keys, 0)

    @cached_property
    def adapt(self):
        """Over the tasks: `params -> Outcome`."""

        def adapt_one(params, task, key):
            adapted, info = self.learner.adapt(params, task.support, key)
            outputs = [self.learner.predict(adapted, batch.inputs) for batch in task]
            return Outcome(
                adapted,
                info,
                outputs[1],
                self.loss_fn(
                    self.network.apply(self.network_params, task.support.inputs),
                    task.support.targets,
                ),
                self.loss_fn(outputs[0], task.support.targets),
                self.loss_fn(outputs[1], task.query.targets),
            )

        mapped = jax.jit(jax.vmap(adapt_one, in_axes=(None, 0, 0)))
        return lambda params: mapped(params, self.tasks, self.keys)


class Outcome(NamedTuple):
    """Of adaptation to one task."""

    adapted: Any
    info: Any
    query_outputs: jax.Array
    support_loss_before: jax.Array
    support_loss: jax.Array
    query_loss: jax.Array


@pytest.fixture(scope="module")
def settings():
    return {"mlp": regression(), "conv": classification(), "features": features()}


CASES = [pytest.param((r, p), id=f"{r.name}-{p}") for r in LEARNERS for p in r.problems]
SMALL_CASES = [case for case in CASES if case.values[0][1] != "conv"]
PLAIN_CASES = [case for case in SMALL_CASES if case.values[0][0].without_jit]
ONE_A_FACTORY = {case.values[0][0].factory: case.id for case in SMALL_CASES}
del ONE_A_FACTORY[bmaml]  # takes long; implicit_bmaml traces the same particles
TRACED_CASES = [
    pytest.param(
        *case.values, id=case.id, marks=[pytest.mark.slow] * (case.id not in ONE_A_FACTORY.values())
    )
    for case in SMALL_CASES
]
SLOW_CASES = [
    pytest.param((r, p), id=f"{r.name}-{p}")
    for r in LEARNERS
    for p in r.problems
    if "fast" in r.settings
]


@pytest.fixture(scope="module")
def cases():
    """What has been built, so that the tests of a case share its programs."""
    return {}


@pytest.fixture(params=CASES)
def case(request, settings, cases):
    row, problem = request.param
    name = row.name, problem
    if name not in cases:
        cases[name] = Case(row, settings[problem])
    return cases[name]


def assert_close(actual, expected, rtol=2e-4):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=rtol, atol=rtol * (1e-3 + float(jnp.abs(e).max())))


def assert_fits(grads, params):
    """The same structure, shapes and dtypes, and finite."""
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    for g, p in zip(jax.tree.leaves(grads), jax.tree.leaves(params), strict=True):
        assert (g.shape, g.dtype) == (p.shape, p.dtype)
        assert jnp.isfinite(g).all()


def first(tree):
    return jax.tree.map(lambda x: x[0], tree)


def test_gradients_fit_the_parameters_and_info_is_scalars(case):
    grads, info = first(case.meta_grads(case.params, case.tasks, case.keys))
    assert_fits(grads, case.params)
    assert isinstance(info, tuple) and hasattr(info, "_fields")
    for value in info:
        assert value is None or (value.shape == () and jnp.isfinite(value))
    assert info.query_loss > 0
    assert (info.query_accuracy is None) == (case.loss_fn is mean_squared_error)


def test_adaptation_lowers_the_support_loss(case):
    outcome = case.adapt(case.params)
    assert (outcome.support_loss < outcome.support_loss_before).all()
    assert jnp.isfinite(outcome.query_loss).all()
    assert isinstance(outcome.info, tuple) and hasattr(outcome.info, "_fields")
    assert all(value is None or value.shape == (3,) for value in outcome.info)
    expected = jax.eval_shape(case.network.apply, case.network_params, case.task.query.inputs)
    assert outcome.query_outputs.shape == (3, *expected.shape)
    assert outcome.query_outputs.dtype == expected.dtype


def test_training_lowers_the_query_loss(case):
    tx = optax.adam(0.02)
    update = jax.jit(tx.update)
    params, state = case.params, tx.init(case.params)
    for _ in range(8):
        grads, _ = case.meta_grads(params, case.tasks, case.keys)
        updates, state = update(jax.tree.map(lambda g: g.mean(0), grads), state, params)
        params = optax.apply_updates(params, updates)
    before, after = (case.adapt(p).query_loss.mean() for p in (case.params, params))
    assert after < 0.95 * before


def test_the_same_key_gives_the_same_bits(case):
    again = [case.meta_grads(case.params, case.tasks, case.keys) for _ in range(2)]
    for a, b in zip(*map(jax.tree.leaves, again), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("case", PLAIN_CASES, indirect=True)
def test_jit_and_vmap_change_nothing_and_the_arguments_stay(case):
    leaves, structure = jax.tree.flatten((case.params, case.task))
    copies = [np.array(x) for x in leaves]
    with jax.disable_jit():
        single = case.learner.meta_grad(case.params, case.task, case.keys[0], 0)
    mapped = case.meta_grads(case.params, case.tasks, case.keys)
    assert_close(first(mapped), single)

    after, structure_after = jax.tree.flatten((case.params, case.task))
    assert structure_after == structure
    assert all(a is b for a, b in zip(after, leaves, strict=True))
    for a, b in zip(after, copies, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("case", SMALL_CASES, indirect=True)
def test_a_task_has_the_same_result_wherever_it_stands(case):
    """With the test above, vmap over tasks is a loop."""

    def roll(tree):
        return jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), tree)

    mapped = case.meta_grads(case.params, case.tasks, case.keys)
    assert_close(case.meta_grads(case.params, roll(case.tasks), roll(case.keys)), roll(mapped))


@pytest.mark.parametrize("case", TRACED_CASES, indirect=True)
def test_nothing_leaks_from_a_trace(case):
    with jax.checking_leaks():
        jax.make_jaxpr(case.learner.meta_grad)(case.params, case.task, case.keys[0], 0)
        jax.make_jaxpr(case.learner.adapt)(case.params, case.task.support, case.keys[0])


@pytest.mark.parametrize("case", SLOW_CASES, indirect=True)
def test_adaptation_leaves_slow_parameters_alone_and_training_does_not(case):
    adapted = first(case.adapt(case.params).adapted).params
    grads = first(case.meta_grads(case.params, case.tasks, case.keys)[0])
    paths = jax.tree_util.tree_leaves_with_path(case.params)
    for (path, before), after, g in zip(
        paths, jax.tree.leaves(adapted), jax.tree.leaves(grads), strict=True
    ):
        is_fast = case.fast(jax.tree_util.keystr(path, simple=True, separator="/"))
        assert bool((before == after).all()) is not is_fast
        assert jnp.abs(g).max() > 0


@pytest.fixture(scope="module")
def exact_gradients(settings):
    """The meta-gradient of a converged run, by curvature."""
    network, loss_fn, params, tasks = settings["mlp"]

    def compute(curvature):
        learner = imaml(
            network,
            loss_fn,
            inner=sgd,
            num_steps=100,
            curvature=curvature,
            solve=partial(solve_cg_steihaug, max_steps=50, tol=1e-6),
        )
        return jax.jit(learner.meta_grad)(params, first(tasks), jax.random.key(0), 0)[0]

    return {curvature: compute(curvature) for curvature in ("hessian", "gauss_newton")}


@pytest.mark.parametrize("inner, solve", PAIRS)
def test_imaml_agrees_over_inner_and_linear_solvers(inner, solve, settings, exact_gradients):
    network, loss_fn, params, tasks = settings["mlp"]
    tx, num_steps = INNERS[inner]
    learner = imaml(network, loss_fn, inner=tx, num_steps=num_steps, **SOLVES[solve])
    grads, info = jax.jit(learner.meta_grad)(params, first(tasks), jax.random.key(0), 0)
    assert_fits(grads, params)
    assert info.inner_residual < 0.01 and info.solve_residual < 0.01
    expected = exact_gradients[SOLVES[solve].get("curvature", "hessian")]
    error = optax.tree.norm(optax.tree.sub(grads, expected)) / optax.tree.norm(expected)
    assert error < 0.02


@pytest.mark.parametrize(
    "factory, statistics",
    [(imaml, mode) for mode in ("batch", "support", "joint", "support_and_one")]
    + [(maml, "support"), (reptile, "support")],
)
def test_every_batch_norm_mode_is_accepted(factory, statistics, settings):
    network, loss_fn, params, tasks = settings["conv"]
    learner = factory(network, loss_fn, inner=sgd, num_steps=2, statistics=statistics)
    task, key = first(tasks), jax.random.key(0)
    grads, _ = jax.eval_shape(learner.meta_grad, params, task, key, 0)
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, params)
    adapted, _ = jax.eval_shape(learner.adapt, params, task.support, key)
    assert jax.eval_shape(learner.predict, adapted, task.query.inputs).shape == (6, 3)


def test_batch_norm_modes_differ(settings):
    network, loss_fn, params, tasks = settings["conv"]
    params = jax.tree.map(lambda x: x + 0.1, params)  # a head that is not zero
    task, key = first(tasks), jax.random.key(0)

    def query_losses(params):
        modes = ("batch", "support", "joint", "support_and_one")
        learners = [fomaml(network, loss_fn, inner=sgd, num_steps=1, statistics=m) for m in modes]
        return [learner.meta_grad(params, task, key, 0)[1].query_loss for learner in learners]

    losses = jnp.stack(jax.jit(query_losses)(params))
    assert jnp.diff(jnp.sort(losses)).min() > 1e-4


def test_plain_functions_and_any_pytree_serve(settings):
    """A list of tuples gives what flax's dictionaries give."""
    network, loss_fn, params, tasks = settings["mlp"]

    def apply(layers, inputs):
        *hidden, (kernel, bias) = layers
        for k, b in hidden:
            inputs = jnp.tanh(inputs @ k + b[None])
        return inputs @ kernel + bias[None]

    def init(key, inputs):
        del key, inputs
        return [(params[name]["kernel"], params[name]["bias"]) for name in ("Dense_0", "head")]

    task, key = first(tasks), jax.random.key(0)
    layers = init(key, None)
    for factory in (maml, fomaml, reptile):
        learner = factory(Network(init, apply), loss_fn, inner=sgd, num_steps=3)
        grads, _ = jax.eval_shape(learner.meta_grad, layers, task, key, 0)
        assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, layers)

    make = partial(imaml, loss_fn=loss_fn, inner=sgd, num_steps=3)
    plain, named = make(Network(init, apply)), make(network)
    grads, info = jax.jit(plain.meta_grad)(plain.init(key, task.support.inputs), task, key, 0)
    assert_fits(grads, layers)
    expected, expected_info = jax.jit(named.meta_grad)(params, task, key, 0)
    assert_close(info, expected_info)
    for layer, name in zip(grads, ("Dense_0", "head"), strict=True):
        assert_close(layer, (expected[name]["kernel"], expected[name]["bias"]))
    adapted, _ = jax.jit(plain.adapt)(layers, task.support, key)
    assert plain.predict(adapted, task.query.inputs).shape == task.query.targets.shape


@pytest.mark.parametrize("case", [*PLAIN_CASES, CASES[1]], indirect=True)
def test_tasks_can_be_split_over_devices(case):
    """Traced inside `shard_map`."""

    def meta_grad(params, task, key):
        return case.learner.meta_grad(params, task, key, 0)

    split_over = map_over_tasks(meta_grad, "vmap", jax.devices()[:1])
    grads, _ = jax.eval_shape(split_over, case.params, case.tasks, case.keys)
    assert [g.shape[1:] for g in jax.tree.leaves(grads)] == [
        p.shape for p in jax.tree.leaves(case.params)
    ]
