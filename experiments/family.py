"""One table of every algorithm on the tasks that it can serve, ours beside the published values.

    python -m experiments.family --budget 0.02
    python -m experiments.family --tasks omniglot --data-dir DIR --max-seconds 900
    python -m experiments.family --tasks leo --features features

One run for each row, in a folder of its own: runs resume, and finished ones are only tested again.
The table is written to OUTPUT.json and OUTPUT.md after each, and printed at the end.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from experiments import (
    accuracy_table,
    common,
    few_shot,
    glyphs,
    leo,
    navigation,
    omniglot,
    omniglot_table,
    sinusoid,
    sinusoid_learners,
)
from imaml_jax import build
from imaml_jax.non_finite import NonFiniteError
from imaml_jax.protocols import Protocol
from imaml_jax.types import Batch, MetaLearner, Task

TaskName = Literal["glyphs", "leo", "navigation", "omniglot", "sinusoid"]
LEO_PUBLISHED = {1: (61.76, 0.08), 5: (77.59, 0.12)}


class Run(NamedTuple):
    """A row of the table that is to be made.

    Attributes:
      task: what is learned.
      algorithm: by what.
      workdir: its folder.
      main: makes `results.json` there.
      full_meta_steps: of its whole budget.
      memory: temporary bytes of the meta-gradient of one task, None where it is not measured.
      score: `results -> (mean, half-width of the 95% interval, NLL or None)`.
      published: in words.
    """

    task: str
    algorithm: str
    workdir: Path
    main: Callable[[], Any]
    full_meta_steps: int
    memory: Callable[[], int | None]
    score: Callable[[dict[str, Any]], tuple[float, float, float | None]]
    published: str


@dataclasses.dataclass(frozen=True)
class Config:
    """Which rows to make, and for how long."""

    tasks: tuple[TaskName, ...] = ("sinusoid", "glyphs", "navigation")
    """What is learned; omniglot needs data, leo features."""
    algorithms: tuple[str, ...] = ()
    """Which algorithms, by the names that the tables print; default all."""
    budget: float = 1.0
    """Share of each run's meta-steps, above 0."""
    max_seconds: float | None = None
    """Stop a run after the first log point past this many seconds of training, above 0."""
    ways: int = 5
    """Classes of a classification task, at least 2."""
    shots: int = 1
    """Support examples a class of a classification task, at least 1."""
    sinusoid_setting: Literal["bmaml", "maml"] = "maml"
    """Whose sinusoids."""
    sinusoid_shots: int = 10
    """Points of a sinusoid, at least 1."""
    data_dir: Path | None = None
    """Directory of Omniglot's zips; default the environment variable IMAML_DATA_DIR."""
    features: Path | None = None
    """What LEO learns from, see `python -m experiments.features`."""
    workdir: Path = Path("runs/family")
    """One folder a row."""
    output: Path = Path("runs/family/table")
    """Where to write the table, without an ending."""


def main(config: Config) -> list[dict[str, Any]]:
    """Makes the rows, and writes the table after each.

    Returns:
      One row a run.

    Raises:
      ValueError: a setting out of its range, or no row.
    """
    if not 0 < config.budget < math.inf:
        raise ValueError(f"budget={config.budget} must be above 0 and finite")
    every = {"leo", "nearest_centroid", *accuracy_table.NAMES}
    every |= {*navigation.SETTINGS, *sinusoid_learners.SETTINGS}
    for name in config.algorithms:
        if name not in every:
            raise ValueError(f"algorithms={name!r} must be of {', '.join(sorted(every))}")
    runs = [
        run
        for task in config.tasks
        for run in _RUNS[task](config)
        if not config.algorithms or run.algorithm in config.algorithms
    ]
    if not runs:
        raise ValueError("nothing to run: tasks and algorithms need values that go together")
    if "leo" in config.tasks and config.features is None:
        raise ValueError(
            "features=None: tasks=leo needs the folder that python -m experiments.features writes"
        )
    common.check_output(config.output)
    rows = []
    for run in runs:
        print(f"\n{run.workdir}", flush=True)
        rows.append(_row(run))
        common.write_json(common.with_ending(config.output, "json"), rows)
        text = markdown(rows)
        common.with_ending(config.output, "md").write_text(text, encoding="utf-8")
    print(f"\n{markdown(rows)}", flush=True)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table in Markdown."""
    header = ["task", "algorithm", "score", "NLL", "published", "meta-steps", "seconds", "MiB"]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        if "diverged_at" in row:
            said = f"diverged at step {row['diverged_at']}"
            lines.append([row["task"], row["algorithm"], said, "", row["published"], "", "", ""])
            continue
        mean, half, nll = row["score"], row["ci95"], row["nll"]
        steps = f"{row.get('trained_meta_steps', 0)} of {row['full_meta_steps']}"
        lines.append(
            [
                row["task"],
                row["algorithm"],
                f"{mean:.4g} ± {half:.2g}",
                "" if nll is None else f"{nll:.3f}",
                row["published"],
                steps,
                f"{row.get('seconds', 0):.0f}",
                "" if row["memory_mib"] is None else f"{row['memory_mib']:.2f}",
            ]
        )
    note = (
        "Score: accuracy in per cent on unseen classes, mean squared error, or return after one "
        "update, with its 95% interval over test tasks. NLL of the averaged predictive. MiB: "
        "temporary memory of the meta-gradient of one task. Published values belong to their own "
        "protocols, which are in the JSON file beside ours."
    )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{note}\n"


def _row(run: Run) -> dict[str, Any]:
    named = {"task": run.task, "algorithm": run.algorithm, "workdir": str(run.workdir)}
    try:
        run.main()  # goes on where it was, refuses another config, and trains no finished run again
    except NonFiniteError as error:
        return named | {"published": run.published, "diverged_at": error.step}
    results = json.loads((run.workdir / "results.json").read_text(encoding="utf-8"))
    results |= results.get("rows", {}).get(run.algorithm, {})  # several algorithms, one run
    mean, ci95, nll = run.score(results)
    memory = run.memory()
    names = ("trained_meta_steps", "seconds", "command", "date", "device", "versions", "settings")
    return named | {
        "score": mean,
        "ci95": ci95,
        "nll": nll,
        "published": run.published,
        "full_meta_steps": run.full_meta_steps,
        "memory_mib": None if memory is None else memory / 2**20,
        **{name: results[name] for name in names if name in results},
    }


def _steps(config: Config, full: int, log_every: int) -> int:
    return max(1, round(config.budget * full / log_every)) * log_every


def _sinusoids(config: Config) -> Iterator[Run]:
    for algorithm in sinusoid_learners.SETTINGS:
        settings = sinusoid_learners.settings_of(algorithm, config.sinusoid_setting)
        steps = _steps(config, settings.meta_steps, 100)
        folder = f"sinusoid_{config.sinusoid_setting}_{config.sinusoid_shots}shot_{algorithm}"
        own = sinusoid.Config(
            algorithm=algorithm,
            setting=config.sinusoid_setting,
            shots=config.sinusoid_shots,
            meta_steps=steps,
            log_every=100 if steps % 1000 else 1000,
            max_seconds=config.max_seconds,
            workdir=config.workdir / f"{folder}_{steps}steps",
        )
        learner = sinusoid_learners.build_learner(
            algorithm, settings, sinusoid_learners.TASKS[own.setting].network
        )
        points = [jnp.zeros((n, 1)) for n in (own.shots, sinusoid.TRAIN_QUERIES)]
        yield Run(
            f"sinusoid, setting {own.setting}, {own.shots}-shot",
            algorithm,
            own.workdir or Path(),
            lambda own=own: sinusoid.main(own),
            settings.meta_steps,
            lambda learner=learner, points=points: _memory(
                learner, Task(*(Batch(x, x) for x in points))
            ),
            lambda results: (results["test_mse"], results["test_ci95"], results["test_nll"]),
            "",
        )


def _classifiers(config: Config, task: Literal["glyphs", "omniglot"]) -> Iterator[Run]:
    for algorithm in accuracy_table.NAMES:
        shape = {"algorithm": algorithm, "ways": config.ways, "shots": config.shots}
        full = few_shot.resolve(few_shot.Config(**shape)).meta_steps
        steps = _steps(config, full, 50)
        folder = f"{task}_{config.ways}way_{config.shots}shot_{algorithm}_{steps}steps"
        settings = {
            **shape,
            "meta_steps": steps,
            "log_every": 50,
            "validate_every": max(1, steps // 500) * 50,
            "max_seconds": config.max_seconds,
            "workdir": config.workdir / folder,
        }
        if task == "glyphs":
            own: Any = glyphs.Config(**settings)
            protocol, run, published = glyphs.resolve(own), glyphs.main, ""
        else:
            own = omniglot.Config(**settings, data_dir=config.data_dir)
            protocol, run = few_shot.resolve(own), omniglot.main
            value = omniglot_table.PUBLISHED[algorithm].get((config.ways, config.shots), ("", None))
            published = accuracy_table.printed(*value)
        yield Run(
            f"{task} {config.ways}-way {config.shots}-shot",
            algorithm,
            config.workdir / folder,
            lambda own=own, run=run: run(own),
            full,
            lambda protocol=protocol, ways=config.ways: _memory_of_classifier(protocol, ways),
            lambda results: (
                100 * results["test_accuracy"],
                100 * results["test_ci95"],
                results["test_nll"],
            ),
            published,
        )


def _navigators(config: Config) -> Iterator[Run]:
    for algorithm, settings in navigation.SETTINGS.items():
        steps = _steps(config, settings.meta_steps, 5)
        own = navigation.Config(
            algorithm=algorithm,
            meta_steps=steps,
            max_seconds=config.max_seconds,
            workdir=config.workdir / f"navigation_{algorithm}_{steps}steps",
        )
        yield Run(
            "2D navigation",
            algorithm,
            own.workdir or Path(),
            lambda own=own: navigation.main(own),
            settings.meta_steps,
            lambda: None,
            lambda results: (results["test_return"][1], results["test_ci95"][1], None),
            "-11.7" if algorithm == "maml" else "",
        )


def _leo(config: Config) -> Iterator[Run]:
    steps = _steps(config, leo.META_STEPS, 1000)
    own = leo.Config(
        features=config.features,
        ways=config.ways,
        shots=config.shots,
        variants=("leo",),
        meta_steps=steps,
        max_seconds=config.max_seconds,
        workdir=config.workdir / f"leo_{config.ways}way_{config.shots}shot_{steps}steps",
    )
    once = functools.cache(lambda: leo.main(own))  # it tests the nearest class mean too
    value = LEO_PUBLISHED.get(config.shots, ("", None)) if config.ways == 5 else ("", None)
    published = {"leo": accuracy_table.printed(*value)}
    for algorithm in ("nearest_centroid", "leo"):
        yield Run(
            f"features {config.ways}-way {config.shots}-shot",
            algorithm,
            own.workdir or Path(),
            once,
            leo.META_STEPS if algorithm == "leo" else 0,
            lambda: None,
            lambda results: (100 * results["test_accuracy"], 100 * results["test_ci95"], None),
            published.get(algorithm, ""),
        )


_RUNS: dict[TaskName, Callable[[Config], Iterator[Run]]] = {
    "glyphs": lambda config: _classifiers(config, "glyphs"),
    "leo": _leo,
    "navigation": _navigators,
    "omniglot": lambda config: _classifiers(config, "omniglot"),
    "sinusoid": _sinusoids,
}


def _memory_of_classifier(protocol: Protocol, ways: int) -> int | None:
    sizes = (ways * n for n in (protocol.train_shots, protocol.train_queries))
    task = Task(*(Batch(jnp.zeros((n, 28, 28, 1)), jnp.arange(n) % ways) for n in sizes))
    return _memory(build.build_learner(protocol, ways), task)


def _memory(learner: MetaLearner, task: Task) -> int | None:
    """Temporary bytes of the compiled meta-gradient of one task."""
    key = jax.random.key(0)
    meta_params = jax.eval_shape(learner.init, key, task.support.inputs)
    compiled = jax.jit(learner.meta_grad).lower(meta_params, task, key, 0).compile()
    analysis = compiled.memory_analysis()
    return analysis and analysis.temp_size_in_bytes


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
