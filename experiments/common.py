"""What every experiment shares: its command line, its devices, and the record of what it ran on."""

import dataclasses
import datetime
import json
import math
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import imaml_jax
from imaml_jax import processes
from imaml_jax.data import cache
from imaml_jax.mapping import MapTasks, Sample, map_over_tasks
from imaml_jax.non_finite import NonFinite, NonFiniteError, replay
from imaml_jax.training import TrainResult, train
from imaml_jax.types import MetaLearner, Task
from imaml_jax.workdir import InterruptedRunError, write_whole

# Keys of the validation and test tasks, of a form that no `--seed` gives to training.
VALIDATION_KEY, TEST_KEY = (20190909, 1), (20190909, 2)
# What may change between the parts of a run that was stopped and resumed.
_CHANGEABLE = {
    *("workdir", "max_seconds", "devices", "data_dir", "download", "accept_changes", "debug_nans"),
    *("model", "non_finite", "split_file"),
    *("coordinator", "num_processes", "process_id", "cluster", "process_timeout"),
}
LOST_STATUS = 76
INTERRUPTED_STATUS = 75  # EX_TEMPFAIL: a scheduler that knows it starts the run again


@dataclasses.dataclass(frozen=True)
class ProcessConfig:
    """The settings of a run that several processes share."""

    coordinator: str | None = None
    """HOST:PORT of process 0 of several; each of them has the same command but for process_id."""
    num_processes: int | None = None
    """Processes that train together, with coordinator."""
    process_id: int | None = None
    """Which of them this is, from 0."""
    cluster: bool = False
    """Take these three from the cluster's environment: SLURM, Open MPI, Kubernetes, TPU pods."""
    process_timeout: int = 100
    """Seconds of silence after which another process counts as lost."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The settings that every training run has."""

    meta_steps: int | None = None
    """Meta-steps in all, a multiple of log_every; the schedule of the outer rate ends there."""
    max_seconds: float | None = None
    """Stop after the first log point past this many seconds of wall clock."""
    seed: int = 0
    """Seed of the initialisation and of the training tasks; validation and test tasks stay."""
    workdir: Path | None = None
    """Where checkpoints, metrics, learning curve and results go; an earlier run there goes on."""
    log_every: int = 100
    """Meta-steps between two log points, one compiled call."""
    validation_tasks: int = 300
    """Validation tasks, the same each time."""
    inner_rate: float | None = None
    """Learning rate of the inner loop; newton_cg has none."""
    num_steps: int | None = None
    """Inner steps in training."""
    eval_num_steps: int | None = None
    """Inner steps at validation and test."""
    outer_rate: float | None = None
    """Learning rate of the outer optimiser at the start."""
    reg_strength: float | None = None
    """Lambda, the strength of iMAML's proximal term."""
    non_finite: NonFinite = "stop"
    """Stop at a loss or gradient that is not finite, or skip the tasks that have one."""
    debug_nans: bool = False
    """Repeat the task that made the run in workdir fail, and name the operation that gave NaN."""
    accept_changes: bool = False
    """Go on with a run in workdir that was started with other settings."""


def run_cli(
    main: Callable[[Any], Any],
    config: type,
    description: str | None,
    args: Sequence[str] | None = None,
) -> Any:
    """Reads a config from the command line and runs `main` on it.

    What the user can mend (a setting that is refused, a file that is missing or cannot be written)
    ends the process with status 2, what stopped the training with status 1, a signal with status
    75, and the loss of another process with status 76, all with one message and no traceback. Any
    other error is a bug and keeps its traceback.

    Args:
      main: `config -> result`.
      config: dataclass of the settings; the docstrings of its fields are the help.
      description: what `--help` prints above them.
      args: the command line; None (default) for the one of the process.

    Returns:
      What `main` returned.
    """
    import tyro

    settings = tyro.cli(config, description=description, args=args)
    try:
        if isinstance(settings, ProcessConfig):
            _join_processes(settings)
        return main(settings)
    except InterruptedRunError as error:
        _exit(INTERRUPTED_STATUS, error)
    except NonFiniteError as error:
        kept = isinstance(settings, RunConfig) and settings.workdir is not None
        if kept and error.task is not None:
            error.add_note("The same command with --debug-nans names the operation.")
        _exit(1, error)
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        _exit(LOST_STATUS, f"another process was lost, or failed ({str(error)[:200]})")
    except (ValueError, OSError) as error:
        if isinstance(error, ValueError) and not _is_ours(error):
            raise
        _exit(2, error)


def run_training(
    run: RunConfig,
    learner: MetaLearner,
    tx: optax.GradientTransformation,
    sample: Sample,
    **settings: Any,
) -> TrainResult:
    """`training.train` by a run's settings, or the replay of its failure.

    Raises:
      ValueError: `debug_nans` without a failed run in the workdir, or one whose replay gave no NaN.
      FloatingPointError: where the replay gave NaN.
    """
    key = jax.random.key(run.seed)
    if run.debug_nans:
        if run.workdir is None:
            raise ValueError("debug_nans=True needs workdir, the one of the failed run")
        example_inputs = settings.get("example_inputs")
        replay(learner, sample, key=key, workdir=run.workdir, example_inputs=example_inputs)
        raise ValueError("debug_nans=True: no operation gave NaN; infinity made the run fail")
    return train(
        learner,
        tx,
        sample,
        key=key,
        log_every=run.log_every,
        workdir=run.workdir,
        max_seconds=run.max_seconds,
        accept_changes=run.accept_changes,
        non_finite=run.non_finite,
        **settings,
    )


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


def say(text: str) -> None:
    """Prints it, once for all processes."""
    if processes.is_first():
        print(text, flush=True)


def fixed_key(seed: tuple[int, int]) -> jax.Array:
    """One of the keys above."""
    return jax.random.fold_in(jax.random.key(seed[0]), seed[1])


def check_seed(seed: int) -> None:
    """Raises ValueError for a seed that is no key."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed} must lie between 0 and {2**32 - 1}")


def check_least(config: Any, **least: int) -> None:
    """Raises ValueError for the first setting that is below its least value."""
    for name, value in least.items():
        if not getattr(config, name) >= value:
            raise ValueError(f"{name}={getattr(config, name)} must be at least {value}")


def check_positive(config: Any, *names: str) -> None:
    """Raises ValueError for the first setting that is not positive and finite."""
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name}={getattr(config, name)} must be positive")


def best_validation(history: Sequence[dict[str, Any]]) -> float | None:
    """The highest validation score of a run; None where there was none."""
    scores = [row["validation"] for row in history if row.get("validation") is not None]
    return max(scores, default=None)


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


def recorded(config: Any) -> dict[str, Any]:
    """The settings that a resumed run must share with the one it continues."""
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in _CHANGEABLE}


def provenance() -> dict[str, Any]:
    """Where, when and by which command a result was made."""
    return {
        "device": str(jax.devices()[0].device_kind),
        "cores": os.cpu_count(),
        "machine": _machine(),
        "versions": {"imaml_jax": imaml_jax.__version__, "jax": jax.__version__},
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python -m", *_module_and_arguments()]),
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
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise ValueError(f"output={output} cannot be written ({error}); choose another") from error


def write_report(
    output: Path,
    results: Any,
    table: Callable[[Any], str],
    draw: Callable[[Any, Path], None],
) -> None:
    """Writes `output`.json and `output`.png and prints the table."""
    write_json(with_ending(output, "json"), results)
    draw(results, with_ending(output, "png"))
    print(table(results), flush=True)


def write_results(workdir: str | os.PathLike | None, results: dict[str, Any]) -> None:
    """Writes `results.json` into the workdir, if there is one."""
    if workdir is not None and processes.is_first():
        write_json(Path(workdir) / "results.json", results)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole: a reader never sees half of it."""
    write_whole(path, json.dumps(value, indent=1, default=str) + "\n")


def _machine() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _is_ours(error: BaseException) -> bool:
    """Whether our own code raised it, and not a library that it calls."""
    file = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    homes = (Path(imaml_jax.__file__).parent, Path(__file__).parent)
    return any(file.is_relative_to(home.resolve()) for home in homes)


def _join_processes(config: ProcessConfig) -> None:
    named = (config.coordinator, config.num_processes, config.process_id)
    if config.cluster and named != (None, None, None):
        raise ValueError(
            "cluster=True takes coordinator, num_processes and process_id from the "
            "environment: leave them out"
        )
    if config.cluster or named != (None, None, None):
        processes.start(*named, timeout_seconds=config.process_timeout)


def _exit(status: int, error: BaseException | str) -> NoReturn:
    notes = getattr(error, "__notes__", [])
    print("\n".join([f"error: {error}", *notes]), file=sys.stderr, flush=True)
    if jax.process_count() > 1:
        os._exit(status)  # an orderly exit would wait for the others
    sys.exit(status)


def _module_and_arguments() -> list[str]:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return [spec.name if spec else Path(sys.argv[0]).name, *sys.argv[1:]]
