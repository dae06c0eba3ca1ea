"""Linear solvers for the meta-gradient at the published task sizes: error, bias and time.

    python -m experiments.solvers

For each size, first-order MAML meta-trains conv4 on glyphs for a while, new tasks are adapted from
there, and every solver is given the linear systems of their meta-gradients. Two errors, relative in
the Euclidean norm: from the solution of the solver's own matrix, and from that with the Hessian,
which is the error of the meta-gradient and for the Gauss-Newton matrix holds its bias; the
solutions are those of MINRES, run to 1e-8. All of that in float64: adaptation drives some
activations onto the kink of ReLU, so that rounding to float32 gives another matrix.
Seconds are those of a system in float32 on one device with its linearisation, medians of
interleaved rounds. Writes OUTPUT.json.
"""

import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax import lax

import imaml_jax
from experiments import glyphs
from experiments.shared import common, reports
from experiments.shared.inner_problems import start_and_tasks
from imaml_jax.data import episodes
from imaml_jax.data import glyphs as glyph_data
from imaml_jax.learners.settings import Count, Positive, Record, Seed
from imaml_jax.networks import Network, conv4
from imaml_jax.types import Batch, LinearOperator, Task

EXACT, MOST_STEPS = 1e-8, 2000
QUERIES, INNER_STEPS, POWER_STEPS = 5, 64, 20
_SYSTEM = ("ways", "shots", "reg_strength")


class Solver(NamedTuple):
    """What is measured.

    Attributes:
      curvature: "Hessian" or "Gauss-Newton".
      name: as printed.
      solve: `(operator, b, largest) -> (x, info)` with an estimate of the largest eigenvalue.
      most_outputs: where more outputs would take too much memory; None for no limit.
    """

    curvature: str
    name: str
    solve: Callable[..., Any]
    most_outputs: int | None = None


class System(NamedTuple):
    """What a task's linear system is made of.

    Attributes:
      params: the adapted parameters.
      query_grad: the right-hand side.
      support: the support examples.
      largest: estimate of the largest eigenvalue of the damped Gauss-Newton matrix.
    """

    params: Any
    query_grad: Any
    support: Any
    largest: jax.Array


# `(solver, system) -> (x, info, operator)`.
Solve = Callable[[Solver, System], tuple[Any, Any, LinearOperator]]
# A solution, what the solver reports, and `||b - A x|| / ||b||`.
Solved = tuple[Any, Any, Any]


@dataclass(frozen=True)
class Config(Record):
    """What is measured."""

    sizes: tuple[str, ...] = ("5x1", "5x5", "20x1", "20x5")
    """Ways x shots."""
    reg_strengths: tuple[Positive, ...] = (2.0, 0.03)
    """Values of lambda: the published one and that of the protocol `common`; each above 0."""
    meta_steps: Count = 100
    """Meta-steps of 8 tasks before, at least 1."""
    num_tasks: Count = 2
    """Linear systems of each size, at least 1."""
    rounds: Count = 3
    """Interleaved rounds of the timing, at least 1."""
    seed: Seed = 0
    """Seed of the initialisation and of the tasks, at least 0."""
    output: Path = Path("runs/solvers")
    """Where to write, without an ending."""

    def check_together(self) -> None:
        reports.check_not_empty(self, "sizes", "reg_strengths")
        if not all(re.fullmatch(r"\d+x\d+", size) for size in self.sizes):
            raise ValueError(f"sizes={self.sizes} must be ways x shots, such as 5x1 20x5")
        if any(ways < 2 or shots < 1 for ways, shots in self.shapes()):
            raise ValueError(f"sizes={self.sizes} must have at least 2 ways and 1 shot")

    def shapes(self) -> list[tuple[int, int]]:
        """The sizes as numbers."""
        pairs = (size.split("x") for size in self.sizes)
        return [(int(ways), int(shots)) for ways, shots in pairs]


def solvers() -> tuple[Solver, ...]:
    """The solvers compared."""

    def plain(solve, **settings):
        return lambda operator, b, _: solve(operator, b, key=jax.random.key(0), **settings)

    def neumann(operator, b, largest):
        step_size = 1 / largest
        return imaml_jax.solve_neumann(operator, b, step_size=step_size, tol=0.0, max_steps=20)

    def cg(steps, **settings):
        return plain(imaml_jax.solve_cg_steihaug, tol=0.0, max_steps=steps, **settings)

    def minres(steps):
        return plain(imaml_jax.solve_minres, tol=0.0, max_steps=steps)

    nystrom = partial(imaml_jax.nystrom_preconditioner, rank=20)
    return (
        Solver("Hessian", "cg, 5 steps", plain(imaml_jax.solve_cg, tol=0.0, max_steps=5)),
        *(Solver("Hessian", f"cg_steihaug, {k} steps", cg(k)) for k in (5, 20, 100)),
        *(Solver("Hessian", f"minres, {k} steps", minres(k)) for k in (5, 20, 100)),
        *(Solver("Gauss-Newton", f"cg_steihaug, {k} steps", cg(k)) for k in (5, 8, 20, 100)),
        Solver("Gauss-Newton", "neumann, 20 terms", neumann),
        Solver("Gauss-Newton", "nystrom, rank 20", plain(imaml_jax.solve_nystrom, rank=20)),
        Solver("Gauss-Newton", "nystrom, rank 20, then 8 cg steps", cg(8, precondition=nystrom)),
        Solver("Gauss-Newton", "woodbury", plain(imaml_jax.solve_woodbury), most_outputs=500),
    )


def main(config: Config) -> list[dict[str, Any]]:
    """Measures, writes and prints.

    Returns:
      One row for each size, lambda and solver.

    Raises:
      ValueError: a task that is larger than the data allow.
    """
    reports.begin(config)
    splits = glyph_data.load()
    for ways, shots in config.shapes():
        for dataset in (splits.train, splits.test):
            episodes.check_task_shape(dataset, ways=ways, shots=shots, queries=QUERIES)
    about = reports.about(config)
    rows = []
    for ways, shots in config.shapes():
        rows += [row | {"about": about} for row in measure(config, ways, shots)]
        common.write_json(common.with_ending(config.output, "json"), rows)
    print(table(rows), flush=True)
    return rows


def measure(config: Config, ways: int, shots: int) -> list[dict[str, Any]]:
    """The rows of one size."""
    network = conv4(ways)
    settings = dict(ways=ways, shots=shots, meta_steps=config.meta_steps, seed=config.seed)
    params, tasks = start_and_tasks(glyphs, config.num_tasks, **settings)
    compared = [s for s in solvers() if ways * ways * shots <= (s.most_outputs or math.inf)]
    rows = []
    for strength in config.reg_strengths:
        prepare = jax.jit(partial(_system, network, strength))
        systems = [prepare(params, task) for task in tasks]
        solve = partial(_solve, network, strength)
        seconds = _seconds(solve, compared, systems, config.rounds)
        exact = {name: _exact(solve, name, systems) for name in ("Hessian", "Gauss-Newton")}
        for solver in compared:
            solved = _solve_all(solve, solver, systems)
            met = [info.min_curvature for _, info, _ in solved if info.min_curvature is not None]
            rows.append(
                {
                    "ways": ways,
                    "shots": shots,
                    "reg_strength": strength,
                    "curvature": solver.curvature,
                    "solver": solver.name,
                    "error": _median_error(solved, exact[solver.curvature]),
                    "error_from_hessian": _median_error(solved, exact["Hessian"]),
                    "residual": statistics.median(float(residual) for *_, residual in solved),
                    "smallest_curvature": float(np.min(met)) if met else None,
                    "seconds": seconds[solver],
                }
            )
    return rows


def _loss(network: Network, params: Any, batch: Batch) -> jax.Array:
    return imaml_jax.cross_entropy(network.apply(params, batch.inputs), batch.targets)


def _system(network: Network, strength: float, params: Any, task: Task) -> System:
    """The linear system of a task's meta-gradient, after adaptation from `params`."""
    loss = partial(_loss, network)
    adapted, _ = imaml_jax.minimize(
        imaml_jax.proximal_objective(loss),
        params,
        params,
        strength,
        task.support,
        tx=imaml_jax.adaptive_gd(0.05),
        num_steps=INNER_STEPS,
    )
    query_grad = jax.grad(loss)(adapted, task.query)
    matvec = _operator(network, "Gauss-Newton", adapted, task.support).matvec

    def power_step(v, _):
        product = matvec(v)
        norm = optax.tree.norm(product)
        return optax.tree.scale(1 / norm, product), norm

    largest = lax.scan(power_step, query_grad, length=POWER_STEPS)[1][-1]
    return System(adapted, query_grad, task.support, strength + largest)


def _operator(network: Network, curvature: str, params: Any, support: Batch) -> LinearOperator:
    if curvature == "Hessian":
        return imaml_jax.hessian(lambda p: _loss(network, p, support), params)
    return imaml_jax.gauss_newton(
        lambda p: network.apply(p, support.inputs),
        lambda outputs: imaml_jax.cross_entropy(outputs, support.targets),
        params,
    )


def _solve(
    network: Network, strength: float, solver: Solver, system: System
) -> tuple[Any, Any, LinearOperator]:
    operator = _operator(network, solver.curvature, system.params, system.support)
    damped = imaml_jax.damped(operator, strength)
    return (*solver.solve(damped, system.query_grad, system.largest), damped)


def _seconds(
    solve: Solve, compared: Sequence[Solver], systems: Sequence[System], rounds: int
) -> dict[Solver, float]:
    """Medians for one system, in float32."""

    def make_run(solver):
        program = jax.jit(lambda system: solve(solver, system)[:2])
        jax.block_until_ready(program(systems[0]))
        return lambda: [program(system) for system in systems]

    seconds = reports.seconds_in_rounds({each: make_run(each) for each in compared}, rounds)
    return {each: statistics.median(own) / len(systems) for each, own in seconds.items()}


def _exact(solve: Solve, curvature: str, systems: Sequence[System]) -> list[Solved] | None:
    """Solutions in float64; None where one was not reached."""

    def minres(operator, b, _):
        return imaml_jax.solve_minres(operator, b, tol=EXACT, max_steps=MOST_STEPS)

    solved = _solve_all(solve, Solver(curvature, "exact", minres), systems)
    return solved if all(info.relative_residual < 10 * EXACT for _, info, _ in solved) else None


def _solve_all(solve: Solve, solver: Solver, systems: Sequence[System]) -> list[Solved]:
    """In float64."""

    @jax.jit
    def program(system):
        x, info, operator = solve(solver, system)
        left = optax.tree.sub(system.query_grad, operator.matvec(x))
        return x, info, optax.tree.norm(left) / optax.tree.norm(system.query_grad)

    with jax.enable_x64(True):
        return [jax.device_get(program(common.in_float64(system))) for system in systems]


def _median_error(found: Sequence[Any], exact: Sequence[Any] | None) -> float | None:
    """None where the exact solutions were not reached."""
    if exact is None:
        return None
    pairs = zip(found, exact, strict=True)
    return statistics.median(
        common.relative_difference(x, solution) for (x, *_), (solution, *_) in pairs
    )


def table(rows: list[dict[str, Any]]) -> str:
    """The measurements as text."""
    lines = []
    for (ways, shots, strength), own in groupby(rows, key=itemgetter(*_SYSTEM)):
        lines.append(f"{ways}-way {shots}-shot, lambda {strength:g}")
        cells = [
            [
                f"{row['curvature']}, {row['solver']}",
                1e3 * row["seconds"],
                *(row[name] for name in ("residual", "error", "error_from_hessian")),
                row["smallest_curvature"],
            ]
            for row in own
        ]
        columns = {"": "", "ms": ".1f", "residual": ".1e", "error": ".1e"}
        columns |= {"from Hessian": ".1e", "curvature": ".1e"}
        lines.append(reports.text_table(columns, cells))
    return "\n".join(lines)


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
