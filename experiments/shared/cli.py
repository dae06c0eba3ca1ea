"""The command line of every experiment: its settings, and how it ends."""

import argparse
import contextlib
import dataclasses
import os
import sys
import traceback
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, NoReturn, Self

import jax

import imaml_jax
from experiments.shared import config_file
from imaml_jax.learners.registry import ALGORITHMS
from imaml_jax.learners.settings import (
    Count,
    Positive,
    Range,
    Record,
    Seed,
    Setting,
    check_value,
    field_docs,
    nearest,
    plain,
    range_of,
    settings_of,
    values_of,
)
from imaml_jax.protocols import Protocol
from imaml_jax.training import processes
from imaml_jax.training.non_finite import NonFinite, NonFiniteError
from imaml_jax.training.workdir import InterruptedRunError
from imaml_jax.training.writers import WriterName

LOST_STATUS = 76
INTERRUPTED_STATUS = 75  # EX_TEMPFAIL: a scheduler that knows it starts the run again
_STOPPED_STATUS = 130  # as a shell has it for SIGINT


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessConfig(Record):
    """The settings of a run that several processes share."""

    coordinator: str | None = None
    """HOST:PORT of process 0 of several; each of them has the same command but for process_id."""
    num_processes: Count | None = None
    """Processes that train together, with coordinator."""
    process_id: Annotated[int, Range(least=0)] | None = None
    """Which of them this is, from 0 and below num_processes."""
    cluster: bool = False
    """Take these three from the cluster's environment: SLURM, Open MPI, Kubernetes, TPU pods."""
    process_timeout: Count = 100
    """Seconds of silence after which another process counts as lost."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(Record):
    """The settings that every training run has."""

    max_seconds: Positive | None = None
    """Stop after the first log point past this many seconds of wall clock."""
    seed: Seed = 0
    """Seed of the initialisation and of the training tasks; validation and test tasks stay."""
    workdir: Path | None = None
    """Where checkpoints, metrics, learning curve and results go; an earlier run there goes on."""
    log_every: Count = 100
    """Meta-steps between two log points, one compiled call."""
    validation_tasks: Count = 300
    """Validation tasks, the same each time."""
    log_to: tuple[WriterName, ...] = ()
    """Where each log point goes beside metrics.jsonl: tensorboard, wandb or both, into workdir."""
    non_finite: NonFinite = "stop"
    """Stop at a loss or gradient that is not finite, or skip the tasks that have one."""
    debug_nans: bool = False
    """Repeat the task that made the run in workdir fail, and name the operation that gave NaN."""
    accept_changes: bool = False
    """Go on with a run in workdir that was started with other settings."""

    def check_multiples(self, **counts: int) -> None:
        """Raises ValueError for the first count that is no multiple of `log_every`."""
        for name, value in counts.items():
            if value % self.log_every:
                raise ValueError(
                    f"{name}={value} must be a multiple of log_every={self.log_every}; "
                    "change either"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProtocolConfig(RunConfig):
    """A run by a protocol, whose values are the defaults of further settings.

    Attributes:
      SELECTORS: the fields that choose the protocol; command lines read them first.
    """

    SELECTORS: ClassVar[tuple[str, ...]] = ()

    settings: Protocol

    @classmethod
    def published(cls, **selectors: Any) -> Protocol:
        """The protocol that the selectors choose."""
        raise NotImplementedError

    @classmethod
    def choices(cls) -> Mapping[str, tuple[str, ...]]:
        """The values of selectors that are names."""
        return {"algorithm": (*ALGORITHMS,)}

    @classmethod
    def of(cls, **values: Any) -> Self:
        """A config by the flat names of its settings and of its protocol's.

        Raises:
          ValueError: an unknown name, a value out of its range, or one that has no effect.
        """
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        selectors = {name: values.pop(name, defaults[name]) for name in cls.SELECTORS}
        hints = typing.get_type_hints(cls, include_extras=True)
        for name, value in selectors.items():
            check_value(name, value, hints[name])
        default = cls(**selectors, settings=cls.published(**selectors))
        return default.with_settings(values)

    def __post_init__(self) -> None:
        super().__post_init__()
        own = getattr(self, "algorithm", self.settings.learner.algorithm)
        if own != self.settings.learner.algorithm:
            raise ValueError(
                f"algorithm={own} is not that of the settings, "
                f"{self.settings.learner.algorithm}: make another config by `of`"
            )

    def with_settings(self, values: Mapping[str, Any]) -> Self:
        """A copy with other values, but of what chooses the protocol; see `Record`."""
        for name in self.SELECTORS:
            if name in values:
                raise ValueError(
                    f"{name}={values[name]} chooses the protocol: make another config by `of`"
                )
        return super().with_settings(values)


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

    selectors = getattr(config, "SELECTORS", ())
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", nargs="?", type=Path)
    for name in selectors:
        flag = name.replace("_", "-")
        finder.add_argument(f"--{flag}", f"--{name}", dest=name, nargs="?", type=_number_or_text)
    chosen = {k: v for k, v in vars(finder.parse_known_args(args)[0]).items() if v is not None}
    path = chosen.pop("config", None)
    in_file = {} if path is None else config_file.load(path)
    in_file_chosen = {name: in_file[name] for name in selectors if in_file.get(name) is not None}
    chosen = in_file_chosen | chosen
    default = config.of(**chosen) if selectors else None
    known, constants = _known(config, default), values_of(default) if default else {}
    converted = {}
    if path is not None:
        converted = config_file.convert(path, in_file, known, constants)
        known = {
            name: setting._replace(value=converted.get(name, setting.value))
            for name, setting in known.items()
        }
    help_text = "YAML file of settings, by the names of these; the command line overrides them."
    option = Annotated[Path | None, tyro.conf.arg(metavar="FILE.yaml", help=help_text)]
    choices = config.choices() if hasattr(config, "choices") else {}
    flat = dataclasses.make_dataclass(
        config.__name__,
        [
            ("config", option, dataclasses.field(default=path)),
            *(_field(name, setting, choices.get(name)) for name, setting in known.items()),
        ],
        kw_only=True,
    )
    # A completion script is registered for one word, and python -m experiments.NAME is three.
    completes = any("-print-completion" in arg or "-write-completion" in arg for arg in args)
    found, unknown = tyro.cli(
        flat,
        return_unknown_args=True,
        prog=program() if completes else f"python -m {program()}",
        description=description,
        args=args,
    )
    while len(unknown) > 1 and str(constants.get(_name_of(unknown[0]))) == unknown[1]:
        unknown = unknown[2:]  # the only value that there is
    if unknown:
        raise ValueError(_unknown(unknown[0], known, default))
    values = {name: getattr(found, name) for name in known}
    if default is None:
        return config(**values)
    typed = {_name_of(argument) for argument in args if argument.startswith("--")}
    given = {name for name in known if name in converted or typed & {name, f"no_{name}"}}
    return config.of(**{name: values[name] for name in given | set(selectors)})


def _name_of(argument: str) -> str:
    return argument.partition("=")[0].removeprefix("--").replace("-", "_")


def _unknown(argument: str, known: Mapping[str, Setting], default: ProtocolConfig | None) -> str:
    """What to say of an argument that is no setting."""
    name = _name_of(argument).removeprefix("no_")
    owners = [kind for kind in ALGORITHMS if name in settings_of(ALGORITHMS[kind](), True)]
    if default is not None and owners:
        algorithm, protocol = default.settings.learner.algorithm, default.settings.name
        if algorithm in owners:
            return f"{argument} is no setting of protocol={protocol}"
        return f"{argument} is no setting of algorithm={algorithm}, but of {', '.join(owners)}"
    near = nearest(f"--{name}", [f"--{each}" for each in known]).replace("_", "-")
    return f"{argument} is no setting{near}"


def _known(config: type, default: ProtocolConfig | None) -> dict[str, Setting]:
    """The settings of a command line, first those that choose the protocol and its learner's."""
    if default is not None:
        found = settings_of(default, all_of_them=True)
        first = (*default.SELECTORS, *settings_of(default.settings.learner, all_of_them=True))
        return {name: found[name] for name in first} | found
    hints, docs = typing.get_type_hints(config, include_extras=True), field_docs(config)
    return {
        field.name: Setting(hints[field.name], field.default, docs.get(field.name, ""))
        for field in dataclasses.fields(config)
    }


def _field(
    name: str, setting: Setting, choices: tuple[str, ...] | None
) -> tuple[str, Any, dataclasses.Field]:
    """The field of the flat dataclass that tyro makes a command line of."""
    import tyro

    hint, bounds = plain(setting.hint), range_of(setting.hint)
    if tyro.conf.Positional in getattr(setting.hint, "__metadata__", ()):
        hint = tyro.conf.Positional[hint]
    option = tyro.conf.arg(
        help=setting.doc + (f" Range: {bounds}." if bounds else ""),
        metavar=f"{{{','.join(choices)}}}" if choices else None,
    )
    required = setting.value is dataclasses.MISSING
    default = dataclasses.field(**({} if required else {"default": setting.value}))
    return name, Annotated[hint, option], default


def _number_or_text(text: str) -> int | str:
    with contextlib.suppress(ValueError):
        return int(text)
    return text


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
