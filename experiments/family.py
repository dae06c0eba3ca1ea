"""One table of every algorithm on the tasks that it can serve, ours beside the published values.

    python -m experiments.family --budget 0.02
    python -m experiments.family --tasks omniglot --data-dir DIR --max-seconds 900
    python -m experiments.family --tasks leo --features features

One run for each row, in a folder of its own: runs resume, and finished ones are only tested again.
The table is written to OUTPUT.json and OUTPUT.md after each, and printed at the end.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from experiments import (
    glyphs,
    leo,
    mini_imagenet,
    navigation,
    omniglot,
    sinusoid,
)
from experiments.shared import accuracy_table, common
from imaml_jax import protocols
from imaml_jax.learners.registry import ALGORITHMS
from imaml_jax.learners.settings import Count, Positive, Range, Record, nearest
from imaml_jax.protocols import leo as leos
from imaml_jax.protocols import navigation as navigators
from imaml_jax.protocols import sinusoid as sinusoids
from imaml_jax.protocols.published import PUBLISHED
from imaml_jax.training.non_finite import NonFiniteError
from imaml_jax.types import Batch, MetaLearner, Task

TaskName = Literal["glyphs", "leo", "mini_imagenet", "navigation", "omniglot", "sinusoid"]
# Of each kind of images: the experiment, and the images' shape.
_IMAGES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "glyphs": (glyphs, (28, 28, 1)),
    "mini_imagenet": (mini_imagenet, (84, 84, 3)),
    "omniglot": (omniglot, (28, 28, 1)),
}


class Run(NamedTuple):
    """A row of the table that is to be made.

    Attributes:
      task: what is learned.
      algorithm: by what.
      protocol: its name, or "own" for that of the experiment.
      workdir: its folder.
      main: makes `results.json` there.
      full_meta_steps: of its whole budget.
      memory: `results -> temporary bytes of the meta-gradient of one task`, None where it is not
        measured.
      score: `results -> (mean, half-width of the 95% interval, NLL or None)`.
      published: in words.
    """

    task: str
    algorithm: str
    protocol: str
    workdir: Path
    main: Callable[[], Any]
    full_meta_steps: int
    memory: Callable[[dict[str, Any]], int | None]
    score: Callable[[dict[str, Any]], tuple[float, float, float | None]]
    published: str


@dataclasses.dataclass(frozen=True)
class Config(Record):
    """Which rows to make, and for how long."""

    tasks: tuple[TaskName, ...] = ("sinusoid", "glyphs", "navigation")
    """What is learned; omniglot and mini_imagenet need data, leo features."""
    algorithms: tuple[str, ...] = ()
    """Which algorithms, by the names that the tables print; default all."""
    budget: Positive = 1.0
    """Share of each run's meta-steps."""
    max_seconds: Positive | None = None
    """Stop a run after the first log point past this many seconds of training."""
    ways: Annotated[int, Range(least=2)] = 5
    """Classes of a classification task."""
    shots: Count = 1
    """Support examples a class of a classification task."""
    sinusoid_setting: sinusoids.Setting = "maml"
    """Whose sinusoids."""
    sinusoid_shots: Count = 10
    """Points of a sinusoid."""
    data_dir: Path | None = None
    """Directory of Omniglot's or mini-ImageNet's files; default the environment variable
    IMAML_DATA_DIR."""
    features: Path | None = None
    """What LEO learns from, see `python -m experiments.features`."""
    workdir: Path = Path("runs/family")
    """One folder a row."""
    output: Path = Path("runs/family/table")
    """Where to write the table, without an ending."""

    @classmethod
    def choices(cls) -> Mapping[str, tuple[str, ...]]:
        """The values of settings that are names."""
        return {"algorithms": (*sorted({"leo", "nearest_centroid", *ALGORITHMS}),)}

    def check_together(self) -> None:
        """Raises ValueError for an unknown algorithm, or LEO without features."""
        every = self.choices()["algorithms"]
        for name in self.algorithms:
            if name not in every:
                raise ValueError(
                    f"algorithms={name!r} must be of {', '.join(every)}{nearest(name, every)}"
                )
        if "leo" in self.tasks and self.features is None:
            raise ValueError(
                "features=None: tasks=leo needs the folder that python -m experiments.features "
                "writes"
            )


def main(config: Config) -> list[dict[str, Any]]:
    """Makes the rows, and writes the table after each.

    Returns:
      One row a run.

    Raises:
      ValueError: a setting out of its range, or no row.
    """
    runs = [
        run
        for task in config.tasks
        for run in _RUNS[task](config)
        if not config.algorithms or run.algorithm in config.algorithms
    ]
    if not runs:
        raise ValueError("nothing to run: tasks and algorithms need values that go together")
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
    header = ["task", "algorithm", "protocol", "score", "NLL", "published"]
    header += ["meta-steps", "seconds", "MiB"]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        named = [row["task"], row["algorithm"], row["protocol"]]
        if "diverged_at" in row:
            said = f"diverged at step {row['diverged_at']}"
            lines.append([*named, said, "", row["published"], "", "", ""])
            continue
        mean, half, nll = row["score"], row["ci95"], row["nll"]
        steps = f"{row.get('trained_meta_steps', 0)} of {row['full_meta_steps']}"
        lines.append(
            [
                *named,
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
        "temporary memory of the meta-gradient of one task. Protocol: that of this row's run, by "
        "its name in imaml_jax.protocols or the experiment's own; its settings are in the JSON "
        "file. Published values were measured under the protocols of their papers."
    )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{note}\n"


def _row(run: Run) -> dict[str, Any]:
    named = {"task": run.task, "algorithm": run.algorithm, "protocol": run.protocol}
    named |= {"workdir": str(run.workdir)}
    try:
        run.main()  # goes on where it was, refuses another config, and trains no finished run again
    except NonFiniteError as error:
        return named | {"published": run.published, "diverged_at": error.step}
    results = json.loads((run.workdir / "results.json").read_text(encoding="utf-8"))
    results |= results.get("rows", {}).get(run.algorithm, {})  # several algorithms, one run
    mean, ci95, nll = run.score(results)
    memory = run.memory(results)
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
    for algorithm in sinusoids.SETTINGS:
        selectors = {"algorithm": algorithm, "setting": config.sinusoid_setting}
        full = sinusoid.Config.of(**selectors).settings.outer.meta_steps
        steps = _steps(config, full, 100)
        folder = f"sinusoid_{config.sinusoid_setting}_{config.sinusoid_shots}shot_{algorithm}"
        own = sinusoid.Config.of(
            **selectors,
            shots=config.sinusoid_shots,
            meta_steps=steps,
            log_every=100 if steps % 1000 else 1000,
            max_seconds=config.max_seconds,
            workdir=config.workdir / f"{folder}_{steps}steps",
        )
        learner = own.settings.build()
        points = [jnp.zeros((n, 1)) for n in (own.shots, own.settings.tasks.train_queries)]
        yield Run(
            f"sinusoid, setting {own.setting}, {own.shots}-shot",
            algorithm,
            "own",
            own.workdir or Path(),
            lambda own=own: sinusoid.main(own),
            full,
            lambda _, learner=learner, points=points: _memory(
                learner, Task(*(Batch(x, x) for x in points))
            ),
            lambda results: (results["test_mse"], results["test_ci95"], results["test_nll"]),
            "",
        )


def of_images(config: Config, task: str) -> Iterator[Run]:
    """The runs of all that classify images."""
    experiment, image = _IMAGES[task]
    for algorithm in ALGORITHMS:
        shape = {"algorithm": algorithm, "ways": config.ways, "shots": config.shots}
        full = protocols.get("common", **shape, dataset=experiment.Config.DATASET).outer.meta_steps
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
        if task != "glyphs":  # which need no data
            settings["data_dir"] = config.data_dir
        own = experiment.Config.of(**settings)
        tasks, learner = own.settings.tasks, own.settings.build(config.ways)
        per_class = (tasks.train_shots, tasks.train_queries)
        published = PUBLISHED.get(task, {}).get(algorithm, {})
        yield Run(
            f"{task} {config.ways}-way {config.shots}-shot",
            algorithm,
            own.protocol,
            config.workdir / folder,
            partial(experiment.main, own),
            full,
            lambda _, learner=learner, per_class=per_class: _memory_of_classifier(
                learner, config.ways, per_class, image
            ),
            _of_accuracy,
            accuracy_table.printed(*published.get((config.ways, config.shots), ("", None))),
        )


def _navigators(config: Config) -> Iterator[Run]:
    for algorithm, (_, outer) in navigators.SETTINGS.items():
        steps = _steps(config, outer.meta_steps, 5)
        own = navigation.Config.of(
            algorithm=algorithm,
            meta_steps=steps,
            max_seconds=config.max_seconds,
            workdir=config.workdir / f"navigation_{algorithm}_{steps}steps",
        )
        published = navigators.AFTER_ONE_UPDATE.get(algorithm)
        yield Run(
            "2D navigation",
            algorithm,
            "own",
            own.workdir or Path(),
            lambda own=own: navigation.main(own),
            outer.meta_steps,
            lambda _: None,
            lambda results: (results["test_return"][1], results["test_ci95"][1], None),
            "" if published is None else f"{published:g}",
        )


def of_features(config: Config) -> Iterator[Run]:
    """The runs of LEO and of the nearest class mean."""
    assert config.features is not None
    shape = f"{config.ways}way_{config.shots}shot"
    steps = _steps(config, leos.META_STEPS, 1000)
    own = leo.Config.of(
        features=config.features,
        ways=config.ways,
        shots=config.shots,
        variants=("leo",),
        meta_steps=steps,
        max_seconds=config.max_seconds,
        workdir=config.workdir / f"leo_{shape}_{steps}steps",
    )
    baseline = dataclasses.replace(
        own, variants=(), workdir=config.workdir / f"nearest_centroid_{shape}"
    )

    def memory(results):
        learner = leo.build_learner(own, stochastic=True)
        per_class = (own.shots, leo.QUERIES)
        return _memory_of_classifier(learner, own.ways, per_class, (1, 1, results["width"]))

    value = leo.published(config.features, config.ways, config.shots) or ("", None)
    for algorithm, of_run, full, memory_of, published in (
        ("nearest_centroid", baseline, 0, lambda _: None, ""),
        ("leo", own, leos.META_STEPS, memory, accuracy_table.printed(*value)),
    ):
        yield Run(
            f"features {config.ways}-way {config.shots}-shot",
            algorithm,
            "own",
            of_run.workdir or Path(),
            partial(leo.main, of_run),
            full,
            memory_of,
            _of_accuracy,
            published,
        )


def _of_accuracy(results: dict[str, Any]) -> tuple[float, float, float | None]:
    return 100 * results["test_accuracy"], 100 * results["test_ci95"], results["test_nll"]


_RUNS: dict[TaskName, Callable[[Config], Iterator[Run]]] = {
    "glyphs": partial(of_images, task="glyphs"),
    "leo": of_features,
    "mini_imagenet": partial(of_images, task="mini_imagenet"),
    "navigation": _navigators,
    "omniglot": partial(of_images, task="omniglot"),
    "sinusoid": _sinusoids,
}


def _memory_of_classifier(
    learner: MetaLearner, ways: int, per_class: tuple[int, int], shape: tuple[int, ...]
) -> int | None:
    """`per_class` are the support and the query examples."""
    sizes = (ways * n for n in per_class)
    task = Task(*(Batch(jnp.zeros((n, *shape)), jnp.arange(n) % ways) for n in sizes))
    return _memory(learner, task)


def _memory(learner: MetaLearner, task: Task) -> int | None:
    """Temporary bytes of the compiled meta-gradient of one task."""
    key = jax.random.key(0)
    meta_params = jax.eval_shape(learner.init, key, task.support.inputs)
    compiled = jax.jit(learner.meta_grad).lower(meta_params, task, key, 0).compile()
    analysis = compiled.memory_analysis()
    return analysis and analysis.temp_size_in_bytes


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
