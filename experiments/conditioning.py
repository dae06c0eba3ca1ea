"""What the linear solvers find and report on ill-conditioned, indefinite and broken systems.

    python -m experiments.conditioning

The matrix is `Q diag(values) Q^T`, multiplied from its factors: so a condition number beyond 1/eps
keeps its meaning in float32, and the solution follows from `values` and solves with the
well-conditioned `Q` as it was rounded, in float64. Spectra: positive, geometric from 1/condition to
1, with a random right-hand side or one whose solution is random ("hidden": its residual is small
long before its error is); indefinite, with every fourth eigenvalue negative. Broken systems
(nothing to solve, singular, NaN, out of range) are diagonal. A solve is flagged where

    its residual misses the tolerance ("residual"),
    it met negative curvature and is for positive definite matrices ("curvature"),
    its estimate of the condition number times its residual exceeds a threshold ("condition"), or
    its solution is not finite ("range").

Silent is an error above the threshold that none of these tells. Writes OUTPUT.json.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import imaml_jax
from experiments.shared import common, reports
from imaml_jax.learners.settings import Count, Positive, Range, Record, Seed
from imaml_jax.types import LinearOperator, LowRank

SPECTRA = ("positive", "hidden", "indefinite")
# The solvers that are not for positive definite matrices only.
FOR_INDEFINITE = ("gmres", "minres", "woodbury", "dense")


class System(NamedTuple):
    """`basis diag(undamped) basis^T + damping`, the right-hand side, all as rounded; the solution.

    None for a solution that does not exist, or not in the range of the dtype.
    """

    basis: np.ndarray
    undamped: np.ndarray
    damping: np.ndarray
    b: np.ndarray
    solution: np.ndarray | None


@dataclass(frozen=True)
class Config(Record):
    """What is measured."""

    conditions: tuple[Annotated[float, Range(above=1, most=1e12)], ...] = (1e2, 1e4, 1e6, 1e8, 1e10)
    """Condition numbers, each above 1 and at most 1e12."""
    size: Annotated[int, Range(least=2, most=1000)] = 64
    """Unknowns, at least 2, at most 1000."""
    tol: Annotated[float, Range(above=0, below=1)] = 1e-5
    """Relative tolerance of every solver, above 0 and below 1."""
    max_steps: Count = 2000
    """Most iterations of those that iterate, at least 1."""
    threshold: Positive = 0.1
    """Largest relative error that passes, and largest product of condition and residual; above
    0."""
    seed: Seed = 0
    """Seed of the systems, at least 0."""
    output: Path = Path("runs/conditioning")
    """Where to write, without an ending."""

    def check_together(self) -> None:
        reports.check_not_empty(self, "conditions")


def solvers(max_steps: int) -> dict[str, Callable[..., Any]]:
    """The solvers measured, `(operator, b, tol=...) -> (x, info)`."""
    nystrom = partial(imaml_jax.nystrom_preconditioner, rank=20)
    steihaug = partial(imaml_jax.solve_cg_steihaug, max_steps=max_steps)
    return {
        "cg": partial(imaml_jax.solve_cg, max_steps=max_steps),
        "cg_steihaug": steihaug,
        "cg_steihaug, Nyström": partial(steihaug, precondition=nystrom),
        "cg_steihaug, Jacobi": partial(steihaug, precondition=imaml_jax.jacobi_preconditioner),
        "gmres": partial(imaml_jax.solve_gmres, max_restarts=max(1, max_steps // 20)),
        "minres": partial(imaml_jax.solve_minres, max_steps=max_steps),
        "neumann": partial(imaml_jax.solve_neumann, step_size=1.0, max_steps=max_steps),
        "nystrom, rank 20": partial(imaml_jax.solve_nystrom, rank=20),
        "woodbury": imaml_jax.solve_woodbury,
        "dense": imaml_jax.solve_dense,
    }


def main(config: Config) -> list[dict[str, Any]]:
    """Measures, writes and prints.

    Returns:
      One row for each dtype, system and solver.
    """
    reports.begin(config)
    rows = []
    for dtype in ("float32", "float64"):
        with jax.enable_x64(dtype == "float64"):
            rows += measure(config, dtype)
    about = reports.about(config)
    common.write_json(
        common.with_ending(config.output, "json"), [row | {"about": about} for row in rows]
    )
    print(table(rows), flush=True)
    return rows


def measure(config: Config, dtype: str) -> list[dict[str, Any]]:
    """The rows of one dtype; every solver is compiled once."""
    systems = {
        (spectrum, condition): spectral(config, spectrum, condition, dtype)
        for spectrum in SPECTRA
        for condition in config.conditions
    }
    systems |= {("broken", name): system for name, system in broken(config.size, dtype).items()}
    rows: list[dict[str, Any]] = []
    for name, solver in solvers(config.max_steps).items():
        program = reports.jit_small(partial(_solve, partial(solver, tol=config.tol)))
        for (spectrum, case), system in systems.items():
            x, info = jax.device_get(program(*system[:4]))
            row = {"dtype": dtype, "spectrum": spectrum, "case": case, "solver": name}
            rows.append(row | outcome(config, name, system, x, info))
    order = [*SPECTRA, "broken"]
    return sorted(rows, key=lambda row: order.index(row["spectrum"]))


def _solve(solver: Callable[..., Any], basis, undamped, damping, b) -> Any:
    def factor() -> LowRank:
        return LowRank(basis.T, jnp.diag(undamped))

    operator = LinearOperator(lambda v: basis @ (undamped * (basis.T @ v)), factor)
    return solver(imaml_jax.damped(operator, damping), b)


def spectral(config: Config, spectrum: str, condition: float, dtype: str) -> System:
    """A system of one of `SPECTRA`."""
    rng = np.random.default_rng(config.seed)
    basis = np.linalg.qr(rng.normal(size=(config.size, config.size)))[0].astype(dtype)
    values = np.geomspace(1 / condition, 1, config.size)
    if spectrum == "indefinite":
        values[1::4] *= -1
    damping = np.asarray(0.5 / condition, dtype)
    undamped = (values - float(damping)).astype(dtype)
    b = rng.normal(size=config.size)
    if spectrum == "hidden":
        b = basis.astype(np.float64) @ (values * (basis.T.astype(np.float64) @ b))
    b = b.astype(dtype)
    exact = (array.astype(np.float64) for array in (basis, undamped, damping, b))
    return System(basis, undamped, damping, b, solution(*exact))


def solution(
    basis: np.ndarray, undamped: np.ndarray, damping: np.ndarray, b: np.ndarray
) -> np.ndarray:
    """In float64 and to its precision, whatever the condition number.

    With `x = Q^-T y` the matrix is `diag(undamped) + damping Q^-1 Q^-T`: nearly diagonal, so that
    scaling by its diagonal leaves a condition number close to 1.
    """
    inverse = np.linalg.inv(basis)
    matrix = np.diag(undamped) + damping * inverse @ inverse.T
    scales = 1 / np.sqrt(np.abs(np.diag(matrix)))
    scaled = scales[:, None] * matrix * scales[None, :]
    return inverse.T @ (scales * np.linalg.solve(scaled, scales * (inverse @ b)))


def broken(size: int, dtype: str) -> dict[str, System]:
    """Diagonal systems at the edge of what can be solved."""
    limits = np.finfo(dtype)
    regular, ones = np.linspace(1, 2, size), np.ones(size)
    nothing = np.zeros(size)
    singular, in_range = regular.copy(), ones.copy()
    singular[0] = in_range[0] = 0
    undefined = regular.copy()
    undefined[1] = np.nan
    huge, tiny = float(limits.max) ** 0.75, float(limits.tiny) ** 0.75
    cases = {
        "nothing to solve": (regular, nothing, nothing),
        "singular, nothing to solve": (singular, nothing, nothing),
        "singular": (singular, ones, None),
        "singular, b in its range": (singular, in_range, in_range / np.maximum(singular, 1)),
        "zero matrix": (nothing, ones, None),
        "NaN in the matrix": (undefined, ones, None),
        "NaN in the matrix, nothing to solve": (undefined, nothing, None),
        "NaN in b": (regular, undefined, None),
        "the solution overflows": (tiny * regular, huge * ones, None),
        "the solution underflows": (huge * regular, tiny * ones, None),
        "huge matrix": (huge * regular, ones, ones / (huge * regular)),
        "tiny matrix": (tiny * regular, ones, ones / (tiny * regular)),
    }
    systems = {}
    for name, (values, b, exact) in cases.items():
        damping = np.asarray(np.nanmax(values) / 2, dtype)
        undamped = values.astype(dtype) - damping
        systems[name] = System(np.eye(size, dtype=dtype), undamped, damping, b.astype(dtype), exact)
    return systems


def outcome(config: Config, solver: str, system: System, x: Any, info: Any) -> dict[str, Any]:
    """What was found, what was reported, and whether a wrong solution was told."""
    error = None
    if system.solution is not None and np.isfinite(x).all():
        scale = np.abs(system.solution).max() or 1.0  # squares would leave the range
        with np.errstate(over="ignore"):  # of solutions that are far from it
            found, exact = x.astype(np.float64) / scale, system.solution / scale
        error = float(np.linalg.norm(found - exact) / (np.linalg.norm(exact) or 1))
    curvature, condition = info.min_curvature, info.condition
    bound = None if condition is None else float(condition) * float(info.relative_residual)
    reasons = {
        "residual": not info.converged,
        "curvature": solver not in FOR_INDEFINITE and curvature is not None and not curvature > 0,
        "condition": bound is not None and bound > config.threshold,
        "range": not np.isfinite(x).all(),
    }
    flags = [reason for reason, given in reasons.items() if given]
    return {
        "error": error,
        "residual": float(info.relative_residual),
        "min_curvature": None if curvature is None else float(curvature),
        "condition": None if condition is None else float(condition),
        "num_steps": None if info.num_steps is None else int(info.num_steps),
        "converged": bool(info.converged),
        "finite": "range" not in flags,
        "flags": flags,
        "silent": not flags and not (error is not None and error <= config.threshold),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Errors with a mark: `*` flagged, `!` silent."""
    lines = []
    for (dtype, spectrum), own in groupby(rows, key=itemgetter("dtype", "spectrum")):
        by_solver = {name: list(cells) for name, cells in groupby(own, key=itemgetter("solver"))}
        cases = [row["case"] for row in next(iter(by_solver.values()))]
        if spectrum == "broken":
            lines += [f"{dtype}, broken", *(f"  {i}: {case}" for i, case in enumerate(cases))]
            heads = [str(i) for i in range(len(cases))]
        else:
            lines.append(f"{dtype}, {spectrum}: relative error, by condition number")
            heads = [f"{case:.0e}" for case in cases]
        columns = [(head, "") for head in ("", *heads)]
        cells = [[name, *map(_cell, found)] for name, found in by_solver.items()]
        lines.append(reports.text_table(columns, cells))
    flagged, silent = (sum(bool(row[key]) for row in rows) for key in ("flags", "silent"))
    small = sum(bool(row["flags"]) and _is_small(row) for row in rows)
    not_finite = sum(row["converged"] and not row["finite"] for row in rows)
    lines.append(
        f"of {len(rows)} solves {flagged} flagged (*), {small} of them with an error of 1e-3 or "
        f"less; {silent} silent (!); {not_finite} not finite and called converged"
    )
    return "\n".join(lines)


def _is_small(row: dict[str, Any]) -> bool:
    return row["error"] is not None and row["error"] <= 1e-3


def _cell(row: dict[str, Any]) -> str:
    mark = "!" if row["silent"] else "*" if row["flags"] else " "
    return ("-" if row["error"] is None else f"{row['error']:.0e}") + mark


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
