"""Time and memory of the reference workload's meta-gradient, beside PyTorch libraries.

    python -m experiments.benchmark
    python -m experiments.benchmark --quick
    python -m experiments.benchmark --size mini_imagenet

The workload: 16 tasks of 5-way 1-shot Omniglot shapes, 15 queries a class, 16 inner steps, 5 CG
steps, conv4 with 64 filters; or 4 tasks of 84x84 photographs, 5 inner steps, 10 of iMAML, conv4
with 32 filters and max-pooling. Timed is the meta-gradient averaged over the tasks and, of ours,
the report on it. Every contender has a process of its own. Those that compute the same
meta-gradient must first agree on it in float64; then all take turns, round by round, on fresh
random images. The ceiling is the rate of float32 matrix products on the same devices in the same
rounds. On the CPU, PyTorch and its libraries take part where they are installed:
`pip install -e .[peers]`. Writes OUTPUT.json and OUTPUT.png.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.benchmark import workload
from experiments.benchmark.workload import CONTENDERS, MATMUL, Contender, reference_of
from experiments.shared import common, reports
from imaml_jax.learners.settings import Count, Record

AGREEMENT = 1e-10
_LIBRARIES = {contender.name: contender.library for contender in CONTENDERS if contender.library}
_ROOT = Path(__file__).parents[2]
_COLUMNS = {
    **{"one meta-gradient": "", "seconds": ".3f", "ratio (spread)": "", "ceiling": ".0%"},
    **{"temp MiB": ".1f", "peak MiB": ".0f", "residual": ".3f", "float64": ".0e"},
}


@dataclasses.dataclass(frozen=True)
class Config(Record):
    """What is timed."""

    rounds: Count | None = None
    """Interleaved rounds, at least 1; default 5, or 3 where it is to be quick."""
    quick: bool = False
    """Fewer contenders."""
    size: workload.SizeName = "omniglot"
    """Shapes of the images, the network and the inner problem."""
    devices: int | None = None
    """Devices over which our tasks are sharded, and threads of PyTorch; default all, which is one
    a core on the CPU; at least 1."""
    output: Path = Path("runs/benchmark")
    """Where to write, without an ending."""


def main(config: Config) -> dict[str, Any]:
    """Times the contenders, writes and prints.

    Returns:
      For each contender the seconds of every round, memory, and what follows from them.

    Raises:
      ValueError: more devices than there are, or a report that cannot be written.
      RuntimeError: a contender failed, two disagree on the meta-gradient, or CG did not take the
        steps that it was to take.
    """
    rounds = config.rounds or (3 if config.quick else 5)
    size = workload.SIZES[config.size]
    devices = len(common.task_devices(config.devices, size.tasks) or [None])
    common.check_output(config.output)
    contenders = [c for c in CONTENDERS if available(c) and (c.quick or not config.quick)]
    start = functools.partial(process, devices=devices, size=config.size)
    disagreement = disagreements(contenders, start)
    names = [MATMUL, *(contender.name for contender in contenders)]
    with contextlib.ExitStack() as stack:
        ask = {name: stack.enter_context(start(name)) for name in names}
        for name in names:
            ask[name](0)  # compiles
        runs = [{name: ask[name](seed) for name in names} for seed in range(1, rounds + 1)]
        memory = {name: ask[name]("memory") for name in names}
    results = summary(contenders, runs, memory, disagreement, devices, size)
    results |= {"config": dataclasses.asdict(config), **common.provenance()}
    results["versions"] |= {
        name: importlib.metadata.version(name)
        for name in sorted({"torch", *_LIBRARIES.values()})
        if importlib.util.find_spec(name)
    }
    common.write_report(config.output, results, table, draw)
    return results


def available(contender: Contender) -> bool:
    """Whether its library is installed and computes where ours does."""
    if contender.library is None:
        return True
    return jax.default_backend() == "cpu" and bool(importlib.util.find_spec(contender.library))


@contextlib.contextmanager
def process(name: str, devices: int, size: workload.SizeName = "omniglot") -> Iterator[Any]:
    """A contender in a process of its own: yields `order -> answer`, see `workload.serve`."""
    module = f"experiments.benchmark.{'peers' if name in _LIBRARIES else 'ours'}"
    with tempfile.TemporaryFile("w+") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", module, name, str(devices), size],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=_ROOT,
        )
        assert child.stdin is not None and child.stdout is not None
        orders, answers = child.stdin, child.stdout

        def ask(order: Any) -> Any:
            with contextlib.suppress(BrokenPipeError):
                print(json.dumps(order), file=orders, flush=True)
            answer = answers.readline()
            if not answer:
                log.seek(0)
                raise RuntimeError(f"{name} exited with {child.wait()}:\n{log.read()[-2000:]}")
            return json.loads(answer)

        try:
            yield ask
        finally:
            child.kill()
            with contextlib.suppress(BrokenPipeError):
                child.communicate()


def disagreements(contenders: Sequence[Contender], start: Callable[[str], Any]) -> dict[str, float]:
    """Relative differences of float64 meta-gradients from those of the reference.

    Args:
      contenders: those to compare.
      start: `name -> process` of it.

    Raises:
      RuntimeError: one is not below `AGREEMENT`.
    """
    pairs = [(c.name, reference_of(c).name) for c in contenders if c.same and c != reference_of(c)]
    gradients = {name: _gradients(start(name)) for name in sorted({n for p in pairs for n in p})}
    found = {}
    for name, reference in pairs:
        found[name] = difference(gradients[name], gradients[reference])
        if not found[name] < AGREEMENT:
            raise RuntimeError(
                f"{name} and {reference} differ by {found[name]:.1e} in the float64 meta-gradient"
            )
    return found


def difference(gradients: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> float:
    """Norm of the difference relative to the reference's."""
    if gradients.keys() != reference.keys():
        raise ValueError(f"parameters {sorted(gradients)} are not {sorted(reference)}")
    squares = [np.sum((gradients[path] - reference[path]) ** 2) for path in reference]
    return float(np.sqrt(sum(squares) / sum(np.sum(a**2) for a in reference.values())))


def _gradients(contender: Any) -> dict[str, np.ndarray]:
    with contender as ask:
        return {path: np.asarray(values) for path, values in ask("gradients").items()}


def summary(
    contenders: Sequence[Contender],
    runs: Sequence[dict[str, Any]],
    memory: dict[str, dict[str, int | None]],
    disagreement: dict[str, float],
    devices: int,
    size: workload.Size = workload.REFERENCE,
) -> dict[str, Any]:
    """What follows from the measurements.

    Raises:
      RuntimeError: a Hessian solve took fewer CG steps than were asked for.
    """

    seconds = {name: [run[name]["seconds"] for run in runs] for name in runs[0]}
    products = 2 * workload.MATRIX**3 * workload.PRODUCTS * devices
    ceiling = products / statistics.median(seconds[MATMUL])
    rows = {}
    for contender in contenders:
        name, reference = contender.name, reference_of(contender).name
        infos = [run[name]["info"] for run in runs]
        taken = {info.get("solve_steps", workload.CG_STEPS) for info in infos}
        if contender.same and taken != {workload.CG_STEPS}:
            raise RuntimeError(f"{name} took {sorted(taken)} CG steps on average")
        median = statistics.median(seconds[name])
        ratios = [a / b for a, b in zip(seconds[name], seconds[reference], strict=True)]
        flops = workload.flops(contender.algorithm, size) if contender.same else None
        rows[name] = {
            "seconds": median,
            "all_seconds": seconds[name],
            "ratio": [statistics.median(ratios), min(ratios), max(ratios)],
            "ratio_to": reference,
            "flops": flops,
            "share_of_ceiling": flops and flops / median / ceiling,
            "disagreement": disagreement.get(name),
            "inner_residual": infos[-1].get("inner_residual"),
            **memory[name],
        }
    return {"devices": devices, "ceiling_flops": ceiling, "contenders": rows}


def table(results: dict[str, Any]) -> str:
    """The measurements as text."""
    rows = [
        (
            name,
            row["seconds"],
            "{:.2f} ({:.2f}-{:.2f})".format(*row["ratio"]),
            row["share_of_ceiling"],
            row["temp_bytes"] and row["temp_bytes"] / 2**20,
            row["peak_resident_bytes"] and row["peak_resident_bytes"] / 2**20,
            row["inner_residual"],
            row["disagreement"],
        )
        for name, row in results["contenders"].items()
    ]
    missing = [c.name for c in CONTENDERS if not available(c)]
    return (
        f"{results['device']}, {results['machine']}, {results['cores']} cores; "
        f"{results['devices']} device(s) or threads; float32 matrix products "
        f"{results['ceiling_flops'] / 1e9:.0f} GFLOP/s\n{reports.text_table(_COLUMNS, rows)}\n"
        "ratio: to the first of the same algorithm, median and range over rounds; peak: of the "
        "whole process, library and compiler included; residual: of the inner problem; float64: "
        "difference of the meta-gradient from the first of the same algorithm"
        + (f"\nnot installed, or not for this device: {missing}" if missing else "")
    )


def draw(results: dict[str, Any], path: Path) -> None:
    """Seconds as bars with the range of the rounds."""
    rows = results["contenders"]
    names = list(rows)[::-1]
    medians = [rows[name]["seconds"] for name in names]
    low = [rows[name]["seconds"] - min(rows[name]["all_seconds"]) for name in names]
    high = [max(rows[name]["all_seconds"]) - rows[name]["seconds"] for name in names]
    colors = ["tab:gray" if name in _LIBRARIES else "tab:blue" for name in names]
    size, title = (9, 0.4 * len(names) + 1), f"{results['machine']}, {results['date']}"
    with reports.panels(path, 1, size, xlabel="seconds a meta-gradient", title=title) as (axes,):
        axes.barh(names, medians, xerr=[low, high], color=colors)
        axes.grid(visible=False, axis="y")


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
