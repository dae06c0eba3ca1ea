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

import dataclasses
import math
import re
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import imaml_jax
from experiments import glyphs
from experiments.shared import common, few_shot
from imaml_jax.data import episodes
from imaml_jax.data import glyphs as glyph_data
from imaml_jax.data.episodes import Splits
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


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    sizes: tuple[str, ...] = ("5x1", "5x5", "20x1", "20x5")
    """Ways x shots."""
    reg_strengths: tuple[float, ...] = (2.0, 0.03)
    """Values of lambda: the published one and that of the protocol `common`; each above 0."""
    meta_steps: int = 100
    """Meta-steps of 8 tasks before, at least 1."""
    num_tasks: int = 2
    """Linear systems of each size, at least 1."""
    rounds: int = 3
    """Interleaved rounds of the timing, at least 1."""
    seed: int = 0
    """Seed of the initialisation and of the tasks, at least 0."""
    output: Path = Path("runs/solvers")
    """Where to write, without an ending."""


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
      ValueError: a setting out of its range.
    """
    sizes = _check(config)
    common.check_output(config.output)
    common.cache_compilations()
    splits = glyph_data.load()
    for ways, shots in sizes:
        for dataset in (splits.train, splits.test):
            episodes.check_task_shape(dataset, ways=ways, shots=shots, queries=QUERIES)
    about = {**dataclasses.asdict(config), **common.provenance()}
    rows = []
    for ways, shots in sizes:
        rows += [row | {"about": about} for row in measure(config, splits, ways, shots)]
        common.write_json(common.with_ending(config.output, "json"), rows)
    print(table(rows), flush=True)
    return rows


def measure(config: Config, splits: Splits, ways: int, shots: int) -> list[dict[str, Any]]:
    """The rows of one size."""
    network = conv4(ways)
    params = _meta_train(config, splits, ways, shots)
    tasks = episodes.sample_tasks(
        jax.random.key(config.seed),
        splits.test,
        num_tasks=config.num_tasks,
        ways=ways,
        shots=shots,
        queries=QUERIES,
        rotations=None,
        invert=True,
    )
    compared = [s for s in solvers() if ways * ways * shots <= (s.most_outputs or math.inf)]
    rows = []
    for strength in config.reg_strengths:
        prepare = jax.jit(partial(_system, network, strength))
        one_by_one = [jax.tree.map(itemgetter(i), tasks) for i in range(config.num_tasks)]
        systems = [prepare(params, task) for task in one_by_one]
        programs = [jax.jit(partial(_solve, network, strength, solver)) for solver in compared]
        for program in programs:
            jax.block_until_ready(program(systems[0]))
        seconds: list[list[float]] = [[] for _ in compared]
        for _ in range(config.rounds):
            for program, own in zip(programs, seconds, strict=True):
                started = time.perf_counter()
                jax.block_until_ready([program(system) for system in systems])
                own.append((time.perf_counter() - started) / len(systems))
        exact = {name: _exact(network, strength, name, systems) for name in _OPERATORS}
        for solver, own in zip(compared, seconds, strict=True):
            solved = _in_float64(network, strength, solver, systems)
            residuals = _residuals(network, strength, solver.curvature, systems, solved)
            met = [info.min_curvature for _, info in solved if info.min_curvature is not None]
            rows.append(
                {
                    "ways": ways,
                    "shots": shots,
                    "reg_strength": strength,
                    "curvature": solver.curvature,
                    "solver": solver.name,
                    "error": _median_error(solved, exact[solver.curvature]),
                    "error_from_hessian": _median_error(solved, exact["Hessian"]),
                    "residual": statistics.median(residuals),
                    "smallest_curvature": float(np.min(met)) if met else None,
                    "seconds": statistics.median(own),
                }
            )
    return rows


def _meta_train(config: Config, splits: Splits, ways: int, shots: int) -> Any:
    steps = config.meta_steps
    settings = glyphs.Config(
        algorithm="fomaml",
        ways=ways,
        shots=shots,
        meta_steps=steps,
        log_every=steps,
        validate_every=steps,
        seed=config.seed,
    )
    protocol = glyphs.resolve(settings)
    trained = few_shot.meta_train(settings, protocol, splits._replace(val=None), "glyphs")
    return jax.device_put(trained.meta_params, jax.local_devices()[0])


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
    matvec = _gauss_newton(network, adapted, task.support).matvec

    def power_step(v, _):
        product = matvec(v)
        norm = optax.tree.norm(product)
        return optax.tree.scale(1 / norm, product), norm

    largest = lax.scan(power_step, query_grad, length=POWER_STEPS)[1][-1]
    return System(adapted, query_grad, task.support, strength + largest)


def _hessian(network: Network, params: Any, support: Batch) -> LinearOperator:
    return imaml_jax.hessian(lambda p: _loss(network, p, support), params)


def _gauss_newton(network: Network, params: Any, support: Batch) -> LinearOperator:
    return imaml_jax.gauss_newton(
        lambda p: network.apply(p, support.inputs),
        lambda outputs: imaml_jax.cross_entropy(outputs, support.targets),
        params,
    )


_OPERATORS = {"Hessian": _hessian, "Gauss-Newton": _gauss_newton}


def _solve(network: Network, strength: float, solver: Solver, system: System) -> Any:
    operator = _OPERATORS[solver.curvature](network, system.params, system.support)
    damped = imaml_jax.damped(operator, strength)
    return solver.solve(damped, system.query_grad, system.largest)


def _exact(
    network: Network, strength: float, curvature: str, systems: Sequence[System]
) -> list[tuple[Any, Any]] | None:
    """Solutions in float64; None where one was not reached."""

    def minres(operator, b, _):
        return imaml_jax.solve_minres(operator, b, tol=EXACT, max_steps=MOST_STEPS)

    solved = _in_float64(network, strength, Solver(curvature, "exact", minres), systems)
    return solved if all(info.relative_residual < 10 * EXACT for _, info in solved) else None


def _in_float64(
    network: Network, strength: float, solver: Solver, systems: Sequence[System]
) -> list[tuple[Any, Any]]:
    with jax.enable_x64(True):
        program = jax.jit(partial(_solve, network, strength, solver))
        return [jax.device_get(program(jax.tree.map(_double, system))) for system in systems]


def _residuals(
    network: Network, strength: float, curvature: str, systems: Sequence[System], solved: Any
) -> list[float]:
    """`||b - A x|| / ||b||`, all in float64."""

    def residual(system, x):
        operator = _OPERATORS[curvature](network, system.params, system.support)
        product = imaml_jax.damped(operator, strength).matvec(x)
        difference = optax.tree.sub(system.query_grad, product)
        return optax.tree.norm(difference) / optax.tree.norm(system.query_grad)

    with jax.enable_x64(True):
        program = jax.jit(residual)
        pairs = zip(systems, (x for x, _ in solved), strict=True)
        return [float(program(*jax.tree.map(_double, pair))) for pair in pairs]


def _double(x: Any) -> jax.Array:
    x = jnp.asarray(x)
    return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _median_error(found: Sequence[Any], exact: Sequence[Any] | None) -> float | None:
    """None where the exact solutions were not reached."""
    if exact is None:
        return None
    pairs = zip(found, exact, strict=True)
    return statistics.median(
        common.relative_difference(x, solution) for (x, _), (solution, _) in pairs
    )


def table(rows: list[dict[str, Any]]) -> str:
    """The measurements as text."""
    lines = []
    for (ways, shots, strength), own in groupby(rows, key=itemgetter(*_SYSTEM)):
        lines.append(f"{ways}-way {shots}-shot, lambda {strength:g}")
        lines.append(
            f"{'':50}{'ms':>8}{'residual':>10}{'error':>10}{'from Hessian':>14}{'curvature':>11}"
        )
        for row in own:
            name = f"{row['curvature']}, {row['solver']}"
            errors = [_shown(row[key]) for key in ("residual", "error", "error_from_hessian")]
            lines.append(
                f"{name:50}{1e3 * row['seconds']:8.1f}{errors[0]:>10}{errors[1]:>10}{errors[2]:>14}"
                f"{_shown(row['smallest_curvature']):>11}"
            )
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _check(config: Config) -> list[tuple[int, int]]:
    """The sizes as numbers.

    Raises:
      ValueError: a setting out of its range.
    """
    sizes = [re.fullmatch(r"(\d+)x(\d+)", size) for size in config.sizes]
    if not sizes or not all(sizes):
        raise ValueError(f"sizes={config.sizes} must be ways x shots, such as 5x1 20x5")
    numbers = [(int(size[1]), int(size[2])) for size in sizes if size]
    if min(ways for ways, _ in numbers) < 2 or min(shots for _, shots in numbers) < 1:
        raise ValueError(f"sizes={config.sizes} must have at least 2 ways and 1 shot")
    if not config.reg_strengths or not all(0 < s < math.inf for s in config.reg_strengths):
        raise ValueError(f"reg_strengths={config.reg_strengths} must be positive")
    common.check_least(config, meta_steps=1, num_tasks=1, rounds=1)
    common.check_seed(config.seed)
    return numbers


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
