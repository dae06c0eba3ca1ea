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
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

import imaml_jax
from experiments.shared import common, scores
from imaml_jax.data import episodes, features
from imaml_jax.training.evaluation import make_evaluate, make_predictions
from imaml_jax.types import MetaLearner

META_STEPS, QUERIES = 100_000, 15
PUBLISHED = {1: (61.76, 0.08), 5: (77.59, 0.12)}  # 5-way, on the authors' mini-ImageNet features
_CLIP, _TASKS_A_CALL = 0.1, 100


class Constants(NamedTuple):
    """What the authors chose for a data set and a number of shots."""

    outer_rate: float
    l2_penalty: float
    orthogonality_penalty: float
    dropout: float
    kl_weight: float
    encoder_penalty: float


CONSTANTS = {
    ("mini_imagenet", 1): Constants(
        2.739071e-4, 3.623413e-10, 0.188103, 0.307651, 0.756143, 5.756821e-6
    ),
    ("mini_imagenet", 5): Constants(
        4.102361e-4, 8.540338e-9, 1.523998e-3, 0.300299, 0.466387, 2.661608e-7
    ),
    ("tiered_imagenet", 1): Constants(
        8.659053e-4, 4.148858e-10, 5.451078e-3, 0.475126, 2.034189e-3, 8.302962e-5
    ),
    ("tiered_imagenet", 5): Constants(
        6.110314e-4, 1.690399e-10, 2.481216e-2, 0.415158, 1.622811, 2.672450e-5
    ),
}
VARIANTS = {"leo": True, "deterministic": False}


@dataclasses.dataclass(frozen=True)
class Config(common.RunConfig):
    """LEO on features; fields that are None take the published value."""

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
    ways: int = 5
    """Classes a task, at least 2."""
    shots: int = 1
    """Support examples a class, at least 1."""
    meta_batch: int = 12
    """Tasks a meta-step, at least 1."""
    log_every: int = 1000
    """Meta-steps between two log points, each with a validation; at least 1."""
    validation_tasks: int = 2000
    """Validation tasks, the same each time; at least 1."""
    test_tasks: int = 10_000
    """Test tasks, at least 2."""
    test_queries: int = 15
    """Query examples a class at validation and test; all others of 600 as published; at least
    1."""
    num_latents: int = 64
    """Size of a code, at least 1."""
    dropout: float | None = None
    """Share of the features that training drops, at least 0 and below 1."""
    kl_weight: float | None = None
    """Beta, the weight of the divergence of the codes from their prior; at least 0."""
    encoder_penalty: float | None = None
    """Gamma, the weight of the distance of adapted codes from the encoder's; at least 0."""
    l2_penalty: float | None = None
    """Lambda_1, the weight of the squared parameters; at least 0."""
    orthogonality_penalty: float | None = None
    """Lambda_2, the weight of the decoder's correlations; at least 0."""


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
    constants = resolve(config)
    learners = {name: build_learner(config, constants, VARIANTS[name]) for name in config.variants}
    splits = features.load(config.features, centred=config.centred)
    _check_data(config, splits)
    common.say(describe(config, constants, splits))
    results = common.recorded(config) | {
        "features": _folder(config),
        "settings": constants._asdict(),
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
            outer(constants.outer_rate),
            sampler(config, splits.train, config.meta_batch, QUERIES),
            num_steps=config.meta_steps or META_STEPS,
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


def resolve(config: Config) -> Constants:
    """The published constants with the config's overrides in place.

    Raises:
      ValueError: a setting out of its range.
    """
    common.check_seed(config.seed)
    least = {"ways": 2, "shots": 1, "meta_batch": 1, "log_every": 1, "num_latents": 1}
    least |= {"validation_tasks": 1, "test_tasks": 2, "test_queries": 1}
    common.check_least(config, **least)
    for name in ("eval_num_steps", "reg_strength"):
        if getattr(config, name) is not None:
            raise ValueError(f"{name}={getattr(config, name)} has no effect on LEO; leave it out")
    for name in ("meta_steps", "max_seconds", "inner_rate", "outer_rate", "num_steps"):
        if getattr(config, name) is not None:
            common.check_positive(config, name)
    meta_steps = config.meta_steps or META_STEPS
    if meta_steps % config.log_every:
        raise ValueError(
            f"meta_steps={meta_steps} must be a multiple of log_every={config.log_every}; "
            "change either"
        )
    if config.kl_weight is not None and "leo" not in config.variants:
        raise ValueError(f"kl_weight={config.kl_weight} has no effect without variants=leo")
    published = CONSTANTS[config.constants, 1 if config.shots == 1 else 5]
    overrides = {name: getattr(config, name) for name in Constants._fields}
    return published._replace(**{n: value for n, value in overrides.items() if value is not None})


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
    return PUBLISHED.get(shots) if fits and ways == 5 else None


def build_learner(config: Config, constants: Constants, stochastic: bool) -> MetaLearner:
    """LEO by these constants."""
    penalties = constants._asdict()
    del penalties["outer_rate"]
    return imaml_jax.leo(
        ways=config.ways,
        num_latents=config.num_latents,
        num_steps=config.num_steps or 5,
        latent_rate=config.inner_rate or 1.0,
        stochastic=stochastic,
        **penalties,
    )


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
    num_tasks = config.test_tasks if is_test else config.validation_tasks
    score = make(
        learner,
        sampler(config, dataset, min(num_tasks, _TASKS_A_CALL), config.test_queries),
        num_tasks=num_tasks,
    )
    return lambda meta_params: score(meta_params, common.fixed_key(seed))


def describe(config: Config, constants: Constants, splits: episodes.Splits) -> str:
    """The protocol in words, printed beside every number."""
    named = ", ".join(f"{name} {value:g}" for name, value in constants._asdict().items())
    trained = (
        f"; LEO of {config.num_latents} latents, {named}, {config.meta_batch} tasks a meta-step, "
        f"{QUERIES} queries a class in training"
    )
    counts = [0 if part is None else episodes.num_classes(part) for part in splits]
    return (
        f"{config.ways}-way {config.shots}-shot on features of width "
        f"{splits.train.images.shape[-1]} in {_folder(config)}, "
        f"{'centred and ' if config.centred else ''}scaled to norm 1; "
        f"{'/'.join(map(str, counts))} classes; {config.test_queries} queries a class at test"
        + (trained if config.variants else "")
    )


def report(results: dict[str, Any]) -> str:
    """The outcome in words."""
    lines = [
        f"test accuracy, 95% CI over {results['test_tasks']} tasks of unseen classes, the same for "
        "all (validation accuracy; checkpoint)"
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
    for dataset, queries in zip(splits, (QUERIES, *[config.test_queries] * 2), strict=True):
        if dataset is not None:
            episodes.check_task_shape(
                dataset, ways=config.ways, shots=config.shots, queries=queries
            )


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
