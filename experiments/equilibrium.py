"""A deep equilibrium layer: a classifier whose hidden state is a fixed point.

    python -m experiments.equilibrium

The state of an input x solves z = tanh(W z + U x + b), where W is scaled so that the iteration
contracts; scikit-learn's digits are classified by a linear read-out of it. The fixed point is found
by iteration and differentiated by `custom_root`: one linear system with I - diag(1 - z^2) W, which
is not symmetric. Against it stands differentiation of K iterations:

- the error of its gradient, relative to the implicit one, in float64 at trained parameters,
- the temporary memory of both compiled programs,
- test accuracies, also of the network with a single iteration, which is no fixed point.

Writes OUTPUT.json and OUTPUT.png.

Bai, Kolter and Koltun, "Deep equilibrium models", NeurIPS 2019.
"""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from experiments.shared import bundled, common, reports
from imaml_jax import cross_entropy, custom_root, minimize, solve_gmres
from imaml_jax.learners.settings import Count, Positive, Range, Record, Seed
from imaml_jax.types import Batch, LinearOperator

NUM_CLASSES, BATCH = 10, 100
MOST_ITERATIONS, KRYLOV_SIZE, MOST_RESTARTS = 2000, 20, 20

# `(W, U x + b) -> z`.
FindState = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Config(Record):
    """What is trained and measured."""

    width: Count = 50
    """Numbers in the hidden state, at least 1."""
    contraction: Annotated[float, Range(above=0, below=1)] = 0.95
    """Bound on the factor of the error in one iteration, between 0 and 1."""
    steps: Count = 500
    """Steps of Adam, each with 100 examples; at least 1."""
    learning_rate: Positive = 3e-3
    """Its rate, above 0."""
    unrolled: tuple[Count, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    """Numbers of iterations K, each at least 1."""
    train_examples: Annotated[int, Range(least=BATCH)] = 1000
    """Training examples, at least 100; the others are for the test."""
    seed: Seed = 0
    """Seed of the split, the initialisation and the batches; at least 0."""
    output: Path = Path("runs/equilibrium")
    """Where to write, without an ending."""

    def check_together(self) -> None:
        """There is something to compare with."""
        reports.check_not_empty(self, "unrolled")


def main(config: Config) -> dict[str, Any]:
    """Trains, measures, writes and prints.

    Returns:
      The settings, the test accuracies, and for the implicit gradient and each K the temporary
      bytes, with the relative difference of the gradients.
    """
    reports.begin(config)
    rng = np.random.default_rng(config.seed)
    train, test = bundled.split(bundled.load("digits"), [config.train_examples], rng)
    most = max(config.unrolled)
    states = {
        "implicit": equilibrium,
        f"unrolled, {most} iterations": partial(iterate, num_steps=most),
        "a single iteration": partial(iterate, num_steps=1),
    }
    start = jax.jit(partial(init_params, config, train.inputs.shape[1]))()
    trained = {name: _train(config, state, start, train) for name, state in states.items()}
    measured = {
        "test_accuracy": {
            name: _accuracy(config, state, trained[name][0], test) for name, state in states.items()
        },
        "seconds_a_step": {name: seconds for name, (_, seconds) in trained.items()},
        **_compare(config, trained["implicit"][0], Batch(*(x[:BATCH] for x in train))),
    }
    return reports.report(config, measured, table, draw)


def next_state(state: jax.Array, recurrent: jax.Array, drive: jax.Array) -> jax.Array:
    """One iteration, on rows of a batch."""
    return jnp.tanh(state @ recurrent + drive)


def iterate(recurrent: jax.Array, drive: jax.Array, *, num_steps: int) -> jax.Array:
    """So many iterations from zero, to be differentiated step by step."""

    def step(state, _):
        return next_state(state, recurrent, drive), None

    return lax.scan(step, jnp.zeros_like(drive), length=num_steps)[0]


def equilibrium(recurrent: jax.Array, drive: jax.Array) -> jax.Array:
    """The fixed point, to be differentiated implicitly."""
    return _fixed_point(jnp.zeros_like(drive), recurrent, drive)


def _solve(operator: LinearOperator, b: Any) -> Any:
    tol = _tolerance(b)
    return solve_gmres(operator, b, tol=tol, restart=KRYLOV_SIZE, max_restarts=MOST_RESTARTS)


def _tolerance(x: jax.Array) -> float:
    return 100 * float(jnp.finfo(x.dtype).eps)


@custom_root(lambda state, *args: next_state(state, *args) - state, _solve)
def _fixed_point(init: jax.Array, recurrent: jax.Array, drive: jax.Array) -> jax.Array:
    def unfinished(carry):
        _, change, count = carry
        return (change > _tolerance(drive)) & (count < MOST_ITERATIONS)

    def step(carry):
        state, _, count = carry
        new = next_state(state, recurrent, drive)
        return new, jnp.max(jnp.abs(new - state)), count + 1

    return lax.while_loop(unfinished, step, step((init, jnp.inf, 0)))[0]


def init_params(config: Config, num_inputs: int) -> dict[str, jax.Array]:
    """W is orthogonal; the read-out begins at zero."""
    keys = jax.random.split(jax.random.key(config.seed))
    return {
        "recurrent": jax.nn.initializers.orthogonal()(keys[0], (config.width, config.width)),
        "input": jax.nn.initializers.lecun_normal()(keys[1], (num_inputs, config.width)),
        "bias": jnp.zeros((1, config.width)),
        "readout": jnp.zeros((config.width, NUM_CLASSES)),
        "readout_bias": jnp.zeros((1, NUM_CLASSES)),
    }


def largest_singular_value_bound(matrix: jax.Array) -> jax.Array:
    """`||(W^T W)^4||_inf^(1/8)`, without a decomposition; exact where W is orthogonal."""
    power = matrix.T @ matrix
    for _ in range(2):
        power = power @ power
    return jnp.max(jnp.sum(jnp.abs(power), 0)) ** (1 / 8)


def logits(config: Config, find_state: FindState, params: Any, inputs: jax.Array) -> jax.Array:
    """Of a batch of inputs `[n, features]`."""
    largest = largest_singular_value_bound(params["recurrent"])
    recurrent = params["recurrent"] * jnp.minimum(1.0, config.contraction / largest)
    state = find_state(recurrent, inputs @ params["input"] + params["bias"])
    return state @ params["readout"] + params["readout_bias"]


def _loss(config: Config, find_state: FindState, params: Any, batch: Batch) -> jax.Array:
    return cross_entropy(logits(config, find_state, params, batch.inputs), batch.targets)


def _accuracy(config: Config, find_state: FindState, params: Any, batch: Batch) -> float:
    outputs = jax.jit(partial(logits, config, find_state))(params, batch.inputs)
    return float(jnp.mean(outputs.argmax(-1) == batch.targets))


def _train(config: Config, find_state: FindState, start: Any, data: Batch) -> tuple[Any, float]:
    """Trained parameters, and the seconds of a step without compilation."""

    def loss(params, key):
        rows = jax.random.choice(key, len(data.targets), (BATCH,), replace=False)
        batch = jax.tree.map(lambda x: jnp.asarray(x)[rows], data)
        return _loss(config, find_state, params, batch)

    def fit(start, keys):
        tx = optax.adam(config.learning_rate)
        return minimize(loss, start, tx=tx, num_steps=config.steps, batches=keys)[0]

    args = (start, jax.random.split(jax.random.key(config.seed + 1), config.steps))
    program = jax.jit(fit).lower(*args).compile()
    started = time.perf_counter()
    params = jax.block_until_ready(program(*args))
    return params, (time.perf_counter() - started) / config.steps


def _compare(config: Config, params: Any, batch: Batch) -> dict[str, Any]:
    """Gradients in float64 and memory in float32, of one batch."""
    ways = {"implicit": equilibrium}
    ways |= {k: partial(iterate, num_steps=k) for k in config.unrolled}
    gradients = {
        way: jax.jit(jax.grad(partial(_loss, config, find_state)))
        for way, find_state in ways.items()
    }
    memory: dict[Any, Any] = {
        way: gradient.lower(params, batch).compile().memory_analysis()
        for way, gradient in gradients.items()
    }
    with jax.enable_x64(True):
        double = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        exact = gradients.pop("implicit")(double, batch)
        errors = {
            k: common.relative_difference(gradient(double, batch), exact)
            for k, gradient in gradients.items()
        }
    return {
        "gradient_difference": errors,
        "temporary_bytes": {way: own.temp_size_in_bytes for way, own in memory.items()},
    }


def table(results: dict[str, Any]) -> str:
    """The measurements as text."""
    differences = results["gradient_difference"]
    trained = [
        (name, accuracy, 1e3 * results["seconds_a_step"][name])
        for name, accuracy in results["test_accuracy"].items()
    ]
    compared = [
        (way if way == "implicit" else f"{way} iterations", size / 2**20, differences.get(way))
        for way, size in results["temporary_bytes"].items()
    ]
    gradient = {"gradient of a batch": "", "MiB": ".2f", "difference": ".0e"}
    return "\n".join(
        [
            reports.text_table({"": "", "accuracy": ".4f", "ms a step": ".2f"}, trained),
            reports.text_table(gradient, compared),
        ]
    )


def draw(results: dict[str, Any], path: Path) -> None:
    """Difference of the gradients and memory against iterations."""
    steps = results["unrolled"]
    mebibytes = {way: count / 2**20 for way, count in results["temporary_bytes"].items()}
    with reports.panels(path, 2, (9, 3.5), xlabel="iterations K") as (left, right):
        left.plot(steps, [results["gradient_difference"][k] for k in steps], "o-")
        left.set(yscale="log", title="gradient, unrolled from implicit")
        left.set(ylabel="relative difference")
        right.plot(steps, [mebibytes[k] for k in steps], "o-", label="unrolled")
        right.axhline(mebibytes["implicit"], color="C1", label="implicit")
        right.set(ylabel="temporary MiB")


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
