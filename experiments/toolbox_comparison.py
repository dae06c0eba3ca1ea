"""Implicit gradients in this toolbox, jaxopt and optimistix: code, error, time and memory.

    python -m experiments.toolbox_comparison

Five bilevel problems in float64, whose gradients NumPy gives in closed form: entropic transport
(Sinkhorn, 30 x 20), Kepler's equation of 1,000 orbits, a ridge regression with 200 strengths, a
logistic regression with 500, and a deep equilibrium layer with 1,000 states. The libraries
differentiate the same solver of the inner problem, optimistix also one of its own, by their default
linear solver and, where that says something, by the same one. Where a default does not reach the
accuracy of the others, it has `tol`.

Libraries take turns, in compilation as in the gradients; the times of a contender are compared with
those of this toolbox before it in the table, round by round: median and quartiles of the ratio.
Compilation is tracing, lowering and compiling with empty caches, in seconds of the processor, which
other work on the machine does not change. Seconds are medians, beside those of the inner solution
alone. Eager compilations are those of one `jax.grad` without `jax.jit`, after a first one. Lines of
code are those of one function for one problem, imports included. Libraries that are not installed
are left out: `pip install -e .[crosscheck]`. Writes OUTPUT.json.
"""

import contextlib
import dataclasses
import gc
import importlib.metadata
import importlib.util
import inspect
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np

from experiments.shared import common, reports
from experiments.shared.toolbox_contenders import CONTENDERS, Contender
from experiments.shared.toolbox_problems import PROBLEMS, Problem
from imaml_jax.learners.settings import Count, Range, Record, Seed

_LEAST_SECONDS = 0.01
_COMPILED = "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass(frozen=True)
class Config(Record):
    """What is measured."""

    problems: tuple[Literal["sinkhorn", "kepler", "ridge", "logistic", "equilibrium"], ...] = (
        "sinkhorn",
        "kepler",
        "ridge",
        "logistic",
        "equilibrium",
    )
    """Problems."""
    tol: Annotated[float, Range(above=0, below=1)] = 1e-11
    """Tolerance of the linear solves and of the libraries' own solvers, above 0 and below 1."""
    compilations: Count = 5
    """Interleaved rounds of the compilation, at least 1."""
    rounds: Count = 31
    """Interleaved rounds of the gradients, at least 1."""
    seed: Seed = 0
    """Seed of the data, at least 0."""
    output: Path = Path("runs/toolbox_comparison")
    """Where to write, without an ending."""

    def check_together(self) -> None:
        """There is something to measure."""
        reports.check_not_empty(self, "problems")


def main(config: Config) -> dict[str, Any]:
    """Measures, writes and prints.

    Returns:
      One row for each contender that is installed, the libraries that are not, and provenance.
    """
    common.check_output(config.output)
    libraries = sorted({name for contender in CONTENDERS for name in contender.libraries})
    missing = [name for name in libraries if importlib.util.find_spec(name) is None]
    rows = []
    with jax.enable_x64(True), _without_stored_programs():
        for name in config.problems:
            present = [
                contender
                for contender in CONTENDERS
                if contender.problem == name and not set(contender.libraries) & set(missing)
            ]
            rows += measure(config, PROBLEMS[name](np.random.default_rng(config.seed)), present)
    versions = common.provenance()["versions"] | {
        name: importlib.metadata.version(name)
        for name in libraries
        if name not in ("imaml_jax", *missing)
    }
    return reports.report(config, {"rows": rows, "missing": missing, "versions": versions}, table)


def measure(config: Config, problem: Problem, contenders: list[Contender]) -> list[dict[str, Any]]:
    """The rows of one problem; to be called with float64 enabled."""
    solvers = [_solver(contender, problem, config.tol) for contender in contenders]
    gradients = [jax.grad(partial(problem.loss, solver)) for solver in solvers]
    solutions = [partial(problem.loss, solver) for solver in solvers]
    programs = {
        (part, i): jax.jit(fn).lower(*problem.args).compile()
        for part, fns in (("gradient", gradients), ("solution", solutions))
        for i, fn in enumerate(fns)
    }
    compile_seconds = _compile_seconds(config, problem, contenders)  # after the imports of each
    seconds = _run_seconds(config, problem, programs)
    rows, ours = [], 0
    for i, contender in enumerate(contenders):
        ours = i if contender.libraries == ("imaml_jax",) else ours
        gradient, timed = programs["gradient", i], seconds["gradient", i]
        memory = gradient.memory_analysis()
        rows.append(
            {
                "problem": contender.problem,
                "library": contender.libraries[0],
                "inner": contender.inner,
                "linear": contender.linear,
                "lines": lines_of_code(contender.make),
                "error": common.relative_difference(gradient(*problem.args), problem.exact),
                "compile_seconds": statistics.median(compile_seconds[i]),
                "compile_ratio": ratio(compile_seconds[i], compile_seconds[ours]),
                "seconds": statistics.median(timed),
                "ratio": ratio(timed, seconds["gradient", ours]),
                "solution_seconds": statistics.median(seconds["solution", i]),
                "all_seconds": timed,
                "all_compile_seconds": compile_seconds[i],
                "temp_bytes": memory.temp_size_in_bytes if memory else None,
                "eager_compilations": eager_compilations(gradients[i], *problem.args),
            }
        )
    return rows


def ratio(seconds: list[float], ours: list[float]) -> tuple[float, float, float]:
    """Median, first and third quartile of the ratios of the rounds."""
    middle, low, high = np.quantile(np.divide(seconds, ours), (0.5, 0.25, 0.75)).tolist()
    return middle, low, high


def lines_of_code(make: Callable[..., Any]) -> int | None:
    """Lines of the body of a function that hold something; None for one of several problems."""
    if isinstance(make, partial):
        return None
    return sum(bool(line.strip()) for line in inspect.getsource(make).splitlines()[1:])


def eager_compilations(fn: Callable[..., Any], *args: Any) -> int:
    """How many programs a call compiles that follows another with the same arguments."""
    jax.block_until_ready(fn(*args))
    count = 0

    def listener(event: str, duration_secs: float, **_: Any) -> None:
        nonlocal count
        del duration_secs
        count += event == _COMPILED

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        jax.block_until_ready(fn(*args))
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    return count


def _compile_seconds(
    config: Config, problem: Problem, contenders: list[Contender]
) -> list[list[float]]:
    """Of the gradients and of the processor, of each contender by rounds."""
    seconds: list[list[float]] = [[] for _ in contenders]
    for _ in range(config.compilations):
        for own, contender in zip(seconds, contenders, strict=True):
            gradient = jax.grad(partial(problem.loss, _solver(contender, problem, config.tol)))
            jax.clear_caches()
            gc.collect()
            started = time.process_time()
            jax.jit(gradient).lower(*problem.args).compile()
            own.append(time.process_time() - started)
    return seconds


def _run_seconds(config: Config, problem: Problem, programs: dict[Any, Any]) -> dict[Any, Any]:
    """Of a call, by rounds; each round begins with another program and takes several calls of each.

    So many that their time can be measured beside other work.
    """
    runs = {name: partial(program, *problem.args) for name, program in programs.items()}
    warm = [reports.seconds_in_rounds(runs, 1) for _ in range(2)][-1]
    calls = math.ceil(_LEAST_SECONDS / min(min(own) for own in warm.values()))
    runs = {name: partial(_call, run, calls) for name, run in runs.items()}
    seconds = {name: [] for name in runs}
    for turn in range(config.rounds):
        first = turn % len(runs)
        order = [*runs][first:] + [*runs][:first]
        for name, (spent,) in reports.seconds_in_rounds({n: runs[n] for n in order}, 1).items():
            seconds[name].append(spent / calls)
    return seconds


def _call(run: Callable[[], Any], calls: int) -> None:
    for _ in range(calls):
        jax.block_until_ready(run())


def _solver(contender: Contender, problem: Problem, tol: float) -> Callable[..., jax.Array]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "JAXopt is no longer maintained", DeprecationWarning)
        return contender.make(problem, tol)


@contextlib.contextmanager
def _without_stored_programs() -> Iterator[None]:
    """Nothing that was compiled earlier comes from a file."""
    folder = jax.config.jax_compilation_cache_dir  # pyright: ignore
    _store_programs_in(None)
    try:
        yield
    finally:
        _store_programs_in(folder)


def _store_programs_in(folder: str | None) -> None:
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()  # it reads the setting once


def table(results: dict[str, Any]) -> str:
    """The measurements as text."""
    columns = [("", ""), ("inner", ""), ("linear", ""), ("lines", "d"), ("error", ".0e")]
    columns += [("compile s", ".2f"), ("ratio", ""), ("ms", ".3f"), ("ratio", "")]
    columns += [("solution ms", ".3f"), ("temp KiB", ".0f"), ("eager compilations", "d")]
    rows = [
        (
            f"{row['problem']}, {row['library']}",
            *(row["inner"], row["linear"], row["lines"], row["error"]),
            *(row["compile_seconds"], _ratio_text(row["compile_ratio"])),
            *(1e3 * row["seconds"], _ratio_text(row["ratio"]), 1e3 * row["solution_seconds"]),
            row["temp_bytes"] and row["temp_bytes"] / 1024,
            row["eager_compilations"],
        )
        for row in results["rows"]
    ]
    lines = [f"{results['device']}, {results['machine']}, {results['cores']} cores"]
    lines.append(reports.text_table(columns, rows))
    if results["missing"]:
        lines.append(f"not installed and left out: {', '.join(results['missing'])}")
    return "\n".join(lines)


def _ratio_text(ratio: tuple[float, float, float]) -> str:
    middle, low, high = ratio
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
