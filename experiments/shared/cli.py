"""The command line of every experiment: its settings, and how it ends."""

import argparse
import contextlib
import dataclasses
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import jax

import imaml_jax
from experiments.shared import config_file
from imaml_jax.training import processes
from imaml_jax.training.non_finite import NonFinite, NonFiniteError
from imaml_jax.training.workdir import InterruptedRunError
from imaml_jax.training.writers import WriterName

LOST_STATUS = 76
INTERRUPTED_STATUS = 75  # EX_TEMPFAIL: a scheduler that knows it starts the run again
_STOPPED_STATUS = 130  # as a shell has it for SIGINT
# Algorithms with a command of their own, which say so wherever one is chosen by name.
_ELSEWHERE = {
    "leo": "learns from features: python -m experiments.features makes them, "
    "python -m experiments.leo trains on them"
}
_OF_NONE = "A setting whose default is None has the value of the protocol, algorithm or machine."


@dataclasses.dataclass(frozen=True)
class ProcessConfig:
    """The settings of a run that several processes share."""

    coordinator: str | None = None
    """HOST:PORT of process 0 of several; each of them has the same command but for process_id."""
    num_processes: int | None = None
    """Processes that train together, with coordinator; at least 1."""
    process_id: int | None = None
    """Which of them this is, from 0; at least 0 and below num_processes."""
    cluster: bool = False
    """Take these three from the cluster's environment: SLURM, Open MPI, Kubernetes, TPU pods."""
    process_timeout: int = 100
    """Seconds of silence after which another process counts as lost, at least 1."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The settings that every training run has."""

    meta_steps: int | None = None
    """Meta-steps in all, a multiple of log_every; the schedule of the outer rate ends there."""
    max_seconds: float | None = None
    """Stop after the first log point past this many seconds of wall clock, above 0."""
    seed: int = 0
    """Seed of the initialisation and of the training tasks; validation and test tasks stay; at
    least 0."""
    workdir: Path | None = None
    """Where checkpoints, metrics, learning curve and results go; an earlier run there goes on."""
    log_every: int = 100
    """Meta-steps between two log points, one compiled call; at least 1."""
    validation_tasks: int = 300
    """Validation tasks, the same each time; at least 1."""
    inner_rate: float | None = None
    """Learning rate of the inner loop; newton_cg has none; above 0."""
    num_steps: int | None = None
    """Inner steps in training, at least 1."""
    eval_num_steps: int | None = None
    """Inner steps at validation and test, at least 1."""
    outer_rate: float | None = None
    """Learning rate of the outer optimiser at the start, above 0."""
    reg_strength: float | None = None
    """Lambda, the strength of iMAML's proximal term; above 0."""
    log_to: tuple[WriterName, ...] = ()
    """Where each log point goes beside metrics.jsonl: tensorboard, wandb or both, into workdir."""
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

    `--config FILE.yaml` gives settings too, which the command line overrides.

    What the user can mend (a setting that is refused, a file that is missing or cannot be written)
    ends the process with status 2, what stopped the training with status 1, SIGINT or SIGTERM with
    status 75 where the run is kept, SIGINT elsewhere with status 130, and the loss of another
    process with status 76, all with one message and no traceback. SIGTERM elsewhere ends it at
    once, which a shell shows as status 143. Any other error is a bug, and keeps its traceback and
    Python's status 1.

    Args:
      main: `config -> result`.
      config: dataclass of the settings; the docstrings of its fields are the help.
      description: what `--help` prints above them.
      args: the command line; None (default) for the one of the process.

    Returns:
      What `main` returned.
    """
    settings = None
    try:
        settings = _settings(config, description, sys.argv[1:] if args is None else args)
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
    except KeyboardInterrupt:
        _exit(_STOPPED_STATUS, "stopped by SIGINT", at_once=True)
    except (ValueError, OSError) as error:
        if isinstance(error, ValueError) and not _is_ours(error):
            raise
        _exit(2, error)


def program() -> str:
    """What `python -m` was given, or the name of the script."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).name


def _settings(config: type, description: str | None, args: Sequence[str]) -> Any:
    """What the command line says, over what the file of `--config` says, over the defaults."""
    import tyro

    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", nargs="?", type=Path)
    finder.add_argument("--algorithm", nargs="?")
    known = finder.parse_known_args(args)[0]
    path = known.config
    fields = dataclasses.fields(config)
    if known.algorithm in _ELSEWHERE and "algorithm" in [field.name for field in fields]:
        raise ValueError(f"algorithm={known.algorithm} {_ELSEWHERE[known.algorithm]}")
    help_text = "YAML file of settings, by the names of these; the command line overrides them."
    config_option = tyro.conf.arg(metavar="FILE.yaml", help=help_text)
    whole = dataclasses.make_dataclass(
        config.__name__,
        [("config", Annotated[Path | None, config_option], dataclasses.field(default=None))],
        bases=(config,),
        namespace={"__post_init__": lambda self: None},  # its settings are checked below
        frozen=True,
        kw_only=True,
    )
    default = None
    if path is not None:
        required = [field.name for field in fields if field.default is dataclasses.MISSING]
        values = config_file.read(path, config)
        default = whole(**{**dict.fromkeys(required, tyro.MISSING), **values, "config": path})
    if issubclass(config, RunConfig):
        description = f"{description or ''}\n\n{_OF_NONE}"
    # A completion script is registered for one word, and python -m experiments.NAME is three.
    completes = any("-print-completion" in arg or "-write-completion" in arg for arg in args)
    found = tyro.cli(
        whole,
        prog=program() if completes else f"python -m {program()}",
        description=description,
        args=args,
        default=default,
        config=(tyro.conf.DisallowNone,),  # so that bool | None is a pair of flags, as bool is
    )
    return config(**{f.name: getattr(found, f.name) for f in fields})


def _is_ours(error: BaseException) -> bool:
    """Whether our own code raised it, and not a library that it calls."""
    file = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    homes = (Path(imaml_jax.__file__).parent, Path(__file__).parents[1])
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


def _exit(status: int, error: BaseException | str, at_once: bool = False) -> NoReturn:
    notes = getattr(error, "__notes__", [])
    at_once = at_once or jax.process_count() > 1
    with contextlib.suppress(OSError):  # of a pipe whose reader the same Ctrl-C has ended
        print("\n".join([f"error: {error}", *notes]), file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    if at_once:
        os._exit(status)  # an orderly exit would wait for what is computing, and for the others
    sys.exit(status)
