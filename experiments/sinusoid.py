"""Regression of sinusoids from a few points: MAML's first experiment.

    python -m experiments.sinusoid --algorithm imaml
    python -m experiments.sinusoid --algorithm maml

Amplitudes in [0.1, 5], phases in [0, pi], points in [-5, 5]; a network of two hidden layers of 40
units. MAML and first-order MAML have the settings of Finn et al., ICML 2017; those of Reptile and
implicit MAML were chosen on validation tasks.
"""

import dataclasses
import time
from functools import partial
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import optax

import imaml_jax
from experiments import common
from imaml_jax.data import sinusoid
from imaml_jax.evaluation import make_evaluate
from imaml_jax.learners.base import MetaInfo
from imaml_jax.networks import mlp
from imaml_jax.types import MetaLearner

_META_BATCH, _TRAIN_QUERIES, _TEST_QUERIES = 25, 10, 100
_NETWORK = mlp([40, 40, 1])


class Settings(NamedTuple):
    """What an algorithm brings along; a config may override it."""

    inner: str
    inner_rate: float
    num_steps: int
    eval_num_steps: int
    outer_rate: float
    meta_steps: int
    reg_strength: float | None = None


SETTINGS = {
    "maml": Settings("sgd", 0.01, 1, 10, 1e-3, 70_000),
    "fomaml": Settings("sgd", 0.01, 1, 10, 1e-3, 70_000),
    "reptile": Settings("sgd", 0.02, 5, 32, 1.0, 15_000),
    "imaml": Settings("adaptive_gd", 0.01, 8, 16, 3e-3, 5_000, reg_strength=2.0),
}


@dataclasses.dataclass(frozen=True)
class Config(common.RunConfig):
    """Sinusoid regression; fields that are None take the algorithm's value."""

    algorithm: Literal["fomaml", "imaml", "maml", "reptile"] = "imaml"
    """Meta-learning algorithm."""
    shots: int = 10
    """Points of a task that the network is adapted to, at least 1."""
    log_every: int = 1000
    """Meta-steps between two log points, each with a validation; one compiled call."""
    test_tasks: int = 600
    """Test tasks."""
    inner: Literal["adaptive_gd", "newton_cg", "sgd"] | None = None
    """Inner optimiser."""


def main(config: Config) -> dict[str, Any]:
    """Meta-trains, and tests the best checkpoint before and after adaptation.

    Args:
      config: the run.

    Returns:
      What `results.json` in the workdir holds: settings, mean squared errors with 95% confidence
      intervals over test tasks, seconds, versions.

    Raises:
      ValueError: a setting out of its range, before anything is compiled.
    """
    common.cache_compilations()
    settings = resolve(config)
    learner = build_learner(config.algorithm, settings)
    if config.algorithm == "reptile":
        outer = optax.sgd(optax.linear_schedule(settings.outer_rate, 0.0, settings.meta_steps))
    else:
        outer = optax.adam(settings.outer_rate)

    def sample_train(key):
        return sinusoid.sample_tasks(
            key, num_tasks=_META_BATCH, shots=config.shots, queries=_TRAIN_QUERIES
        )

    unadapted = learner._replace(
        adapt=lambda meta_params, support, key: (meta_params, MetaInfo()), predict=_NETWORK.apply
    )
    scorer = partial(_make_scorer, shots=config.shots)
    validate = scorer(learner, config.validation_tasks, common.VALIDATION_KEY)
    on_test = scorer(learner, config.test_tasks, common.TEST_KEY)
    before_on_test = scorer(unadapted, config.test_tasks, common.TEST_KEY)
    recorded = {"dataset": "sinusoid"} | common.recorded(config) | {"settings": settings._asdict()}
    print(describe(config, settings), flush=True)
    started = time.perf_counter()
    result = common.run_training(
        config,
        learner,
        outer,
        sample_train,
        num_steps=settings.meta_steps,
        example_inputs=jnp.zeros((1, 1)),
        validate=validate,
        map_tasks="vmap",
        config=recorded,
    )
    test, before = on_test(result.best_meta_params), before_on_test(result.best_meta_params)
    validation = common.best_validation(result.history)
    results = recorded | common.provenance()
    results |= common.outcome(result, started) | {
        "validation_mse": -validation if validation is not None else None,
        "test_mse": -test.mean,
        "test_ci95": test.ci95,
        "test_mse_before": -before.mean,
        "test_ci95_before": before.ci95,
        "test_info": test.info,
    }
    common.write_results(config.workdir, results)
    print(report(results), flush=True)
    return results


def resolve(config: Config) -> Settings:
    """The algorithm's settings with the config's overrides in place.

    Raises:
      ValueError: a setting out of its range.
    """
    overrides = {name: getattr(config, name) for name in Settings._fields}
    settings = SETTINGS[config.algorithm]._replace(
        **{name: value for name, value in overrides.items() if value is not None}
    )
    if config.algorithm != "imaml" and settings.reg_strength is not None:
        raise ValueError(
            f"reg_strength={settings.reg_strength} is a setting of imaml; leave it out for "
            f"algorithm={config.algorithm}"
        )
    common.check_seed(config.seed)
    if settings.inner == "newton_cg" and config.algorithm == "maml":
        raise ValueError(
            "inner=newton_cg cannot be differentiated by unrolling, as algorithm=maml does; "
            "choose another inner or algorithm=fomaml"
        )
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


def build_learner(algorithm: str, settings: Settings) -> MetaLearner:
    """The learner of an algorithm, on the network of two hidden layers."""
    inner = {
        "sgd": optax.sgd,
        "adaptive_gd": imaml_jax.adaptive_gd,
        "newton_cg": lambda rate: imaml_jax.newton_cg(max_cg_steps=10),
    }[settings.inner](settings.inner_rate)
    make, own = {
        "maml": (imaml_jax.maml, {}),
        "fomaml": (imaml_jax.fomaml, {}),
        "reptile": (imaml_jax.reptile, {"statistics": "batch"}),
        "imaml": (
            imaml_jax.imaml,
            {
                "reg_strength": settings.reg_strength,
                "curvature": "gauss_newton",
                "solve": imaml_jax.solve_woodbury,
            },
        ),
    }[algorithm]
    return make(
        _NETWORK,
        imaml_jax.mean_squared_error,
        inner=inner,
        num_steps=settings.num_steps,
        eval_num_steps=settings.eval_num_steps,
        **own,
    )


def describe(config: Config, settings: Settings) -> str:
    """The protocol in words, printed beside every number."""
    proximal = f", lambda {settings.reg_strength:g}" if settings.reg_strength else ""
    return (
        f"sinusoid {config.shots}-shot, {config.algorithm}: amplitude in [0.1, 5], phase in "
        f"[0, pi], points in [-5, 5], {_TEST_QUERIES} query points at test, inner "
        f"{settings.inner} rate {settings.inner_rate:g}{proximal}, {settings.num_steps} steps in "
        f"training and {settings.eval_num_steps} at test, {_META_BATCH} tasks a meta-step"
    )


def report(results: dict[str, Any]) -> str:
    """The outcome in words."""
    return (
        f"test mean squared error {results['test_mse']:.4f} ± {results['test_ci95']:.4f} after "
        f"{results['settings']['eval_num_steps']} inner steps, {results['test_mse_before']:.3f} ± "
        f"{results['test_ci95_before']:.3f} before (95% CI over {results['test_tasks']} tasks; "
        f"best checkpoint, step {results['best_step']} of {results['trained_meta_steps']}; "
        f"{results['seconds']:.0f} s)"
    )


def _make_scorer(learner: MetaLearner, num_tasks: int, seed: tuple[int, int], *, shots: int):
    """Negative squared error, for higher is better, on tasks that only the key decides."""

    def sample(key):
        return sinusoid.sample_tasks(key, num_tasks=100, shots=shots, queries=_TEST_QUERIES)

    score = make_evaluate(
        learner,
        sample,
        num_tasks=num_tasks,
        score_fn=lambda outputs, targets: -imaml_jax.mean_squared_error(outputs, targets),
        map_tasks="vmap",
    )
    return lambda meta_params: score(meta_params, common.fixed_key(seed))


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
