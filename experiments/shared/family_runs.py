"""The rows of the family's table: which run each is, and what is read from its results."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

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
from experiments.shared import accuracy_table
from imaml_jax import protocols
from imaml_jax.learners.registry import ALGORITHMS
from imaml_jax.protocols import leo as leos
from imaml_jax.protocols import navigation as navigators
from imaml_jax.protocols import sinusoid as sinusoids
from imaml_jax.protocols.published import PUBLISHED
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


def _steps(config: Any, full: int, log_every: int) -> int:
    return max(1, round(config.budget * full / log_every)) * log_every


def _sinusoids(config: Any) -> Iterator[Run]:
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


def of_images(config: Any, task: str) -> Iterator[Run]:
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


def _navigators(config: Any) -> Iterator[Run]:
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


def of_features(config: Any) -> Iterator[Run]:
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


RUNS: dict[TaskName, Callable[[Any], Iterator[Run]]] = {
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
