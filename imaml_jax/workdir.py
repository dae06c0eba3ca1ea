"""A run's directory: whose it is, who writes to it, and what a signal does to who writes."""

import contextlib
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_ABSENT = object()
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class InterruptedRunError(Exception):
    """A run stopped because a signal asked for it; the same call goes on where it stopped.

    Attributes:
      signal_name: such as "SIGTERM".
      step: finished meta-steps.
      workdir: where they are kept.
    """

    def __init__(self, signal_name: str, step: int, workdir: Path):
        super().__init__(
            f"stopped by {signal_name} after meta-step {step}, which is kept in {workdir}: the "
            "same call goes on from there"
        )
        self.signal_name = signal_name
        self.step = step
        self.workdir = workdir


@contextlib.contextmanager
def lock(workdir: str | os.PathLike) -> Iterator[None]:
    """Keeps other processes from the directory for as long as the context, or the process, lives.

    Args:
      workdir: made if missing.

    Raises:
      ValueError: if another run has it.
    """
    path = Path(workdir) / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise ValueError(
                    f"workdir {workdir} is in use by process {file.read().strip() or 'unknown'}: "
                    "wait for it, stop it, or choose another workdir"
                ) from None
        file.truncate(0)
        file.write(f"{os.getpid()} on {os.uname().nodename if hasattr(os, 'uname') else ''}\n")
        file.flush()
        yield


@contextlib.contextmanager
def deferred_signals() -> Iterator[Callable[[], str | None]]:
    """Lets SIGINT and SIGTERM wait, so that work can come to a good end.

    The second one of them acts at once. Does nothing outside the main thread.

    Yields:
      A function that tells the name of the signal that came, or None.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    came: list[str] = []

    def note(number: int, frame: Any) -> None:
        del frame
        came.append(signal.Signals(number).name)
        for each in _SIGNALS:
            signal.signal(each, before[each])
        print(
            f"\n{came[0]}: stopping after this chunk and its checkpoint; again to stop at once",
            file=sys.stderr,
            flush=True,
        )

    before = {each: signal.signal(each, note) or signal.SIG_DFL for each in _SIGNALS}
    try:
        yield lambda: came[0] if came else None
    finally:
        for each in _SIGNALS:
            signal.signal(each, before[each])


def claim(
    workdir: str | os.PathLike, config: Mapping[str, Any], accept_changes: bool = False
) -> None:
    """Makes `workdir` the home of the run with this `config`, or checks that it already is.

    Args:
      workdir: made if missing; the config is kept in `config.json`.
      config: what JSON can hold.
      accept_changes: go on with this config where the run had another, with a warning.

    Raises:
      ValueError: if a run of another config lives there, naming each field with both values, or
        its `config.json` cannot be read.
    """
    path = Path(workdir) / "config.json"
    wanted = _flat(json.loads(json.dumps(config)))
    saved = wanted
    if path.exists():
        try:
            saved = _flat(dict(json.loads(path.read_text(encoding="utf-8"))))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path} is damaged ({error}): move it away to go on with the run, or choose "
                "another workdir"
            ) from None
    differences = [
        f"{name}: was {saved.get(name, 'absent')!r}, now {wanted.get(name, 'absent')!r}"
        for name in {**saved, **wanted}
        if repr(saved.get(name, _ABSENT)) != repr(wanted.get(name, _ABSENT))
    ]
    found = f"workdir {workdir} holds a run of another config ({'; '.join(differences)})"
    if differences and not accept_changes:
        raise ValueError(
            f"{found}; go on with the old values, accept the changes, or choose another workdir"
        )
    if differences:
        warnings.warn(f"{found}; it goes on with the new one", stacklevel=2)
    if differences or not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".tmp_{path.name}")
        temporary.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(config, dict) or not config:
        return {prefix: config}
    fields = [
        _flat(value, f"{prefix}.{name}" if prefix else name) for name, value in config.items()
    ]
    return {name: value for part in fields for name, value in part.items()}
