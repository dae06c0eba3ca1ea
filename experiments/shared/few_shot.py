"""Few-shot image classification, as the experiments on all kinds of images share it."""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from experiments.shared import common, saved_model, scores
from experiments.shared.cli import ProcessConfig, ProtocolConfig
from imaml_jax import protocols
from imaml_jax.data import episodes
from imaml_jax.learners.settings import Count, Range
from imaml_jax.protocols import Protocol
from imaml_jax.protocols.protocol import ImageTasks
from imaml_jax.training import plots, processes
from imaml_jax.training.evaluation import Evaluation, ensemble, stack_members
from imaml_jax.training.loop import TrainResult
from imaml_jax.training.mapping import Sample
from imaml_jax.training.step import init_meta_params

_WITHOUT_VALIDATION = ("lake", "reptile")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ProcessConfig, ProtocolConfig):
    """What a run is."""

    SELECTORS: ClassVar = ("algorithm", "protocol", "ways", "shots")
    DATASET: ClassVar = "omniglot"

    algorithm: str = "imaml"
    """Meta-learning algorithm."""
    protocol: str = "common"
    """Published protocol, or the common one, chosen by measurement on validation classes."""
    ways: Annotated[int, Range(least=2)] = 5
    """Classes a task."""
    shots: Count = 1
    """Support examples a class."""
    validate_every: Count = 500
    """Meta-steps between two validations; a multiple of log_every."""
    map_tasks: Literal["map", "vmap"] | Count | None = None
    """How tasks are mapped on a device: vmap, map or a chunk of them; default by platform."""
    devices: int | None = None
    """Most devices that share a batch of tasks, as many as divide it; at least 1, default all."""
    model: Path | None = None
    """Folder for the trained model, in float16, which experiments.classify uses."""

    @classmethod
    def published(cls, **selectors: Any) -> Protocol:
        """The protocol that the selectors choose."""
        return protocols.get(selectors.pop("protocol"), **selectors, dataset=cls.DATASET)

    @classmethod
    def choices(cls) -> Mapping[str, tuple[str, ...]]:
        """The values of selectors that are names."""
        return {**super().choices(), "protocol": (*protocols.PROTOCOLS,)}

    def check_together(self) -> None:
        """Raises ValueError for counts that do not fit, or an ensemble without validation."""
        meta_steps = self.settings.outer.meta_steps
        self.check_multiples(meta_steps=meta_steps, validate_every=self.validate_every)
        tasks = self.settings.tasks
        if tasks.ensemble > 1 and tasks.split in _WITHOUT_VALIDATION:
            raise ValueError(
                f"ensemble={tasks.ensemble} is chosen on validation classes, which split="
                f"{tasks.split} has none of; choose another split or ensemble=1"
            )


def run(config: Config, splits: episodes.Splits, dataset: str) -> dict[str, Any]:
    """Meta-trains on the training classes and tests the best checkpoint on the test classes.

    Args:
      config: the run.
      splits: train, validation (or None) and test classes.
      dataset: its name, for the report.

    Returns:
      What `results.json` in the workdir holds: settings, accuracies with 95% confidence intervals
      over test tasks, seconds, versions.

    Raises:
      ValueError: data that the tasks do not fit, before anything is compiled.
    """
    learner, tasks = config.settings.build(config.ways), config.settings.tasks
    on_test = (tasks, config, splits.test, tasks.test_tasks, common.TEST_KEY)
    if config.model is not None:
        saved_model.check(config.model, splits)
    started = time.perf_counter()
    result = meta_train(config, splits, dataset)
    test = scores.predictions_on(learner, *on_test)(result.best_meta_params)
    results = common.recorded(config, dataset) | common.provenance()
    results |= common.outcome(result, started) | {
        "validation_accuracy": common.best_validation(result),
        "test_info": test.info,
        **scores.scores(test),
    }
    if len(result.best) > 1:
        members = stack_members([each.meta_params for each in result.best])
        averaged = scores.scores(scores.predictions_on(ensemble(learner), *on_test)(members))
        results["ensemble_steps"] = [each.step for each in result.best]
        results |= {name.replace("test", "ensemble"): averaged[name] for name in averaged}
    common.write_results(config.workdir, results)
    if config.workdir is not None and processes.is_first():
        plots.reliability_diagram(scores.calibration(test), config.workdir / "reliability.png")
    common.say(report(results))
    if config.model is not None:
        to_save = (splits, dataset, result.best_meta_params, results)
        common.say(saved_model.report(saved_model.save(config.model, config, *to_save)))
    return results


def meta_train(config: Config, splits: episodes.Splits, dataset: str) -> TrainResult:
    """Meta-trains without a look at the test classes; arguments and errors as those of `run`."""
    common.cache_compilations()
    tasks = config.settings.tasks
    devices = common.task_devices(config.devices, tasks.meta_batch)
    _check_data(config, splits)
    learner, validate = config.settings.build(config.ways), None
    if splits.val is not None:
        validate = scores.accuracy_on(
            learner, tasks, config, splits.val, config.validation_tasks, common.VALIDATION_KEY
        )
    common.say(describe(config, dataset))
    return common.run_training(
        config,
        learner,
        config.settings.build_outer(),
        training_tasks(config, splits.train),
        num_steps=config.settings.outer.meta_steps,
        example_inputs=_example(splits),
        validate=validate,
        validate_every=config.validate_every,
        keep_best=tasks.ensemble,
        map_tasks=config.map_tasks,
        devices=devices,
        config=common.recorded(config, dataset),
    )


def training_tasks(config: Config, dataset: episodes.Dataset) -> Sample:
    """`key -> Task`, a meta-batch of new tasks."""
    tasks = config.settings.tasks

    def sample(key):
        return episodes.sample_tasks(
            key,
            dataset,
            num_tasks=tasks.meta_batch,
            ways=config.ways,
            shots=tasks.train_shots,
            queries=tasks.train_queries,
            rotations=tasks.train_rotations,
            invert=tasks.invert,
        )

    return sample


def with_tasks(protocol: Protocol, kind: type[ImageTasks], **changes: Any) -> Protocol:
    """The protocol with its tasks as a record of another kind."""
    tasks = {field.name: getattr(protocol.tasks, field.name) for field in dataclasses.fields(kind)}
    return dataclasses.replace(protocol, tasks=kind(**tasks | changes))


def describe(config: Config, dataset: str) -> str:
    """The protocol in words, printed beside every number."""
    task = f"{dataset} {config.ways}-way {config.shots}-shot"
    return f"{task}, {config.algorithm}, {config.settings.in_words()}"


def report(results: dict[str, Any]) -> str:
    """The outcome in words."""
    which = "last" if results["validation_accuracy"] is None else "best"
    averaged = ""
    if "ensemble_accuracy" in results:
        averaged = (
            f"; ensemble of the best {len(results['ensemble_steps'])} checkpoints "
            f"{100 * results['ensemble_accuracy']:.2f} ± {100 * results['ensemble_ci95']:.2f}%"
        )
    return (
        f"test accuracy {100 * results['test_accuracy']:.2f} ± {100 * results['test_ci95']:.2f}% "
        f"(95% CI over {results['settings']['test_tasks']} tasks of unseen classes; {which} "
        f"checkpoint, step {results['best_step']} of {results['trained_meta_steps']}; "
        f"{results['seconds']:.0f} s)" + averaged
    )


def untrained(config: Config, splits: episodes.Splits) -> Evaluation:
    """Test accuracy of the initialisation before any meta-training, on the test tasks of `run`."""
    common.cache_compilations()
    learner, tasks = config.settings.build(config.ways), config.settings.tasks
    meta_params = init_meta_params(learner, jax.random.key(config.seed), _example(splits))
    score = scores.accuracy_on(
        learner, tasks, config, splits.test, tasks.test_tasks, common.TEST_KEY
    )
    return score(meta_params)


def _example(splits: episodes.Splits) -> jax.Array:
    return jnp.zeros((1, *splits.train.images.shape[1:]))


def _check_data(config: Config, splits: episodes.Splits) -> None:
    tasks = config.settings.tasks
    for dataset, shots, queries, rotations in (
        (splits.train, tasks.train_shots, tasks.train_queries, tasks.train_rotations),
        (splits.val, config.shots, tasks.test_queries, tasks.test_rotations),
        (splits.test, config.shots, tasks.test_queries, tasks.test_rotations),
    ):
        if dataset is not None:
            episodes.check_task_shape(
                dataset, ways=config.ways, shots=shots, queries=queries, rotations=rotations
            )
