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
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

import imaml_jax
from experiments.shared import common
from experiments.shared.cli import ProtocolConfig
from imaml_jax.data import sinusoid
from imaml_jax.learners.base import Adapted, MetaInfo
from imaml_jax.learners.settings import Count
from imaml_jax.protocols import Protocol
from imaml_jax.protocols import sinusoid as protocols
from imaml_jax.training import metrics, plots
from imaml_jax.training.evaluation import Predictions, make_evaluate, make_predictions
from imaml_jax.types import MetaLearner, Task

_WIDTHS = np.geomspace(0.01, 3.0, 60)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ProtocolConfig):
    """Sinusoid regression."""

    SELECTORS: ClassVar = ("algorithm", "setting")

    algorithm: str = "imaml"
    """Meta-learning algorithm; implicit_anil is imaml of the head alone."""
    setting: protocols.Setting = "maml"
    """Whose tasks and network."""
    shots: Count = 10
    """Points of a task that the network is adapted to."""
    log_every: Count = 1000
    """Meta-steps between two log points, each with a validation."""
    test_tasks: Count = 600
    """Test tasks."""

    @classmethod
    def published(cls, **selectors: Any) -> Protocol:
        """The protocol that the selectors choose."""
        return protocols.get(**selectors)

    def check_together(self) -> None:
        """Raises ValueError for meta-steps that do not fit the log points."""
        self.check_multiples(meta_steps=self.settings.outer.meta_steps)


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
    protocol = config.settings
    learner, stacked = protocol.build(), protocol.build_samples()
    unadapted = learner._replace(
        adapt=lambda meta_params, support, key: (
            Adapted(protocol.learner.before_adaptation(meta_params), None),
            MetaInfo(),
        )
    )
    scorer = partial(_on_tasks, config=config, make=_make_evaluate)
    validate = scorer(learner, num_tasks=config.validation_tasks, seed=common.VALIDATION_KEY)
    recorded = common.recorded(config, "sinusoid")
    print(describe(config), flush=True)
    started = time.perf_counter()
    result = common.run_training(
        config,
        learner,
        protocol.build_outer(),
        _training_tasks(config),
        num_steps=protocol.outer.meta_steps,
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


def describe(config: Config) -> str:
    """The protocol in words, printed beside every number."""
    return (
        f"sinusoid {config.shots}-shot, amplitude in [0.1, 5], points in [-5, 5], "
        f"{config.algorithm}, {config.settings.in_words()}"
    )


def report(results: dict[str, Any]) -> str:
    """The outcome in words."""
    settings = results["settings"]
    steps = settings.get("eval_num_steps") or settings.get("num_steps")
    return (
        f"test mean squared error {results['test_mse']:.4f} ± {results['test_ci95']:.4f} after "
        f"{steps} inner steps, {results['test_mse_before']:.3f} ± "
        f"{results['test_ci95_before']:.3f} before; NLL {results['test_nll']:.3f} ± "
        f"{results['test_nll_ci95']:.3f}, {100 * results['coverage']:.0f}% of targets in the 90% "
        f"band (95% CI over {results['test_tasks']} tasks; best checkpoint, step "
        f"{results['best_step']} of {results['trained_meta_steps']}; {results['seconds']:.0f} s)"
    )


def _ranges(config: Config) -> dict[str, Any]:
    tasks = config.settings.tasks
    names = ("phase", "frequency", "relative_noise")
    return {"shots": config.shots} | {name: getattr(tasks, name) for name in names}


def _training_tasks(config: Config) -> Callable[[jax.Array], Task]:
    """`key -> Task`, a meta-batch of new tasks or of those that there are."""
    tasks = config.settings.tasks
    draw: Callable[..., Task] = partial(
        sinusoid.sample_tasks, queries=tasks.train_queries, **_ranges(config)
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
            queries=config.settings.tasks.test_queries,
            **_ranges(config),
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
    ranges: dict[str, Any] = _ranges(config) | {"relative_noise": 0.0}
    key = common.fixed_key(common.TEST_KEY)
    drawn = sinusoid.sample_tasks(key, num_tasks=1, queries=200, **ranges)
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
