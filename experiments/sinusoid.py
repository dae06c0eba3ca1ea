"""Regression of sinusoids from a few points: MAML's first experiment, and BMAML's.

    python -m experiments.sinusoid --algorithm imaml
    python -m experiments.sinusoid --algorithm bmaml --setting bmaml --shots 5

Setting maml: amplitudes in [0.1, 5], phases in [0, pi], a network of two hidden layers of 40 units.
Setting bmaml: phases in [0, 2 pi], frequencies in [0.5, 2], noise of a hundredth of the amplitude,
three hidden layers, and only 1,000 tasks to train on. Points in [-5, 5] in both. In setting maml,
MAML and first-order MAML have the settings of Finn et al., ICML 2017; all others were chosen on
validation tasks of setting maml, with 5 points. The published loss of bmaml is --meta-loss chaser.

Every predictive is a mixture of Gaussians about the outputs of its samples, of one width that
validation tasks choose; an algorithm without samples has one.
"""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import imaml_jax
from experiments.shared import common
from experiments.shared.sinusoid_learners import (
    TASKS,
    WITH_KERNEL,
    Algorithm,
    Settings,
    Tasks,
    build_learner,
    make_outer,
    settings_of,
    unadapted_params,
)
from imaml_jax.data import sinusoid
from imaml_jax.learners.base import Adapted, MetaInfo
from imaml_jax.training import metrics, plots
from imaml_jax.training.evaluation import Predictions, make_evaluate, make_predictions
from imaml_jax.types import MetaLearner, Task

TRAIN_QUERIES, _TEST_QUERIES = 10, 100
_WIDTHS = np.geomspace(0.01, 3.0, 60)
_WITH_STRENGTH = ("imaml", "implicit_anil", "implicit_bmaml", "implicit_platipus")
_WITH_SAMPLES = ("bmaml", "implicit_bmaml", "implicit_platipus", "platipus")


@dataclasses.dataclass(frozen=True)
class Config(common.RunConfig):
    """Sinusoid regression; fields that are None take the algorithm's value."""

    algorithm: Algorithm = "imaml"
    """Meta-learning algorithm; implicit_anil is imaml of the head alone."""
    setting: Literal["bmaml", "maml"] = "maml"
    """Whose tasks and network."""
    shots: int = 10
    """Points of a task that the network is adapted to, at least 1."""
    log_every: int = 1000
    """Meta-steps between two log points, each with a validation; at least 1."""
    test_tasks: int = 600
    """Test tasks, at least 1."""
    inner: Literal["adaptive_gd", "newton_cg", "sgd"] | None = None
    """Inner optimiser."""
    num_samples: int | None = None
    """Particles of BMAML, or samples of PLATIPUS in training, which has 10 at test; at least 1."""
    kernel: Literal["exact", "official"] | None = None
    """BMAML's: exact, or the constants of its published code."""
    bandwidth: float | None = None
    """BMAML's, of the kernel, above 0; default the median's, with which the gradients of the
    other particles together count as much as a particle's own."""
    meta_loss: Literal["chaser", "particles", "query"] | None = None
    """BMAML's: published is chaser, which implicit_bmaml has not; default particles, the mean of
    their query losses."""
    leader_steps: int | None = None
    """Inner steps of bmaml's leader beyond the adapted particles, for the chaser loss; at least 1,
    which is the default."""


def main(config: Config) -> dict[str, Any]:
    """Meta-trains, and tests the best checkpoint before and after adaptation.

    Args:
      config: the run.

    Returns:
      What `results.json` in the workdir holds: settings, mean squared errors with 95% confidence
      intervals over test tasks, likelihood and coverage, seconds, versions.

    Raises:
      ValueError: a setting out of its range, before anything is compiled.
    """
    common.cache_compilations()
    settings, tasks = resolve(config), TASKS[config.setting]
    make = partial(build_learner, config.algorithm, settings, tasks.network)
    learner, stacked = make(), make(average=None)
    unadapted = learner._replace(
        adapt=lambda meta_params, support, key: (
            Adapted(unadapted_params(config.algorithm, meta_params), None),
            MetaInfo(),
        )
    )
    scorer = partial(_on_tasks, config=config, make=_make_evaluate)
    validate = scorer(learner, num_tasks=config.validation_tasks, seed=common.VALIDATION_KEY)
    recorded = {"dataset": "sinusoid"} | common.recorded(config) | {"settings": settings._asdict()}
    print(describe(config, settings), flush=True)
    started = time.perf_counter()
    result = common.run_training(
        config,
        learner,
        make_outer(config.algorithm, settings),
        _training_tasks(config, tasks),
        num_steps=settings.meta_steps,
        example_inputs=jnp.zeros((1, 1)),
        validate=validate,
        map_tasks="vmap",
        config=recorded,
    )
    best = result.best_meta_params
    test, before = (
        scorer(each, num_tasks=config.test_tasks, seed=common.TEST_KEY)(best)
        for each in (learner, unadapted)
    )
    predict = partial(_on_tasks, stacked, config=config, make=make_predictions)
    chosen_on = predict(num_tasks=config.validation_tasks, seed=common.VALIDATION_KEY)(best)
    predicted = predict(num_tasks=config.test_tasks, seed=common.TEST_KEY)(best)
    validation = common.best_validation(result)
    results = recorded | common.provenance()
    results |= common.outcome(result, started) | {
        "validation_mse": -validation if validation is not None else None,
        "test_mse": -test.mean,
        "test_ci95": test.ci95,
        "test_mse_before": -before.mean,
        "test_ci95_before": before.ci95,
        "test_info": test.info,
        **_likelihood(chosen_on, predicted),
    }
    common.write_results(config.workdir, results)
    if config.workdir is not None:
        _draw(config, stacked, best)
    print(report(results), flush=True)
    return results


def resolve(config: Config) -> Settings:
    """The algorithm's settings with the config's overrides in place.

    Raises:
      ValueError: a setting out of its range.
    """
    overrides = {name: getattr(config, name, None) for name in Settings._fields}
    settings = settings_of(config.algorithm, config.setting)._replace(
        **{name: value for name, value in overrides.items() if value is not None}
    )
    if config.algorithm == "mamlpp" and config.eval_num_steps is None:
        settings = settings._replace(eval_num_steps=settings.num_steps)
    for name, owners in (
        ("reg_strength", _WITH_STRENGTH),
        ("num_samples", _WITH_SAMPLES),
        ("kernel", WITH_KERNEL),
        ("bandwidth", WITH_KERNEL),
        ("meta_loss", WITH_KERNEL),
        ("leader_steps", ("bmaml",)),
    ):
        if config.algorithm not in owners and getattr(settings, name) is not None:
            raise ValueError(
                f"{name}={getattr(settings, name)} is a setting of {', '.join(owners)}; leave it "
                f"out for algorithm={config.algorithm}"
            )
    if settings.meta_loss == "chaser" and settings.leader_steps is None:
        settings = settings._replace(leader_steps=1)
    if settings.leader_steps is not None and settings.meta_loss != "chaser":
        raise ValueError(
            f"leader_steps={settings.leader_steps} is a setting of meta_loss=chaser, not of "
            f"{settings.meta_loss}: leave it out, or give --meta-loss chaser"
        )
    common.check_seed(config.seed)
    if settings.inner == "newton_cg" and config.inner_rate is not None:
        raise ValueError(f"inner_rate={config.inner_rate} has no effect on newton_cg; leave it out")
    if settings.inner == "newton_cg" and config.algorithm == "implicit_bmaml":
        raise ValueError(
            "inner=newton_cg needs an objective, which the particles of implicit_bmaml have not; "
            "choose sgd or adaptive_gd"
        )
    unrolled = ("anil", "bmaml", "maml", "platipus")
    if settings.inner == "newton_cg" and config.algorithm in unrolled:
        raise ValueError(
            "inner=newton_cg cannot be differentiated by unrolling, as "
            f"algorithm={config.algorithm} does; choose another inner or an implicit algorithm"
        )
    if settings.inner != "sgd" and config.algorithm == "mamlpp":
        raise ValueError(f"inner={settings.inner}: mamlpp has gradient descent; leave it out")
    values = dataclasses.asdict(config) | settings._asdict()
    positive = ("shots", "log_every", "validation_tasks", "test_tasks")
    for name in (*positive, *settings._fields, "max_seconds"):
        if isinstance(values[name], int | float) and not values[name] > 0:
            raise ValueError(f"{name}={values[name]} must be positive")
    if settings.meta_steps % config.log_every:
        raise ValueError(
            f"meta_steps={settings.meta_steps} must be a multiple of log_every={config.log_every}; "
            "change either"
        )
    return settings


def describe(config: Config, settings: Settings) -> str:
    """The protocol in words, printed beside every number."""
    tasks = TASKS[config.setting]
    rate = "" if settings.inner == "newton_cg" else f" rate {settings.inner_rate:g}"
    own = f", lambda {settings.reg_strength:g}" if settings.reg_strength else ""
    own += f", {settings.num_samples} samples" if settings.num_samples else ""
    own += f", KL weight {settings.kl_weight:g}" if settings.kl_weight else ""
    own += f", loss {settings.meta_loss}" if settings.meta_loss else ""
    own += f", leader {settings.leader_steps} steps on" if settings.leader_steps else ""
    if settings.posterior:
        width = f" of bandwidth {settings.bandwidth:g}" if settings.bandwidth else ""
        own += f", {settings.posterior}, {settings.kernel} kernel{width}"
    return (
        f"sinusoid {config.shots}-shot, {config.algorithm}: amplitude in [0.1, 5], {tasks.said}, "
        f"points in [-5, 5], {_TEST_QUERIES} query points at test, inner "
        f"{settings.inner}{rate}{own}, {settings.num_steps} steps in "
        f"training and {settings.eval_num_steps} at test, {tasks.meta_batch} tasks a meta-step"
    )


def report(results: dict[str, Any]) -> str:
    """The outcome in words."""
    return (
        f"test mean squared error {results['test_mse']:.4f} ± {results['test_ci95']:.4f} after "
        f"{results['settings']['eval_num_steps']} inner steps, {results['test_mse_before']:.3f} ± "
        f"{results['test_ci95_before']:.3f} before; NLL {results['test_nll']:.3f} ± "
        f"{results['test_nll_ci95']:.3f}, {100 * results['coverage']:.0f}% of targets in the 90% "
        f"band (95% CI over {results['test_tasks']} tasks; best checkpoint, step "
        f"{results['best_step']} of {results['trained_meta_steps']}; {results['seconds']:.0f} s)"
    )


def _training_tasks(config: Config, tasks: Tasks) -> Callable[[jax.Array], Task]:
    """`key -> Task`, a meta-batch of new tasks or of those that there are."""
    draw: Callable[..., Task] = partial(
        sinusoid.sample_tasks, shots=config.shots, queries=TRAIN_QUERIES, **tasks.ranges
    )
    number = tasks.train_tasks
    if number is None:
        return lambda key: draw(key, num_tasks=tasks.meta_batch)
    pool = draw(jax.random.key(config.seed), num_tasks=number)

    def sample(key):
        chosen = jax.random.choice(key, number, (tasks.meta_batch,), replace=False)
        return jax.tree.map(lambda x: x[chosen], pool)

    return sample


def _on_tasks(
    learner: MetaLearner,
    *,
    config: Config,
    make: Callable[..., Any],
    num_tasks: int,
    seed: tuple[int, int],
) -> Callable[[Any], Any]:
    """A function of meta-parameters, on tasks that only the seed decides."""

    def sample(key):
        return sinusoid.sample_tasks(
            key,
            num_tasks=100,
            shots=config.shots,
            queries=_TEST_QUERIES,
            **TASKS[config.setting].ranges,
        )

    run = make(learner, sample, num_tasks=num_tasks, map_tasks="vmap")
    return lambda meta_params: run(meta_params, common.fixed_key(seed))


_make_evaluate = partial(
    make_evaluate,
    # Negative, for higher is better.
    score_fn=lambda outputs, targets: -imaml_jax.mean_squared_error(outputs, targets),
)


def _samples(predictions: Predictions) -> jax.Array:
    """`[tasks, samples, n, 1]`."""
    outputs, targets, _ = predictions
    return jnp.asarray(outputs if outputs.ndim > targets.ndim else outputs[:, None])


def _likelihood(chosen_on: Predictions, test: Predictions) -> dict[str, float]:
    """NLL over tasks, coverage over points, and the error of a single sample."""

    @jax.jit
    def score(predictions, std):
        samples = _samples(predictions)

        def each(metric):
            return jax.vmap(partial(metric, noise_std=std))(samples, predictions.targets)

        inside = each(partial(metrics.coverage, level=0.9)).mean()
        return each(metrics.gaussian_mixture_nll), inside

    on_validation = jax.lax.map(lambda std: score(chosen_on, std)[0].mean(), jnp.asarray(_WIDTHS))
    std = float(_WIDTHS[np.argmin(on_validation)])
    nll, inside = score(test, std)
    mean, ci95 = metrics.mean_ci95(nll)
    samples, targets = _samples(test), test.targets
    return {
        "noise_std": std,
        "test_nll": mean,
        "test_nll_ci95": ci95,
        "coverage": float(inside),
        "test_mse_of_samples": float(jnp.square(samples - targets[:, None]).mean()),
    }


def _draw(config: Config, learner: MetaLearner, meta_params: Any) -> None:
    """What the samples predict in one test task, in the workdir."""
    ranges: dict[str, Any] = TASKS[config.setting].ranges | {"relative_noise": 0.0}
    key = common.fixed_key(common.TEST_KEY)
    drawn = sinusoid.sample_tasks(key, num_tasks=1, shots=config.shots, queries=200, **ranges)
    support, query = jax.tree.map(lambda x: x[0], drawn)
    order = query.inputs[:, 0].argsort()
    inputs, truth = (x[order] for x in query)

    @jax.jit
    def predict(meta_params):
        adapted, _ = learner.adapt(meta_params, support, key)
        return learner.predict(adapted, inputs)

    outputs = predict(meta_params)
    samples = outputs if outputs.ndim > truth.ndim else outputs[None]
    assert config.workdir is not None
    path = config.workdir / "bands.png"
    plots.prediction_bands(inputs[:, 0], samples[..., 0], truth[:, 0], support, path)


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
