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
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.shared import common


class Data(NamedTuple):
    """Training and held-out examples: inputs `[n, size]`, targets `[n]`."""

    inputs: jax.Array
    targets: jax.Array
    held_out_inputs: jax.Array
    held_out_targets: jax.Array


class Contender(NamedTuple):
    """What is measured.

    Attributes:
      libraries: what must be installed, the one compared first.
      inner: how the inner problem is solved.
      make: `(objective, tol) -> (init, strength, data) -> x`; its source is what is counted.
    """

    libraries: tuple[str, ...]
    inner: str
    make: Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    size: int = 200
    """Features; twice as many training examples; at least 1."""
    tol: float = 1e-10
    """Tolerance of the linear solves and of the minimisers, above 0 and below 1."""
    rounds: int = 15
    """Interleaved rounds of the timing, at least 1."""
    seed: int = 0
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

    Raises:
      ValueError: a setting out of its range.
    """
    _check(config)
    common.check_output(config.output)
    libraries = sorted({name for contender in CONTENDERS for name in contender.libraries})
    missing = [name for name in libraries if importlib.util.find_spec(name) is None]
    with jax.enable_x64(True):
        rows = measure(config, [c for c in CONTENDERS if not set(c.libraries) & set(missing)])
    results = {"rows": rows, "missing": missing, **dataclasses.asdict(config)}
    results |= common.provenance()
    results["versions"] |= {
        name: importlib.metadata.version(name)
        for name in libraries
        if name not in ("imaml_jax", *missing)
    }
    common.write_json(common.with_ending(config.output, "json"), results)
    print(table(results), flush=True)
    return results


def measure(config: Config, contenders: list[Contender]) -> list[dict[str, Any]]:
    """The rows; to be called with float64 enabled."""
    data, strength = problem(config)
    exact = exact_gradient(data, strength)
    programs = [_compiled(contender, config.tol, data, strength) for contender in contenders]
    seconds: list[tuple[list[float], list[float]]] = [([], []) for _ in programs]
    for _ in range(config.rounds + 1):
        for pair, own in zip(programs, seconds, strict=True):
            for program, times in zip(pair, own, strict=True):
                started = time.perf_counter()
                jax.block_until_ready(program(strength, data))
                times.append(time.perf_counter() - started)
    rows = []
    for contender, (_, gradient), (solving, whole) in zip(
        contenders, programs, seconds, strict=True
    ):
        memory = gradient.memory_analysis()
        rows.append(
            {
                "library": contender.libraries[0],
                "inner": contender.inner,
                "lines": lines_of_code(contender.make),
                "error": common.relative_difference(gradient(strength, data), exact),
                "seconds": statistics.median(whole[1:]),  # the first round warms up
                "solve_seconds": statistics.median(solving[1:]),
                "all_seconds": whole[1:],
                "temp_bytes": memory.temp_size_in_bytes if memory else None,
            }
        )
    return rows


def objective(x: jax.Array, strength: jax.Array, data: Data) -> jax.Array:
    """Of the inner problem."""
    residual = data.inputs @ x - data.targets
    return jnp.mean(residual**2) / 2 + jnp.sum(strength * x**2) / 2


def held_out_loss(x: jax.Array, data: Data) -> jax.Array:
    """Of the outer problem."""
    return jnp.mean((data.held_out_inputs @ x - data.held_out_targets) ** 2)


def problem(config: Config) -> tuple[Data, jax.Array]:
    """Random data, and the strengths."""
    rng = np.random.default_rng(config.seed)
    weight = rng.normal(size=config.size)

    def examples():
        inputs = rng.normal(size=(2 * config.size, config.size))
        return jnp.asarray(inputs), jnp.asarray(inputs @ weight + rng.normal(size=2 * config.size))

    strength = jnp.asarray(rng.uniform(0.1, 0.4, config.size))
    return Data(*examples(), *examples()), strength


def exact_gradient(data: Data, strength: jax.Array) -> np.ndarray:
    """`-x * A^-1 g` with `A x = X^T y / n` and the gradient `g` of the held-out loss at `x`."""
    inputs, targets, held_out, held_out_targets = (np.asarray(array) for array in data)
    matrix = inputs.T @ inputs / len(inputs) + np.diag(strength)
    x = np.linalg.solve(matrix, inputs.T @ targets / len(inputs))
    outer = 2 / len(held_out) * held_out.T @ (held_out @ x - held_out_targets)
    return -x * np.linalg.solve(matrix, outer)


def lines_of_code(make: Callable[..., Any]) -> int:
    """Lines of the body of a function that hold something."""
    return sum(bool(line.strip()) for line in inspect.getsource(make).splitlines()[1:])


def _compiled(contender: Contender, tol: float, data: Data, strength: jax.Array) -> tuple[Any, Any]:
    """The inner solution and the gradient, as programs of the strengths and the data."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "JAXopt is no longer maintained", DeprecationWarning)
        solver = contender.make(objective, tol)

    def solve(strength, data):
        return solver(jnp.zeros_like(strength), strength, data)

    def loss(strength, data):
        return held_out_loss(solve(strength, data), data)

    compiled = [jax.jit(fn).lower(strength, data).compile() for fn in (solve, jax.grad(loss))]
    return compiled[0], compiled[1]


def table(results: dict[str, Any]) -> str:
    """The measurements as text."""
    lines = [
        f"{results['device']}, {results['machine']}, {results['cores']} cores",
        f"{'':26}{'lines':>6}{'error':>9}{'ms':>9}{'solution':>10}{'temp KiB':>10}",
    ]
    for row in results["rows"]:
        memory = "" if row["temp_bytes"] is None else f"{row['temp_bytes'] / 1024:.0f}"
        lines.append(
            f"{row['library'] + ', ' + row['inner']:26}{row['lines']:6}{row['error']:9.0e}"
            f"{1e3 * row['seconds']:9.2f}{1e3 * row['solve_seconds']:10.2f}{memory:>10}"
        )
    if results["missing"]:
        lines.append(f"not installed and left out: {', '.join(results['missing'])}")
    return "\n".join(lines)


def _check(config: Config) -> None:
    common.check_least(config, size=1, rounds=1)
    if not 0 < config.tol < 1:
        raise ValueError(f"tol={config.tol} must be above 0 and below 1")
    common.check_seed(config.seed)


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
