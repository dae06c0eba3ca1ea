"""Saves the best checkpoint of a run as a model, which experiments.classify uses.

    python -m experiments.export --workdir runs/imaml --output DIR

For runs of experiments.folder, glyphs, mini_imagenet and omniglot that were made without --model,
finished or stopped. The accuracy of the stored weights is measured on the run's own test tasks, so
that its data are needed.
"""

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

from experiments import folder, glyphs, mini_imagenet, omniglot
from experiments.shared import common, config_file, few_shot, saved_model
from imaml_jax import protocols
from imaml_jax.protocols.model_file import Description
from imaml_jax.training import checkpoint


@dataclasses.dataclass(frozen=True)
class Config:
    """From a run to a model."""

    workdir: Path
    """The run's folder."""
    output: Path
    """The model's folder."""
    data_dir: Path | None = None
    """The run's data; default the environment variable IMAML_DATA_DIR. A run of experiments.folder
    needs its folder of images here."""
    split_file: Path | None = None
    """The split file of a run of experiments.folder, if it had one."""


def main(config: Config) -> Description:
    """Saves the model.

    Raises:
      ValueError: no such run, no data, or a place that is taken.
    """
    common.cache_compilations()
    module, settings = read_run(config)
    settings, splits, dataset = module.prepare(settings)
    saved_model.check(config.output, splits)
    result = few_shot.meta_train(settings, splits, dataset)
    before = saved_model.measure(settings, settings.settings, splits, result.best_meta_params)
    results = _of_run(config.workdir) | {
        "seed": settings.seed,
        "best_step": result.best_step,
        "trained_meta_steps": int(result.state.step),
        "seconds": round(result.history[-1]["seconds"], 1),
        "test_accuracy": before.mean,
    }
    saved = saved_model.save(
        config.output, settings, splits, dataset, result.best_meta_params, results
    )
    common.say(saved_model.report(saved))
    return saved[1]


def read_run(config: Config) -> tuple[Any, Any]:
    """The experiment of a run, and its settings with no time left to train.

    Raises:
      ValueError: the folder holds no run of an experiment that can be saved.
    """
    path = config.workdir / "config.json"
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
        names, dataset = set(recorded) - {"root_key", "keep_best"}, recorded["dataset"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"workdir={config.workdir} holds no run of experiments.folder, glyphs, mini_imagenet "
            f"or omniglot ({type(error).__name__}: {error})"
        ) from error
    by_dataset = {"Omniglot": omniglot, "glyphs": glyphs}
    module = folder if "split_seed" in names else by_dataset.get(dataset, mini_imagenet)
    has_selectors = all(name in names for name in module.Config.SELECTORS)
    if not has_selectors or not checkpoint.steps(config.workdir / "checkpoints"):
        raise ValueError(
            f"workdir={config.workdir} holds no checkpoint of experiments.folder, glyphs, "
            "mini_imagenet or omniglot: name the --workdir of one of them"
        )
    if module is folder and config.data_dir is None:
        raise ValueError(f"data_dir: name the folder of images of the run in {config.workdir}")
    default = module.Config.of(**{name: recorded[name] for name in module.Config.SELECTORS})
    hints = typing.get_type_hints(module.Config, include_extras=True)
    given = {"data_dir": config.data_dir, "split_file": config.split_file}
    values = {**recorded, **{name: value for name, value in given.items() if value}}
    fields = {field.name for field in dataclasses.fields(default)} - {"settings"}
    own = {name: config_file.typed(values[name], hints[name]) for name in values if name in fields}
    own |= {"workdir": config.workdir, "max_seconds": 1e-9}
    settings = protocols.from_settings(recorded["settings"])
    if isinstance(default.settings.tasks, folder.FolderTasks):
        settings = few_shot.with_tasks(settings, folder.FolderTasks)
    return module, dataclasses.replace(default, **own, settings=settings)


def _of_run(workdir: Path) -> dict[str, Any]:
    """Where and by which command the run was made, as far as is known."""
    try:
        found = json.loads((workdir / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
