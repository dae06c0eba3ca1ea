"""LEO on cached features, beside the nearest class mean on the same test tasks.

    python -m experiments.features --dataset mini_imagenet --data-dir DIR --output features
    python -m experiments.leo --features features --ways 5 --shots 1

or with the features that LEO's authors released:

    python -m experiments.leo --features embeddings/miniImageNet/center --shots 5
    python -m experiments.leo --features embeddings/tieredImageNet/center \\
        --constants tiered_imagenet

Trains LEO, and LEO with means for samples ("deterministic"), by the published constants of a data
set and a number of shots: 12 tasks a meta-step, 15 queries a class, Adam at a constant rate after
each gradient was clipped to 0.1 entry by entry and each tensor's to norm 0.1. The checkpoint that
is best on validation tasks is tested. Published, on the authors' features: 61.76 ± 0.08% and
77.59 ± 0.12% on mini-ImageNet 5-way 1-shot and 5-shot, 66.33 ± 0.05% and 81.44 ± 0.09% on
tiered-ImageNet; 61.48, 76.53, 66.18 and 82.06% deterministic.
"""

import dataclasses
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import optax

import imaml_jax
from experiments.shared import common, scores
from experiments.shared.cli import ProtocolConfig
from imaml_jax.data import episodes, features
from imaml_jax.learners.settings import Count, Range, Record, words
from imaml_jax.protocols import Protocol
from imaml_jax.protocols import leo as protocols
from imaml_jax.training.evaluation import make_evaluate, make_predictions
from imaml_jax.types import MetaLearner

QUERIES = 15
_CLIP, _TASKS_A_CALL = 0.1, 100
VARIANTS = {"leo": True, "deterministic": False}


@dataclasses.dataclass(frozen=True)
class FeatureTasks(Record):
    """Tasks of classification by features."""

    meta_batch: Count = 12
    """Tasks a meta-step."""
    test_tasks: Annotated[int, Range(least=2)] = 10_000
    """Test tasks."""
    test_queries: Count = 15
    """Query examples a class at validation and test; all others of 600 as published."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ProtocolConfig):
    """LEO on features."""

    SELECTORS: ClassVar = ("constants", "shots")

    features: Path | None = None
    """Folder of {train,val,test}_embeddings.pkl; default the environment variable
    IMAML_DATA_DIR."""
    constants: Literal["mini_imagenet", "tiered_imagenet"] = "mini_imagenet"
    """Data set whose published constants are taken: those of 1 shot, or of 5 for more than one."""
    variants: tuple[Literal["leo", "deterministic"], ...] = ("leo", "deterministic")
    """What is trained, one after the other, each for meta_steps and max_seconds; none for the
    nearest class mean alone."""
    centred: bool = False
    """Subtract the mean feature of the training classes before features are scaled to norm 1."""
    ways: Annotated[int, Range(least=2)] = 5
    """Classes a task."""
    shots: Count = 1
    """Support examples a class."""
    log_every: Count = 1000
    """Meta-steps between two log points, each with a validation."""
    validation_tasks: Count = 2000
    """Validation tasks, the same each time."""

    @classmethod
    def published(cls, **selectors: Any) -> Protocol:
        """The constants of the data set and the number of shots."""
        name, shots = selectors["constants"], selectors["shots"]
        if (name, 1) not in protocols.CONSTANTS:
            raise ValueError(f"constants={name!r} must be mini_imagenet or tiered_imagenet")
        learner, outer = protocols.CONSTANTS[name, 1 if shots == 1 else 5]
        return Protocol("leo", "Rusu et al., ICLR 2019", FeatureTasks(), Record(), outer, learner)

    def check_together(self) -> None:
        """Raises ValueError for settings that do not go together."""
        weight = self.settings.learner.kl_weight
        theirs = self.published(constants=self.constants, shots=self.shots).learner.kl_weight
        if "leo" not in self.variants and weight != theirs:
            raise ValueError(f"kl_weight={weight} has no effect without variants=leo")
        self.check_multiples(meta_steps=self.settings.outer.meta_steps)


def main(config: Config) -> dict[str, Any]:
    """Trains the variants and tests each beside the nearest class mean.

    Args:
      config: the run.

    Returns:
      What `results.json` in the workdir holds.

    Raises:
      ValueError: a setting out of its range, or features that are not there.
    """
    common.cache_compilations()
    learners = {name: build_learner(config, VARIANTS[name]) for name in config.variants}
    splits = features.load(config.features, centred=config.centred)
    _check_data(config, splits)
    common.say(describe(config, splits))
    results = common.recorded(config, config.constants) | {
        "features": _folder(config),
        "width": splits.train.images.shape[-1],
    }
    in_print = published(Path(_folder(config)).expanduser(), config.ways, config.shots)
    centroid = imaml_jax.nearest_centroid(ways=config.ways)
    rows = {
        "nearest_centroid": {
            "validation_accuracy": None
            if splits.val is None
            else scorer(config, centroid, splits.val, common.VALIDATION_KEY)({}).mean,
            **_tested(config, centroid, splits, {}),
        }
    }
    for name, learner in learners.items():
        started = time.perf_counter()
        workdir = None if config.workdir is None else config.workdir / name
        validate = None
        if splits.val is not None:
            validate = scorer(config, learner, splits.val, common.VALIDATION_KEY)
        result = common.run_training(
            dataclasses.replace(config, workdir=workdir),
            learner,
            outer(config.settings.outer.outer_rate),
            sampler(config, splits.train, config.settings.tasks.meta_batch, QUERIES),
            num_steps=config.settings.outer.meta_steps,
            example_inputs=jnp.zeros((1, *splits.train.images.shape[1:])),
            validate=validate,
            map_tasks="vmap",
            config=results | {"variant": name},
        )
        rows[name] = {
            "validation_accuracy": common.best_validation(result),
            **_tested(config, learner, splits, result.best_meta_params),
            **common.outcome(result, started),
        }
    results |= common.provenance() | {"published": in_print, "rows": rows}
    common.write_results(config.workdir, results)
    common.say(report(results))
    return results


def published(features: Path, ways: int, shots: int) -> tuple[float, float] | None:
    """What is in print of LEO on such tasks, None where features are not of mini-ImageNet.

    Which they are of is told by what `experiments.features` wrote beside them, or by the names of
    the authors' folders.
    """
    made, name = features / "results.json", "miniImageNet"
    if made.exists():
        found = json.loads(made.read_text(encoding="utf-8"))
        fits = isinstance(found, dict) and found.get("dataset") == "mini_imagenet"
    else:
        below = (features / name, features / "embeddings" / name)
        fits = name in features.resolve().parts or any(folder.is_dir() for folder in below)
    return protocols.PUBLISHED.get(shots) if fits and ways == 5 else None


def build_learner(config: Config, stochastic: bool) -> MetaLearner:
    """LEO by these constants, or with means for samples."""
    return dataclasses.replace(config.settings.learner, stochastic=stochastic).build(config.ways)


def outer(rate: float) -> optax.GradientTransformation:
    """Adam after the two clippings."""

    def clip_norm(g):
        return g * jnp.minimum(1.0, _CLIP / jnp.maximum(jnp.linalg.norm(g.ravel()), 1e-12))

    by_tensor = optax.stateless(lambda grads, _: jax.tree.map(clip_norm, grads))
    return optax.chain(optax.clip(_CLIP), by_tensor, optax.adam(rate))


def sampler(
    config: Config, dataset: episodes.Dataset, num_tasks: int, queries: int
) -> Callable[[jax.Array], Any]:
    """`key -> Task` of so many tasks."""
    return partial(
        episodes.sample_tasks,
        dataset=dataset,
        num_tasks=num_tasks,
        ways=config.ways,
        shots=config.shots,
        queries=queries,
    )


def scorer(
    config: Config,
    learner: MetaLearner,
    dataset: episodes.Dataset,
    seed: tuple[int, int],
    make: Callable[..., Any] = make_evaluate,
) -> Callable[[Any], Any]:
    """Accuracy, or what else `make` is for, on tasks that only the key and features decide."""
    is_test = seed == common.TEST_KEY
    tasks = config.settings.tasks
    num_tasks = tasks.test_tasks if is_test else config.validation_tasks
    score = make(
        learner,
        sampler(config, dataset, min(num_tasks, _TASKS_A_CALL), tasks.test_queries),
        num_tasks=num_tasks,
    )
    return lambda meta_params: score(meta_params, common.fixed_key(seed))


def describe(config: Config, splits: episodes.Splits) -> str:
    """The protocol in words, printed beside every number."""
    protocol = config.settings
    trained = f"; LEO: {words(protocol.learner)}; {words(protocol.outer)}"
    trained += f"; {QUERIES} queries a class in training"
    counts = [0 if part is None else episodes.num_classes(part) for part in splits]
    return (
        f"{config.ways}-way {config.shots}-shot on features of width "
        f"{splits.train.images.shape[-1]} in {_folder(config)}, "
        f"{'centred and ' if config.centred else ''}scaled to norm 1; "
        f"{'/'.join(map(str, counts))} classes; {words(protocol.tasks)}"
        + (trained if config.variants else "")
    )


def report(results: dict[str, Any]) -> str:
    """The outcome in words."""
    lines = [
        f"test accuracy, 95% CI over {results['settings']['test_tasks']} tasks of unseen classes, "
        "the same for all (validation accuracy; checkpoint)"
    ]
    for name, row in results["rows"].items():
        validation = row["validation_accuracy"]
        chosen = "" if validation is None else f"{100 * validation:.2f}%; "
        step = f"step {row['best_step']}" if "best_step" in row else "not trained"
        lines.append(
            f"{name:17} {100 * row['test_accuracy']:.2f} ± {100 * row['test_ci95']:.2f}% "
            f"({chosen}{step})"
        )
    return "\n".join(lines)


def _folder(config: Config) -> str:
    return str(config.features or os.environ.get("IMAML_DATA_DIR"))


def _tested(
    config: Config, learner: MetaLearner, splits: episodes.Splits, meta_params: Any
) -> dict[str, float]:
    predict = scorer(config, learner, splits.test, common.TEST_KEY, make_predictions)
    return scores.scores(predict(meta_params))


def _check_data(config: Config, splits: episodes.Splits) -> None:
    for dataset, queries in zip(
        splits, (QUERIES, *[config.settings.tasks.test_queries] * 2), strict=True
    ):
        if dataset is not None:
            episodes.check_task_shape(
                dataset, ways=config.ways, shots=config.shots, queries=queries
            )


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
