"""Injects faults into runs and data, and tells what survived.

    python -m tests.faults

At least 30 signals at random moments to real training processes, and in this process damaged and
truncated checkpoints, interrupted writes, full disks, damaged logs, bad settings, hostile archives
and pickles. Prints one line a kind; ends with status 1 if anything was lost that must not be: more
than one interval between two checkpoints, a line of the log, a bit of the result, or a file that a
hostile data set wrote.
"""

import argparse
import builtins
import json
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from experiments import sinusoid
from experiments.shared import few_shot
from imaml_jax.data import mini_imagenet, omniglot, own, pickles, tiered_imagenet
from imaml_jax.training import checkpoint, json_lines, workdir

ROOT = Path(__file__).resolve().parent.parent
STEPS, INTERVAL = 800, 10
COMMAND = [sys.executable, "-m", "experiments.sinusoid", "--algorithm", "fomaml"]
COMMAND += ["--meta-steps", str(STEPS), "--log-every", str(INTERVAL)]
COMMAND += ["--validation-tasks", "10", "--test-tasks", "10", "--workdir"]
TREE = {"weight": jnp.arange(500.0), "step": jnp.int32(3)}


class LostError(Exception):
    """Something was lost that must not be."""


def require(condition: Any, what: str) -> None:
    """Raises LostError."""
    if not condition:
        raise LostError(what)


# Signals to training processes.


def signals(rng: random.Random, folder: Path, count: int) -> Iterator[str]:
    """SIGKILL and SIGTERM at random moments; every run is started again until it is done."""
    whole = folder / "whole"
    started = time.monotonic()
    require(_start(whole).wait() == 0, "an undisturbed run failed")
    span = time.monotonic() - started
    expected = _outcome(whole)
    run = 0
    while count > 0:
        place = folder / f"run{run}"
        run += 1
        status = None
        while status != 0:
            process = _start(place)
            name = rng.choice(["SIGKILL", "SIGTERM"])
            with suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(0.1, 0.9) * span)
            if process.poll() is None and count > 0:
                process.send_signal(signal.Signals[name])
                count -= 1
                status = process.wait()
                yield _after_signal(name, status, place)
            else:
                status = process.wait()
                require(status == 0, f"a resumed run ended with status {status}")
        require(_outcome(place) == expected, "a resumed run ended with another result")


def _start(place: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [*COMMAND, str(place)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )


def _outcome(place: Path) -> Any:
    results = json.loads((place / "results.json").read_text())
    rows = json_lines.read(place / "metrics.jsonl")
    steps = [row["step"] for row in rows]
    require(steps == list(range(INTERVAL, STEPS + 1, INTERVAL)), "the log has gaps or repeats")
    curve = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    return results["test_mse"], results["best_step"], curve


def _after_signal(name: str, status: int, place: Path) -> str:
    allowed = {"SIGKILL": {-9, 0}, "SIGTERM": {-15, 75, 0}}[name]
    require(status in allowed, f"{name} ended the process with status {status}")
    log = place / "metrics.jsonl"
    if not log.exists():
        return f"{name} before the first chunk"
    logged = [row["step"] for row in json_lines.read(log)]
    kept = checkpoint.steps(place / "checkpoints")
    last = max(logged, default=0)
    require(last - max(kept, default=0) <= INTERVAL, f"{last} logged, {kept} kept")
    if status == 75:
        require(kept and kept[-1] == last, "SIGTERM left a chunk without a checkpoint")
    return name


# Checkpoints.


def checkpoints(rng: random.Random, folder: Path, count: int) -> Iterator[str]:
    """A file of the newest checkpoint truncated, changed, emptied or removed."""
    for _ in range(count):
        place = folder / f"c{rng.random()}"
        for step in (10, 20):
            checkpoint.save(place, step, _tree(step), {"step_of": step})
        files = [f for f in (place / "step_00000020").rglob("*") if f.is_file()]
        target = rng.choice(files)
        content = target.read_bytes()
        kind = rng.choice(["truncated", "changed", "emptied", "removed"])
        if kind == "removed":
            target.unlink()
        elif kind == "emptied" or not content:
            target.write_bytes(b"")
        elif kind == "truncated":
            target.write_bytes(content[: rng.randrange(len(content))])
        else:
            at = rng.randrange(len(content))
            target.write_bytes(content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :])
        _require_restored(place, (10, 20))
        yield f"checkpoint {kind}"


def interrupted_writes(rng: random.Random, folder: Path, count: int) -> Iterator[str]:
    """An exception out of some call that writes; earlier checkpoints stay."""
    calls = [(os, "replace"), (Path, "write_text"), (Path, "mkdir"), (checkpoint, "_checksum")]
    errors = [OSError(28, "No space left on device"), KeyboardInterrupt(), OSError(30, "Read-only")]
    for _ in range(count):
        place = folder / f"w{rng.random()}"
        checkpoint.save(place, 10, _tree(10), {})
        owner, name = rng.choice(calls)
        with mock.patch.object(owner, name, side_effect=rng.choice(errors)):
            try:
                checkpoint.save(place, 20, _tree(20), {})
            except (OSError, KeyboardInterrupt):
                pass
            else:
                raise LostError(f"a failing {name} went unnoticed")
        _require_restored(place, (10,))
        checkpoint.save(place, 30, _tree(30), {})
        _require_restored(place, (30,))
        yield "interrupted write"


def full_disks(rng: random.Random, folder: Path, count: int) -> Iterator[str]:
    """The system refuses to write more than some bytes to a file."""
    for _ in range(count):
        place = folder / f"d{rng.random()}"
        checkpoint.save(place, 10, _tree(10), {})
        with _file_size_limit(rng.randrange(0, 1500)):
            try:
                checkpoint.save(place, 20, _tree(20), {})
            except OSError:
                done = False
            except Exception as error:  # what Orbax makes of it
                done = False
                require("File too large" in str(error) or "rite" in str(error), repr(error))
            else:
                done = True
        _require_restored(place, (10, 20) if done else (10,))
        yield "full disk"


@contextmanager
def _file_size_limit(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def _tree(step: int) -> dict[str, jax.Array]:
    return {**TREE, "step": jnp.int32(step)}


def _require_restored(place: Path, allowed: tuple[int, ...]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = checkpoint.restore(place, TREE)
    require(found is not None, "no checkpoint is left")
    tree, notes = found or (TREE, {})
    require(notes["step"] in allowed, f"step {notes['step']} came back, not one of {allowed}")
    require(int(tree["step"]) == notes["step"], "arrays of another step came back")
    require(np.array_equal(tree["weight"], TREE["weight"]), "other bits came back")


# Logs and directories.


def logs(rng: random.Random, folder: Path, count: int) -> Iterator[str]:
    """A log with a torn or damaged line: the others are kept."""
    for _ in range(count):
        path = folder / "log.jsonl"
        rows = [{"step": i, "loss": 1 / i} for i in range(1, 9)]
        lines = [json.dumps(row).encode() + b"\n" for row in rows]
        at = rng.randrange(len(lines))
        if rng.random() < 0.5:
            content, left = b"".join(lines)[: -rng.randrange(1, 9)], rows[:-1]
        else:
            lines[at] = bytes(rng.randrange(128, 256) for _ in range(9)) + b"\n"
            content, left = b"".join(lines), rows[:at] + rows[at + 1 :]
        path.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            require(json_lines.rewind(path, 8) == left, "lines of the log were lost")
        for line in path.read_text().splitlines():
            json.loads(line)
        yield "damaged log"


def directories(rng: random.Random, folder: Path, count: int) -> Iterator[str]:
    """A workdir that is in use, damaged, another run's or no directory is refused."""
    for i in range(count):
        place = folder / f"home{i}"
        workdir.claim(place, {"rate": 0.1})
        kind = rng.choice(["in use", "damaged", "another config", "a file"])
        if kind == "in use":
            with workdir.lock(place):
                _require_refused(lambda p=place: workdir.lock(p).__enter__(), "in use")
        elif kind == "damaged":
            (place / "config.json").write_text('{"rate"')
            _require_refused(lambda p=place: workdir.check(p, {"rate": 0.1}), "damaged")
        elif kind == "another config":
            _require_refused(lambda p=place: workdir.check(p, {"rate": 0.2}), "rate: was 0.1")
        else:
            file = folder / f"file{i}"
            file.write_text("x")
            _require_refused(lambda f=file: workdir.claim(f / "run", {}), "file", OSError)
        yield f"workdir {kind}"


def _require_refused(
    call: Callable[[], Any], word: str, kind: type[Exception] = ValueError
) -> None:
    try:
        call()
    except kind as error:
        require(word in str(error), f"{error} does not name {word}")
    else:
        raise LostError(f"{word} was not refused")


# Settings.

_BAD = {
    "ways": (0, 1, -3),
    "shots": (0, -1),
    "meta_steps": (0, -100, 150),
    "log_every": (0, -1),
    "validate_every": (0, 150),
    "inner_rate": (0.0, -1.0, float("nan")),
    "outer_rate": (0.0, float("nan")),
    "num_steps": (0, -2),
    "eval_num_steps": (0,),
    "reg_strength": (0.0, -2.0, float("nan")),
    "cg_steps": (0, -5),
    "seed": (-1, 2**32),
    "meta_batch": (0, -8),
    "test_tasks": (0,),
    "validation_tasks": (0,),
    "max_seconds": (0.0, -5.0, float("nan")),
    "protocol": ("finnn", "", "imaml"),
    "algorithm": ("imam", "sgd"),
    "solve": ("woodbury",),
}


def settings(rng: random.Random, folder: Path, count: int) -> Iterator[str]:
    """A setting out of its range is refused by name, before any data are read."""
    del folder
    pairs = [(name, value) for name, values in _BAD.items() for value in values]
    rng.shuffle(pairs)
    for name, value in (pairs * 2)[:count]:
        changes: Any = {"curvature": "hessian"} if name == "solve" else {}
        changes |= {name: value}
        _require_refused(lambda c=changes: few_shot.Config.of(**c), name)
        if name in ("meta_steps", "reg_strength", "seed", "inner_rate"):
            if (name, value) != ("meta_steps", 150):
                changes = {name: value}
                _require_refused(lambda c=changes: sinusoid.Config.of(**c), name)
        yield "bad setting"


# Data.


class _Runs:
    """Pickles to a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def hostile_data(rng: random.Random, folder: Path, count: int) -> Iterator[str]:
    """Pickles that call, archives that climb out, arrays of objects: refused, and nothing ran."""
    mark = folder / f"mark{rng.getrandbits(64)}"
    calls = [
        _Runs(os.system, f"touch {mark}"),
        _Runs(builtins.eval, f"open({str(mark)!r}, 'w').close()"),
        _Runs(builtins.exec, f"open({str(mark)!r}, 'w').close()"),
        _Runs(open, str(mark), "w"),
        _Runs(os.mkdir, str(mark)),
    ]
    for i in range(count):
        place = folder / f"data{i}"
        place.mkdir()
        cache = place / "cache"
        call = rng.choice(calls)
        kind = rng.choice(["pickle", "pickled data set", "archive", "object array"])
        if kind == "pickle":
            (place / "x.pkl").write_bytes(pickle.dumps(call, rng.randrange(2, 6)))
            _require_refused(lambda p=place: pickles.load(p / "x.pkl"), "x.pkl")
        elif kind == "pickled data set":
            module = rng.choice([mini_imagenet, tiered_imagenet])
            for name in module.PICKLES:
                (place / name).write_bytes(pickle.dumps({"image_data": call}))
            load = module.load
            _require_refused(lambda p=place, f=load, c=cache: f(p, cache_dir=c), "Nothing in it")
        elif kind == "archive":
            for name in omniglot.ARCHIVES:
                with zipfile.ZipFile(place / name, "w") as file:
                    for up in ("../", "../../", f"{tempfile.gettempdir()}/", "a/../../"):
                        file.writestr(f"{up}{mark.name}", b"x")
            _require_refused(lambda p=place, c=cache: omniglot.load(p, cache_dir=c), "")
        else:
            np.savez(place / "x.npz", train_images=np.array([call], object))
            _require_refused(lambda p=place: own.load_arrays(p / "x.npz"), "x.npz")
        require(not mark.exists(), f"a hostile {kind} ran")
        written = [
            Path(tempfile.gettempdir(), mark.name),
            *folder.rglob(mark.name),
            *ROOT.parent.glob(mark.name),
        ]
        require(not any(path.exists() for path in written), f"a hostile {kind} wrote a file")
        yield f"hostile {kind}"


KINDS: dict[str, tuple[Callable[..., Iterator[str]], int]] = {
    "checkpoints": (checkpoints, 60),
    "interrupted writes": (interrupted_writes, 20),
    "full disks": (full_disks, 20),
    "logs": (logs, 20),
    "directories": (directories, 12),
    "settings": (settings, 40),
    "hostile data": (hostile_data, 30),
    "signals": (signals, 36),
}


def main(kinds: list[str], share: float, seed: int) -> int:
    """Injects, prints, and returns the number of faults after which something was lost."""
    lost, total = 0, 0
    for name in kinds:
        inject, count = KINDS[name]
        count = max(1, round(share * count))
        started = time.monotonic()
        seen: dict[str, int] = {}
        with tempfile.TemporaryDirectory() as folder:
            try:
                for what in inject(random.Random(seed), Path(folder), count):
                    seen[what] = seen.get(what, 0) + 1
            except LostError as error:
                lost += 1
                print(f"{name}: LOST: {error}", flush=True)
        total += sum(seen.values())
        listed = ", ".join(f"{number} {what}" for what, number in sorted(seen.items()))
        print(f"{name}: survived {listed} ({time.monotonic() - started:.0f} s)", flush=True)
    print(f"{total} faults survived, {lost} kinds lost something")
    return lost


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--share", type=float, default=1.0, help="of the number of each kind")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.exit(main(options.kinds, options.share, options.seed) > 0)
