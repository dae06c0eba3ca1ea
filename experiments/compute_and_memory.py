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
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import imaml_jax
from experiments.shared import common
from imaml_jax.networks import conv4
from imaml_jax.training.plots import new_figure
from imaml_jax.types import Batch, Task

VALUES = {
    "num_steps": (2, 4, 8, 16, 32),
    "num_tasks": (1, 2, 4, 8, 16, 32, 64, 128),
    "ways": (2, 5, 10, 20),
    "shots": (1, 2, 5, 10),
    "filters": (16, 32, 64, 128, 256),
}
# A loop of one step is compiled away.
_LEAST = {"num_steps": 2, "num_tasks": 1, "ways": 2, "shots": 1, "filters": 1}


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    axis: Literal["num_steps", "num_tasks", "ways", "shots", "filters"] = "num_steps"
    """What grows."""
    values: tuple[int, ...] = ()
    """Its values, two or more, each at least the least of that setting; none for the defaults."""
    num_steps: int = 16
    """Inner steps, at least 2."""
    num_tasks: int = 1
    """Tasks a meta-gradient, at least 1."""
    ways: int = 20
    """Classes a task, at least 2."""
    shots: int = 5
    """Support and query examples a class, at least 1."""
    filters: int = 64
    """Channels of the network, at least 1."""
    rounds: int = 5
    """Interleaved rounds of the timing, at least 0, which measures memory only."""
    output: Path = Path("runs/compute_and_memory")
    """Where to write, without an ending."""


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

    Raises:
      ValueError: a setting out of its range.
    """
    config = resolve(config)
    common.check_output(config.output)
    common.cache_compilations()
    sizes = [dataclasses.replace(config, **{config.axis: value}) for value in config.values]
    params, programs = {}, {}
    for size in sizes:
        network = conv4(size.ways, filters=size.filters)
        params[size] = network.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
        for name, learner in contenders(size).items():
            mapped = jax.jit(partial(_meta_gradient, learner))
            programs[name, size] = mapped.lower(params[size], _tasks(size, 0)).compile()
    temp = {cell: p.memory_analysis().temp_size_in_bytes for cell, p in programs.items()}
    peak = dict.fromkeys(programs)
    if config.rounds or jax.devices()[0].memory_stats():
        for name, size in sorted(programs, key=lambda cell: temp[cell]):  # the peak only grows
            jax.block_until_ready(programs[name, size](params[size], _tasks(size, 0)))
            of_device = jax.devices()[0].memory_stats() or {}
            peak[name, size] = of_device.get("peak_bytes_in_use")
    times: dict[Any, list[float]] = {cell: [] for cell in programs}
    for round_number in range(config.rounds):
        for (name, size), program in programs.items():
            tasks = jax.block_until_ready(_tasks(size, round_number + 1))
            started = time.perf_counter()
            jax.block_until_ready(program(params[size], tasks))
            times[name, size].append(time.perf_counter() - started)
    rows = {}
    for name in contenders(config):
        own = [(name, size) for size in sizes]
        seconds = [statistics.median(times[cell]) for cell in own] if config.rounds else None
        used = [temp[cell] for cell in own]
        rows[name] = {
            "temp_bytes": used,
            "peak_device_bytes": [peak[cell] for cell in own],
            "seconds": seconds,
            "bytes_line": fit(config.values, used)._asdict(),
            "seconds_line": seconds and fit(config.values, seconds)._asdict(),
        }
    results = {**dataclasses.asdict(config), "algorithms": rows, **common.provenance()}
    common.write_report(config.output, results, table, draw)
    return results


def resolve(config: Config) -> Config:
    """The config with its values in place.

    Raises:
      ValueError: a setting out of its range.
    """
    values = config.values or VALUES[config.axis]
    if len(set(values)) < 2:
        raise ValueError(f"values={values} must name two different ones or more")
    for name, least in (*_LEAST.items(), ("rounds", 0)):
        smallest = min(values) if name == config.axis else getattr(config, name)
        if smallest < least:
            raise ValueError(f"{name}={smallest} must be at least {least}")
    return dataclasses.replace(config, values=values)


def contenders(size: Config) -> dict[str, imaml_jax.MetaLearner]:
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


def _meta_gradient(learner: imaml_jax.MetaLearner, params: Any, tasks: Task) -> Any:
    return common.mean_over_tasks(partial(common.meta_gradient, learner), "map")(params, tasks)


def _tasks(size: Config, seed: int) -> Task:
    labels = jnp.tile(jnp.arange(size.ways), (size.num_tasks, size.shots))
    shape = (2, *labels.shape, 28, 28, 1)
    images = jax.random.uniform(jax.random.key(seed), shape)
    return Task(Batch(images[0], labels), Batch(images[1], labels))


def table(results: dict[str, Any]) -> str:
    """The measurements as text."""
    values = results["values"]
    fixed = [f"{name} {results[name]}" for name in VALUES if name != results["axis"]]
    lines = [
        f"one meta-gradient on one device ({results['machine']}): {', '.join(fixed)}",
        f"{results['axis']:32}"
        + "".join(f"{value:>9}" for value in values)
        + "   a unit      R²  exponent",
    ]
    for unit, name, scale in (("MiB", "temp_bytes", 2**-20), ("ms", "seconds", 1e3)):
        for algorithm, row in results["algorithms"].items():
            if row[name]:
                line = row["bytes_line" if unit == "MiB" else "seconds_line"]
                costs = "".join(f"{scale * cost:9.1f}" for cost in row[name])
                lines.append(
                    f"{algorithm + ', ' + unit:32}{costs}{scale * line['slope']:9.3f} "
                    f"{line['r_squared']:7.4f} {line['exponent']:9.2f}"
                )
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Memory and time side by side."""
    figure = new_figure(10, 4)
    memory, seconds = figure.subplots(1, 2)
    for name, row in results["algorithms"].items():
        memory.plot(results["values"], [b / 2**20 for b in row["temp_bytes"]], "o-", label=name)
        if row["seconds"]:
            seconds.plot(results["values"], row["seconds"], "o-", label=name)
    label = {"num_steps": "inner steps", "num_tasks": "tasks"}.get(results["axis"], results["axis"])
    memory.set(xlabel=label, ylabel="temporary memory (MiB)")
    seconds.set(xlabel=label, ylabel="seconds a meta-gradient")
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    memory.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
