"""2D navigation by policy gradients: MAML's third experiment.

    python -m experiments.navigation
    python -m experiments.navigation --algorithm imaml --outer adam --max-seconds 600

A point that starts at the origin learns where its goal is from rewards alone. A Gaussian policy of
two hidden layers of 100 units, whose standard deviation starts at 1, 20 trajectories of at most 100
steps a task, one inner step of rate 0.5; outside TRPO with mean KL at most 0.01, as published.
Adapted at test by 40 trajectories an update, at half the rate after the first.
"""

import dataclasses
import time
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import imaml_jax
from experiments.shared import common
from imaml_jax.networks import mlp
from imaml_jax.policies import navigation
from imaml_jax.policies.problem import PolicyProblem
from imaml_jax.policies.trajectories import mean_return, rollout
from imaml_jax.policies.trpo import make_trpo_train_step
from imaml_jax.training.evaluation import Evaluation
from imaml_jax.training.mapping import draw_tasks, map_over_tasks
from imaml_jax.training.metrics import mean_ci95
from imaml_jax.training.plots import new_figure

_TRAJECTORIES, _TEST_TRAJECTORIES, _DRAWN_GOALS = 20, 40, 4
_POLICY = imaml_jax.gaussian_policy(
    mlp([100, 100, 2], kernel_init=jax.nn.initializers.glorot_uniform())
)
# Returns after 0, 1, 2 and 3 updates, published with the code of Finn et al.
PUBLISHED = {
    "published, MAML": (-40.4, -11.7, -3.3, -3.2),
    "published, random initialisation": (-82.7, -58.0, -54.0, -47.0),
}
_ORACLE = -2.3


Algorithm = Literal["fomaml", "imaml", "maml", "reptile"]


class Settings(NamedTuple):
    """What an algorithm brings along; a config may override it."""

    outer: str
    outer_rate: float
    num_steps: int
    inner: str = "sgd"
    inner_rate: float = 0.5
    eval_num_steps: int = 3
    meta_steps: int = 100
    reg_strength: float | None = None
    temperature: float | None = None


SETTINGS: dict[Algorithm, Settings] = {
    "maml": Settings("trpo", 1e-2, 1),
    "fomaml": Settings("trpo", 1e-2, 1),
    "reptile": Settings("adam", 1e-2, 3),
    "imaml": Settings("adam", 1e-2, 10, "adaptive_gd", 0.1, reg_strength=1.0, temperature=0.3),
}


@dataclasses.dataclass(frozen=True)
class Config(common.RunConfig):
    """2D navigation; fields that are None take the algorithm's value."""

    algorithm: Algorithm = "maml"
    """Meta-learning algorithm."""
    outer: Literal["adam", "trpo"] | None = None
    """Outer optimiser; TRPO has no outer rate, and does not serve Reptile."""
    estimator: Literal["emaml", "loaded_dice", "lvc", "naive"] = "naive"
    """Surrogate of MAML's inner step; naive is the published one, emaml is not for TRPO."""
    temperature: float | None = None
    """Of the weights in iMAML's inner problem; the lower, the more its best actions count; above
    0."""
    meta_batch: int = 20
    """Tasks a meta-step; 40 in the paper; at least 1."""
    horizon: int = 100
    """Most steps of a trajectory, at least 1."""
    log_every: int = 5
    """Meta-steps between two log points, each with a validation; at least 1."""
    validation_tasks: int = 40
    """Validation tasks, the same each time; at least 1."""
    test_tasks: int = 40
    """Test tasks, at least 1."""


def main(config: Config) -> dict[str, Any]:
    """Meta-trains, and tests the best checkpoint after 0, 1, 2, ... updates.

    Args:
      config: the run.

    Returns:
      What `results.json` in the workdir holds: settings, returns with 95% confidence intervals over
      test goals, seconds, versions.

    Raises:
      ValueError: a setting out of its range, before anything is compiled.
    """
    common.cache_compilations()
    settings = resolve(config)
    problem = build_problem(config, settings)
    learner = imaml_jax.policy_gradient(problem)

    sample = partial(navigation.sample_tasks, num_tasks=config.meta_batch)
    tx, train_step = optax.adam(settings.outer_rate), None
    if settings.outer == "trpo":
        tx, train_step = optax.identity(), make_trpo_train_step(problem, sample)
    validate = make_score(config, settings._replace(eval_num_steps=1), config.validation_tasks)
    score = make_score(config, settings, config.test_tasks)

    def after_one_update(meta_params):
        returns, _ = validate(meta_params, common.fixed_key(common.VALIDATION_KEY))
        return Evaluation(*mean_ci95(returns[:, 1]), returns[:, 1], {})

    recorded = {"dataset": "navigation"} | common.recorded(config)
    recorded |= {"settings": settings._asdict()}
    print(describe(config, settings), flush=True)
    started = time.perf_counter()
    result = common.run_training(
        config,
        learner,
        tx,
        sample,
        num_steps=settings.meta_steps,
        example_inputs=jnp.zeros((1, 2)),
        validate=after_one_update,
        train_step=train_step,
        config=recorded,
    )
    returns, paths = score(result.best_meta_params, common.fixed_key(common.TEST_KEY))
    scores = [mean_ci95(column) for column in returns.T]
    results = recorded | common.provenance() | common.outcome(result, started)
    results |= {
        "validation_return": common.best_validation(result),
        "test_return": [mean for mean, _ in scores],
        "test_ci95": [half_width for _, half_width in scores],
        "published": PUBLISHED | {"oracle": _ORACLE},
    }
    common.write_results(config.workdir, results)
    if config.workdir is not None:
        draw(paths, config.workdir / "trajectories.png")
    print(report(results), flush=True)
    return results


def resolve(config: Config) -> Settings:
    """The algorithm's settings with the config's overrides in place.

    Raises:
      ValueError: a setting out of its range.
    """
    overrides = {name: getattr(config, name, None) for name in Settings._fields}
    settings = SETTINGS[config.algorithm]._replace(
        **{name: value for name, value in overrides.items() if value is not None}
    )
    common.check_seed(config.seed)
    if config.algorithm == "imaml":
        common.check_positive(settings, "reg_strength", "temperature")
    for name in ("reg_strength", "temperature"):
        if config.algorithm != "imaml" and getattr(settings, name) is not None:
            raise ValueError(
                f"{name}={getattr(settings, name)} is a setting of imaml; leave it out for "
                f"algorithm={config.algorithm}"
            )
    if settings.outer == "trpo" and config.non_finite == "skip":
        raise ValueError(
            "non_finite=skip does not serve outer=trpo, whose step is that of all tasks"
        )
    if settings.outer == "trpo" and config.outer_rate is not None:
        raise ValueError(f"outer_rate={config.outer_rate} is a setting of outer=adam; leave it out")
    common.check_least(
        config, meta_batch=1, horizon=1, log_every=1, validation_tasks=1, test_tasks=1
    )
    common.check_least(settings, num_steps=1, eval_num_steps=1, meta_steps=1)
    common.check_positive(settings, "inner_rate", "outer_rate")
    if config.max_seconds is not None and not config.max_seconds > 0:
        raise ValueError(f"max_seconds={config.max_seconds} must be positive")
    if settings.meta_steps % config.log_every:
        raise ValueError(
            f"meta_steps={settings.meta_steps} must be a multiple of log_every={config.log_every}; "
            "change either"
        )
    return settings


def build_problem(config: Config, settings: Settings, shrink: float = 1.0) -> PolicyProblem:
    """The adaptation, of `settings` in training and of one update by `_TEST_TRAJECTORIES` at test.

    An update of implicit MAML is a solution of its proximal problem; `shrink` divides its lambda as
    it multiplies the rate of the others.
    """
    implicit = config.algorithm == "imaml"
    rate = settings.inner_rate * shrink
    proximal: dict[str, Any] = {}
    if implicit:
        rate = settings.inner_rate
        proximal["reg_strength"] = (settings.reg_strength or 1.0) / shrink
        proximal["temperature"] = settings.temperature or 1.0
    return imaml_jax.policy_problem(
        _POLICY,
        navigation.navigation(horizon=config.horizon),
        algorithm=config.algorithm,
        estimator=config.estimator,
        inner={"adaptive_gd": imaml_jax.adaptive_gd, "sgd": optax.sgd}[settings.inner](rate),
        num_steps=settings.num_steps,
        eval_num_steps=settings.num_steps if implicit else 1,
        num_trajectories=_TRAJECTORIES,
        eval_num_trajectories=_TEST_TRAJECTORIES,
        **proximal,
    )


def make_score(config: Config, settings: Settings, num_tasks: int):
    """`(meta_params, key) -> (returns [num_tasks, updates + 1], paths)`, at goals by the key.

    The return after k updates is that of the trajectories by which update k + 1 is made. `paths`
    holds the first goals, and positions `[goals, updates + 1, horizon, 2]` with their mask.
    """
    environment = navigation.navigation(horizon=config.horizon)
    problems = [build_problem(config, settings)]
    problems += [build_problem(config, settings, 0.5)] * (settings.eval_num_steps - 1)

    def score_task(params, goal, key):
        *keys, last_key = jax.random.split(key, len(problems) + 1)
        seen = []
        for problem, own_key in zip(problems, keys, strict=True):
            adaptation = problem.adapt(params, goal, own_key)
            params = adaptation.params
            seen.append(jax.tree.map(lambda x: x[-1], adaptation.support.trajectories))
        seen.append(rollout(environment, _POLICY, params, goal, last_key, _TEST_TRAJECTORIES))
        returns = jnp.stack([mean_return(trajectories) for trajectories in seen])
        paths = [(t.observations[:, 0], t.mask[:, 0]) for t in seen]
        return returns, (goal, *jax.tree.map(lambda *x: jnp.stack(x), *paths))

    @jax.jit
    def score(params, key):
        tasks, keys = draw_tasks(partial(navigation.sample_tasks, num_tasks=num_tasks), key, 0)
        returns, paths = map_over_tasks(score_task)(params, tasks.support, keys)
        return returns, jax.tree.map(lambda x: x[:_DRAWN_GOALS], paths)

    return lambda params, key: jax.tree.map(np.asarray, score(params, key))


def describe(config: Config, settings: Settings) -> str:
    """The protocol in words, printed beside every number."""
    outer = (
        "TRPO with mean KL 0.01" if settings.outer == "trpo" else f"Adam {settings.outer_rate:g}"
    )
    proximal = ""
    if config.algorithm == "imaml":
        proximal = f", lambda {settings.reg_strength:g}, temperature {settings.temperature:g}"
    return (
        f"2D navigation, {config.algorithm} ({config.estimator} surrogate), outer {outer}: goals "
        f"in [-0.5, 0.5]^2, horizon {config.horizon}, {config.meta_batch} tasks a meta-step, "
        f"{_TRAJECTORIES} trajectories and {settings.num_steps} inner steps of "
        f"{settings.inner} at rate {settings.inner_rate:g}{proximal} in training; at test "
        f"{_TEST_TRAJECTORIES} trajectories an update, the "
        + ("lambda doubled" if config.algorithm == "imaml" else "rate halved")
        + " after the first"
    )


def report(results: dict[str, Any]) -> str:
    """The outcome as a table."""
    scores = zip(results["test_return"], results["test_ci95"], strict=True)
    rows = {"this run": [f"{mean:.1f} ± {half_width:.1f}" for mean, half_width in scores]}
    rows |= {name: [f"{value:.1f}" for value in values] for name, values in PUBLISHED.items()}
    columns = range(len(results["test_return"]))
    lines = [f"{'return after updates':34}" + "".join(f"{k:>14}" for k in columns)]
    for name, cells in rows.items():
        lines.append(f"{name:34}" + "".join(f"{cell:>14}" for cell in cells[: len(columns)]))
    lines.append(
        f"published oracle {_ORACLE}; 95% CI over {results['test_tasks']} tasks; best checkpoint "
        f"by validation goals, step {results['best_step']} of {results['trained_meta_steps']}; "
        f"{results['seconds']:.0f} s"
    )
    return "\n".join(lines)


def draw(paths: Any, path: Path) -> None:
    """One trajectory a goal before and after one update, and after the last."""
    goals, positions, masks = paths
    shown = sorted({0, 1, positions.shape[1] - 1})
    figure = new_figure(3.5 * len(shown), 3.7)
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, k in zip(panels, shown, strict=True):
        for i, goal in enumerate(goals):
            taken = masks[i, k] > 0
            axes.plot(*positions[i, k][taken].T, color=f"C{i}", linewidth=1)
            axes.plot(*goal, marker="*", markersize=12, color=f"C{i}")
        axes.set(title=f"after {k} updates", xlim=(-1, 1), ylim=(-1, 1), aspect="equal")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
