"""One implicit gradient in this toolbox, jaxopt and optimistix: code, error, time and memory.

    python -m experiments.toolbox_comparison

A ridge regression with a strength for each feature; wanted is the gradient of a held-out loss in
the strengths, in float64, whose closed form NumPy gives. Every library solves the inner problem in
two ways, by dense Newton steps (one of the user's, where the library takes any solver) and by its
own minimiser, and the tangent system by CG with the same tolerance. Lines of code are those of the
functions below, imports included; they share the objective. Seconds are medians of interleaved
rounds, beside those of the inner solution alone. Libraries that are not installed are left out:
`pip install -e .[crosscheck]`. Writes OUTPUT.json.
"""
# pyright: reportMissingImports=false

import dataclasses
import importlib.metadata
import importlib.util
import inspect
import statistics
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.shared import common, reports
from imaml_jax.learners.settings import Count, Range, Record, Seed
from imaml_jax.types import Batch


class Contender(NamedTuple):
    """What is measured.

    Attributes:
      libraries: what must be installed, the one compared first.
      inner: how the inner problem is solved.
      make: `(objective, tol) -> (init, strength, train) -> x`; its source is what is counted.
    """

    libraries: tuple[str, ...]
    inner: str
    make: Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Config(Record):
    """What is measured."""

    size: Count = 200
    """Features; twice as many training examples; at least 1."""
    tol: Annotated[float, Range(above=0, below=1)] = 1e-10
    """Tolerance of the linear solves and of the minimisers, above 0 and below 1."""
    rounds: Count = 15
    """Interleaved rounds of the timing, at least 1."""
    seed: Seed = 0
    """Seed of the data, at least 0."""
    output: Path = Path("runs/toolbox_comparison")
    """Where to write, without an ending."""


def _ours_newton(objective, tol):
    from functools import partial

    from imaml_jax import custom_argmin, solve_cg

    @custom_argmin(objective, partial(solve_cg, tol=tol))
    def solver(init, *args):
        hessian, gradient = (f(objective)(init, *args) for f in (jax.hessian, jax.grad))
        return init - jnp.linalg.solve(hessian, gradient)

    return solver


def _jaxopt_newton(objective, tol):
    from functools import partial

    from jaxopt.implicit_diff import custom_root
    from jaxopt.linear_solve import solve_cg

    @custom_root(jax.grad(objective), solve=partial(solve_cg, tol=tol))
    def solver(init, *args):
        hessian, gradient = (f(objective)(init, *args) for f in (jax.hessian, jax.grad))
        return init - jnp.linalg.solve(hessian, gradient)

    return solver


def _optimistix_newton(objective, tol):
    import lineax
    import optimistix

    def solver(init, *args):
        solution = optimistix.root_find(
            lambda x, args: jax.grad(objective)(x, *args),
            optimistix.Newton(rtol=tol, atol=tol),
            init,
            args,
            adjoint=optimistix.ImplicitAdjoint(lineax.CG(rtol=tol, atol=tol)),
            tags=frozenset({lineax.positive_semidefinite_tag}),
        )
        return solution.value

    return solver


def _ours_minimiser(objective, tol):
    from functools import partial

    from imaml_jax import custom_argmin, minimize, newton_cg, solve_cg

    tx = newton_cg(max_cg_steps=100, cg_tol=tol)
    solver = partial(minimize, objective, tx=tx, num_steps=2)
    implicit = custom_argmin(objective, partial(solve_cg, tol=tol), has_aux=True)(solver)
    return lambda init, *args: implicit(init, *args)[0]


def _jaxopt_minimiser(objective, tol):
    from functools import partial

    from jaxopt import LBFGS
    from jaxopt.linear_solve import solve_cg

    implicit = partial(solve_cg, tol=tol)
    solver = LBFGS(objective, tol=tol, maxiter=500, implicit_diff_solve=implicit)
    return lambda init, *args: solver.run(init, *args).params


def _optimistix_minimiser(objective, tol):
    import lineax
    import optimistix

    def solver(init, *args):
        solution = optimistix.minimise(
            lambda x, args: objective(x, *args),
            optimistix.BFGS(rtol=tol, atol=tol),
            init,
            args,
            adjoint=optimistix.ImplicitAdjoint(lineax.CG(rtol=tol, atol=tol)),
            tags=frozenset({lineax.positive_semidefinite_tag}),
            max_steps=500,
        )
        return solution.value

    return solver


CONTENDERS = (
    Contender(("imaml_jax",), "Newton step", _ours_newton),
    Contender(("jaxopt",), "Newton step", _jaxopt_newton),
    Contender(("optimistix", "lineax"), "Newton", _optimistix_newton),
    Contender(("imaml_jax",), "newton_cg", _ours_minimiser),
    Contender(("jaxopt",), "LBFGS", _jaxopt_minimiser),
    Contender(("optimistix", "lineax"), "BFGS", _optimistix_minimiser),
)


def main(config: Config) -> dict[str, Any]:
    """Measures, writes and prints.

    Returns:
      One row for each contender that is installed, the libraries that are not, and provenance.
    """
    reports.begin(config)
    libraries = sorted({name for contender in CONTENDERS for name in contender.libraries})
    missing = [name for name in libraries if importlib.util.find_spec(name) is None]
    with jax.enable_x64(True):
        rows = measure(config, [c for c in CONTENDERS if not set(c.libraries) & set(missing)])
    versions = common.provenance()["versions"] | {
        name: importlib.metadata.version(name)
        for name in libraries
        if name not in ("imaml_jax", *missing)
    }
    return reports.report(config, {"rows": rows, "missing": missing, "versions": versions}, table)


def measure(config: Config, contenders: list[Contender]) -> list[dict[str, Any]]:
    """The rows; to be called with float64 enabled."""
    args = problem(config)
    exact = exact_gradient(*args)
    programs = {
        (contender, part): program
        for contender in contenders
        for part, program in _compiled(contender, config.tol, *args).items()
    }
    runs = {name: partial(program, *args) for name, program in programs.items()}
    seconds = reports.seconds_in_rounds(runs, config.rounds + 1)  # the first round warms up
    rows = []
    for contender in contenders:
        gradient, timed = programs[contender, "gradient"], seconds[contender, "gradient"][1:]
        memory = gradient.memory_analysis()
        rows.append(
            {
                "library": contender.libraries[0],
                "inner": contender.inner,
                "lines": lines_of_code(contender.make),
                "error": common.relative_difference(gradient(*args), exact),
                "seconds": statistics.median(timed),
                "solve_seconds": statistics.median(seconds[contender, "solution"][1:]),
                "all_seconds": timed,
                "temp_bytes": memory.temp_size_in_bytes if memory else None,
            }
        )
    return rows


def objective(x: jax.Array, strength: jax.Array, train: Batch) -> jax.Array:
    """Of the inner problem."""
    residual = train.inputs @ x - train.targets
    return jnp.mean(residual**2) / 2 + jnp.sum(strength * x**2) / 2


def held_out_loss(x: jax.Array, held_out: Batch) -> jax.Array:
    """Of the outer problem."""
    return jnp.mean((held_out.inputs @ x - held_out.targets) ** 2)


def problem(config: Config) -> tuple[jax.Array, Batch, Batch]:
    """The strengths, and random training and held-out examples."""
    rng = np.random.default_rng(config.seed)
    weight = rng.normal(size=config.size)

    def examples():
        inputs = rng.normal(size=(2 * config.size, config.size))
        targets = inputs @ weight + rng.normal(size=2 * config.size)
        return Batch(jnp.asarray(inputs), jnp.asarray(targets))

    strength = jnp.asarray(rng.uniform(0.1, 0.4, config.size))
    return strength, examples(), examples()


def exact_gradient(strength: jax.Array, *parts: Batch) -> np.ndarray:
    """`-x * A^-1 g` with `A x = X^T y / n` and the gradient `g` of the held-out loss at `x`."""
    (inputs, targets), (held_out, held_out_targets) = jax.tree.map(np.asarray, parts)
    matrix = inputs.T @ inputs / len(inputs) + np.diag(strength)
    x = np.linalg.solve(matrix, inputs.T @ targets / len(inputs))
    outer = 2 / len(held_out) * held_out.T @ (held_out @ x - held_out_targets)
    return -x * np.linalg.solve(matrix, outer)


def lines_of_code(make: Callable[..., Any]) -> int:
    """Lines of the body of a function that hold something."""
    return sum(bool(line.strip()) for line in inspect.getsource(make).splitlines()[1:])


def _compiled(contender: Contender, tol: float, *args: Any) -> dict[str, Any]:
    """The inner solution and the gradient, as programs of the arguments."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "JAXopt is no longer maintained", DeprecationWarning)
        solver = contender.make(objective, tol)

    def solution(strength, train, held_out):
        del held_out
        return solver(jnp.zeros_like(strength), strength, train)

    def loss(strength, train, held_out):
        return held_out_loss(solution(strength, train, held_out), held_out)

    programs = {"solution": solution, "gradient": jax.grad(loss)}
    return {name: jax.jit(fn).lower(*args).compile() for name, fn in programs.items()}


def table(results: dict[str, Any]) -> str:
    """The measurements as text."""
    columns = {"": "", "lines": "d", "error": ".0e", "ms": ".2f", "solution": ".2f"}
    columns |= {"temp KiB": ".0f"}
    rows = [
        (
            f"{row['library']}, {row['inner']}",
            *(row["lines"], row["error"], 1e3 * row["seconds"], 1e3 * row["solve_seconds"]),
            row["temp_bytes"] and row["temp_bytes"] / 1024,
        )
        for row in results["rows"]
    ]
    lines = [f"{results['device']}, {results['machine']}, {results['cores']} cores"]
    lines.append(reports.text_table(columns, rows))
    if results["missing"]:
        lines.append(f"not installed and left out: {', '.join(results['missing'])}")
    return "\n".join(lines)


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
