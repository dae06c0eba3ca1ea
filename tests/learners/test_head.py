"""Adapting the head alone (ANIL): features computed once, and an inner problem solved exactly."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from imaml_jax import (
    Batch,
    Task,
    bmaml,
    cross_entropy,
    fomaml,
    imaml,
    maml,
    mamlpp,
    newton_cg,
    solve_cg,
    solve_woodbury,
)
from imaml_jax.learners.base import is_head
from imaml_jax.learners.supervised import Encoded, supervised
from imaml_jax.networks import Network, conv4, mlp
from tests.learners.conftest import relative_error

pytestmark = pytest.mark.usefixtures("x64_module")

KEY = jax.random.key(0)
SGD = optax.sgd(0.2)


@pytest.fixture(scope="module")
def problem(x64_module):
    """`(network, params, task)`: four classes, features of three numbers."""
    network = mlp([3, 4], activation=jnp.tanh, kernel_init=jax.nn.initializers.glorot_uniform())
    rng = np.random.default_rng(1)
    inputs, labels = jnp.asarray(rng.normal(size=(20, 2))), jnp.tile(jnp.arange(4), 5)
    task = Task(Batch(inputs[:8], labels[:8]), Batch(inputs[8:], labels[8:]))
    return network, network.init(jax.random.key(2), inputs), task


CG = dict(solve=partial(solve_cg, max_steps=50), reg_strength=0.3)
LEARNERS = {
    "maml": partial(maml, inner=SGD, num_steps=3),
    "maml_support": partial(maml, inner=SGD, num_steps=3, statistics="joint"),
    "fomaml": partial(fomaml, inner=SGD, num_steps=3),
    "imaml": partial(imaml, inner=SGD, num_steps=3, **CG),
    "imaml_learned": partial(imaml, inner=SGD, num_steps=3, learn_reg_strength=True, **CG),
    "mamlpp": partial(mamlpp, inner_rate=0.2, num_steps=2),
    "bmaml": partial(bmaml, num_particles=2, inner=SGD, num_steps=2, init_spread=0.1),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "bmaml")) for n in LEARNERS]
)
def test_features_computed_once_change_nothing(problem, name):
    """But the time: a network without a named head runs whole at every step."""
    network, params, task = problem
    named, nameless = (
        LEARNERS[name](each, cross_entropy, fast=is_head)
        for each in (network, Network(network.init, network.apply))
    )
    meta_params = named.init(KEY, task.support.inputs)

    def outcome(learner):
        adapted, info = learner.adapt(meta_params, task.support, KEY)
        outputs = learner.predict(adapted, task.query.inputs)
        return learner.meta_grad(meta_params, task, KEY, 0), adapted, info, outputs

    assert relative_error(*(jax.jit(partial(outcome, x))() for x in (named, nameless))) < 1e-10


def test_only_a_head_alone_is_given_features(problem):
    network, params, task = problem
    cases = {
        is_head: True,
        lambda path: path == "head/bias": True,
        lambda path: path != "Dense_0/bias": False,
    }
    for fast, encodes in cases.items():
        split = supervised(network, cross_entropy, fast=fast)
        _, slow = split.split(params)
        assert isinstance(split.encode(slow, task), Encoded) is encodes
    joint = supervised(network, cross_entropy, fast=is_head, statistics="joint")
    assert joint.encode(joint.split(params)[1], task) is not None
    assert not isinstance(joint.encode(joint.split(params)[1], task), Encoded)


def test_support_and_query_are_normalised_apart():
    network = conv4(3, filters=2)
    keys = jax.random.split(KEY, 3)
    support, query = (1 + i + (1 + i) * jax.random.normal(keys[i], (3, 16, 16, 1)) for i in (0, 1))
    params = network.init(keys[2], support)
    problem = supervised(network, cross_entropy, fast=is_head)
    fast, slow = problem.split(params)
    task = Task(Batch(support, None), Batch(query, None))
    encoded = problem.encode(slow, task)
    for inputs, outputs in (
        (support, problem.support_outputs(fast, encoded, task.support)),
        (query, problem.query_outputs(fast, encoded, task)),
    ):
        np.testing.assert_allclose(outputs, network.apply(params, inputs), rtol=1e-5, atol=1e-6)


def test_anil_is_maml_with_rate_zero_for_the_body(problem):
    network, params, task = problem
    rates = {"head": optax.sgd(0.2), "Dense_0": optax.set_to_zero()}
    labels = {name: name for name in rates}
    frozen = optax.partition(rates, labels)
    anil = maml(network, cross_entropy, inner=SGD, num_steps=3, fast=is_head)
    whole = maml(network, cross_entropy, inner=frozen, num_steps=3)
    grads, expected = (
        jax.jit(learner.meta_grad)(params, task, KEY, 0)[0] for learner in (anil, whole)
    )
    assert relative_error(grads, expected) < 1e-12


def test_implicit_anil_is_exact(problem, finite_differences):
    """The head's problem is convex: Newton's method finds its solution to the last digits."""
    network, params, task = problem
    learner = imaml(
        network,
        cross_entropy,
        inner=newton_cg(max_cg_steps=20, cg_tol=1e-12),
        num_steps=8,
        reg_strength=0.1,
        curvature="gauss_newton",
        solve=solve_woodbury,
        fast=is_head,
    )
    grads, info = jax.jit(learner.meta_grad)(params, task, KEY, 0)
    assert info.inner_residual < 1e-12 and info.solve_residual < 1e-12
    flat, unravel = ravel_pytree(params)

    def query_loss(x):
        adapted, _ = learner.adapt(unravel(x), task.support, KEY)
        return cross_entropy(learner.predict(adapted, task.query.inputs), task.query.targets)

    assert relative_error(grads, finite_differences(query_loss, flat)) < 1e-8
