"""The experiments on the toolbox: hard linear systems, and the libraries beside it."""

import importlib.util
import json
from fractions import Fraction
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import conditioning, error_estimate, toolbox_comparison
from experiments.shared import common, toolbox_problems
from experiments.shared.toolbox_contenders import CONTENDERS


def exact_solution(matrix, b):
    """Gaussian elimination of a definite matrix in rational numbers."""
    rows = [[*row, right] for row, right in zip(matrix, b, strict=True)]
    for i, pivot in enumerate(rows):
        for j, row in enumerate(rows):
            if i != j:
                ratio = row[i] / pivot[i]
                rows[j] = [x - ratio * y for x, y in zip(row, pivot, strict=True)]
    return [float(row[-1] / row[i]) for i, row in enumerate(rows)]


@pytest.mark.parametrize("spectrum", ["positive", "indefinite"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_solutions_are_exact_at_any_condition_number(spectrum, dtype):
    config = conditioning.Config(size=5)
    system = conditioning.spectral(config, spectrum, 1e12, dtype)
    basis = np.vectorize(Fraction)(system.basis.astype(np.float64))
    undamped = np.vectorize(Fraction)(system.undamped.astype(np.float64))
    damping = Fraction(float(system.damping))
    matrix = (basis * undamped[None, :]) @ basis.T
    matrix += damping * np.vectorize(Fraction)(np.eye(5, dtype=int))
    exact = exact_solution(matrix, np.vectorize(Fraction)(system.b.astype(np.float64)))
    assert np.linalg.norm(system.solution - exact) < 1e-12 * np.linalg.norm(exact)


def test_conditioning(tmp_path, capsys):
    config = conditioning.Config(
        conditions=(1e2, 1e10), size=12, max_steps=100, output=tmp_path / "hard"
    )
    names = ("cg", "cg_steihaug", "dense")
    chosen = {name: conditioning.solvers(100)[name] for name in names}
    with mock.patch.object(conditioning, "solvers", lambda _: chosen):
        rows = conditioning.main(config)
    assert len(rows) == 2 * len(names) * (2 * 3 + 12)
    written = json.loads((tmp_path / "hard.json").read_text(encoding="utf-8"))
    assert [row["silent"] for row in written] == [row["silent"] for row in rows]
    assert "0 not finite and called converged" in capsys.readouterr().out
    found = {(row["dtype"], row["spectrum"], row["case"], row["solver"]): row for row in rows}
    easy = found["float64", "positive", 1e2, "cg_steihaug"]
    assert easy["converged"] and not easy["flags"] and easy["error"] < 1e-3
    assert "curvature" in found["float64", "indefinite", 1e2, "cg_steihaug"]["flags"]
    assert "condition" in found["float32", "hidden", 1e10, "dense"]["flags"]
    assert "residual" in found["float32", "broken", "singular", "cg"]["flags"]
    assert "range" in found["float32", "broken", "singular, nothing to solve", "dense"]["flags"]
    assert not any(row["silent"] for row in rows if row["spectrum"] == "broken")
    assert not any(row["silent"] for row in rows if row["solver"] == "dense")


@pytest.mark.parametrize("name", toolbox_problems.PROBLEMS)
def test_the_gradients_in_closed_form(name, x64):
    problem = toolbox_problems.PROBLEMS[name](np.random.default_rng(1))
    own = [c for c in CONTENDERS if c.problem == name and c.libraries == ("imaml_jax",)]
    solver = own[-1].make(problem, 1e-11)
    gradient = jax.jit(jax.grad(lambda *args: problem.loss(solver, *args)))(*problem.args)
    assert common.relative_difference(gradient, problem.exact) < 1e-9


def test_toolbox_comparison(tmp_path, capsys):
    (own,) = (c for c in CONTENDERS if (c.problem, *c.libraries) == ("kepler", "imaml_jax"))
    absent = own._replace(libraries=("no_such_library",))
    another = absent._replace(problem="sinkhorn")
    config = toolbox_comparison.Config(
        problems=("kepler",), compilations=1, rounds=2, output=tmp_path / "beside"
    )
    folder = jax.config.jax_compilation_cache_dir
    with mock.patch.object(toolbox_comparison, "CONTENDERS", (own, another, own, absent)):
        results = toolbox_comparison.main(config)
    assert jax.config.jax_compilation_cache_dir == folder
    assert [row["library"] for row in results["rows"]] == ["imaml_jax"] * 2
    for row in results["rows"]:
        assert row["error"] < 1e-8 and row["lines"] is None
        assert len(row["all_seconds"]) == 2 and len(row["all_compile_seconds"]) == 1
        assert min(*row["all_seconds"], row["solution_seconds"], row["compile_seconds"]) > 0
        assert row["ratio"] == row["compile_ratio"] == (1, 1, 1)
    assert results["missing"] == ["no_such_library"]
    assert "not installed and left out: no_such_library" in capsys.readouterr().out
    written = json.loads((tmp_path / "beside.json").read_text(encoding="utf-8"))
    assert written["missing"] == results["missing"] and "imaml_jax" in written["versions"]


def test_a_contender_is_compared_with_its_own_library_before_it():
    """And every problem begins with one to compare with."""
    firsts = {contender.problem: contender.libraries for contender in reversed(CONTENDERS)}
    assert firsts == dict.fromkeys(toolbox_problems.PROBLEMS, ("imaml_jax",))
    assert toolbox_comparison.ratio([2.0, 4.0], [1.0, 1.0]) == (3.0, 2.5, 3.5)


def test_compilations_of_an_eager_call_are_counted():
    assert toolbox_comparison.eager_compilations(jax.jit(jnp.sin), 1.0) == 0
    assert toolbox_comparison.eager_compilations(lambda x: jax.jit(lambda x: x + 1)(x), 1.0) == 1


@pytest.mark.slow
def test_toolbox_comparison_with_every_library(tmp_path):
    for name in ("jaxopt", "lineax", "optimistix"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"no {name}: pip install -e .[crosscheck]")
    config = toolbox_comparison.Config(compilations=1, rounds=1, output=tmp_path / "beside")
    rows = toolbox_comparison.main(config)["rows"]
    assert len(rows) == len(CONTENDERS)
    assert all(row["error"] < 1e-8 for row in rows)


def test_lines_are_counted_of_what_serves_one_problem():
    lines = [
        toolbox_comparison.lines_of_code(contender.make)
        for contender in CONTENDERS
        if contender.problem == "ridge" and contender.linear == "cg"
    ]
    assert lines == [7, 8, 13, 6, 6, 14]


def test_lines_that_hold_nothing_are_not_counted():
    def make(objective):
        first = objective

        return first

    assert toolbox_comparison.lines_of_code(make) == 2


@pytest.mark.slow
def test_the_estimate_covers_the_error(tmp_path, capsys):
    config = error_estimate.Config(
        kinds=("logistic", "sinusoid"), problems=4, rounds=8, output=tmp_path / "figure"
    )
    kinds = error_estimate.main(config)["kinds"]
    assert kinds["logistic"]["coverage"] == 1.0 and kinds["logistic"]["within_10"] > 0.9
    assert kinds["sinusoid"]["coverage"] > 0.9
    for asked in kinds["logistic"]["asked"]:
        assert asked["largest_error"] <= asked["accuracy"] and asked["converged"] == 4
    assert "estimate / error" in capsys.readouterr().out
    assert (tmp_path / "figure.png").stat().st_size > 10_000
