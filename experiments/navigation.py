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
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

import imaml_jax
from experiments.shared import common
from experiments.shared.cli import ProtocolConfig
from imaml_jax.learners.settings import Count
from imaml_jax.policies import Policy, navigation
from imaml_jax.policies.problem import PolicyProblem
from imaml_jax.policies.trajectories import mean_return, rollout
from imaml_jax.policies.trpo import make_trpo_train_step
from imaml_jax.protocols import Protocol
from imaml_jax.protocols import navigation as protocols
from imaml_jax.training.evaluation import Evaluation
from imaml_jax.training.mapping import draw_tasks, map_over_tasks
from imaml_jax.training.metrics import mean_ci95
from imaml_jax.training.plots import new_figure

_TRAJECTORIES: dict[str, int] = {"num_trajectories": 20, "eval_num_trajectories": 40}
_DRAWN_GOALS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ProtocolConfig):
    """2D navigation."""

    SELECTORS: ClassVar = ("algorithm",)

    algorithm: str = "maml"
    """Meta-learning algorithm."""
    log_every: Count = 5
    """Meta-steps between two log points, each with a validation."""
    validation_tasks: Count = 40
    """Validation tasks, the same each time."""
    test_tasks: Count = 40
    """Test tasks."""

    @classmethod
    def published(cls, **selectors: Any) -> Protocol:
        """The protocol that the selectors choose."""
        return protocols.get(**selectors)

    @classmethod
    def choices(cls) -> Mapping[str, tuple[str, ...]]:
        """The values of selectors that are names."""
        return {"algorithm": (*protocols.SETTINGS,)}

    def check_together(self) -> None:
        """Raises ValueError for settings that do not go together."""
        if self.settings.outer.outer == "trpo" and self.non_finite == "skip":
            raise ValueError(
                "non_finite=skip does not serve outer=trpo, whose step is that of all tasks"
            )
        self.check_multiples(meta_steps=self.settings.outer.meta_steps)


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
    protocol, problem = config.settings, build_problem(config)
    learner = imaml_jax.policy_gradient(problem)

    sample = partial(navigation.sample_tasks, num_tasks=protocol.tasks.meta_batch)
    if protocol.outer.outer == "trpo":
        tx, train_step = optax.identity(), make_trpo_train_step(problem, sample)
    else:
        tx, train_step = protocol.build_outer(), None
    validate = make_score(config, 1, config.validation_tasks)
    score = make_score(config, protocol.learner.eval_num_steps, config.test_tasks)

    def after_one_update(meta_params):
        returns, _ = validate(meta_params, common.fixed_key(common.VALIDATION_KEY))
        return Evaluation(*mean_ci95(returns[:, 1]), returns[:, 1], {})

    recorded = common.recorded(config, "navigation")
    print(describe(config), flush=True)
    started = time.perf_counter()
    result = common.run_training(
        config,
        learner,
        tx,
        sample,
        num_steps=protocol.outer.meta_steps,
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
        "published": protocols.PUBLISHED | {"oracle": protocols.ORACLE},
    }
    common.write_results(config.workdir, results)
    if config.workdir is not None:
        draw(paths, config.workdir / "trajectories.png")
    print(report(results), flush=True)
    return results


def build_problem(config: Config, shrink: float = 1.0) -> PolicyProblem:
    """The adaptation; `shrink` multiplies the rate of an update, or divides lambda."""
    environment = navigation.navigation(horizon=config.settings.tasks.horizon)
    learner = config.settings.learner
    return learner.build(_policy(config), environment, shrink=shrink, **_TRAJECTORIES)


def _policy(config: Config) -> Policy:
    return imaml_jax.gaussian_policy(config.settings.network.build(2))


def make_score(config: Config, updates: int, num_tasks: int):
    """`(meta_params, key) -> (returns [num_tasks, updates + 1], paths)`, at goals by the key.

    The return after k updates is that of the trajectories by which update k + 1 is made. `paths`
    holds the first goals, and positions `[goals, updates + 1, horizon, 2]` with their mask.
    """
    environment = navigation.navigation(horizon=config.settings.tasks.horizon)
    policy, last_trajectories = _policy(config), _TRAJECTORIES["eval_num_trajectories"]
    problems = [build_problem(config)] + [build_problem(config, 0.5)] * (updates - 1)

    def score_task(params, goal, key):
        *keys, last_key = jax.random.split(key, len(problems) + 1)
        seen = []
        for problem, own_key in zip(problems, keys, strict=True):
            adaptation = problem.adapt(params, goal, own_key)
            params = adaptation.params
            seen.append(jax.tree.map(lambda x: x[-1], adaptation.support.trajectories))
        seen.append(rollout(environment, policy, params, goal, last_key, last_trajectories))
        returns = jnp.stack([mean_return(trajectories) for trajectories in seen])
        paths = [(t.observations[:, 0], t.mask[:, 0]) for t in seen]
        return returns, (goal, *jax.tree.map(lambda *x: jnp.stack(x), *paths))

    @jax.jit
    def score(params, key):
        tasks, keys = draw_tasks(partial(navigation.sample_tasks, num_tasks=num_tasks), key, 0)
        returns, paths = map_over_tasks(score_task)(params, tasks.support, keys)
        return returns, jax.tree.map(lambda x: x[:_DRAWN_GOALS], paths)

    return lambda params, key: jax.tree.map(np.asarray, score(params, key))


def describe(config: Config) -> str:
    """The protocol in words, printed beside every number."""
    return (
        f"2D navigation, goals in [-0.5, 0.5]^2, {config.algorithm}, "
        f"{config.settings.in_words()}; {_TRAJECTORIES['num_trajectories']} trajectories "
        f"an inner step in training and {_TRAJECTORIES['eval_num_trajectories']} an update at "
        "test, after the first at half the rate, or twice the lambda"
    )


def report(results: dict[str, Any]) -> str:
    """The outcome as a table."""
    scores = zip(results["test_return"], results["test_ci95"], strict=True)
    rows = {"this run": [f"{mean:.1f} ± {half_width:.1f}" for mean, half_width in scores]}
    rows |= {
        name: [f"{value:.1f}" for value in values] for name, values in protocols.PUBLISHED.items()
    }
    columns = range(len(results["test_return"]))
    lines = [f"{'return after updates':34}" + "".join(f"{k:>14}" for k in columns)]
    for name, cells in rows.items():
        lines.append(f"{name:34}" + "".join(f"{cell:>14}" for cell in cells[: len(columns)]))
    lines.append(
        f"published oracle {protocols.ORACLE}; 95% CI over {results['test_tasks']} tasks; best "
        f"checkpoint by validation goals, step {results['best_step']} of "
        f"{results['trained_meta_steps']}; {results['seconds']:.0f} s"
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
