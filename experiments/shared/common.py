"""What every experiment shares: its devices, its training, and the record of what it ran on."""

import dataclasses
import datetime
import functools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import imaml_jax
from experiments.shared import config_file
from experiments.shared.cli import ProcessConfig as ProcessConfig
from experiments.shared.cli import ProtocolConfig, RunConfig, program
from experiments.shared.cli import run_cli as run_cli
from imaml_jax import protocols
from imaml_jax.data import cache
from imaml_jax.training import TrainResult, processes, train, writers
from imaml_jax.training.mapping import MapTasks, Sample, map_over_tasks
from imaml_jax.training.non_finite import replay
from imaml_jax.training.workdir import write_whole
from imaml_jax.types import MetaLearner, Task

# Keys of the validation and test tasks, of a form that no `--seed` gives to training.
VALIDATION_KEY, TEST_KEY = (20190909, 1), (20190909, 2)
# What may change between the parts of a run that was stopped and resumed.
_CHANGEABLE = {
    *("workdir", "max_seconds", "devices", "data_dir", "download", "accept_changes", "debug_nans"),
    *("log_to", "model", "non_finite", "split_file"),
    *("coordinator", "num_processes", "process_id", "cluster", "process_timeout"),
}
# What the training itself records beside a config.
_OF_TRAINING = ("dataset", "root_key", "keep_best", "variant", "features", "width")
# What belongs to one start of a run on one machine.
_OF_A_START = {"workdir", "model", "accept_changes", "debug_nans"}
_OF_A_START |= {field.name for field in dataclasses.fields(ProcessConfig)}


def run_training(
    run: RunConfig,
    learner: MetaLearner,
    tx: optax.GradientTransformation,
    sample: Sample,
    **settings: Any,
) -> TrainResult:
    """`training.train` by a run's settings, or the replay of its failure.

    A workdir gets `config.yaml` too, which `--config` reads.

    Raises:
      ValueError: `debug_nans` without a failed run in the workdir, or one whose replay gave no NaN;
        or `log_to` without a workdir.
      FloatingPointError: where the replay gave NaN.
    """
    _commit()  # of the code that runs, whatever is committed meanwhile
    key = jax.random.key(run.seed)
    if run.debug_nans:
        if run.workdir is None:
            raise ValueError("debug_nans=True needs workdir, the one of the failed run")
        example_inputs = settings.get("example_inputs")
        replay(learner, sample, key=key, workdir=run.workdir, example_inputs=example_inputs)
        raise ValueError("debug_nans=True: no operation gave NaN; infinity made the run fail")
    if run.log_to and run.workdir is None:
        raise ValueError(f"log_to={run.log_to} needs workdir, which holds what is written")
    if run.workdir is not None and processes.is_first():
        _write_settings(run.workdir, run)
    with writers.open_writers(
        run.log_to, run.workdir or Path(), settings.get("config") or {}
    ) as log:
        return train(
            learner,
            tx,
            sample,
            key=key,
            log_every=run.log_every,
            workdir=run.workdir,
            max_seconds=run.max_seconds,
            accept_changes=run.accept_changes,
            migrate=functools.partial(migrated, run) if isinstance(run, ProtocolConfig) else None,
            non_finite=run.non_finite,
            log=log,
            **settings,
        )


def _write_settings(workdir: Path, run: RunConfig) -> None:
    """Keeps those that the run began with, or goes on with by `accept_changes`."""
    if run.accept_changes or not (workdir / "config.json").exists():
        workdir.mkdir(parents=True, exist_ok=True)
        head = f"# python -m {program()} --config config.yaml --workdir FOLDER\n"
        write_whole(workdir / "config.yaml", head + config_file.text(run, _OF_A_START))


def meta_gradient(learner: MetaLearner, meta_params: Any, task: Task) -> Any:
    """That of one task, for learners in which neither the key nor the meta-step plays a part."""
    return learner.meta_grad(meta_params, task, jax.random.key(0), jnp.zeros((), jnp.int32))[0]


def mean_over_tasks(
    fn: Callable[..., Any], map_tasks: MapTasks = None, devices: Sequence[Any] | None = None
) -> Callable[..., Any]:
    """`map_over_tasks` with every output averaged over the tasks."""
    mapped = map_over_tasks(fn, map_tasks, devices)
    return lambda shared, *per_task: jax.tree.map(lambda x: x.mean(0), mapped(shared, *per_task))


def relative_difference(found: Any, exact: Any) -> float:
    """Of two trees, in float64 and the Euclidean norm."""
    found, exact = (np.asarray(ravel_pytree(tree)[0], np.float64) for tree in (found, exact))
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def in_float64(tree: Any) -> Any:
    """The tree with its real numbers in float64, which must be enabled."""

    def cast(x):
        return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(cast, jax.tree.map(jnp.asarray, tree))


def say(text: str) -> None:
    """Prints it, once for all processes."""
    if processes.is_first():
        print(text, flush=True)


def fixed_key(seed: tuple[int, int]) -> jax.Array:
    """One of the keys above."""
    return jax.random.fold_in(jax.random.key(seed[0]), seed[1])


def best_validation(result: TrainResult) -> float | None:
    """The validation score of the best checkpoint; None where there was no validation."""
    return result.best[0].score if result.best else None


def task_devices(limit: int | None, num_tasks: int) -> Sequence[Any] | None:
    """The devices that share a batch of tasks.

    Args:
      limit: at most so many of each process; None for all there are.
      num_tasks: tasks a batch.

    Returns:
      As many devices as divide `num_tasks`, the same number of each process, or None where that is
      one in all.

    Raises:
      ValueError: more devices than there are, fewer than one, or a number of processes that does
        not divide `num_tasks`.
    """
    own, count = len(jax.local_devices()), jax.process_count()
    if limit is not None and not 1 <= limit <= own:
        raise ValueError(
            f"devices={limit}; allowed: 1 to {own}, the number of {jax.default_backend()} devices "
            "of this process. Leave it out to use them all."
        )
    if num_tasks % count:
        raise ValueError(
            f"num_processes={count} must divide the tasks of a batch, {num_tasks}: change either"
        )
    fitting = (n for n in range(1, (limit or own) + 1) if num_tasks % (n * count) == 0)
    number = max(fitting)
    if number * count == 1:
        return None
    by_process = [
        [device for device in jax.devices() if device.process_index == i] for i in range(count)
    ]
    return [device for devices in by_process for device in devices[:number]]


def cache_compilations() -> None:
    """Keeps compiled programs in the cache directory, so that a second run starts sooner."""
    jax.config.update("jax_compilation_cache_dir", str(cache.cache_root() / "xla"))


def recorded(config: ProtocolConfig, dataset: str) -> dict[str, Any]:
    """The settings that a resumed run must share with the one it continues."""
    return {"dataset": dataset, **lasting(config), "settings": config.settings.recorded()}


def lasting(config: Any) -> dict[str, Any]:
    """The fields of a config that do not change between the parts of a run."""
    names = [field.name for field in dataclasses.fields(config) if field.name not in _CHANGEABLE]
    return {name: getattr(config, name) for name in names}


def migrated(run: ProtocolConfig, saved: dict[str, Any]) -> dict[str, Any]:
    """The record of a run, as `recorded` makes it today.

    Earlier versions recorded the settings of all algorithms, and beside them each one that was
    given, or None. What they had no name for has the published value.
    """
    settings = saved.get("settings")
    if "meta_steps" not in saved or not isinstance(settings, dict):
        return saved
    published = run.published(**{name: getattr(run, name) for name in run.SELECTORS}).recorded()
    given = {name: value for name, value in saved.items() if value is not None} | settings
    if "split" in settings:
        given |= protocols.from_settings(settings).recorded()
    names = run.settings.recorded()
    own = {name: value for name, value in saved.items() if name in {*lasting(run), *_OF_TRAINING}}
    return own | {"settings": {name: given.get(name, published.get(name)) for name in names}}


def provenance() -> dict[str, Any]:
    """Where, when and by which command a result was made."""
    return {
        "device": str(jax.devices()[0].device_kind),
        "cores": os.cpu_count(),
        "machine": _machine(),
        "peak_memory_mib": _peak_memory_mib(),
        "commit": _commit(),
        "versions": {"imaml_jax": imaml_jax.__version__, "jax": jax.__version__},
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python -m", program(), *sys.argv[1:]]),
    }


def outcome(result: TrainResult, started: float) -> dict[str, Any]:
    """What the results of every run say of its training, begun at `started` of `perf_counter`."""
    return {
        "trained_meta_steps": int(result.state.step),
        "best_step": result.best_step,
        "seconds": round(result.history[-1]["seconds"] if result.history else 0.0, 1),
        "seconds_of_this_call": round(time.perf_counter() - started, 1),
    }


def with_ending(output: Path, ending: str) -> Path:
    """The file of a report; its name may have dots of its own."""
    return output.with_name(f"{output.name}.{ending}")


def check_output(output: Path) -> None:
    """Makes the folder of a report, before anything is computed.

    Raises:
      ValueError: a name that no file can have, or a folder that cannot be written.
    """
    if not output.name:
        raise ValueError(f"output={output} must name a file, without an ending")
    check_folder(output.parent, f"output={output}")


def check_folder(folder: Path, setting: str) -> None:
    """Makes a folder, before anything is computed.

    Args:
      folder: the folder.
      setting: that which names it, with its value, for the error.

    Raises:
      ValueError: it cannot be made, or no file can be written into it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{setting} cannot be written ({error}); choose another") from error


def write_report(
    output: Path,
    results: Any,
    table: Callable[[Any], str],
    draw: Callable[[Any, Path], None] | None = None,
) -> None:
    """Writes `output`.json, with something to draw `output`.png too, and prints the table."""
    write_json(with_ending(output, "json"), results)
    if draw is not None:
        draw(results, with_ending(output, "png"))
    print(table(results), flush=True)


def write_results(workdir: str | os.PathLike | None, results: dict[str, Any]) -> None:
    """Writes `results.json` into the workdir, if there is one; made where it is missing."""
    if workdir is not None and processes.is_first():
        Path(workdir).mkdir(parents=True, exist_ok=True)
        write_json(Path(workdir) / "results.json", results)


def json_for_html(value: Any) -> str:
    """JSON that stands whole in a script element, whatever text is in it: no tag, no comment."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"), default=str)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole: a reader never sees half of it."""
    write_whole(path, json.dumps(value, indent=1, default=str) + "\n")


def _peak_memory_mib() -> float | None:
    """The most that the device held, or on the CPU this process; None where no one counts it."""
    held = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    if held is None:
        try:
            import resource
        except ImportError:  # Windows
            return None
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        held = peak if sys.platform == "darwin" else 1024 * peak
    return round(held / 2**20, 1)


@functools.cache
def _commit() -> str | None:
    """That of the git checkout these experiments are run from, with `+` if files were changed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        said = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.strip()


def _machine() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
