"""Few-shot image classification, as the experiments on Omniglot and on glyphs share it."""

import dataclasses
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from experiments.shared import common, saved_model, scores
from imaml_jax import protocols
from imaml_jax.data import episodes
from imaml_jax.protocols import Protocol, build
from imaml_jax.training import TrainResult, plots, processes
from imaml_jax.training.evaluation import Evaluation, ensemble, stack_members
from imaml_jax.training.step import init_meta_params

Algorithm = protocols.Algorithm
ProtocolName = Literal[
    "common", "finn", "imaml_dev", "imaml_paper", "mamlpp_code", "mamlpp_paper", "reptile"
]
_WITHOUT_VALIDATION = ("lake", "reptile")
_OF_IMPLICIT = ("cg_steps", "curvature", "learn_reg_strength", "reg_strength", "solve")
_OF_MAMLPP = ("first_order_epochs", "learn_rates", "multi_step_epochs", "per_step_norm")
_POSITIVE = (
    *("shots", "log_every", "validate_every", "validation_tasks", "meta_steps", "test_tasks"),
    *("meta_batch", "num_steps", "eval_num_steps", "inner_rate", "outer_rate"),
    *("ensemble", "num_samples"),
)


@dataclasses.dataclass(frozen=True)
class Config(common.ProcessConfig, common.RunConfig):
    """What a run is; fields that are None take the protocol's value."""

    algorithm: Algorithm = "imaml"
    """Meta-learning algorithm; imaml_hf has the Hessian-free inner solver, anil adapts the head."""
    protocol: ProtocolName = "common"
    """Published protocol, or the common one, chosen by measurement on validation classes."""
    ways: int = 5
    """Classes a task, at least 2."""
    shots: int = 1
    """Support examples a class, at least 1."""
    validate_every: int = 500
    """Meta-steps between two validations; a multiple of log_every."""
    test_tasks: int | None = None
    """Test tasks, at least 1."""
    map_tasks: Literal["map", "vmap"] | int | None = None
    """How tasks are mapped on a device: vmap, map or a chunk of at least 1; default by platform."""
    devices: int | None = None
    """Most devices that share a batch of tasks, as many as divide it; at least 1, default all."""
    meta_batch: int | None = None
    """Tasks a meta-step, at least 1."""
    curvature: Literal["hessian", "gauss_newton"] | None = None
    """Curvature matrix of iMAML's linear system."""
    solve: Literal["cg", "cg_steihaug", "minres", "woodbury"] | None = None
    """Solver of iMAML's linear system; woodbury needs gauss_newton."""
    cg_steps: int | None = None
    """CG steps of that solver, and of a Hessian-free direction; at least 1."""
    activation: Literal["gelu", "leaky_relu", "relu", "silu", "softplus"] | None = None
    """Of the network."""
    schedule: Literal["constant", "cosine", "linear"] | None = None
    """Of the outer rate."""
    learn_rates: bool | None = None
    """MAML++ learns its inner rates, one for each array and step."""
    per_step_norm: bool | None = None
    """MAML++ has a norm scale and offset for each inner step."""
    multi_step_epochs: int | None = None
    """Hundredths of the meta-steps with MAML++'s loss after every inner step, at least 0."""
    first_order_epochs: int | None = None
    """Hundredths of the meta-steps in which MAML++ takes first-order gradients, before the
    second-order ones; at least 0."""
    num_samples: int | None = None
    """Samples of PLATIPUS in training, or particles of BMAML; at least 1, of BMAML at least 2."""
    ensemble: int | None = None
    """Best validated checkpoints whose logits are averaged at test; at least 1."""
    learn_reg_strength: Literal["one", "leaf", "parameter"] | None = None
    """iMAML learns one lambda, one for each array of parameters, or one for each parameter."""
    inner: Literal["adam", "adaptive_gd", "nesterov", "newton_cg", "sgd"] | None = None
    """Inner optimiser; nesterov is SGD with momentum 0.8."""
    model: Path | None = None
    """Folder for the trained model, in float16, which experiments.classify uses."""


def run(
    config: Config, protocol: Protocol, splits: episodes.Splits, dataset: str
) -> dict[str, Any]:
    """Meta-trains on the training classes and tests the best checkpoint on the test classes.

    Args:
      config: the run.
      protocol: what `resolve(config)` gives, changed where the data ask for it.
      splits: train, validation (or None) and test classes.
      dataset: its name, for the report.

    Returns:
      What `results.json` in the workdir holds: settings, accuracies with 95% confidence intervals
      over test tasks, seconds, versions.

    Raises:
      ValueError: a setting out of its range, before anything is compiled.
    """
    learner = build.build_learner(protocol, config.ways)
    on_test = (protocol, config, splits.test, protocol.test_tasks, common.TEST_KEY)
    if config.model is not None:
        saved_model.check(config.model, splits)
    started = time.perf_counter()
    result = meta_train(config, protocol, splits, dataset)
    test = scores.predictions_on(learner, *on_test)(result.best_meta_params)
    results = _recorded(config, protocol, dataset) | common.provenance()
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
        to_save = (protocol, splits, dataset, result.best_meta_params, results)
        common.say(saved_model.report(saved_model.save(config.model, config, *to_save)))
    return results


def meta_train(
    config: Config, protocol: Protocol, splits: episodes.Splits, dataset: str
) -> TrainResult:
    """Meta-trains without a look at the test classes; arguments and errors as those of `run`."""
    common.cache_compilations()
    devices = common.task_devices(config.devices, protocol.meta_batch)
    _check_data(config, protocol, splits)

    def sample_train(key):
        return episodes.sample_tasks(
            key,
            splits.train,
            num_tasks=protocol.meta_batch,
            ways=config.ways,
            shots=protocol.train_shots,
            queries=protocol.train_queries,
            rotations=protocol.train_rotations,
            invert=protocol.invert,
        )

    learner, validate = build.build_learner(protocol, config.ways), None
    if splits.val is not None:
        validate = scores.accuracy_on(
            learner, protocol, config, splits.val, config.validation_tasks, common.VALIDATION_KEY
        )
    common.say(describe(config, protocol, dataset))
    return common.run_training(
        config,
        learner,
        build.make_outer(protocol, protocol.meta_steps),
        sample_train,
        num_steps=protocol.meta_steps,
        example_inputs=_example(splits),
        validate=validate,
        validate_every=config.validate_every,
        keep_best=protocol.ensemble,
        map_tasks=config.map_tasks,
        devices=devices,
        config=_recorded(config, protocol, dataset),
    )


def resolve(config: Config, dataset: str = "omniglot") -> Protocol:
    """The protocol for the data set, with the config's overrides in place.

    Raises:
      ValueError: a setting out of its range, or a protocol that does not cover the algorithm or
        the data set.
    """
    task = {"algorithm": config.algorithm, "ways": config.ways, "shots": config.shots}
    protocol = protocols.get(config.protocol, **task, dataset=dataset)
    overrides = {
        name: getattr(config, name)
        for name in Protocol._fields
        if getattr(config, name, None) is not None and name != "name"
    }
    protocol = protocol._replace(**overrides)
    if config.algorithm == "mamlpp" and config.eval_num_steps is None:
        protocol = protocol._replace(eval_num_steps=protocol.num_steps)
    _check_settings(config, protocol)
    return protocol


def describe(config: Config, protocol: Protocol, dataset: str) -> str:
    """The protocol in words, printed beside every number."""
    rate = "" if protocol.inner == "newton_cg" else f" rate {protocol.inner_rate:g}"
    own = ""
    if protocol.algorithm in protocols.IMPLICIT:
        at_test, learned = protocol.eval_reg_strength, protocol.learn_reg_strength
        own = (
            f"; lambda {protocol.reg_strength:g}"
            + ("" if learned is None else f" learned ({learned})")
            + ("" if at_test is None else f" (at test {at_test:g})")
            + ("" if protocol.cg_damping is None else f", damping {protocol.cg_damping:g}")
            + f", {protocol.curvature} curvature, solver {protocol.solve}"
            + ("" if protocol.solve == "woodbury" else f" with {protocol.cg_steps} steps")
        )
    elif protocol.algorithm == "mamlpp":
        own = (
            f"; rates {'learned' if protocol.learn_rates else 'fixed'}, norms "
            f"{'for each step' if protocol.per_step_norm else 'for all steps'}, losses after every "
            f"step in {protocol.multi_step_epochs}% of the meta-steps, first order in "
            f"{protocol.first_order_epochs}%"
        )
    elif protocol.num_samples > 1:
        own = f"; {protocol.num_samples} samples, all else of {protocol.algorithm} by default"
    return (
        f"{dataset} {config.ways}-way {config.shots}-shot, {config.algorithm}, protocol "
        f"{protocol.name} ({protocol.source}): split {protocol.split}, rotations "
        f"{protocol.train_rotations} in training and {protocol.test_rotations} at test, "
        f"{protocol.test_queries} queries a class at test, batch norm by {protocol.statistics}, "
        f"ink {1 if protocol.invert else 0}; {protocol.meta_batch} tasks a meta-step of "
        f"{protocol.train_shots} support and {protocol.train_queries} query examples a class, "
        f"outer {protocol.outer} {protocol.outer_rate:g} {protocol.schedule}; inner "
        f"{protocol.inner}{rate}, {protocol.num_steps} steps in training and "
        f"{protocol.eval_num_steps} at test{own}"
    )


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


def untrained(config: Config, protocol: Protocol, splits: episodes.Splits) -> Evaluation:
    """Test accuracy of the initialisation before any meta-training, on the test tasks of `run`."""
    common.cache_compilations()
    learner = build.build_learner(protocol, config.ways)
    meta_params = init_meta_params(learner, jax.random.key(config.seed), _example(splits))
    score = scores.accuracy_on(
        learner, protocol, config, splits.test, protocol.test_tasks, common.TEST_KEY
    )
    return score(meta_params)


def _example(splits: episodes.Splits) -> jax.Array:
    return jnp.zeros((1, *splits.train.images.shape[1:]))


def _check_settings(config: Config, protocol: Protocol) -> None:
    """What can be refused before any data are read."""
    values = dataclasses.asdict(config) | protocol._asdict()
    positive = list(_POSITIVE)
    if protocol.algorithm in protocols.IMPLICIT:
        positive += ["cg_steps", "reg_strength"]
    else:
        _refuse(config, protocol, _OF_IMPLICIT, "choose " + " or ".join(protocols.IMPLICIT))
    common.check_least(protocol, multi_step_epochs=0, first_order_epochs=0)
    if protocol.algorithm == "bmaml":
        common.check_least(protocol, num_samples=2)  # the kernel takes its width from distances
    if protocol.algorithm not in ("bmaml", "platipus"):
        _refuse(config, protocol, ("num_samples",), "choose bmaml or platipus")
    if protocol.algorithm != "mamlpp":
        _refuse(config, protocol, _OF_MAMLPP, "choose mamlpp")
    elif config.inner not in (None, "sgd"):
        raise ValueError(f"inner={config.inner}: mamlpp has gradient descent; leave it out")
    elif protocol.eval_num_steps != protocol.num_steps:
        raise ValueError(
            f"eval_num_steps={protocol.eval_num_steps} must be num_steps={protocol.num_steps}: "
            "mamlpp learns rates and norms for these steps alone"
        )
    common.check_seed(config.seed)
    if protocol.cg_damping is not None:
        for name in ("curvature", "inner", "learn_reg_strength", "solve"):
            if getattr(config, name) is not None:
                raise ValueError(
                    f"{name}={getattr(config, name)} has no effect on protocol={protocol.name}; "
                    "leave it out or choose another protocol"
                )
    newton, hessian_free = protocol.inner == "newton_cg", protocol.algorithm == "imaml_hf"
    if newton != hessian_free and protocol.algorithm != "implicit_anil":
        raise ValueError(
            f"inner={protocol.inner} does not go with algorithm={protocol.algorithm}: newton_cg "
            "is the inner solver of imaml_hf and implicit_anil, and of no other"
        )
    if protocol.inner == "newton_cg" and config.inner_rate is not None:
        raise ValueError(f"inner_rate={config.inner_rate} has no effect on newton_cg; leave it out")
    no_cg = protocol.solve == "woodbury" and protocol.inner != "newton_cg"
    if no_cg and config.cg_steps is not None:
        raise ValueError(f"cg_steps={config.cg_steps} has no effect on woodbury; leave it out")
    if config.max_seconds is not None:
        positive.append("max_seconds")
    if protocol.ensemble > 1 and protocol.split in _WITHOUT_VALIDATION:
        raise ValueError(
            f"ensemble={protocol.ensemble} is chosen on validation classes, which split="
            f"{protocol.split} has none of; choose another split or ensemble=1"
        )
    for name in positive:
        if not values[name] > 0:
            raise ValueError(f"{name}={values[name]} must be positive")
    if config.ways < 2:
        raise ValueError(f"ways={config.ways} must be at least 2")
    for name in ("meta_steps", "validate_every"):
        if values[name] % config.log_every:
            raise ValueError(
                f"{name}={values[name]} must be a multiple of log_every={config.log_every}; "
                "change either"
            )
    if (protocol.solve, protocol.curvature) == ("woodbury", "hessian"):
        raise ValueError(
            "solve=woodbury needs the low rank of curvature=gauss_newton, not curvature=hessian; "
            "change either, for example to solve=cg_steihaug"
        )


def _refuse(config: Config, protocol: Protocol, names: tuple[str, ...], remedy: str) -> None:
    """Raises ValueError for the first of the settings that is given."""
    for name in names:
        if getattr(config, name) is not None:
            raise ValueError(
                f"{name}={getattr(config, name)} has no effect on {protocol.algorithm}; leave it "
                f"out or {remedy}"
            )


def _check_data(config: Config, protocol: Protocol, splits: episodes.Splits) -> None:
    for dataset, shots, queries, rotations in (
        (splits.train, protocol.train_shots, protocol.train_queries, protocol.train_rotations),
        (splits.val, config.shots, protocol.test_queries, protocol.test_rotations),
        (splits.test, config.shots, protocol.test_queries, protocol.test_rotations),
    ):
        if dataset is not None:
            episodes.check_task_shape(
                dataset, ways=config.ways, shots=shots, queries=queries, rotations=rotations
            )


def _recorded(config: Config, protocol: Protocol, dataset: str) -> dict[str, Any]:
    return {"dataset": dataset, **common.recorded(config), "settings": protocol._asdict()}
