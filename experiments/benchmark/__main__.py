"""Time and memory of one meta-step of the reference workload, beside PyTorch libraries.

    python -m experiments.benchmark
    python -m experiments.benchmark --quick

The workload: 16 tasks of 5-way 1-shot Omniglot shapes, 15 queries a class, 16 inner steps, 5 CG
steps, conv4 with 64 filters. Every contender has a process of its own. Those that solve the same
problem must first agree on the meta-gradient in float64; then all take turns, round by round, on
fresh random images. The ceiling is the matrix product of the same devices in the same rounds.
PyTorch's libraries take part where they are installed: `pip install -e .[peers]`. Writes
OUTPUT.json and OUTPUT.png.
"""

import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from experiments import common
from experiments.benchmark import ours, peers, workload

CEILING = ours.MATMUL
IMAML, MAML = "iMAML, Hessian, solve_cg_steihaug", "MAML"
QUICK = (IMAML, MAML, "first-order MAML", *peers.available())
SAME_PROBLEM = {
    "iMAML, Hessian, solve_cg": IMAML,
    "MAML, no recomputation": MAML,
    "torchopt iMAML, solve_cg": IMAML,
    "torchopt MAML": MAML,
    "higher MAML": MAML,
}
AGREEMENT = 1e-10
_COUNTED = {"iMAML, Hessian, ": "imaml", "MAML": "maml", "first-order MAML": "fomaml"}


@dataclasses.dataclass(frozen=True)
class Config:
    """What is timed."""

    rounds: int = 5
    """Interleaved rounds, at least 1."""
    quick: bool = False
    """Three rounds of fewer contenders."""
    devices: int | None = None
    """Devices over which our tasks are sharded; default all, which is one a core on the CPU."""
    output: Path = Path("runs/benchmark")
    """Where to write, without an ending."""


def main(config: Config) -> dict[str, Any]:
    """Times the contenders, writes and prints.

    Returns:
      For each contender the seconds of every round, memory, and what follows from them.

    Raises:
      ValueError: a setting out of its range.
      RuntimeError: a contender failed, or two disagree on the meta-gradient.
    """
    if config.rounds < 1:
        raise ValueError(f"rounds={config.rounds} must be at least 1")
    common.task_devices(config.devices, workload.TASKS)
    names = list(QUICK) if config.quick else [*ours.learners(), *peers.available()]
    with contextlib.ExitStack() as stack:
        processes = {
            name: stack.enter_context(_process(name, config.devices)) for name in (CEILING, *names)
        }
        disagreement = _disagreement(processes)
        for process in processes.values():
            process.ask(0)  # compiles
        times: dict[str, list[float]] = {name: [] for name in processes}
        for seed in range(1, 1 + (3 if config.quick else config.rounds)):
            for name, process in processes.items():
                times[name].append(process.ask(seed))
        memory = {name: processes[name].ask(None) for name in names}
    results = summary(times, memory, disagreement, config.devices) | common.provenance()
    config.output.parent.mkdir(parents=True, exist_ok=True)
    path = config.output.with_name(config.output.name + ".json")
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    draw(results, path.with_suffix(".png"))
    print(table(results))
    return results


def summary(
    times: dict[str, list[float]],
    memory: dict[str, dict[str, int | None]],
    disagreement: dict[str, float],
    devices: int | None,
) -> dict[str, Any]:
    """What follows from the measurements."""
    count = len(common.task_devices(devices, workload.TASKS) or [None])
    ceiling = 2 * ours.MATRIX**3 * count / statistics.median(times[CEILING])
    rows = {}
    for name, seconds in times.items():
        if name == CEILING:
            continue
        median = statistics.median(seconds)
        own = IMAML if "iMAML" in name else MAML
        ratios = [a / b for a, b in zip(seconds, times[own], strict=True)]
        counted = next((kind for head, kind in _COUNTED.items() if name.startswith(head)), None)
        flops = workload.flops(counted) if counted else None
        rows[name] = {
            "seconds": median,
            "all_seconds": seconds,
            "ratio": [statistics.median(ratios), min(ratios), max(ratios)],
            "ratio_to": own,
            "flops": flops,
            "share_of_ceiling": flops and flops / median / ceiling,
            "disagreement": disagreement.get(name),
            **memory[name],
        }
    return {"devices": count, "ceiling_flops": ceiling, "contenders": rows}


class _Process:
    """A contender at the other end of a pipe."""

    def __init__(self, name: str, pipe: subprocess.Popen, log: Any):
        self.name, self._pipe, self._log = name, pipe, log

    def ask(self, order: Any) -> Any:
        assert self._pipe.stdin is not None and self._pipe.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(order), file=self._pipe.stdin, flush=True)
        answer = self._pipe.stdout.readline()
        if not answer:
            self._log.seek(0)
            raise RuntimeError(f"{self.name} stopped:\n{self._log.read()[-2000:]}")
        return json.loads(answer)


@contextlib.contextmanager
def _process(name: str, devices: int | None) -> Iterator[_Process]:
    module = "peers" if name in peers.available() else "ours"
    command = [sys.executable, "-m", f"experiments.benchmark.{module}", name, str(devices or 0)]
    with tempfile.TemporaryFile("w+") as log:
        pipe = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
        try:
            yield _Process(name, pipe, log)
        finally:
            pipe.kill()
            pipe.communicate()


def _disagreement(processes: dict[str, _Process]) -> dict[str, float]:
    """Relative difference of float64 meta-gradients between those that solve the same problem."""
    pairs = {name: own for name, own in SAME_PROBLEM.items() if name in processes}
    with tempfile.TemporaryDirectory() as folder:
        gradients = {}
        for number, name in enumerate(sorted({*pairs, *pairs.values()})):
            file = f"{folder}/{number}.npz"
            processes[name].ask(file)
            with np.load(file) as arrays:
                gradients[name] = dict(arrays)
    differences = {}
    for name, own in pairs.items():
        ref = gradients[own]
        squares = [np.sum((gradients[name][path] - ref[path]) ** 2) for path in ref]
        norm = np.sqrt(sum(np.sum(array**2) for array in ref.values()))
        differences[name] = float(np.sqrt(sum(squares)) / norm)
        if not differences[name] < AGREEMENT:
            raise RuntimeError(
                f"{name} and {own} differ by {differences[name]:.1e} in the float64 meta-gradient"
            )
    return differences


def table(results: dict[str, Any]) -> str:
    """The measurements as text."""
    lines = [
        f"{results['machine']}, {results['cores']} cores; ours on {results['devices']} device(s); "
        f"float32 matrix products {results['ceiling_flops'] / 1e9:.0f} GFLOP/s",
        f"{'one meta-step':40}{'seconds':>9}  {'ratio (spread)':20}{'ceiling':>8}"
        f"{'temp MiB':>10}{'peak MiB':>10}{'float64':>9}",
    ]
    for name, row in results["contenders"].items():
        median, low, high = row["ratio"]
        ratio = f"{median:.2f} ({low:.2f}-{high:.2f})"
        share = f"{100 * row['share_of_ceiling']:.0f}%" if row["share_of_ceiling"] else ""
        temp = f"{row['temp_bytes'] / 2**20:.1f}" if row["temp_bytes"] else ""
        same = "" if row["disagreement"] is None else f"{row['disagreement']:.0e}"
        lines.append(
            f"{name:40}{row['seconds']:9.3f}  {ratio:20}{share:>8}{temp:>10}"
            f"{row['peak_rss_bytes'] / 2**20:10.0f}{same:>9}"
        )
    lines.append(f"ratio: to {IMAML} for iMAML, to {MAML} for the others")
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Seconds as bars with the range of the rounds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = results["contenders"]
    names = list(rows)[::-1]
    medians = [rows[name]["seconds"] for name in names]
    low = [rows[name]["seconds"] - min(rows[name]["all_seconds"]) for name in names]
    high = [max(rows[name]["all_seconds"]) - rows[name]["seconds"] for name in names]
    colors = ["tab:gray" if name in peers.available() else "tab:blue" for name in names]
    figure = Figure(figsize=(9, 0.4 * len(names) + 1), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.barh(names, medians, xerr=[low, high], color=colors)
    axes.set(xlabel="seconds a meta-step", title=f"{results['machine']}, {results['date']}")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
