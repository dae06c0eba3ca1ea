"""Which task mapping, convolution and matrix precision are fastest on this device.

    python -m experiments.platform_defaults

Times iMAML's meta-gradient (Hessian, 5 CG steps) for the benchmark's workload, for 20-way 5-shot
Omniglot and for 5-way 1-shot mini-ImageNet, and prints the rate as a share of that of large matrix
products in the same precision, the seconds that the device was busy, and the kernels launched. Only
"highest" is float32 in full on every device; what the others cost in accuracy is the difference
from lax.conv in "highest". Every cell is written to OUTPUT.json when it is done, and a second run
goes on from there.
"""

import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import imaml_jax
from experiments import common
from experiments.benchmark.profile import traced
from experiments.benchmark.workload import flops, forward_flops
from imaml_jax.convolution import convolve, lax_convolve
from imaml_jax.mapping import MapTasks, map_over_tasks
from imaml_jax.networks import conv4
from imaml_jax.types import Batch, Task

CONVOLUTIONS = {"patches": convolve, "lax": lax_convolve}
INNER_RATE, REG_STRENGTH, CG_STEPS = 0.05, 2.0, 5
_MATRIX = 4096


class Workload(NamedTuple):
    """Shapes of a meta-gradient."""

    num_tasks: int
    ways: int
    shots: int
    queries: int
    inner_steps: int
    side: int
    channels: int
    network: dict[str, Any]


WORKLOADS = {
    "reference": Workload(16, 5, 1, 15, 16, 28, 1, {"filters": 64}),
    "omniglot": Workload(16, 20, 5, 5, 16, 28, 1, {"filters": 64}),
    "mini_imagenet": Workload(4, 5, 1, 15, 10, 84, 3, {"filters": 32, "downsample": "max_pool"}),
}


class Cell(NamedTuple):
    """What is timed at once."""

    workload: str
    map_tasks: MapTasks
    convolution: str
    precision: str


@dataclasses.dataclass(frozen=True)
class Config:
    """What is timed."""

    workloads: tuple[Literal["reference", "omniglot", "mini_imagenet"], ...] = (
        *("reference", "omniglot", "mini_imagenet"),
    )
    """The workloads, in this order."""
    map_tasks: tuple[str, ...] = ("vmap", "4", "map")
    """Mappings of tasks: vmap, map, or tasks a chunk."""
    convolutions: tuple[Literal["patches", "lax"], ...] = ("patches", "lax")
    """Patches and a matrix product, or lax.conv."""
    precisions: tuple[Literal["highest", "high", "default"], ...] = ("highest", "default")
    """Of matrix products and convolutions."""
    rounds: int = 5
    """Timed runs of each cell."""
    max_seconds: float = 480.0
    """No new cell is begun after this many seconds."""
    output: Path = Path("runs/platform_defaults")
    """Where to write, without an ending."""


def main(config: Config) -> list[dict[str, Any]]:
    """Times what is not yet in the output, writes and prints.

    Returns:
      One row a cell, those of earlier runs on the same device and versions included.

    Raises:
      ValueError: a setting out of its range.
    """
    if config.rounds < 1:
        raise ValueError(f"rounds={config.rounds} must be at least 1")
    if not config.max_seconds > 0:
        raise ValueError(f"max_seconds={config.max_seconds} must be positive")
    mappings: list[MapTasks] = [int(m) if m.isdigit() else m for m in config.map_tasks]
    for mapping in mappings:
        map_over_tasks(lambda shared: shared, mapping)
    common.check_output(config.output)
    common.cache_compilations()
    started = time.perf_counter()
    path = config.output.with_name(config.output.name + ".json")
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    where = common.provenance()
    rows = [r for r in rows if all(r[k] == where[k] for k in ("device", "versions"))]
    done = {tuple(row[name] for name in Cell._fields) for row in rows}
    axes = (config.workloads, mappings, config.convolutions, config.precisions)
    rates, exact = {}, {}
    for cell in map(Cell._make, itertools.product(*axes)):
        if cell in done or time.perf_counter() - started > config.max_seconds:
            continue
        if cell.precision not in rates:
            rates[cell.precision] = _matmul_rate(cell.precision)
        if cell.workload not in exact:
            exact[cell.workload] = _compile(Cell(cell.workload, "map", "lax", "highest"))()
        try:
            row = measure(cell, config.rounds, exact[cell.workload], rates[cell.precision])
        except jax.errors.JaxRuntimeError as error:  # most likely out of memory
            row = {"error": str(error)[:500]}
        rows.append(cell._asdict() | row | where)
        common.write_json(path, rows)
        print(line(rows[-1]), flush=True)
    print(f"\n{summary(rows)}", flush=True)
    return rows


def measure(cell: Cell, rounds: int, exact: Any, matmul_rate: float) -> dict[str, Any]:
    """Seconds, memory and accuracy of one cell."""
    work = WORKLOADS[cell.workload]
    started = time.perf_counter()
    run = _compile(cell)
    compiled_in = time.perf_counter() - started
    difference = _difference(run(), exact)
    times = _times(run, rounds)
    _, operations = traced(run)
    forward = forward_flops(
        work.side,
        work.channels,
        work.network["filters"],
        work.ways,
        pools=work.network.get("downsample") == "max_pool",
    )
    products = flops(
        "imaml",
        forward,
        num_tasks=work.num_tasks,
        support=work.ways * work.shots,
        query=work.ways * work.queries,
        inner_steps=work.inner_steps,
        cg_steps=CG_STEPS,
    )
    seconds = statistics.median(times)
    return {
        "seconds": seconds,
        "all_seconds": times,
        "compile_seconds": compiled_in,
        "temp_bytes": run.args[0].memory_analysis().temp_size_in_bytes,
        "launches": sum(map(len, operations.values())),
        "busy_seconds": sum(map(sum, operations.values())),
        "difference": difference,
        "flops": products,
        "matmul_flops": matmul_rate,
        "share_of_matmul": products / seconds / matmul_rate,
    }


def _compile(cell: Cell) -> partial:
    """The mean meta-gradient of the cell, compiled, with its arguments in place."""
    work = WORKLOADS[cell.workload]
    convolution = partial(CONVOLUTIONS[cell.convolution], precision=cell.precision)
    network = conv4(work.ways, convolution=convolution, **work.network)
    image = jnp.zeros((1, work.side, work.side, work.channels))
    params, tasks = network.init(jax.random.key(0), image), _tasks(work)
    learner = imaml_jax.imaml(
        network,
        imaml_jax.cross_entropy,
        inner=optax.sgd(INNER_RATE),
        num_steps=work.inner_steps,
        reg_strength=REG_STRENGTH,
        solve=partial(imaml_jax.solve_cg_steihaug, tol=0.0, max_steps=CG_STEPS),
    )
    mapped = map_over_tasks(partial(common.meta_gradient, learner), cell.map_tasks)
    mean = jax.jit(lambda *args: jax.tree.map(lambda g: g.mean(0), mapped(*args)))
    return partial(_run, mean.lower(params, tasks).compile(), params, tasks)


def _run(program: Any, *args: Any) -> Any:
    return jax.block_until_ready(program(*args))


def _tasks(work: Workload) -> Task:
    batches = []
    for i, examples in enumerate((work.shots, work.queries)):
        labels = jnp.tile(jnp.arange(work.ways), (work.num_tasks, examples))
        shape = (*labels.shape, work.side, work.side, work.channels)
        batches.append(Batch(jax.random.uniform(jax.random.key(i), shape), labels))
    return Task(*batches)


def _difference(found: Any, exact: Any) -> float:
    found, exact = (np.asarray(ravel_pytree(tree)[0], np.float64) for tree in (found, exact))
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def _matmul_rate(precision: str) -> float:
    """Operations a second of large matrix products."""
    matrix = jnp.full((_MATRIX, _MATRIX), 1 / _MATRIX)
    product = partial(_run, jax.jit(partial(jnp.matmul, precision=precision)), matrix, matrix)
    product()
    return 2 * _MATRIX**3 / min(_times(product, 5))


def _times(run: Callable[[], Any], rounds: int) -> list[float]:
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return times


def line(row: dict[str, Any]) -> str:
    """One cell as text."""
    cell = f"{row['workload']}, {row['map_tasks']}, {row['convolution']}, {row['precision']}"
    if "error" in row:
        return f"{cell:40}{row['error'].splitlines()[0]}"
    return (
        f"{cell:40}{1e3 * row['seconds']:9.1f} ms, {100 * row['share_of_matmul']:5.1f}% of matrix "
        f"products, busy {1e3 * row['busy_seconds']:8.1f} ms in {row['launches']} kernels, "
        f"{row['temp_bytes'] / 2**20:8.1f} MiB, compiled in {row['compile_seconds']:5.1f} s, "
        f"difference {row['difference']:.0e}"
    )


def summary(rows: list[dict[str, Any]]) -> str:
    """The fastest cell of each workload and precision."""
    fine = [row for row in rows if "error" not in row]
    lines = ["fastest:"]
    for group in sorted({(row["workload"], row["precision"]) for row in fine}):
        own = [row for row in fine if (row["workload"], row["precision"]) == group]
        lines.append(line(min(own, key=lambda row: row["seconds"])))
    return "\n".join(lines)


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
