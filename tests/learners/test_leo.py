"""LEO in float64 against a calculation with loops, finite differences and constructed tasks."""

import importlib
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.flatten_util import ravel_pytree

from imaml_jax import Batch, Task, cross_entropy, leo
from imaml_jax.bilevel.inner import minimize
from imaml_jax.training.metrics import accuracy

leo_module = importlib.import_module("imaml_jax.learners.leo")
WAYS, SHOTS, WIDTH, LATENTS = 3, 2, 4, 2
PENALTIES = dict(
    kl_weight=0.3, encoder_penalty=0.7, l2_penalty=0.05, orthogonality_penalty=0.2, dropout=0.0
)
NO_PENALTIES = dict.fromkeys(PENALTIES, 0.0)
SIZES = dict(ways=WAYS, num_latents=LATENTS, num_steps=3, num_finetuning_steps=2)
RATES = dict(latent_rate=0.4, finetuning_rate=0.1)
KEY = jax.random.key(7)

pytestmark = pytest.mark.usefixtures("x64_module")
make = partial(leo, **SIZES, **RATES)


def draw_task(seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(WAYS, 1, WIDTH))
    features = (centres + 0.5 * rng.normal(size=(WAYS, SHOTS + 3, WIDTH))).astype(np.float64)
    labels = np.repeat(np.arange(WAYS, dtype=np.int32)[:, None], SHOTS + 3, 1)
    order = rng.permutation(WAYS * SHOTS)
    support = (features[:, :SHOTS].reshape(-1, WIDTH)[order], labels[:, :SHOTS].ravel()[order])
    query = (features[:, SHOTS:].reshape(-1, WIDTH), labels[:, SHOTS:].ravel())
    return Task(*(Batch(jnp.asarray(x), jnp.asarray(y)) for x, y in (support, query)))


@pytest.fixture(scope="module")
def task(x64_module):
    return draw_task()


@pytest.fixture(scope="module")
def params(x64_module):
    drawn = make().init(jax.random.key(1), jnp.zeros((1, WIDTH), jnp.float64))
    # Spreads on both sides of the least deviation, rates that differ from entry to entry.
    rng = np.random.default_rng(2)
    return {n: x * jnp.asarray(rng.uniform(0.8, 1.6, x.shape)) for n, x in drawn.items()}


def fixed_noise(key, shape, dtype):
    del key
    return jnp.cos(jnp.arange(np.prod(shape), dtype=dtype)).reshape(shape)


def relate_by_loops(params, codes):
    """Pair by pair."""
    ways, shots, _ = codes.shape
    rows = []
    for c in range(ways):
        of_class = []
        for k in range(shots):
            outputs = []
            for d, m in itertools.product(range(ways), range(shots)):
                x = jnp.concatenate([codes[c, k], codes[d, m]])
                x = jax.nn.relu(x @ params["relation_0"])
                x = jax.nn.relu(x @ params["relation_1"])
                outputs.append(x @ params["relation_2"])
            of_class.append(sum(outputs) / len(outputs))
        rows.append(sum(of_class) / shots)
    return jnp.stack(rows)


def reference(params, task, noise, kl_weight, encoder_penalty, l2_penalty, orthogonality_penalty):
    """Training loss without dropout, query logits and KL; K copies, as the paper has it."""
    support = jnp.stack(
        [
            task.support.inputs[jnp.nonzero(task.support.targets == c, size=SHOTS)[0]]
            for c in range(WAYS)
        ]
    )
    one_hot = jnp.repeat(jnp.eye(WAYS)[:, None], SHOTS, 1)

    def sample(codes, offset, e):
        mean, spread = codes[..., : codes.shape[-1] // 2], codes[..., codes.shape[-1] // 2 :]
        deviation = jnp.maximum(jnp.exp(spread) - (1 - offset), 1e-10)
        return mean if e is None else mean + deviation * e, deviation

    def logits(inputs, weights):  # [N, n, D] and [N, K, D] -> [N, n, N]
        return jnp.einsum("ijk,lmk->ijlm", inputs, weights).mean(-1)

    def support_loss(weights):
        return -jnp.sum(one_hot * jax.nn.log_softmax(logits(support, weights)))

    def decode(z, e):
        return sample(z @ params["decoder"], np.sqrt(2 / (WAYS + WIDTH)), e)[0]

    e_codes, e_weights = None, [None] * (SIZES["num_steps"] + 1)
    if noise is not None:
        e_codes = noise(None, (WAYS, SHOTS, LATENTS), jnp.float64)
        e_weights = noise(None, (len(e_weights), WAYS, SHOTS, WIDTH), jnp.float64)

    codes = leo_module.relate(params, support @ params["encoder"])  # by loops above
    z, deviation = sample(jnp.stack([codes] * SHOTS, 1), 0.0, e_codes)
    start, kl = z, 0.0
    if noise is not None:
        log_q = -0.5 * e_codes**2 - jnp.log(deviation)
        kl = jnp.mean(log_q + 0.5 * z**2)
    for e in e_weights[:-1]:
        z = z - params["latent_rate"] * jax.grad(lambda z, e: support_loss(decode(z, e)))(z, e)
    w = decode(z, e_weights[-1])
    for _ in range(SIZES["num_finetuning_steps"]):
        w = w - params["finetuning_rate"] * jax.grad(support_loss)(w)
    query_logits = logits(task.query.inputs[None], w)[0]
    decoder = params["decoder"]
    correlations = decoder @ decoder.T
    norms = jnp.sqrt(jnp.diag(correlations))
    correlations = correlations / (norms[:, None] * norms[None])
    weights = [x for name, x in params.items() if not name.endswith("rate")]
    loss = cross_entropy(query_logits, task.query.targets) + kl_weight * kl
    loss += encoder_penalty * jnp.mean((lax.stop_gradient(z) - start) ** 2)
    loss += l2_penalty * 0.5 * sum(jnp.sum(x**2) for x in weights)
    loss += orthogonality_penalty * jnp.mean((correlations - jnp.eye(LATENTS)) ** 2)
    return loss, (query_logits, kl)


def assert_trees_close(actual, expected, rtol=1e-9):
    assert actual.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], rtol=rtol, atol=rtol, err_msg=name)


def test_the_steps_on_the_codes_follow_the_learned_rate():
    """Loss z^2 x at z = x = 4, rate 0.1: each step leaves a fifth."""
    z, _ = minimize(
        lambda z, x: jnp.sum(z**2 * x),
        jnp.full((1, 1, 1), 4.0),
        jnp.float64(4.0),
        tx=leo_module.descent(jnp.full((1, 1, 1), 0.1)),
        num_steps=3,
    )
    np.testing.assert_allclose(z, 0.032, rtol=1e-12)


def test_the_relation_network_is_its_loops_and_permutes_with_the_classes(params):
    codes = jnp.asarray(np.random.default_rng(3).normal(size=(WAYS, SHOTS, LATENTS)))
    found = leo_module.relate(params, codes)
    np.testing.assert_allclose(found, relate_by_loops(params, codes), rtol=1e-12)
    order = jnp.array([2, 0, 1])
    np.testing.assert_allclose(leo_module.relate(params, codes[order]), found[order], rtol=1e-12)
    swapped = leo_module.relate(params, codes[:, ::-1])
    np.testing.assert_allclose(swapped, found, rtol=1e-12)


def test_adaptation_is_the_calculation_with_loops(params, task):
    learner = make()
    adapted, info = jax.jit(learner.adapt)(params, task.support, KEY)
    zeros = {name: 0.0 for name in PENALTIES if name != "dropout"}
    _, (expected, _) = jax.jit(partial(reference, noise=None, **zeros))(params, task)
    np.testing.assert_allclose(learner.predict(adapted, task.query.inputs), expected, rtol=1e-9)
    assert info.support_loss < WAYS * SHOTS * np.log(WAYS)


@pytest.mark.parametrize("noise", [fixed_noise, None])
def test_the_meta_gradient_is_that_of_the_calculation_with_loops(params, task, noise, monkeypatch):
    if noise is not None:
        monkeypatch.setattr(jax.random, "normal", noise)
    learner = make(**PENALTIES, stochastic=noise is not None)
    grads, info = jax.jit(learner.meta_grad)(params, task, KEY, 0)
    penalties = {name: weight for name, weight in PENALTIES.items() if name != "dropout"}
    value = partial(reference, noise=noise, **penalties)
    of_loops = jax.jit(jax.value_and_grad(value, has_aux=True))
    (loss, (logits, kl)), expected = of_loops(params, task)
    assert_trees_close(grads, expected)
    query_loss = cross_entropy(logits, task.query.targets)
    np.testing.assert_allclose(info.query_loss, query_loss, rtol=1e-9)
    np.testing.assert_allclose(info.meta_loss, loss, rtol=1e-9)
    if noise is None:
        assert info.kl_divergence is None
    else:
        np.testing.assert_allclose(info.kl_divergence, kl, rtol=1e-9)


@pytest.fixture(scope="module")
def plain(params, task):
    """A learner with dropout, samples and no penalties, and its meta-gradient."""
    learner = make(**NO_PENALTIES | {"dropout": 0.3})
    return learner, jax.jit(learner.meta_grad)(params, task, KEY, 0)[0]


def test_finite_differences_in_every_tensor(params, task, plain, finite_differences):
    """By the key, which stays; the penalties are checked above."""
    learner, grads = plain
    flat, restore = ravel_pytree(params)
    expected = finite_differences(
        lambda x: learner.meta_grad(restore(x), task, KEY, 0)[1].query_loss, flat
    )
    assert_trees_close(grads, restore(jnp.asarray(expected)), rtol=1e-6)
    assert all(jnp.abs(g).max() > 1e-4 for g in grads.values())


def test_the_meta_gradient_is_not_of_first_order(params, task, plain, monkeypatch):
    exact = leo_module.descent
    stop = optax.stateless(lambda grads, _: lax.stop_gradient(grads))
    monkeypatch.setattr(leo_module, "descent", lambda rate: optax.chain(stop, exact(rate)))
    found, _ = jax.jit(lambda *args: plain[0].meta_grad(*args))(params, task, KEY, 0)
    for name in ("encoder", "relation_0", "decoder", "latent_rate"):
        difference = jnp.linalg.norm(found[name] - plain[1][name])
        assert difference > 0.01 * jnp.linalg.norm(plain[1][name]), name


def test_the_encoder_penalty_reaches_the_initial_codes_alone(params, task, plain):
    learner = make(**NO_PENALTIES | {"dropout": 0.3, "encoder_penalty": 1.0})
    grads, _ = jax.jit(learner.meta_grad)(params, task, KEY, 0)
    for name, difference in optax.tree.sub(grads, plain[1]).items():
        if name.startswith(("encoder", "relation")):
            assert jnp.abs(difference).max() > 1e-3, name
        else:
            np.testing.assert_allclose(difference, 0, atol=1e-12, err_msg=name)


def test_the_kl_keeps_its_digits_in_float32_at_the_least_deviation():
    codes = jnp.array([[0.3, -1.7, 2.0, -5.0, -5.0, 0.5]])
    noise = jnp.array([[0.7, -0.2, 1.1]])

    def gradient(dtype):
        sample = partial(leo_module._sample, offset=0.0, noise=noise.astype(dtype))
        return jax.grad(lambda codes: sample(codes)[1])(codes.astype(dtype))

    np.testing.assert_allclose(gradient(jnp.float32), gradient(jnp.float64), rtol=1e-5)


def test_evaluation_is_deterministic_and_training_is_not(params, task, plain):
    learner = make(**PENALTIES | {"dropout": 0.5})
    adapted = jax.jit(lambda key: learner.adapt(params, task.support, key)[0])
    expected = adapted(jax.random.key(0))
    np.testing.assert_array_equal(adapted(jax.random.key(1)), expected)
    other, _ = jax.jit(plain[0].adapt)(params, task.support, KEY)
    np.testing.assert_array_equal(other, expected)  # no dropout, no penalties
    for settings in (dict(dropout=0.5, stochastic=False), dict(dropout=0.0)):
        meta_grad = make(**settings).meta_grad
        query_loss = jax.jit(lambda key, f=meta_grad: f(params, task, key, 0)[1].query_loss)
        assert query_loss(jax.random.key(0)) != query_loss(jax.random.key(1)), settings


def test_classes_are_interchangeable_and_examples_come_in_any_order(params, task):
    learner = make()
    predict = jax.jit(
        lambda support: learner.predict(learner.adapt(params, support, KEY)[0], task.query.inputs)
    )
    expected = predict(task.support)
    order = np.array([1, 2, 0])  # class c becomes order[c]
    renamed = predict(task.support._replace(targets=jnp.asarray(order)[task.support.targets]))
    np.testing.assert_allclose(renamed[:, order], expected, rtol=1e-9)
    shuffled = predict(jax.tree.map(lambda x: x[::-1], task.support))
    np.testing.assert_allclose(shuffled, expected, rtol=1e-9)
    as_images = task.support._replace(inputs=task.support.inputs.reshape(-1, 1, 1, WIDTH))
    np.testing.assert_array_equal(predict(as_images), expected)


def clusters(key, num_tasks, noise=0.1):
    """Tasks of normalised features around random centres."""
    centre_key, noise_key = jax.random.split(key)
    centres = jax.random.normal(centre_key, (num_tasks, WAYS, 1, 16), jnp.float32)
    drawn = jax.random.normal(noise_key, (num_tasks, WAYS, SHOTS + 5, 16), jnp.float32)
    features = centres + noise * drawn
    features = features / jnp.linalg.norm(features, axis=-1, keepdims=True)

    def batch(part):
        labels = jnp.broadcast_to(jnp.arange(WAYS, dtype=jnp.int32)[None, :, None], part.shape[:3])
        return Batch(part.reshape(num_tasks, -1, 16), labels.reshape(num_tasks, -1))

    return Task(batch(features[:, :, :SHOTS]), batch(features[:, :, SHOTS:]))


@pytest.mark.slow
def test_clusters_are_told_apart_and_shuffled_labels_are_not():
    learner = leo(**SIZES | {"num_latents": 8}, dropout=0.1, kl_weight=1e-2)
    tx = optax.adam(1e-2)
    params = learner.init(jax.random.key(0), jnp.zeros((1, 16), jnp.float32))

    @jax.jit
    def train(params, key):
        def step(carry, key):
            params, state = carry
            keys = jax.random.split(key, 4)
            grads, _ = jax.vmap(learner.meta_grad, (None, 0, 0, None))(
                params, clusters(key, 4), keys, 0
            )
            updates, state = tx.update(jax.tree.map(lambda g: g.mean(0), grads), state, params)
            return (optax.apply_updates(params, updates), state), None

        return lax.scan(step, (params, tx.init(params)), jax.random.split(key, 60))[0][0]

    @jax.jit
    def score(params, tasks):
        def of_task(task):
            adapted, _ = learner.adapt(params, task.support, KEY)
            return accuracy(learner.predict(adapted, task.query.inputs), task.query.targets)

        return jax.vmap(of_task)(tasks).mean()

    tasks = clusters(jax.random.key(5), 100)
    params = train(params, jax.random.key(4))
    assert score(params, tasks) > 0.95
    shuffled = jax.random.permutation(KEY, tasks.support.targets, axis=1, independent=True)
    by_chance = tasks._replace(support=tasks.support._replace(targets=shuffled))
    assert abs(score(params, by_chance) - 1 / WAYS) < 0.1


def test_the_published_size():
    example = jax.ShapeDtypeStruct((1, 1, 1, 640), jnp.float32)
    shapes = jax.eval_shape(leo(ways=5).init, KEY, example)
    assert sum(x.size for x in shapes.values()) == 172_736
    assert {n: x.shape for n, x in shapes.items()} == {
        "encoder": (640, 64),
        **{f"relation_{i}": (128, 128) for i in range(3)},
        "decoder": (64, 1280),
        "latent_rate": (1, 1, 64),
        "finetuning_rate": (1, 1, 640),
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(ways=0), "ways=0"),
        (dict(ways=None), "ways=None must be an integer, at least 1"),
        (dict(num_latents=0), "num_latents=0"),
        (dict(num_steps=0), "num_steps=0"),
        (dict(num_finetuning_steps=1.5), "num_finetuning_steps=1.5"),
        (dict(latent_rate=0.0), "latent_rate=0.0 must be a finite number, above 0"),
        (dict(latent_rate=float("inf")), "latent_rate=inf must be a finite number, above 0"),
        (
            dict(finetuning_rate=float("nan")),
            "finetuning_rate=nan must be a finite number",
        ),
        (dict(dropout=1.0), "dropout=1.0 must be a finite number, at least 0 and below 1"),
        (dict(kl_weight=-1.0), "kl_weight=-1.0 must be a finite number, at least 0"),
        (dict(encoder_penalty=-1.0), "encoder_penalty=-1.0"),
        (dict(l2_penalty=float("inf")), "l2_penalty=inf must be a finite number, at least 0"),
        (dict(orthogonality_penalty=float("nan")), "orthogonality_penalty=nan"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=f"leo: {message}"):
        leo(**{"ways": 5} | settings)


def test_shots_must_be_equal(params, task):
    uneven = jax.tree.map(lambda x: x[:-1], task.support)
    with pytest.raises(ValueError, match="ways=3 must divide the support examples, 5"):
        make().adapt(params, uneven, KEY)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (jnp.zeros((6, 5, 5, 1)), r"\(6, 5, 5, 1\).*experiments\.features makes features"),
        (jnp.zeros((6, WIDTH), jnp.uint8), "uint8; expected floating-point features"),
    ],
)
def test_what_is_no_features_is_refused(params, task, inputs, message):
    learner = make()
    for call in (
        partial(learner.init, KEY, inputs),
        partial(learner.adapt, params, task.support._replace(inputs=inputs), KEY),
        partial(learner.predict, jnp.zeros((WAYS, SHOTS, WIDTH)), inputs),
    ):
        with pytest.raises(ValueError, match=f"leo: .*{message}"):
            call()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(inputs=jnp.zeros((6, 1, 1, 5))), f"inputs have 5 features; expected {WIDTH}"),
        (dict(targets=jnp.zeros(6)), "targets are float.*; expected integer labels"),
    ],
)
def test_features_of_another_width_and_targets_that_are_no_labels(params, task, changes, message):
    batch = task.support._replace(**changes)
    for call in (
        partial(make().adapt, params, batch, KEY),
        partial(make().meta_grad, params, task._replace(query=batch), KEY, 0),
    ):
        with pytest.raises(ValueError, match=f"leo: {message}"):
            call()
