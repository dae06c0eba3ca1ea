"""A run's directory: whose it is, who writes to it, and what a signal does to who writes."""

import contextlib
import errno
import json
import os
import platform
import signal
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_ABSENT = repr("absent")
_CONFIG = "config.json"
Migrate = Callable[[dict[str, Any]], Mapping[str, Any]]
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
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
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                warnings.warn(
                    f"the file system of workdir {workdir} has no locks ({error}): nothing keeps "
                    "a second process from it",
                    stacklevel=3,
                )
        file.truncate(0)
        file.write(f"{os.getpid()} on {platform.node()}\n")
        file.flush()
        yield


@contextlib.contextmanager
def deferred_signals() -> Iterator[Callable[[], str | None]]:
    """Lets SIGINT and SIGTERM wait, so that work can come to a good end.

    The second one of them acts at once. Does nothing outside the main thread, nor for a signal that
    the process ignores.

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
        for each in before:
            signal.signal(each, before[each])
        text = f"\n{came[0]}: stopping after this chunk and its checkpoint; again to stop at once\n"
        with contextlib.suppress(OSError):  # not print, which a handler must not enter twice
            os.write(2, text.encode())

    handlers = {each: signal.getsignal(each) or signal.SIG_DFL for each in _SIGNALS}
    before = {each: now for each, now in handlers.items() if now != signal.SIG_IGN}
    for each in before:
        signal.signal(each, note)
    try:
        yield lambda: came[0] if came else None
    finally:
        for each in before:
            signal.signal(each, before[each])


def check(
    workdir: str | os.PathLike,
    config: Mapping[str, Any],
    accept_changes: bool = False,
    fixed: Collection[str] = (),
    migrate: Migrate | None = None,
) -> None:
    """Refuses a `workdir` where a run of another config lives.

    Args:
      workdir: it may be missing.
      config: what JSON can hold.
      accept_changes: warns in place of refusing.
      fixed: the fields whose change it refuses all the same.
      migrate: translates what is kept there before it is compared; see `Run`.

    Raises:
      ValueError: if a run of another config lives there, naming each field with both values, or
        its `config.json` cannot be read.
    """
    path = Path(workdir) / _CONFIG
    if not path.exists():
        return
    wanted = _said(json.loads(json.dumps(config)))
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8")))
        saved = _said(json.loads(json.dumps(migrate(found) if migrate else found)))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): move it away to go on with the run, or choose another "
            "workdir"
        ) from None
    changed = [name for name in saved | wanted if saved.get(name) != wanted.get(name)]
    if not changed:
        return
    differences = "; ".join(
        f"{name}: was {saved.get(name, _ABSENT)}, now {wanted.get(name, _ABSENT)}"
        for name in changed
    )
    found = f"workdir {workdir} holds a run of another config ({differences})"
    immovable = [name for name in changed if name in fixed]
    if accept_changes and immovable:
        raise ValueError(
            f"{found}; {', '.join(immovable)} cannot change within a run: go on with the old value "
            "or choose another workdir"
        )
    if not accept_changes:
        raise ValueError(
            f"{found}; go on with the old values, accept the changes, or choose another workdir"
        )
    warnings.warn(f"{found}; it goes on with the new one", stacklevel=4)


def claim(workdir: str | os.PathLike, config: Mapping[str, Any]) -> None:
    """Makes `workdir` the home of the run with this `config`; see `check`, which comes before."""
    path = Path(workdir) / _CONFIG
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(config, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Writes a file that a kill leaves as it was or as it shall be, on the disk when it returns."""
    temporary = path.with_name(f".tmp_{path.name}")
    temporary.write_text(text, encoding="utf-8")
    flush(temporary)
    os.replace(temporary, path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Waits until a file, or the names in a directory, are on the disk."""
    with contextlib.suppress(OSError):  # not every system opens directories
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _said(config: Any) -> dict[str, str]:
    """The values of nested dicts by dotted name, as text."""
    values = jax.tree.leaves_with_path(config, is_leaf=lambda x: not isinstance(x, dict) or not x)
    return {jax.tree_util.keystr(at, simple=True, separator="."): repr(x) for at, x in values}
