"""Data hyper-cleaning of a network of a million parameters: stochastic methods beside each other.

The inner problem is a weighted mean of cross-entropies, `mean of sigmoid(logit) * loss`, plus
`reg_strength / 2 ||params||^2`, of a network with two hidden layers; the outer loss is the mean
cross-entropy of the validation examples.
"""

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.shared import stochastic_bilevel
from experiments.shared.stochastic_bilevel import Method, Problem, Rates, Sizes, State
from imaml_jax import cross_entropy, damped, gauss_newton
from imaml_jax.networks import mlp
from imaml_jax.types import Batch

OURS, FULL_BATCH = "ours", "ours, full batch"
ALL_EXAMPLES = 2**31 - 1
CONTENDERS: dict[str, tuple[Method, Sizes]] = {
    OURS: (stochastic_bilevel.IMPLICIT, Sizes(64, 20, 3, 128, 0.1)),
    "SOBA": (stochastic_bilevel.SOBA, Sizes(64)),
    "AmIGO": (stochastic_bilevel.AMIGO, Sizes(64, 10, 10)),
    "stocBiO": (stochastic_bilevel.STOCBIO, Sizes(64, 10, 10)),
    FULL_BATCH: (stochastic_bilevel.IMPLICIT, Sizes(ALL_EXAMPLES, 2, 1, ALL_EXAMPLES, 1.0)),
}
"""The published ones with the sizes of benchopt/benchmark_bilevel, ours with sizes found by trial
on other splits."""
INNER_RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
OUTER_RATES = (10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10_000.0, 30_000.0, 100_000.0)
MIDDLE = Rates(0.3, 1000.0)
"""Where the search for the rates of every method begins."""
TRIES = 8
"""Rates that are tried for each method."""
POINTS = 10
TRAIN_STEPS, TRAIN_RATE, TRAIN_BATCH = 300, 0.05, 64


class Cleaning(NamedTuple):
    """A split with a network of one size.

    Attributes:
      problem: of its training and validation examples; the hyperparameters are logits `[train]`.
      init: `key -> params`.
      train: `(logits, key) -> params` with weights that stay, from new parameters.
      scores: `params -> (validation loss, test accuracy)`.
    """

    problem: Problem
    init: Callable[[jax.Array], Any]
    train: Callable[[jax.Array, jax.Array], Any]
    scores: Callable[[Any], tuple[jax.Array, jax.Array]]


def make_cleaning(
    train: Batch, validation: Batch, test: Batch, *, sizes: tuple[int, ...], reg_strength: float
) -> Cleaning:
    """The bilevel problem of a tanh network.

    Args:
      train: examples whose weights are learned.
      validation: examples of the outer loss.
      test: examples of the accuracy.
      sizes: units of its layers, the last one of the classes.
      reg_strength: L2 regularisation of all parameters.
    """
    initializer = jax.nn.initializers.lecun_normal()
    network = mlp(sizes, activation=jnp.tanh, kernel_init=initializer)
    num_train, num_validation = len(train.targets), len(validation.targets)

    def weighted(outputs, logits, labels):
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
        return jnp.mean(jax.nn.sigmoid(logits) * losses)

    def inner(params, logits, rows):
        outputs = network.apply(params, train.inputs[rows])
        penalty = 0.5 * reg_strength * optax.tree.norm(params, squared=True)
        return weighted(outputs, logits[rows], train.targets[rows]) + penalty

    def outer(params, logits, rows):
        del logits
        outputs = network.apply(params, validation.inputs[rows])
        return cross_entropy(outputs, validation.targets[rows])

    def curvature(params, logits, rows):
        matrix = gauss_newton(
            lambda p: network.apply(p, train.inputs[rows]),
            lambda outputs: weighted(outputs, logits[rows], train.targets[rows]),
            params,
        )
        return damped(matrix, reg_strength)

    def init(key):
        return network.init(key, train.inputs[:1])

    def fit(logits, key):
        tx = optax.sgd(optax.cosine_decay_schedule(TRAIN_RATE, TRAIN_STEPS), momentum=0.9)
        params = init(key)

        def step(carry, key):
            params, state = carry
            rows = jax.random.randint(key, (TRAIN_BATCH,), 0, num_train)
            updates, state = tx.update(jax.grad(inner)(params, logits, rows), state)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(key, TRAIN_STEPS)
        return jax.lax.scan(step, (params, tx.init(params)), keys)[0][0]

    def scores(params):
        correct = network.apply(params, test.inputs).argmax(-1) == test.targets
        loss = outer(params, None, jnp.arange(num_validation))
        return loss, jnp.mean(correct)

    problem = Problem(inner, outer, curvature, num_train, num_validation)
    return Cleaning(problem, init, fit, scores)


class Split(NamedTuple):
    """Examples of the inner problem, of the outer loss and of the accuracy."""

    train: Batch
    validation: Batch
    test: Batch


class Runner(NamedTuple):
    """A method compiled.

    Attributes:
      advance: `(split, rates, state, key, num_steps) -> state`, that many meta-steps.
      evaluations: gradients and products of one example in a meta-step.
      num_steps: meta-steps that the evaluations of a contest allow, at least 1.
      compile_seconds: what compiling took.
    """

    advance: Callable[[Split, Rates, State, jax.Array, Any], State]
    evaluations: int
    num_steps: int
    compile_seconds: float


class Contest(NamedTuple):
    """The methods, compiled for splits of one size.

    Attributes:
      runners: they, by name.
      start: `(split, key) -> state` where all begin.
      scores: `(split, params) -> (validation loss, test accuracy)`.
      retrained_accuracy: `(split, logits, key) -> test accuracy` of a new network trained with
        these weights.
      num_params: parameters of the network.
    """

    runners: dict[str, Runner]
    start: Callable[[Split, jax.Array], State]
    scores: Callable[[Split, Any], tuple[jax.Array, jax.Array]]
    retrained_accuracy: Callable[[Split, jax.Array, jax.Array], jax.Array]
    num_params: int


def make_contest(
    like: Split, *, sizes: tuple[int, ...], reg_strength: float, evaluations: int
) -> Contest:
    """Compiles all methods for splits of the sizes of `like`; see `make_cleaning`.

    Args:
      like: a split.
      sizes: units of the network's layers.
      reg_strength: its L2 regularisation.
      evaluations: gradients and products of one example that each method has.
    """

    def cleaning(split):
        return make_cleaning(*split, sizes=sizes, reg_strength=reg_strength)

    @jax.jit
    def start(split, key):
        return stochastic_bilevel.start(cleaning(split).init(key), jnp.zeros(len(split[0].targets)))

    @jax.jit
    def scores(split, params):
        return cleaning(split).scores(params)

    @jax.jit
    def retrained_accuracy(split, logits, key):
        return cleaning(split).scores(cleaning(split).train(logits, key))[1]

    state = jax.eval_shape(start, like, jax.random.key(0))
    runners = {}
    for name, (method, method_sizes) in CONTENDERS.items():
        per_step = method.evaluations(cleaning(like).problem, method_sizes)

        def advance(split, *args, method=method, method_sizes=method_sizes):
            problem = cleaning(split).problem
            return stochastic_bilevel.run(method, problem, method_sizes, *args)

        arguments = like, Rates(1.0, 1.0), state, jax.random.key(0), 1
        started = time.perf_counter()
        program = jax.jit(advance).lower(*arguments).compile()
        seconds = time.perf_counter() - started
        runners[name] = Runner(program, per_step, max(1, evaluations // per_step), seconds)
    num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    return Contest(runners, start, scores, retrained_accuracy, num_params)


def tune(contest: Contest, split: Split, key: jax.Array) -> dict[str, list[tuple[Any, ...]]]:
    """Searches the rates of every method by the validation loss at the end.

    Compass search from `MIDDLE`, or from a lower inner rate where that diverges: the inner and the
    outer rate by turns go up, else down, as long as the loss falls, through `INNER_RATES` and
    `OUTER_RATES`, until `TRIES` rates were tried or all neighbours of the best are worse.

    Returns:
      `{method: [(inner rate, outer rate, last validation loss), ...]}`, best first; the loss is
      None where it grew to twice the first one, at which the method was stopped.
    """
    init_key, run_key = jax.random.split(key)
    start = contest.start(split, init_key)
    limit = 2 * float(contest.scores(split, start.params)[0])

    def last_loss(runner, rates):
        state, loss = start, limit
        for num_steps in _lengths(runner.num_steps):
            state = runner.advance(split, rates, state, run_key, num_steps)
            loss = float(contest.scores(split, state.params)[0])
            if not loss < limit:
                return math.inf
        return loss

    tried = {}
    for name, runner in contest.runners.items():
        losses = compass_search(partial(last_loss, runner))
        best_first = sorted(losses, key=losses.__getitem__)
        tried[name] = [(*rates, _finite(losses[rates])) for rates in best_first]
    return tried


def compass_search(loss: Callable[[Rates], float]) -> dict[Rates, float]:
    """The losses of the rates that `tune` tries."""
    best = MIDDLE
    losses = {best: loss(best)}
    while math.isinf(losses[best]) and len(losses) < TRIES and (lower := _neighbour(best, (-1, 0))):
        best = lower
        losses[best] = loss(best)
    failures = 0  # directions in a row without a better one
    while failures < len(_DIRECTIONS):
        for direction in _DIRECTIONS:
            failures += 1
            while (rates := _neighbour(best, direction)) is not None:
                if rates not in losses:
                    if len(losses) == TRIES:
                        return losses
                    losses[rates] = loss(rates)
                if losses[rates] >= losses[best]:
                    break
                best, failures = rates, 0
    return losses


_DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1))


def _neighbour(rates: Rates, direction: tuple[int, int]) -> Rates | None:
    """The next ones in that direction; None past the ends."""
    inner, outer = (
        known.index(rate) + step
        for known, rate, step in zip((INNER_RATES, OUTER_RATES), rates, direction, strict=True)
    )
    if not (0 <= inner < len(INNER_RATES) and 0 <= outer < len(OUTER_RATES)):
        return None
    return Rates(INNER_RATES[inner], OUTER_RATES[outer])


def measure(
    contest: Contest, split: Split, rates: Mapping[str, Rates], key: jax.Array
) -> dict[str, dict[str, Any]]:
    """Every method with its own rates; they take turns.

    Returns:
      By method, lists over the points, the first one before any meta-step: `evaluations`, `seconds`
      of the processor without compilation and scores, `validation_loss`, `test_accuracy`. And the
      `logits` found, an array `[train]`, and the `retrained_accuracy` with these. Numbers of a
      method that diverged are None, also the logits.
    """
    init_key, run_key, train_key = jax.random.split(key, 3)
    start = contest.start(split, init_key)
    states = dict.fromkeys(contest.runners, start)
    points = {name: [(0, 0.0, *_scores(contest, split, start))] for name in states}
    for point in range(POINTS):
        for name, runner in contest.runners.items():
            for num_steps in _lengths(runner.num_steps)[point : point + 1]:
                evaluations, seconds, *_ = points[name][-1]
                arguments = split, rates[name], states[name], run_key, num_steps
                started = time.process_time()
                state = states[name] = jax.block_until_ready(runner.advance(*arguments))
                seconds += time.process_time() - started
                evaluations += num_steps * runner.evaluations
                points[name].append((evaluations, seconds, *_scores(contest, split, state)))
    measured = {}
    fields = "evaluations", "seconds", "validation_loss", "test_accuracy"
    for name, state in states.items():
        logits = state.hyperparams
        finite = bool(np.isfinite(logits).all())
        retrained = contest.retrained_accuracy(split, logits, train_key) if finite else None
        measured[name] = {
            **dict(zip(fields, map(list, zip(*points[name], strict=True)), strict=True)),
            "logits": np.asarray(logits) if finite else None,
            "retrained_accuracy": None if retrained is None else float(retrained),
        }
    return measured


def _lengths(num_steps: int) -> list[int]:
    """Meta-steps from point to point: `POINTS` of these, or single meta-steps where these are
    fewer."""
    stops = {round(num_steps * k / POINTS) for k in range(POINTS + 1)}
    return np.diff(sorted(stops)).tolist()


def _scores(contest: Contest, split: Split, state: State) -> tuple[float | None, float | None]:
    loss, accuracy = map(float, contest.scores(split, state.params))
    return _finite(loss), accuracy if math.isfinite(loss) else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
