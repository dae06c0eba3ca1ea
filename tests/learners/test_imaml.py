"""Implicit MAML against closed forms, dense solves, finite differences and unrolling, in float64.

The references share no curvature, solver or inner-loop code with the library: flat parameters,
`jax.hessian`, Newton's method on the assembled matrix.
"""

from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from imaml_jax import (
    Batch,
    Task,
    adaptive_gd,
    cross_entropy,
    custom_argmin,
    fomaml,
    imaml,
    maml,
    mean_squared_error,
    minimize,
    newton_cg,
    proximal_objective,
    solve_cg,
    solve_cg_steihaug,
    solve_dense,
    solve_woodbury,
)
from imaml_jax.learners.base import is_head
from imaml_jax.networks import Network, conv4, mlp
from tests.learners.conftest import relative_error

pytestmark = pytest.mark.usefixtures("x64_module")

KEY = jax.random.key(0)
EXACT = dict(
    cg=dict(solve=partial(solve_cg, tol=1e-13)),
    steihaug=dict(solve=partial(solve_cg_steihaug, tol=1e-13)),
    dense=dict(solve=solve_dense),
    gauss_newton_cg=dict(solve=partial(solve_cg, tol=1e-13), curvature="gauss_newton"),
    gauss_newton_steihaug=dict(
        solve=partial(solve_cg_steihaug, tol=1e-13), curvature="gauss_newton"
    ),
    gauss_newton_woodbury=dict(solve=solve_woodbury, curvature="gauss_newton"),
)


# A linear model under the squared loss, whose meta-gradient has a closed form.

INNERS = {
    "gradient_descent": (optax.sgd(0.3), 250),
    "momentum": (optax.sgd(0.2, momentum=0.4), 250),
    "nesterov": (optax.sgd(0.2, momentum=0.4, nesterov=True), 250),
    "adaptive_gd": (adaptive_gd(0.05), 400),
    "lbfgs": (optax.lbfgs(), 60),
    "newton_cg": (newton_cg(max_cg_steps=20, cg_tol=1e-12), 4),
}


@pytest.fixture(scope="module")
def quadratic(x64_module):
    """`(network, params, task, reg_strength, closed form of the meta-gradient)`."""
    rng = np.random.default_rng(0)
    support, query = (Batch(rng.normal(size=(n, 3)), rng.normal(size=(n, 2))) for n in (7, 9))
    params = {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)}
    reg_strength = 0.7

    def with_ones(x):
        return np.hstack([x, np.ones((len(x), 1))])

    x, z = with_ones(support.inputs), with_ones(query.inputs)
    theta = np.vstack([params["kernel"], params["bias"]])
    scale = 2 / support.targets.size
    system = scale * x.T @ x + reg_strength * np.eye(4)
    phi = np.linalg.solve(system, scale * x.T @ support.targets + reg_strength * theta)
    v = 2 / query.targets.size * z.T @ (z @ phi - query.targets)
    expected = reg_strength * np.linalg.solve(system, v)
    network = Network(lambda key, inputs: params, lambda p, x: x @ p["kernel"] + p["bias"][None, :])
    params, task = jax.tree.map(jnp.asarray, (params, Task(support, query)))
    return network, params, task, reg_strength, {"kernel": expected[:3], "bias": expected[3]}


@pytest.mark.parametrize(
    "inner, solve",
    [(inner, "steihaug") for inner in INNERS]
    + [("gradient_descent", solve) for solve in EXACT if solve != "steihaug"],
)
def test_closed_form_on_a_quadratic(quadratic, inner, solve):
    network, params, task, reg_strength, expected = quadratic
    tx, num_steps = INNERS[inner]
    learner = imaml(
        network,
        mean_squared_error,
        inner=tx,
        num_steps=num_steps,
        reg_strength=reg_strength,
        **EXACT[solve],
    )
    grads, info = jax.jit(learner.meta_grad)(params, task, KEY, 0)
    assert relative_error(grads, expected) < 1e-10
    assert info.inner_residual < 1e-10
    assert info.solve_residual < 1e-10


def test_strength_may_be_traced(quadratic):
    network, params, task, reg_strength, expected = quadratic
    tx, num_steps = INNERS["gradient_descent"]

    def meta_grad(strength):
        settings = {"inner": tx, "num_steps": num_steps, **EXACT["steihaug"]}
        learner = imaml(network, mean_squared_error, reg_strength=strength, **settings)
        return learner.meta_grad(params, task, KEY, 0)[0]

    grads = jax.jit(jax.vmap(meta_grad))(jnp.array([reg_strength, 2 * reg_strength]))
    assert relative_error(jax.tree.map(lambda g: g[0], grads), expected) < 1e-10
    doubled = jax.jit(lambda: meta_grad(2 * reg_strength))()
    assert relative_error(jax.tree.map(lambda g: g[1], grads), doubled) < 1e-10


# Problems that are not quadratic, and references on flat parameters.


class Reference(NamedTuple):
    """A problem on flat parameters, split by a mask, with everything calculated anew."""

    network: Network
    loss_fn: object
    params: object
    task: Task
    fast: object
    reg_strength: object
    flat: jax.Array
    strengths: jax.Array  # of the fast parameters
    is_fast: np.ndarray

    def support_loss(self, flat):
        outputs = self.network.apply(ravel_pytree(self.params)[1](flat), self.task.support.inputs)
        return self.loss_fn(outputs, self.task.support.targets)

    def query_loss(self, flat):
        outputs = self.network.apply(ravel_pytree(self.params)[1](flat), self.task.query.inputs)
        return self.loss_fn(outputs, self.task.query.targets)

    def solve_inner(self, flat, strengths):
        """Gradient descent, then Newton's method on the assembled Hessian; all flat parameters."""
        where = np.flatnonzero(self.is_fast)
        anchor = flat[where]

        def objective(fast):
            penalty = 0.5 * jnp.sum(strengths * (fast - anchor) ** 2)
            return self.support_loss(flat.at[where].set(fast)) + penalty

        def newton(fast, _):
            step = jnp.linalg.solve(jax.hessian(objective)(fast), jax.grad(objective)(fast))
            return fast - step, None

        near = jax.lax.fori_loop(
            0, 100, lambda _, fast: fast - 0.1 * jax.grad(objective)(fast), anchor
        )
        fast, _ = jax.lax.scan(newton, near, length=3)
        return flat.at[where].set(fast), jnp.linalg.norm(jax.grad(objective)(fast))

    def meta_loss(self, flat, strengths):
        return self.query_loss(self.solve_inner(flat, strengths)[0])

    def dense(self):
        adapted, residual = self.solve_inner(self.flat, self.strengths)
        value, v = jax.value_and_grad(self.query_loss)(adapted)
        f, s = np.flatnonzero(self.is_fast), np.flatnonzero(~self.is_fast)
        hessian = jax.hessian(self.support_loss)(adapted)[f]
        matrix = hessian[:, f] + jnp.diag(self.strengths)
        u = jnp.linalg.solve(matrix, v[f])
        fast_grads = self.strengths * u
        return Dense(
            residual=residual,
            adapted=adapted,
            grads=jnp.zeros_like(v).at[f].set(fast_grads).at[s].set(v[s] - hessian[:, s].T @ u),
            u=u,
            query_loss=value,
            smallest=jnp.linalg.eigvalsh(matrix)[0],
            cosine=v[f] @ fast_grads / (jnp.linalg.norm(v[f]) * jnp.linalg.norm(fast_grads)),
        )


class Dense(NamedTuple):
    """What a dense solve gives: `u` is `(Lambda + H)^-1 v`."""

    residual: jax.Array
    adapted: jax.Array
    grads: jax.Array
    u: jax.Array
    query_loss: jax.Array
    smallest: jax.Array
    cosine: jax.Array


def regression(fast=None, reg_strength=2.0):
    network = mlp([3, 1], activation=jnp.tanh, kernel_init=jax.nn.initializers.glorot_uniform())
    x = np.random.default_rng(1).normal(size=(12, 2))
    y = np.sin(x[:, :1]) + x[:, 1:] / 2
    return make_reference(network, mean_squared_error, x, y, fast, reg_strength)


def classification(fast=None, reg_strength=2.0, num_blocks=2):
    network = conv4(
        2,
        filters=2,
        num_blocks=num_blocks,
        epsilon=0.1,
        activation=jnp.tanh,
        head_init=jax.nn.initializers.glorot_uniform(),
    )
    x = np.random.default_rng(1).normal(size=(8, 6, 6, 1))
    return make_reference(network, cross_entropy, x, np.arange(8) % 2, fast, reg_strength)


def make_reference(network, loss_fn, x, y, fast, reg_strength):
    half = len(x) // 2
    x, y = jnp.asarray(x), jnp.asarray(y)
    task = Task(Batch(x[:half], y[:half]), Batch(x[half:], y[half:]))
    params = jax.jit(network.init)(jax.random.key(2), x)
    params = jax.tree.map(lambda p: p.astype(jnp.float64), params)
    mask = jax.tree_util.tree_map_with_path(
        lambda path, p: jnp.full(
            p.shape, fast is None or fast(jax.tree_util.keystr(path, simple=True, separator="/"))
        ),
        params,
    )
    is_fast = np.asarray(ravel_pytree(mask)[0])
    if not isinstance(reg_strength, dict):
        strengths = jnp.full(is_fast.sum(), reg_strength)
    else:
        by_module = {
            module: jax.tree.map(lambda p, m=module: jnp.full(p.shape, reg_strength[m]), leaves)
            for module, leaves in params.items()
        }
        strengths = ravel_pytree(by_module)[0][is_fast]
    flat = ravel_pytree(params)[0]
    return Reference(network, loss_fn, params, task, fast, reg_strength, flat, strengths, is_fast)


def is_no_norm(path):
    return "scale" not in path and "offset" not in path


REFERENCES = {
    "mlp": regression,
    "mlp_tree_strength": partial(regression, reg_strength={"Dense_0": 1.5, "head": 3.0}),
    "mlp_fast_head": partial(regression, fast=is_head),
    "conv": classification,
    "conv_slow_norm_tree_strength": partial(
        classification,
        fast=is_no_norm,
        reg_strength={"block_0": 2.5, "head": 1.0},
        num_blocks=1,
    ),
}


@cache
def reference_and_dense(name):
    """`(Reference, Dense)`; call with float64 enabled."""
    reference = REFERENCES[name]()
    return reference, jax.jit(reference.dense)()


SOLVES = {
    "mlp": "dense",
    "mlp_tree_strength": "steihaug",
    "mlp_fast_head": "cg",
    "conv": "cg",
    "conv_slow_norm_tree_strength": "steihaug",
}
INNER = dict(inner=optax.sgd(0.15), num_steps=400)


@pytest.fixture(scope="module", params=REFERENCES)
def solved(request, x64_module):
    """A reference, its dense solution, and what the library says."""
    reference, dense = reference_and_dense(request.param)
    learner = imaml(
        reference.network,
        reference.loss_fn,
        fast=reference.fast,
        reg_strength=reference.reg_strength,
        **INNER,
        **EXACT[SOLVES[request.param]],
    )
    grads, info = jax.jit(learner.meta_grad)(reference.params, reference.task, KEY, 0)
    return reference, dense, grads, info


def test_dense_solve(solved):
    _, dense, grads, info = solved
    assert dense.residual < 1e-12
    assert relative_error(grads, dense.grads) < 1e-8
    np.testing.assert_allclose(info.query_loss, dense.query_loss, rtol=1e-10)
    np.testing.assert_allclose(info.cosine, dense.cosine, rtol=1e-8)
    assert info.inner_residual < 1e-12 and info.solve_residual < 1e-12
    if info.min_curvature is not None:
        assert info.min_curvature > dense.smallest - 1e-10


def test_finite_differences(solved, finite_differences):
    reference, _, grads, _ = solved
    slopes = finite_differences(
        lambda x: reference.meta_loss(x, reference.strengths), reference.flat
    )
    assert relative_error(grads, slopes) < 1e-5


@pytest.mark.parametrize(
    "name, solve",
    [
        ("mlp", "gauss_newton_cg"),
        ("mlp", "gauss_newton_steihaug"),
        ("mlp", "gauss_newton_woodbury"),
        ("conv", "gauss_newton_woodbury"),
    ],
)
def test_gauss_newton(name, solve):
    """Against the assembled `lambda (lambda I + J^T S J)^-1 v`."""
    reference, dense = reference_and_dense(name)
    learner = imaml(reference.network, reference.loss_fn, reg_strength=2.0, **INNER, **EXACT[solve])
    grads, info = jax.jit(learner.meta_grad)(reference.params, reference.task, KEY, 0)
    unravel = ravel_pytree(reference.params)[1]
    support = reference.task.support

    def expected():
        adapted = dense.adapted
        outputs, spread = ravel_pytree(reference.network.apply(unravel(adapted), support.inputs))
        jacobian = jax.jacobian(
            lambda flat: reference.network.apply(unravel(flat), support.inputs).ravel()
        )(adapted)
        curvature = jax.hessian(lambda o: reference.loss_fn(spread(o), support.targets))(outputs)
        matrix = jacobian.T @ curvature @ jacobian + 2.0 * jnp.eye(adapted.size)
        return 2.0 * jnp.linalg.solve(matrix, jax.grad(reference.query_loss)(adapted))

    assert relative_error(grads, jax.jit(expected)()) < 1e-8
    assert info.solve_residual < 1e-9


# The same objective through the general toolbox: derivatives in everything it depends on.


@pytest.mark.parametrize("name", ["mlp_tree_strength", "mlp_fast_head"])
def test_custom_argmin_gives_every_derivative(name, finite_differences):
    reference, dense = reference_and_dense(name)
    where = np.flatnonzero(reference.is_fast)

    def loss(fast, flat):
        return reference.support_loss(flat.at[where].set(fast))

    objective = proximal_objective(loss)

    @custom_argmin(objective, partial(solve_cg, tol=1e-13))
    def adapt(init, anchor, strength, flat):
        return minimize(objective, init, anchor, strength, flat, tx=INNER["inner"], num_steps=400)[
            0
        ]

    def meta_loss(flat, strength):
        adapted = adapt(flat[where], flat[where], strength, flat)
        return reference.query_loss(flat.at[where].set(adapted))

    moved = dense.adapted[where] - reference.flat[where]
    grads, by_strength = jax.jit(jax.grad(meta_loss, (0, 1)))(reference.flat, reference.strengths)
    assert relative_error(grads, dense.grads) < 1e-8
    assert relative_error(by_strength, -moved * dense.u) < 1e-8
    slopes = finite_differences(
        lambda s: reference.meta_loss(reference.flat, s), reference.strengths
    )
    assert relative_error(by_strength, slopes) < 1e-5


def test_custom_argmin_in_a_scalar_and_in_a_tree_strength(finite_differences):
    reference, dense = reference_and_dense("mlp")
    fun = reference.network.apply

    def loss(params, batch):
        return mean_squared_error(fun(params, batch.inputs), batch.targets)

    objective = proximal_objective(loss)

    @custom_argmin(objective, solve_dense)
    def adapt(init, anchor, strength, support):
        return minimize(objective, init, anchor, strength, support, **steps)[0]

    steps = dict(tx=INNER["inner"], num_steps=INNER["num_steps"])

    def meta_loss(strength, params):
        adapted = adapt(params, params, strength, reference.task.support)
        return loss(adapted, reference.task.query)

    by_coordinate = -(dense.adapted - reference.flat) * dense.u
    by_leaf = jax.tree.map(jnp.sum, ravel_pytree(reference.params)[1](by_coordinate))
    gradient = jax.jit(jax.grad(meta_loss, (0, 1)))

    scalar, by_params = gradient(2.0, reference.params)
    np.testing.assert_allclose(scalar, by_coordinate.sum(), rtol=1e-8)
    assert relative_error(by_params, dense.grads) < 1e-8
    ones = jnp.ones(reference.flat.size)
    slope = finite_differences(
        lambda s: reference.meta_loss(reference.flat, s[0] * ones), jnp.array([2.0])
    )
    np.testing.assert_allclose(scalar, slope[0], rtol=1e-5)

    prefix, _ = gradient({"Dense_0": 2.0, "head": 2.0}, reference.params)
    assert relative_error(prefix, {k: sum(jax.tree.leaves(v)) for k, v in by_leaf.items()}) < 1e-8


@pytest.mark.parametrize(
    "granularity", ["scalar", "branches", "per_leaf", "per_parameter", "given_per_parameter"]
)
def test_the_strength_is_learned_by_its_logarithm(granularity, finite_differences):
    reference, dense = reference_and_dense("mlp")
    coordinates = -2.0 * (dense.adapted - reference.flat) * dense.u  # lambda dF/dlambda
    by_parameter = ravel_pytree(reference.params)[1](coordinates)
    shapes = jax.tree.map(lambda p: jnp.full(p.shape, 2.0), reference.params)
    strength, learned, start_at, expected = {
        "scalar": (2, True, 2.0, coordinates.sum()),
        "branches": (
            {"Dense_0": 2.0, "head": 2},
            True,
            {"Dense_0": 2.0, "head": 2.0},
            {name: sum(map(jnp.sum, jax.tree.leaves(v))) for name, v in by_parameter.items()},
        ),
        "per_leaf": (
            {"Dense_0": 2.0, "head": 2.0},
            "leaf",
            jax.tree.map(lambda _: 2.0, reference.params),
            jax.tree.map(jnp.sum, by_parameter),
        ),
        "per_parameter": (2.0, "parameter", shapes, by_parameter),
        "given_per_parameter": (shapes, True, shapes, by_parameter),
    }[granularity]
    learner = imaml(
        reference.network,
        reference.loss_fn,
        reg_strength=strength,
        learn_reg_strength=learned,
        **INNER,
        **EXACT["steihaug"],
    )
    start = learner.init(KEY, reference.task.support.inputs)
    logs = jax.tree.map(jnp.log, jax.tree.map(jnp.float64, start_at))
    jax.tree.map(np.testing.assert_array_equal, start.log_reg_strength, logs)
    meta_params = start._replace(params=reference.params)
    grads, _ = jax.jit(learner.meta_grad)(meta_params, reference.task, KEY, 0)
    assert jax.tree.structure(grads) == jax.tree.structure(meta_params)
    assert relative_error(grads.params, dense.grads) < 1e-8
    assert relative_error(grads.log_reg_strength, expected) < 1e-8


# To an accuracy instead of by step counts.

ADAPTIVE = dict(inner=optax.sgd(0.15), num_steps=15, solve=partial(solve_cg_steihaug, max_steps=5))


@pytest.mark.parametrize(
    "name",
    [
        "mlp",
        pytest.param("mlp_tree_strength", marks=pytest.mark.slow),
        pytest.param("mlp_fast_head", marks=pytest.mark.slow),
        pytest.param("conv", marks=pytest.mark.slow),
    ],
)
def test_an_adaptive_meta_gradient_is_as_exact_as_asked(name):
    reference, dense = reference_and_dense(name)
    rounds = []
    for accuracy in (1e-2, 1e-7):
        learner = imaml(
            reference.network,
            reference.loss_fn,
            fast=reference.fast,
            reg_strength=reference.reg_strength,
            accuracy=accuracy,
            max_rounds=100,
            **ADAPTIVE,
        )
        grads, info = jax.jit(learner.meta_grad)(reference.params, reference.task, KEY, 0)
        assert relative_error(grads, dense.grads) <= info.gradient_error <= accuracy
        rounds.append(int(info.num_rounds))
    assert 1 <= rounds[0] < rounds[1] < 100
    np.testing.assert_allclose(info.query_loss, dense.query_loss, rtol=1e-5)
    np.testing.assert_allclose(info.cosine, dense.cosine, rtol=1e-5)
    assert info.inner_residual < 1e-3 and info.solve_residual < 1e-3
    assert info.min_curvature > dense.smallest - 1e-10
    assert info.support_loss > 0 and info.solve_steps > 0


def test_one_round_tells_the_error_of_fixed_step_counts():
    reference, dense = reference_and_dense("mlp")
    make = partial(imaml, reference.network, reference.loss_fn, reg_strength=2.0)
    settings = {**ADAPTIVE, "num_steps": 10}
    fixed, fixed_info = jax.jit(make(**settings).meta_grad)(
        reference.params, reference.task, KEY, 0
    )
    told, info = jax.jit(make(**settings, accuracy=1e-3, max_rounds=1).meta_grad)(
        reference.params, reference.task, KEY, 0
    )
    error = relative_error(fixed, dense.grads)
    assert info.num_rounds == 1 and error <= info.gradient_error <= 10 * error
    assert relative_error(told, dense.grads) < error / 3  # corrected to first order
    np.testing.assert_allclose(info.inner_residual, fixed_info.inner_residual, rtol=1e-8)
    np.testing.assert_allclose(info.solve_residual, fixed_info.solve_residual, rtol=1e-6)
    assert fixed_info.gradient_error is None


@pytest.mark.slow
def test_an_adaptive_meta_gradient_without_jit():
    reference, dense = reference_and_dense("mlp")
    make = partial(imaml, reference.network, reference.loss_fn, reg_strength=2.0, accuracy=1e-2)
    call = (reference.params, reference.task, KEY, 0)
    grads, info = make(**ADAPTIVE, max_rounds=20).meta_grad(*call)
    assert relative_error(grads, dense.grads) <= info.gradient_error <= 1e-2
    missed = make(**{**ADAPTIVE, "num_steps": 1}, max_rounds=1).meta_grad(*call)[1]
    assert missed.missed_accuracy == 1
    with pytest.raises(ValueError, match=r"gauss_newton.*solve_cg_steihaug"):
        make(**{**ADAPTIVE, "solve": solve_woodbury}).meta_grad(*call)


@pytest.mark.parametrize("strength", [2.0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_the_error_is_that_of_the_gradient_that_is_returned(strength):
    """With lambda learned, of its logarithm's part too, however small lambda is."""
    reference, _ = reference_and_dense("mlp")

    def grads(accuracy, max_rounds):
        learner = imaml(
            reference.network,
            reference.loss_fn,
            reg_strength=strength,
            learn_reg_strength=True,
            accuracy=accuracy,
            max_rounds=max_rounds,
            **ADAPTIVE,
        )
        start = learner.init(KEY, reference.task.support.inputs)
        meta_params = start._replace(params=reference.params)
        return jax.jit(learner.meta_grad)(meta_params, reference.task, KEY, 0)

    exact, _ = grads(1e-10, 500)
    found, info = grads(0.3, 500)
    assert relative_error(found, exact) <= info.gradient_error <= 0.3


def test_an_adaptive_meta_gradient_in_the_learned_strength():
    reference, dense = reference_and_dense("mlp")
    learner = imaml(
        reference.network,
        reference.loss_fn,
        reg_strength=2.0,
        learn_reg_strength=True,
        accuracy=1e-6,
        max_rounds=100,
        **ADAPTIVE,
    )
    start = learner.init(KEY, reference.task.support.inputs)
    meta_params = start._replace(params=reference.params)
    grads, info = jax.jit(learner.meta_grad)(meta_params, reference.task, KEY, 0)
    expected = -2.0 * jnp.dot(dense.adapted - reference.flat, dense.u)
    assert info.missed_accuracy == 0
    assert relative_error(grads.params, dense.grads) < 1e-6
    np.testing.assert_allclose(grads.log_reg_strength, expected, rtol=1e-6)
    assert info.gradient_error < 1e-6


def test_adaptation_follows_the_learned_strength():
    reference, _ = reference_and_dense("mlp")
    settings = dict(learn_reg_strength=True, **INNER)
    make = partial(imaml, reference.network, reference.loss_fn, **settings)
    learner = make(reg_strength=2.0)
    meta_params = learner.init(KEY, reference.task.support.inputs)
    meta_params = meta_params._replace(params=reference.params)

    def adapted(learner, log_strength):
        changed = meta_params._replace(log_reg_strength=jnp.log(log_strength))
        return jax.jit(learner.adapt)(changed, reference.task.support, KEY)[0].params

    for strength in (0.5, 2.0):
        fixed = imaml(reference.network, reference.loss_fn, reg_strength=strength, **INNER)
        expected = jax.jit(fixed.adapt)(reference.params, reference.task.support, KEY)[0].params
        assert relative_error(adapted(learner, strength), expected) < 1e-10
    at_test = make(reg_strength=2.0, eval_reg_strength=0.5)
    assert relative_error(adapted(at_test, 2.0), adapted(learner, 0.5)) < 1e-10


# Relatives: the unrolled objective, first-order MAML, what happens short of convergence.


def test_a_long_unroll_of_the_same_objective():
    reference, dense = reference_and_dense("mlp")

    def unrolled(anchor):
        def objective(flat):
            return reference.support_loss(flat) + 1.0 * jnp.sum((flat - anchor) ** 2)

        def step(flat, _):
            return flat - 0.15 * jax.grad(objective)(flat), None

        return reference.query_loss(jax.lax.scan(step, anchor, length=400)[0])

    # test_dense_solve compares the library with the same dense solve
    assert relative_error(jax.jit(jax.grad(unrolled))(reference.flat), dense.grads) < 1e-8
    plain = maml(reference.network, mean_squared_error, inner=INNER["inner"], num_steps=20)
    other, _ = jax.jit(plain.meta_grad)(reference.params, reference.task, KEY, 0)
    assert (
        relative_error(other, dense.grads) > 0.01
    )  # MAML without the proximal term has another limit


def test_a_strong_pull_gives_first_order_maml():
    """The error falls as `1 / lambda`: cosine and ratio of the norms tend to 1."""
    reference, dense = reference_and_dense("mlp")
    unmoved = fomaml(reference.network, mean_squared_error, inner=optax.sgd(1e-12), num_steps=1)
    expected, _ = jax.jit(unmoved.meta_grad)(reference.params, reference.task, KEY, 0)
    errors = []
    for strength in (1e3, 1e5):
        learner = imaml(
            reference.network,
            mean_squared_error,
            inner=optax.sgd(1 / strength),
            num_steps=10,
            reg_strength=strength,
            **EXACT["steihaug"],
        )
        grads, info = jax.jit(learner.meta_grad)(reference.params, reference.task, KEY, 0)
        errors.append(relative_error(grads, expected))
        assert abs(1 - info.cosine) < 10 / strength
        assert abs(1 - optax.tree.norm(grads) / optax.tree.norm(expected)) < 10 / strength
    assert errors[1] == pytest.approx(errors[0] / 100, rel=0.1)


def test_info_tells_an_unsolved_inner_problem_and_an_unsolved_system():
    reference, dense = reference_and_dense("mlp")
    learner = imaml(
        reference.network,
        mean_squared_error,
        inner=optax.sgd(0.01),
        num_steps=3,
        solve=partial(solve_cg_steihaug, max_steps=1),
    )
    _, info = jax.jit(learner.meta_grad)(reference.params, reference.task, KEY, 0)
    assert info.inner_residual > 0.7
    assert info.solve_residual > 1e-3
    assert info.solve_steps == 1


def test_info_tells_negative_curvature():
    """`1 - cos(w)` at `w = 3` has curvature -0.99, more than a strength of 0.5 makes up for."""
    network = Network(lambda key, x: jnp.array([3.0]), lambda w, x: x * w[None])
    batch = Batch(jnp.ones((1, 1)), jnp.zeros((1, 1)))
    learner = imaml(
        network,
        lambda outputs, targets: (1 - jnp.cos(outputs)).mean(),
        inner=optax.sgd(1e-3),
        num_steps=1,
        reg_strength=0.5,
    )
    grads, info = jax.jit(learner.meta_grad)(jnp.array([3.0]), Task(batch, batch), KEY, 0)
    assert info.min_curvature < 0
    assert info.solve_residual == 1
    assert jnp.isfinite(grads).all()


def test_adapt_uses_the_evaluation_settings():
    reference, dense = reference_and_dense("mlp")
    learner = imaml(
        reference.network,
        mean_squared_error,
        inner=optax.sgd(0.1),
        num_steps=2,
        reg_strength={"Dense_0": 1.0, "head": 2.0},
        eval_num_steps=4,
        eval_reg_strength=0,
    )
    adapted, info = jax.jit(learner.adapt)(reference.params, reference.task.support, KEY)
    flat = reference.flat
    gradient = jax.jit(jax.grad(reference.support_loss))
    for _ in range(4):
        flat = flat - 0.1 * gradient(flat)
    assert relative_error(adapted.params, flat) < 1e-12
    np.testing.assert_allclose(info.support_loss, reference.support_loss(flat), rtol=1e-12)


def test_memory_does_not_grow_with_the_inner_steps():
    network = mlp([64, 1])
    inputs = jnp.ones((100, 3))
    task = Task(Batch(inputs, inputs[:, :1]), Batch(inputs, inputs[:, :1]))
    params = jax.jit(network.init)(KEY, inputs)

    def temp_bytes(factory, num_steps, **settings):
        learner = factory(
            network, mean_squared_error, inner=optax.sgd(0.1), num_steps=num_steps, **settings
        )
        compiled = jax.jit(learner.meta_grad).lower(params, task, KEY, 0).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = (temp_bytes(imaml, n) for n in (4, 64))
    assert many == pytest.approx(few, rel=0.01)
    few, many = (temp_bytes(maml, n, remat=False) for n in (4, 64))
    assert many > 4 * few


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(num_steps=0), "num_steps=0"),
        (dict(num_steps=-1), "num_steps=-1"),
        (dict(num_steps=2.5), "num_steps=2.5"),
        (dict(eval_num_steps=0), "eval_num_steps=0"),
        (dict(reg_strength=0), "reg_strength=0"),
        (dict(reg_strength=-1.0), "reg_strength=-1.0"),
        (dict(reg_strength=float("nan")), "reg_strength=nan"),
        (dict(reg_strength={"Dense_0": 1.0, "head": -2.0}), "reg_strength=-2.0"),
        (dict(eval_reg_strength=-1), "eval_reg_strength=-1"),
        (dict(curvature="fisher"), "curvature='fisher'"),
        (dict(statistics="running"), "statistics='running'"),
        (dict(learn_reg_strength="layer"), "learn_reg_strength='layer'"),
        (dict(learn_reg_strength=1), "learn_reg_strength=1"),
        (dict(accuracy=0.0), "accuracy=0.0"),
        (dict(accuracy=float("inf")), "accuracy=inf"),
        (dict(accuracy=True), "accuracy=True"),
        (dict(accuracy=float("nan")), "accuracy=nan"),
        (dict(max_rounds=0), "max_rounds=0"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        imaml(mlp([1]), mean_squared_error, **{"inner": optax.sgd(0.1), "num_steps": 5, **settings})


def test_woodbury_on_the_hessian_says_what_to_use():
    reference, dense = reference_and_dense("mlp")
    learner = imaml(
        reference.network, mean_squared_error, solve=solve_woodbury, curvature="hessian", **INNER
    )
    with pytest.raises(ValueError, match=r"gauss_newton.*solve_cg_steihaug"):
        jax.eval_shape(learner.meta_grad, reference.params, reference.task, KEY, 0)
