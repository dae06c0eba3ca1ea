"""Memory and time of one meta-gradient against the number of inner steps.

    python -m experiments.compute_and_memory

Question 3 and figures 2b and 2c of Rajeswaran et al., NeurIPS 2019: one task of 20-way 5-shot
Omniglot shapes, conv4 with 64 filters, random images. Memory is what the compiled program allocates
besides its arguments and results, and the device's own peak where it reports one; time is the
median of interleaved rounds on one device. Writes OUTPUT.json and OUTPUT.png.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import imaml_jax
from experiments import common
from imaml_jax.networks import conv4
from imaml_jax.types import Batch, Task


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    ways: int = 20
    """Classes of the task, at least 2."""
    shots: int = 5
    """Support and query examples a class."""
    filters: int = 64
    """Channels of the network."""
    num_steps: tuple[int, ...] = (2, 4, 8, 16, 32)
    """Inner steps, each at least 2: a loop of one step is compiled away."""
    rounds: int = 5
    """Interleaved rounds of the timing; 0 measures memory only."""
    output: Path = Path("runs/compute_and_memory")
    """Where to write, without an ending."""


class Line(NamedTuple):
    """A least-squares line: how much a step costs, what remains without steps, and the fit."""

    slope: float
    intercept: float
    r_squared: float


def main(config: Config) -> dict[str, Any]:
    """Measures, writes and prints.

    Returns:
      For each algorithm its temporary bytes, seconds and peak device bytes (None where the device
      does not tell) over `num_steps`, and the lines fitted to bytes and seconds.

    Raises:
      ValueError: a setting out of its range.
    """
    _check(config)
    network = conv4(config.ways, filters=config.filters)
    params = network.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    cells = [(name, steps) for steps in config.num_steps for name in contenders(config, 2)]
    programs, temp = {}, {}
    for name, steps in cells:
        learner = contenders(config, steps)[name]
        lowered = jax.jit(partial(common.meta_gradient, learner)).lower(params, _task(config, 0))
        programs[name, steps] = lowered.compile()
        temp[name, steps] = programs[name, steps].memory_analysis().temp_size_in_bytes
    # The device's peak only grows: the smallest programs first.
    peak = {}
    for cell in sorted(cells, key=lambda cell: temp[cell]):
        jax.block_until_ready(programs[cell](params, _task(config, 0)))
        peak[cell] = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    times = {cell: [] for cell in cells}
    for round_number in range(config.rounds):
        task = jax.block_until_ready(_task(config, round_number + 1))
        for cell in cells:
            started = time.perf_counter()
            jax.block_until_ready(programs[cell](params, task))
            times[cell].append(time.perf_counter() - started)
    rows = {}
    for name in contenders(config, 2):
        own = [(name, steps) for steps in config.num_steps]
        seconds = [statistics.median(times[cell]) for cell in own] if config.rounds else None
        rows[name] = {
            "temp_bytes": [temp[cell] for cell in own],
            "peak_device_bytes": [peak[cell] for cell in own],
            "seconds": seconds,
            "bytes_line": fit(config.num_steps, [temp[cell] for cell in own])._asdict(),
            "seconds_line": seconds and fit(config.num_steps, seconds)._asdict(),
        }
    settings = dataclasses.asdict(config) | {"output": str(config.output)}
    results = {**settings, "algorithms": rows, **common.provenance()}
    config.output.parent.mkdir(parents=True, exist_ok=True)
    path = config.output.with_name(config.output.name + ".json")
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    draw(results, path.with_suffix(".png"))
    print(table(results))
    return results


def contenders(config: Config, steps: int) -> dict[str, imaml_jax.MetaLearner]:
    """The learners measured, by name."""
    network, loss = conv4(config.ways, filters=config.filters), imaml_jax.cross_entropy
    settings = {"inner": optax.sgd(0.05), "num_steps": steps}
    solve = partial(imaml_jax.solve_cg_steihaug, tol=0.0, max_steps=5)
    return {
        "MAML": imaml_jax.maml(network, loss, **settings, remat=False),
        "MAML, steps recomputed": imaml_jax.maml(network, loss, **settings),
        "first-order MAML": imaml_jax.fomaml(network, loss, **settings),
        "iMAML, 5 CG": imaml_jax.imaml(network, loss, **settings, solve=solve),
    }


def fit(steps: Sequence[int], values: Sequence[float]) -> Line:
    """Least squares; a constant fits a flat line with `r_squared` 1."""
    slope, intercept = np.polyfit(steps, values, 1)
    residual = np.var(np.asarray(values) - slope * np.asarray(steps) - intercept)
    total = np.var(values)
    return Line(float(slope), float(intercept), float(1 - residual / total) if total else 1.0)


def _task(config: Config, seed: int) -> Task:
    labels = jnp.tile(jnp.arange(config.ways), config.shots)
    images = jax.random.uniform(jax.random.key(seed), (2, labels.size, 28, 28, 1))
    return Task(Batch(images[0], labels), Batch(images[1], labels))


def table(results: dict[str, Any]) -> str:
    """The measurements as text."""
    steps = results["num_steps"]
    lines = [
        f"one meta-gradient, {results['ways']}-way {results['shots']}-shot, "
        f"{results['filters']} filters, one device of {results['device']}",
        f"{'inner steps':32}" + "".join(f"{count:>9}" for count in steps) + "   a step      R²",
    ]
    for name, row in results["algorithms"].items():
        line = row["bytes_line"]
        values = "".join(f"{value / 2**20:9.1f}" for value in row["temp_bytes"])
        fitted = f"{line['slope'] / 2**20:9.3f} {line['r_squared']:7.4f}"
        lines.append(f"{name + ', MiB':32}{values}{fitted}")
    for name, row in results["algorithms"].items():
        if row["seconds"]:
            line = row["seconds_line"]
            values = "".join(f"{1e3 * value:9.0f}" for value in row["seconds"])
            fitted = f"{1e3 * line['slope']:9.3f} {line['r_squared']:7.4f}"
            lines.append(f"{name + ', ms':32}{values}{fitted}")
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Both figures."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    memory, seconds = figure.subplots(1, 2)
    for name, row in results["algorithms"].items():
        memory.plot(results["num_steps"], [b / 2**20 for b in row["temp_bytes"]], "o-", label=name)
        if row["seconds"]:
            seconds.plot(results["num_steps"], row["seconds"], "o-", label=name)
    memory.set(xlabel="inner steps", ylabel="temporary memory (MiB)")
    seconds.set(xlabel="inner steps", ylabel="seconds a meta-gradient")
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    memory.legend()
    figure.savefig(path, dpi=120)


def _check(config: Config) -> None:
    if len(config.num_steps) < 2 or min(config.num_steps) < 2:
        raise ValueError(f"num_steps={config.num_steps} must name two counts or more, all >= 2")
    for name, least in (("ways", 2), ("shots", 1), ("filters", 1), ("rounds", 0)):
        if getattr(config, name) < least:
            raise ValueError(f"{name}={getattr(config, name)} must be at least {least}")


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
