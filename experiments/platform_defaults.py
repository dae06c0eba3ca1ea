"""Which task mapping, convolution and matrix precision are fastest on this device.

    python -m experiments.platform_defaults

Times iMAML's meta-gradient (Hessian, 5 CG steps) for the benchmark's workload, for 20-way 5-shot
Omniglot and for 5-way 1-shot mini-ImageNet, and prints it as a share of the roofline: of the time
that the device needs for as many operations at its rate of large matrix products in the same
precision, or to move once what each product reads and writes, whichever is longer. Also printed:
how long the device was busy and in how many kernels, as far as its profiler tells, and the relative
difference from lax.conv in "highest", which alone is float32 in full on every device; convolutions
only have the precision named. Every cell is written to OUTPUT.json when it is done; a second run on
the same machine goes on from there.
"""

import json
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

import imaml_jax
from experiments.benchmark import workload
from experiments.benchmark.profile import traced
from experiments.shared import common, reports
from experiments.shared.inner_problems import random_tasks
from imaml_jax.learners.settings import Count, Positive, Record
from imaml_jax.networks import conv4
from imaml_jax.networks.convolution import convolve, lax_convolve
from imaml_jax.training.mapping import MapTasks, map_over_tasks
from imaml_jax.types import Task

CONVOLUTIONS = {"patches": convolve, "lax": lax_convolve}
_MATRIX, _CPU_MATRIX, _CHAIN, _NUMBERS = 8192, workload.MATRIX, 8, 2**26
_SIZE = workload.REFERENCE
_SAME_PLACE = ("device", "machine", "cores", "versions")
# Largest difference with which a cell can be picked. Rounding alone gives 2e-2 on the reference
# workload: it moves activations across the kink of ReLU.
_ACCURATE = 1e-1


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
    "reference": Workload(
        *(_SIZE.tasks, workload.WAYS, 1, workload.QUERIES, _SIZE.implicit_steps),
        *(_SIZE.side, 1, {"filters": _SIZE.filters, "epsilon": workload.EPSILON}),
    ),
    "omniglot": Workload(16, 20, 5, 5, 16, 28, 1, {"filters": 64}),
    "mini_imagenet": Workload(4, 5, 1, 15, 10, 84, 3, {"filters": 32, "downsample": "max_pool"}),
}


class Cell(NamedTuple):
    """What is timed at once."""

    workload: str
    map_tasks: MapTasks
    convolution: str
    precision: str


@dataclass(frozen=True)
class Config(Record):
    """What is timed."""

    workloads: tuple[Literal["reference", "omniglot", "mini_imagenet"], ...] = (
        *("reference", "omniglot", "mini_imagenet"),
    )
    """The workloads, in this order."""
    map_tasks: tuple[str, ...] = ("vmap", "2", "map")
    """Mappings of tasks: vmap, map, or tasks a chunk."""
    convolutions: tuple[Literal["patches", "lax"], ...] = ("patches", "lax")
    """Patches and a matrix product, or lax.conv."""
    precisions: tuple[Literal["highest", "high", "default"], ...] = ("highest", "default")
    """Of convolutions; what else there is stays in full."""
    rounds: Count = 5
    """Timed runs of each cell, at least 1."""
    max_seconds: Positive = 480.0
    """No cell is begun that would end later than this if it took as long as the longest so far,
    above 0."""
    output: Path = Path("runs/platform_defaults")
    """Where to write, without an ending."""

    def check_together(self) -> None:
        for mapping in self.mappings():
            map_over_tasks(lambda shared: shared, mapping)

    def mappings(self) -> list[MapTasks]:
        """`map_tasks`, with the tasks a chunk as numbers."""
        return [int(m) if m.isdigit() else m for m in self.map_tasks]


def main(config: Config) -> list[dict[str, Any]]:
    """Times what is not yet in the output, writes and prints.

    Returns:
      One row a cell, those of earlier runs on the same device and versions included.

    Raises:
      ValueError: the output is there and holds something else.
    """
    common.check_output(config.output)
    path = common.with_ending(config.output, "json")
    stored, where = _stored(path), common.provenance()
    here = [row for row in stored if all(row[name] == where[name] for name in _SAME_PLACE)]
    others = [row for row in stored if row not in here]
    rows = [row for row in here if "error" not in row]
    if rows:
        print(f"{len(rows)} cells of {sorted({row['date'] for row in rows})} in {path}")
    done = {tuple(row[name] for name in Cell._fields) for row in rows}
    orders = (config.precisions, config.convolutions, config.mappings(), config.workloads)
    cells = [Cell(name, how, conv, precision) for precision, conv, how, name in product(*orders)]
    measured, started, longest = Measurements(), time.perf_counter(), 0.0
    for cell in (cell for cell in cells if cell not in done):
        begun = time.perf_counter()
        if begun - started + longest > config.max_seconds:
            break
        try:
            row = measure(cell, config.rounds, measured)
        except jax.errors.JaxRuntimeError as error:  # most likely out of memory
            row = {"error": str(error)[:500]}
        longest = max(longest, time.perf_counter() - begun)
        rows.append(cell._asdict() | row | where)
        common.write_json(path, [*others, *rows])
        print(line(rows[-1]), flush=True)
    print(f"\n{summary(rows)}", flush=True)
    return rows


class Measurements:
    """What cells share, measured when it is first asked for."""

    def __init__(self) -> None:
        self.matmul_rate = cache(_matmul_rate)
        self.bytes_a_second = cache(_bytes_a_second)
        self.exact = cache(_exact)


def _matmul_rate(precision: str) -> float:
    """Operations a second of large matrix products."""
    side = _CPU_MATRIX if jax.default_backend() == "cpu" else _MATRIX
    matrix = jax.random.normal(jax.random.key(0), (side, side)) / math.sqrt(side)

    def chain(a):
        product = partial(jnp.matmul, precision=precision)
        return jax.lax.fori_loop(0, _CHAIN, lambda _, b: product(b, a), a)

    return 2 * _CHAIN * side**3 / _least_seconds(chain, matrix)


def _bytes_a_second() -> float:
    """Bytes read and written a second by a large elementwise operation."""
    return 8 * _NUMBERS / _least_seconds(lambda x: x + 1, jnp.zeros(_NUMBERS))


def _least_seconds(fn: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
    run = partial(jax.jit(fn), x)
    jax.block_until_ready(run())
    return min(_times(run, 3))


def _exact(name: str) -> Any:
    """The meta-gradient of a workload by lax.conv in full precision."""
    program, args = _lower(Cell(name, "map", "lax", "highest"))
    return jax.device_get(program.compile()(*args)[0])


def measure(cell: Cell, rounds: int, measured: Measurements) -> dict[str, Any]:
    """Seconds, memory and accuracy of one cell; "error" where solves took too few CG steps."""
    work = WORKLOADS[cell.workload]
    lowered, args = _lower(cell)
    started = time.perf_counter()
    program = lowered.compile()
    compiled_in = time.perf_counter() - started

    def run() -> Any:
        return jax.block_until_ready(program(*args))

    found, steps = run()
    if steps != workload.CG_STEPS:
        return {"error": f"took {steps:g} CG steps on average"}
    times = _times(run, rounds)
    _, operations = traced(run) if jax.default_backend() != "cpu" else (None, {})
    products, numbers = costs(work)
    rate, bandwidth = measured.matmul_rate(cell.precision), measured.bytes_a_second()
    seconds = statistics.median(times)
    return {
        "seconds": seconds,
        "all_seconds": times,
        "compile_seconds": compiled_in,
        "temp_bytes": program.memory_analysis().temp_size_in_bytes,
        "kernels": sum(map(len, operations.values())) or None,
        "busy_seconds": sum(map(sum, operations.values())) or None,
        "difference": common.relative_difference(found, measured.exact(cell.workload)),
        "flops": products,
        "least_bytes": 4 * numbers,
        "matmul_flops": rate,
        "bytes_a_second": bandwidth,
        "share_of_matmul": products / rate / seconds,
        "share_of_roofline": max(products / rate, 4 * numbers / bandwidth) / seconds,
    }


def costs(work: Workload) -> tuple[float, float]:
    """Operations of the matrix products, and numbers that these read and write at least."""
    size = workload.Size(
        work.side,
        work.channels,
        work.network["filters"],
        work.network.get("downsample") == "max_pool",
        work.num_tasks,
        implicit_steps=work.inner_steps,
    )
    layers = workload.layers(size, work.ways)
    support = work.ways * work.shots
    totals = []
    for first, *others in (
        [layer.flops for layer in layers],
        [layer.numbers + layer.weights / support for layer in layers],
    ):
        total = workload.flops(
            "imaml",
            size,
            (first, sum(others)),
            support=support,
            query=work.ways * work.queries,
        )
        totals.append(total)
    return totals[0], totals[1]


def _lower(cell: Cell) -> tuple[Any, tuple[Any, Task]]:
    """The mean meta-gradient of the cell with the mean number of CG steps, and its arguments."""
    work = WORKLOADS[cell.workload]
    convolution = partial(CONVOLUTIONS[cell.convolution], precision=cell.precision)
    head = jax.nn.initializers.normal(0.05)
    network = conv4(work.ways, convolution=convolution, head_init=head, **work.network)
    image = jnp.zeros((1, work.side, work.side, work.channels))
    tasks = random_tasks(work.num_tasks, work.ways, (work.shots, work.queries), image.shape[1:])
    args = network.init(jax.random.key(0), image), tasks
    learner = imaml_jax.imaml(
        network,
        imaml_jax.cross_entropy,
        inner=optax.sgd(workload.INNER_RATE),
        num_steps=work.inner_steps,
        reg_strength=_SIZE.reg_strength,
        solve=partial(imaml_jax.solve_cg_steihaug, tol=0.0, max_steps=workload.CG_STEPS),
    )

    def of_task(params, task):
        key, step = jax.random.key(0), jnp.zeros((), jnp.int32)
        grads, info = learner.meta_grad(params, task, key, step)
        return grads, info.solve_steps.astype(jnp.float32)

    return jax.jit(common.mean_over_tasks(of_task, cell.map_tasks)).lower(*args), args


def _stored(path: Path) -> list[dict[str, Any]]:
    """The rows of earlier runs.

    Raises:
      ValueError: the file is there and holds something else.
    """
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        if all(row.keys() >= {*Cell._fields, *_SAME_PLACE, "date"} for row in rows):
            return rows
    except (AttributeError, TypeError, ValueError):
        pass
    raise ValueError(f"{path} holds no cells of this experiment; name another output or delete it")


def _times(run: Callable[[], Any], rounds: int) -> list[float]:
    return reports.seconds_in_rounds({"": run}, rounds)[""]


def line(row: dict[str, Any]) -> str:
    """One cell as text."""
    cell = f"{row['workload']}, {row['map_tasks']}, {row['convolution']}, {row['precision']}"
    if "error" in row:
        return f"{cell:40}{row['error'].splitlines()[0]}"
    busy = ""
    if row["kernels"] is not None:
        busy = f"busy {1e3 * row['busy_seconds']:.1f} ms in {row['kernels']} kernels, "
    return (
        f"{cell:40}{1e3 * row['seconds']:9.1f} ms, {100 * row['share_of_matmul']:5.1f}% of matrix "
        f"products, {100 * row['share_of_roofline']:5.1f}% of the roofline, {busy}"
        f"{row['temp_bytes'] / 2**20:.1f} MiB, compiled in {row['compile_seconds']:.1f} s, "
        f"difference {row['difference']:.0e}"
    )


def summary(rows: Iterable[dict[str, Any]]) -> str:
    """For each precision, the mapping and convolution whose times have the least product."""
    times: dict[tuple[str, Any, str], dict[str, float]] = {}
    for row in rows:
        if "error" not in row and row["difference"] < _ACCURATE:
            how = (row["precision"], row["map_tasks"], row["convolution"])
            times.setdefault(how, {})[row["workload"]] = row["seconds"]
    lines = []
    for precision in dict.fromkeys(how[0] for how in times):
        own = {how: found for how, found in times.items() if how[0] == precision}
        most = max(map(len, own.values()))
        complete = {how: found for how, found in own.items() if len(found) == most}
        _, mapping, convolution = min(complete, key=lambda how: math.prod(complete[how].values()))
        lines.append(
            f"fastest in {precision} over {most} workload(s): map_tasks={mapping}, {convolution}"
        )
    return "\n".join(lines) or "no cell was timed"


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
