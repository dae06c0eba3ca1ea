"""Inner problems of iMAML that the reports measure, where first-order MAML has meta-trained."""

import dataclasses
from collections.abc import Callable
from functools import partial
from operator import itemgetter
from types import ModuleType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

import imaml_jax
from experiments.shared import common, few_shot
from imaml_jax.data import episodes, glyphs, sinusoid
from imaml_jax.networks import Network, conv4, mlp
from imaml_jax.training import train
from imaml_jax.types import Batch, Task

FEATURES, EXAMPLES = 12, (25, 15)
STRENGTH, META_STEPS = 0.5, 200
Kind = Literal["logistic", "sinusoid", "glyphs_silu", "glyphs_relu"]


def start_and_tasks(
    experiment: ModuleType, num_tasks: int, network: Any = None, **settings: Any
) -> tuple[Any, list[Task]]:
    """Meta-parameters that first-order MAML has trained for a while, and new tasks to adapt to.

    Args:
      experiment: the command whose images, protocol and settings these are, as
        `experiments.glyphs`.
      num_tasks: tasks of the test classes, drawn with the seed of the settings.
      network: that of the protocol to train instead of its own.
      **settings: of the command; meta_steps and seed among them.
    """
    steps = settings["meta_steps"]
    config = experiment.Config.of(
        algorithm="fomaml", log_every=steps, validate_every=steps, **settings
    )
    config, splits, dataset = experiment.prepare(config)
    if network is not None:
        settings_of_run = dataclasses.replace(config.settings, network=network)
        config = dataclasses.replace(config, settings=settings_of_run)
    trained = few_shot.meta_train(config, splits._replace(val=None), dataset)
    drawn = config.settings.tasks
    tasks = episodes.sample_tasks(
        jax.random.key(config.seed),
        splits.test,
        num_tasks=num_tasks,
        ways=config.ways,
        shots=config.shots,
        queries=drawn.train_queries,
        rotations=drawn.test_rotations,
        invert=drawn.invert,
    )
    params = jax.device_put(trained.meta_params, jax.local_devices()[0])
    return params, [jax.tree.map(itemgetter(i), tasks) for i in range(num_tasks)]


def random_tasks(
    num_tasks: int, ways: int, examples: tuple[int, int], image: tuple[int, ...]
) -> Task:
    """Random images: `examples` of each class in the support and in the query set."""
    batches = []
    for i, count in enumerate(examples):
        labels = jnp.tile(jnp.arange(ways), (num_tasks, count))
        images = jax.random.uniform(jax.random.key(i), (*labels.shape, *image))
        batches.append(Batch(images, labels))
    return Task(*batches)


class Problem(NamedTuple):
    """A bilevel problem of raveled parameters.

    Attributes:
      outer: `(x, args) -> scalar`.
      objective: `(x, args) -> scalar`.
      curvature: `(x, args) -> LinearOperator`.
      start: where the minimisation begins.
      args: one array.
      strong_convexity: smallest possible eigenvalue of the curvature.
    """

    outer: Callable[..., jax.Array]
    objective: Callable[..., jax.Array]
    curvature: Callable[..., Any]
    start: jax.Array
    args: jax.Array
    strong_convexity: jax.Array


def make_problem(kind: Kind) -> Callable[[jax.Array], Problem]:
    """`key -> Problem` of that kind; meta-trains where it is a few-shot problem."""
    if kind == "logistic":
        return logistic
    family = sinusoids() if kind == "sinusoid" else characters(kind.removeprefix("glyphs_"))
    return partial(few_shot_problem, family, _meta_train(family))


def logistic(key: jax.Array) -> Problem:
    """A random logistic regression whose features have scales of their own."""
    keys = jax.random.split(key, 6)
    spread, level = jax.random.uniform(keys[0], (2,))
    scales = jnp.logspace(0, -2 * spread, FEATURES)
    basis = jnp.linalg.qr(jax.random.normal(keys[1], (FEATURES, FEATURES)))[0]
    inputs = (jax.random.normal(keys[2], (sum(EXAMPLES), FEATURES)) * scales[None]) @ basis
    margins = inputs @ (basis.T @ (3 * jax.random.normal(keys[3], (FEATURES,)) / scales))
    labels = jnp.sign(margins + jax.random.normal(keys[4], margins.shape))
    strength = 10 ** (-3 + 2 * level)

    def loss(x, rows):
        return jnp.mean(jax.nn.softplus(-labels[rows] * (inputs[rows] @ x)))

    def objective(x, log_weights):
        return loss(x, slice(EXAMPLES[0])) + 0.5 * jnp.sum(jnp.exp(log_weights) * x**2)

    return Problem(
        lambda x, args: loss(x, slice(EXAMPLES[0], None)),
        objective,
        lambda x, args: imaml_jax.hessian(lambda p: objective(p, args), x),
        jnp.zeros(FEATURES),
        jnp.full(FEATURES, jnp.log(strength)),
        strength,
    )


class Family(NamedTuple):
    """Tasks and a network for them.

    Attributes:
      network: `(init, apply)`.
      loss_fn: `(outputs, targets) -> scalar`.
      sample: `(key, num_tasks=...) -> Task`.
      rate: inner learning rate of the meta-training.
    """

    network: Network
    loss_fn: Callable[..., jax.Array]
    sample: Callable[..., imaml_jax.Task]
    rate: float


def sinusoids() -> Family:
    """Regression with a tanh network."""
    network = mlp([20, 1], activation=jnp.tanh, kernel_init=jax.nn.initializers.normal(0.5))
    sample = partial(sinusoid.sample_tasks, shots=10, queries=10)
    return Family(network, imaml_jax.mean_squared_error, sample, 0.05)


def characters(activation: str) -> Family:
    """5-way 1-shot glyphs with a small convolutional network."""
    network = conv4(5, filters=4, num_blocks=3, activation=getattr(jax.nn, activation))
    images = glyphs.load().train
    sample = partial(episodes.sample_tasks, dataset=images, ways=5, shots=1, queries=5)
    return Family(network, imaml_jax.cross_entropy, sample, 0.1)


def few_shot_problem(family: Family, meta_params: Any, key: jax.Array) -> Problem:
    """iMAML's inner problem on a task, with the Gauss-Newton matrix."""
    task = jax.tree.map(lambda x: x[0], family.sample(key, num_tasks=1))
    start, unravel = ravel_pytree(meta_params)
    loss_fn = family.loss_fn

    def outputs(x, batch):
        return family.network.apply(unravel(x), batch.inputs.astype(jnp.float64))

    def loss(x, batch):
        return loss_fn(outputs(x, batch), batch.targets)

    def objective(x, anchor):
        return loss(x, task.support) + 0.5 * STRENGTH * jnp.sum((x - anchor) ** 2)

    def curvature(x, anchor):
        del anchor
        matrix = imaml_jax.gauss_newton(
            lambda p: outputs(p, task.support),
            lambda y: loss_fn(y, task.support.targets),
            x,
        )
        return imaml_jax.damped(matrix, STRENGTH)

    return Problem(
        lambda x, anchor: loss(x, task.query),
        objective,
        curvature,
        start,
        start,
        jnp.asarray(STRENGTH),
    )


def _meta_train(family: Family) -> Any:
    learner = imaml_jax.fomaml(
        family.network, family.loss_fn, inner=optax.sgd(family.rate), num_steps=5
    )
    sample = partial(family.sample, num_tasks=8)
    example = sample(jax.random.key(0)).support.inputs[0]
    trained = train(
        learner,
        optax.adam(1e-2),
        sample,
        key=jax.random.key(0),
        num_steps=META_STEPS,
        example_inputs=jnp.zeros_like(example, jnp.float32),
        log_every=META_STEPS,
        progress=False,
    )
    return common.in_float64(trained.meta_params)
