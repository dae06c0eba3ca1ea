"""Memory and time of a meta-gradient against inner steps, tasks, classes, examples or channels.

    python -m experiments.compute_and_memory
    python -m experiments.compute_and_memory --axis filters --ways 5 --shots 1

The default is question 3 and the rest of figure 2 of Rajeswaran et al., NeurIPS 2019: one task of
20-way 5-shot Omniglot shapes, conv4 with 64 filters, growing inner steps; random images. Memory is
what the compiled program allocates besides its arguments and results, and the device's own peak
where it reports one; time is the median of interleaved rounds. One device, one task after another.
Writes OUTPUT.json and OUTPUT.png.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import imaml_jax
from experiments.shared import common, reports
from experiments.shared.inner_problems import random_tasks
from imaml_jax.learners.settings import Count, Range, Record
from imaml_jax.networks import conv4

VALUES = {
    "num_steps": (2, 4, 8, 16, 32),
    "num_tasks": (1, 2, 4, 8, 16, 32, 64, 128),
    "ways": (2, 5, 10, 20),
    "shots": (1, 2, 5, 10),
    "filters": (16, 32, 64, 128, 256),
}


@dataclass(frozen=True)
class Size(Record):
    """What a meta-gradient is made of."""

    # A loop of one step is compiled away.
    num_steps: Annotated[int, Range(least=2)] = 16
    """Inner steps, at least 2."""
    num_tasks: Count = 1
    """Tasks a meta-gradient, at least 1."""
    ways: Annotated[int, Range(least=2)] = 20
    """Classes a task, at least 2."""
    shots: Count = 5
    """Support and query examples a class, at least 1."""
    filters: Count = 64
    """Channels of the network, at least 1."""


@dataclass(frozen=True)
class Config(Size):
    """What is measured."""

    axis: Literal["num_steps", "num_tasks", "ways", "shots", "filters"] = "num_steps"
    """What grows."""
    values: tuple[int, ...] = ()
    """Its values, two or more, each at least the least of that setting; none for the defaults."""
    rounds: Annotated[int, Range(least=0)] = 5
    """Interleaved rounds of the timing, at least 0, which measures memory only."""
    output: Path = Path("runs/compute_and_memory")
    """Where to write, without an ending."""

    def check_together(self) -> None:
        if len(set(self.sizes())) < 2:
            raise ValueError(f"values={self.values} must name two different ones or more")

    def sizes(self) -> dict[int, Size]:
        """The size of each value."""
        fixed = {field.name: getattr(self, field.name) for field in dataclasses.fields(Size)}
        values = self.values or VALUES[self.axis]
        return {value: Size(**fixed | {self.axis: value}) for value in values}


class Line(NamedTuple):
    """A least-squares line, and the exponent of the power law that fits best.

    Attributes:
      slope: growth a unit.
      intercept: what remains at 0.
      r_squared: the share of the variance that the line explains.
      exponent: slope of the logarithms.
    """

    slope: float
    intercept: float
    r_squared: float
    exponent: float


def main(config: Config) -> dict[str, Any]:
    """Measures, writes and prints.

    Returns:
      For each algorithm its temporary bytes, seconds and the device's peak bytes so far, smaller
      programs first (None where the device does not tell), over the values, and the lines fitted to
      bytes and seconds.
    """
    reports.begin(config)
    sizes = config.sizes()
    params, programs = {}, {}
    for value, size in sizes.items():
        network = conv4(size.ways, filters=size.filters)
        params[value] = network.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
        for name, learner in contenders(size).items():
            gradient = partial(common.meta_gradient, learner)
            program = jax.jit(common.mean_over_tasks(gradient, "map"))
            programs[name, value] = program.lower(params[value], _tasks(size)).compile()
    temp = {cell: p.memory_analysis().temp_size_in_bytes for cell, p in programs.items()}
    peak = dict.fromkeys(programs)
    if config.rounds or jax.devices()[0].memory_stats():
        for name, value in sorted(programs, key=lambda cell: temp[cell]):  # the peak only grows
            jax.block_until_ready(programs[name, value](params[value], _tasks(sizes[value])))
            of_device = jax.devices()[0].memory_stats() or {}
            peak[name, value] = of_device.get("peak_bytes_in_use")
    seconds = {}
    if config.rounds:
        tasks = {value: _tasks(size) for value, size in sizes.items()}
        runs = {
            (name, value): partial(program, params[value], tasks[value])
            for (name, value), program in programs.items()
        }
        seconds = reports.seconds_in_rounds(runs, config.rounds)
    rows = {}
    for name in contenders(config):
        used = [temp[name, value] for value in sizes]
        medians = [statistics.median(seconds[name, v]) for v in sizes] if seconds else None
        rows[name] = {
            "temp_bytes": used,
            "peak_device_bytes": [peak[name, value] for value in sizes],
            "seconds": medians,
            "bytes_line": fit(list(sizes), used)._asdict(),
            "seconds_line": medians and fit(list(sizes), medians)._asdict(),
        }
    return reports.report(config, {"values": tuple(sizes), "algorithms": rows}, table, draw)


def contenders(size: Size) -> dict[str, imaml_jax.MetaLearner]:
    """The learners measured, by name."""
    network, loss = conv4(size.ways, filters=size.filters), imaml_jax.cross_entropy
    settings: dict[str, Any] = {"inner": optax.sgd(0.05), "num_steps": size.num_steps}
    solve = partial(imaml_jax.solve_cg_steihaug, tol=0.0, max_steps=5)
    return {
        "MAML": imaml_jax.maml(network, loss, **settings, remat=False),
        "MAML, steps recomputed": imaml_jax.maml(network, loss, **settings),
        "first-order MAML": imaml_jax.fomaml(network, loss, **settings),
        "iMAML, 5 CG": imaml_jax.imaml(network, loss, **settings, solve=solve),
    }


def fit(values: Sequence[int], costs: Sequence[float]) -> Line:
    """Least squares; constant costs fit a flat line with `r_squared` 1."""
    slope, intercept = np.polyfit(values, costs, 1)
    residual = np.var(np.asarray(costs) - slope * np.asarray(values) - intercept)
    total = np.var(costs)
    exponent = np.polyfit(np.log(values), np.log(costs), 1)[0]
    r_squared = 1 - residual / total if total else 1.0
    return Line(float(slope), float(intercept), float(r_squared), float(exponent))


def _tasks(size: Size) -> imaml_jax.Task:
    return random_tasks(size.num_tasks, size.ways, (size.shots, size.shots), (28, 28, 1))


def table(results: dict[str, Any]) -> str:
    """The measurements as text."""
    fixed = [f"{name} {results[name]}" for name in VALUES if name != results["axis"]]
    columns = {results["axis"]: "", **{str(value): ".1f" for value in results["values"]}}
    columns |= {"a unit": ".3f", "R²": ".4f", "exponent": ".2f"}
    cells = []
    for unit, name, scale in (("MiB", "bytes", 2**-20), ("ms", "seconds", 1e3)):
        for algorithm, row in results["algorithms"].items():
            costs, line = row["temp_bytes" if name == "bytes" else name], row[f"{name}_line"]
            if costs:
                growth = (scale * line["slope"], line["r_squared"], line["exponent"])
                cells.append([f"{algorithm}, {unit}", *(scale * cost for cost in costs), *growth])
    return (
        f"one meta-gradient on one device ({results['machine']}): {', '.join(fixed)}\n"
        + reports.text_table(columns, cells)
    )


def draw(results: dict[str, Any], path: Path) -> None:
    """Memory and time side by side."""
    label = {"num_steps": "inner steps", "num_tasks": "tasks"}.get(results["axis"], results["axis"])
    with reports.panels(path, 2, (10, 4), xlabel=label) as (memory, seconds):
        memory.set(ylabel="temporary memory (MiB)")
        seconds.set(ylabel="seconds a meta-gradient")
        for name, row in results["algorithms"].items():
            memory.plot(results["values"], [b / 2**20 for b in row["temp_bytes"]], "o-", label=name)
            if row["seconds"]:
                seconds.plot(results["values"], row["seconds"], "o-")


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
