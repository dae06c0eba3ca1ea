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

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

import imaml_jax
from experiments.benchmark import workload
from experiments.benchmark.profile import traced
from experiments.shared import common
from imaml_jax.networks import conv4
from imaml_jax.networks.convolution import convolve, lax_convolve
from imaml_jax.training.mapping import MapTasks, map_over_tasks
from imaml_jax.types import Batch, Task

CONVOLUTIONS = {"patches": convolve, "lax": lax_convolve}
_MATRIX, _CPU_MATRIX, _CHAIN, _NUMBERS = 8192, workload.MATRIX, 8, 2**26
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
        *(workload.TASKS, workload.WAYS, 1, workload.QUERIES, workload.INNER_STEPS),
        *(workload.SIDE, 1, {"filters": workload.FILTERS, "epsilon": workload.EPSILON}),
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


@dataclasses.dataclass(frozen=True)
class Config:
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
    rounds: int = 5
    """Timed runs of each cell, at least 1."""
    max_seconds: float = 480.0
    """No cell is begun that would end later than this if it took as long as the longest so far,
    above 0."""
    output: Path = Path("runs/platform_defaults")
    """Where to write, without an ending."""


def main(config: Config) -> list[dict[str, Any]]:
    """Times what is not yet in the output, writes and prints.

    Returns:
      One row a cell, those of earlier runs on the same device and versions included.

    Raises:
      ValueError: a setting out of its range.
    """
    common.check_least(config, rounds=1)
    if not config.max_seconds > 0:
        raise ValueError(f"max_seconds={config.max_seconds} must be positive")
    mappings: list[MapTasks] = [int(m) if m.isdigit() else m for m in config.map_tasks]
    for mapping in mappings:
        map_over_tasks(lambda shared: shared, mapping)
    common.check_output(config.output)
    path = common.with_ending(config.output, "json")
    stored, where = _stored(path), common.provenance()
    here = [row for row in stored if all(row[name] == where[name] for name in _SAME_PLACE)]
    others = [row for row in stored if row not in here]
    rows = [row for row in here if "error" not in row]
    if rows:
        print(f"{len(rows)} cells of {sorted({row['date'] for row in rows})} in {path}")
    done = {tuple(row[name] for name in Cell._fields) for row in rows}
    orders = (config.precisions, config.convolutions, mappings, config.workloads)
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
        self._rates, self._exact = {}, {}
        self._bytes_a_second = None

    def matmul_rate(self, precision: str) -> float:
        """Operations a second of large matrix products."""
        if precision not in self._rates:
            side = _CPU_MATRIX if jax.default_backend() == "cpu" else _MATRIX
            matrix = jax.random.normal(jax.random.key(0), (side, side)) / math.sqrt(side)
            chain = jax.jit(
                lambda a: jax.lax.fori_loop(
                    0, _CHAIN, lambda _, b: jnp.matmul(b, a, precision=precision), a
                )
            )
            jax.block_until_ready(chain(matrix))
            seconds = min(_times(lambda: jax.block_until_ready(chain(matrix)), 3))
            self._rates[precision] = 2 * _CHAIN * side**3 / seconds
        return self._rates[precision]

    def bytes_a_second(self) -> float:
        """Bytes read and written a second by a large elementwise operation."""
        if self._bytes_a_second is None:
            numbers = jnp.zeros(_NUMBERS)
            add = jax.jit(lambda x: x + 1)
            jax.block_until_ready(add(numbers))
            seconds = min(_times(lambda: jax.block_until_ready(add(numbers)), 3))
            self._bytes_a_second = 8 * _NUMBERS / seconds
        return self._bytes_a_second

    def exact(self, name: str) -> Any:
        """The meta-gradient of a workload by lax.conv in full precision."""
        if name not in self._exact:
            program, args = _lower(Cell(name, "map", "lax", "highest"))
            self._exact[name] = jax.device_get(program.compile()(*args)[0])
        return self._exact[name]


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
    layers = workload.layers(
        work.side,
        work.channels,
        work.network["filters"],
        work.ways,
        pools=work.network.get("downsample") == "max_pool",
    )
    support = work.ways * work.shots
    totals = []
    for first, *others in (
        [layer.flops for layer in layers],
        [layer.numbers + layer.weights / support for layer in layers],
    ):
        total = workload.flops(
            "imaml",
            (first, sum(others)),
            num_tasks=work.num_tasks,
            support=support,
            query=work.ways * work.queries,
            inner_steps=work.inner_steps,
            cg_steps=workload.CG_STEPS,
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
    args = network.init(jax.random.key(0), image), _tasks(work)
    learner = imaml_jax.imaml(
        network,
        imaml_jax.cross_entropy,
        inner=optax.sgd(workload.INNER_RATE),
        num_steps=work.inner_steps,
        reg_strength=workload.REG_STRENGTH,
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


def _tasks(work: Workload) -> Task:
    batches = []
    for i, examples in enumerate((work.shots, work.queries)):
        labels = jnp.tile(jnp.arange(work.ways), (work.num_tasks, examples))
        shape = (*labels.shape, work.side, work.side, work.channels)
        batches.append(Batch(jax.random.uniform(jax.random.key(i), shape), labels))
    return Task(*batches)


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
