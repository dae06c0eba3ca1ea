"""Runs as they are found on the disk: finished, going on, stopped, or committed as JSON."""

import contextlib
import json
import math
import os
import platform
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from imaml_jax.training import json_lines

_MARKS = ("results.json", "metrics.jsonl", "checkpoints")
_OWN_PICTURE = "learning_curve.png"  # drawn anew from the same numbers
_LARGEST = 1e100  # past any float32, and small enough for sums and squares
_DEPTH = 50  # of lists and objects in each other


class Run(NamedTuple):
    """One run, or one row of a file of results.

    Attributes:
      name: its folder or file, and its key there.
      results: what is known of it: its config, then its results over that.
      config: the settings that a resumed run must share, of a folder that has them; else None.
      history: one row a log point.
      state: a finished run has results; one that is running has a living process on this machine.
      pictures: image files.
      notes: what could not be read.
      raw: the file's content where it is no run of training, else None.
    """

    name: str
    results: dict[str, Any]
    config: dict[str, Any] | None = None
    history: tuple[dict[str, Any], ...] = ()
    state: Literal["finished", "running", "unfinished"] = "finished"
    pictures: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    raw: Any = None


def read(path: Path) -> list[Run]:
    """The runs at a path, in the order of their names.

    Args:
      path: a run's folder, a folder of such folders, or a JSON file of results.

    Raises:
      ValueError: no run is there.
    """
    if path.is_dir():
        found = [run for folder in _folders(path, set()) for run in _of_folder(folder)]
        if found:
            return found
        raise ValueError(
            f"{path} is no run: neither it nor a folder in it has {', '.join(_MARKS[:-1])} or "
            f"{_MARKS[-1]}; name the workdir of a run"
        )
    if not path.exists():
        raise ValueError(f"{path} does not exist; name the workdir of a run, or a JSON file")
    if path.suffix != ".json":
        raise ValueError(f"{path} is no run: name a folder, or a JSON file of results")
    return _of_file(path)


def _folders(path: Path, seen: set[str]) -> list[Path]:
    """The runs' folders below `path`, itself included, each once; parts of a run are left to it."""
    real = os.path.realpath(path)
    if real in seen:  # by a link
        return []
    seen.add(real)
    inner = [each for each in path.iterdir() if each.is_dir() and each.name[0] != "."]
    inner.sort(key=lambda each: (each.is_symlink(), each.name))
    is_run = any((path / mark).exists() for mark in _MARKS)
    if is_run and not (inner and isinstance(_load(path / "results.json", []), list)):
        return [path]  # else it is a summary of what is below
    return [found for each in inner for found in _folders(each, seen)]


def _of_folder(folder: Path) -> list[Run]:
    notes: list[str] = []
    results = _load(folder / "results.json", notes)
    config = _load(folder / "config.json", notes)
    config = config if isinstance(config, dict) else None
    history = _history(folder, notes)
    if isinstance(results, list):
        return [
            Run(f"{folder.name}: {row.get('name', index)}", row, notes=tuple(notes))
            for index, row in enumerate(results)
            if isinstance(row, dict)
        ]
    pictures = tuple(p for p in sorted(folder.glob("*.png")) if p.name != _OWN_PICTURE)
    name = folder.name or str(folder.resolve())
    run = Run(name, results or {}, config, history, pictures=pictures, notes=tuple(notes))
    if not isinstance(results, dict):
        state = "running" if _is_alive(folder) else "unfinished"
        return [run._replace(results=config or {}, state=state)]
    trained = results.get("trained_meta_steps")
    if history and isinstance(trained, int) and history[-1]["step"] > trained and _is_alive(folder):
        return [run._replace(state="running")]
    parts = []
    for key, part in _parts(run).items():
        more = list(notes)
        part = part._replace(history=_history(folder / key, more), notes=tuple(more))
        parts.append(part._replace(pictures=() if parts else pictures))
    return parts or [run]


def _of_file(path: Path) -> list[Run]:
    notes: list[str] = []
    value = _load(path, notes)
    if notes:
        raise ValueError(notes[0])
    picture = path.with_suffix(".png")
    pictures = (picture,) if picture.exists() else ()
    records = _records(value, path.stem)
    made = [about for record in records.values() if "command" in (about := provenance(record))]
    if not made:
        raise ValueError(
            f"{path} is no result of these experiments: none of its records has a command"
        )
    found = []
    for name, record in records.items():
        curve = record.get("curve")
        run = Run(name, record, history=_steps(curve if isinstance(curve, list) else []))
        found += _parts(run).values() or [run]
    if not any(_has_score(run.results) for run in found):
        return [Run(path.stem, made[0], pictures=pictures, raw=value)]
    return [found[0]._replace(pictures=pictures), *found[1:]]


def _records(value: Any, stem: str) -> dict[str, dict[str, Any]]:
    """The results in a file by name: a list of them, a mapping to them, or one alone."""
    if isinstance(value, list):
        rows = [row for row in value if isinstance(row, dict)]
        return {f"{stem}: {row.get('run', index)}": row for index, row in enumerate(rows)}
    if not isinstance(value, dict):
        return {}
    inner = {key: each for key, each in value.items() if isinstance(each, dict)}
    if inner and len(inner) == len(value):
        return {f"{stem}: {key}": each for key, each in inner.items()}
    return {stem: value}


def _parts(run: Run) -> dict[str, Run]:
    """The results of several algorithms in one, without their histories."""
    return {
        key: Run(f"{run.name}: {key}", run.results | {"algorithm": key, "rows": None} | row)
        for key, row in mapping(run.results, "rows").items()
        if isinstance(row, dict)
    }


def provenance(record: dict[str, Any]) -> dict[str, Any]:
    """Where a record says by which command it was made: in itself, or one level below."""
    below = [record.get(key) for key in ("about", "config")]
    return next((e for e in (record, *below) if isinstance(e, dict) and "command" in e), record)


def number(value: Any) -> float | None:
    """`value` where it is a number that can be calculated with: finite, and not past 1e100."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST:
        return float(value)
    return None


def word(record: dict[str, Any], name: str) -> str | None:
    """The text of that name; None where it is absent or no text."""
    value = record.get(name)
    return value if isinstance(value, str) else None


def mapping(record: dict[str, Any], name: str) -> dict[str, Any]:
    """The object of that name; empty where it is absent or no object."""
    value = record.get(name)
    return value if isinstance(value, dict) else {}


def _strict(value: Any, depth: int = _DEPTH) -> Any:
    """With null for what JSON has no word for, and for what is nested too deeply."""
    if not depth or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if isinstance(value, dict):
        return {key: _strict(each, depth - 1) for key, each in value.items()}
    return [_strict(each, depth - 1) for each in value] if isinstance(value, list) else value


def _has_score(results: dict[str, Any]) -> bool:
    names = ("test_accuracy", "test_mse", "score", "validation")
    has = any(number(results.get(name)) is not None for name in names)
    return has or isinstance(results.get("test_return"), list)


def _steps(rows: Iterable[Any]) -> tuple[dict[str, Any], ...]:
    """Those of the rows that are of a step."""
    return tuple(r for r in rows if isinstance(r, dict) and isinstance(r.get("step"), int))


def _history(folder: Path, notes: list[str]) -> tuple[dict[str, Any], ...]:
    """The rows of a run's log; to the notes goes what is wrong with it."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            rows = json_lines.read(folder / "metrics.jsonl")
    except OSError as error:
        notes.append(f"metrics.jsonl cannot be read ({error})")
        return ()
    notes += [str(warning.message) for warning in caught]
    return _steps(map(_strict, rows))


def _load(path: Path, notes: list[str]) -> Any:
    """The content of a JSON file, None where there is none; to the notes what is wrong with it."""
    try:
        return _strict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{path} cannot be read ({error})")


def _is_alive(folder: Path) -> bool:
    """Whether the process that last held the folder lives, as far as this machine can tell."""
    with contextlib.suppress(OSError, ValueError, OverflowError):
        process, _, host = (folder / ".lock").read_text(encoding="utf-8").strip().split(" ")
        if os.name == "posix" and host == platform.node():  # elsewhere the signal 0 is a real one
            with contextlib.suppress(PermissionError):  # of another user's
                os.kill(int(process), 0)
            return True
    return False
