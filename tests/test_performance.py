"""The experiments on solvers, mappings and rates: what they compute, at a tiny size."""

import json
import os
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

# Importing the experiments must not change the devices of the other tests.
with mock.patch.dict(os.environ, XLA_FLAGS=os.environ.get("XLA_FLAGS", "")):
    from experiments import platform_defaults, solvers, throughput
    from experiments.benchmark import profile

TINY = platform_defaults.Workload(2, 2, 1, 1, 2, 8, 1, {"filters": 4, "num_blocks": 2})


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(platform_defaults.WORKLOADS, "reference", TINY)
    monkeypatch.setattr(platform_defaults, "_MATRIX", 64)


def test_operations_are_told_apart_by_what_they_hold():
    def program(a, indices):
        def step(_, b):
            return jnp.tanh(b @ a)

        looped = jax.lax.fori_loop(0, 3, step, a)
        return looped.sum(0) + a[indices].T[:, :8].sum(1)

    args = jnp.ones((64, 64)), jnp.arange(9) * 3
    compiled = jax.jit(program).lower(*args).compile()
    operations = {name: (kind, source) for name, kind, source in profile.parsed(compiled.as_text())}
    kinds = {kind for kind, _ in operations.values()}
    assert {"matrix products", "reductions", "while"} <= kinds
    assert any("tanh" in source for _, source in operations.values())
    _, times = profile.traced(lambda: jax.block_until_ready(compiled(*args)))
    products = [name for name in times if operations[name][0] == "matrix products"]
    assert sum(len(times[name]) for name in products) == 3
    assert all(spent > 0 for own in times.values() for spent in own)


def test_cells_are_timed_once_and_agree(tiny, tmp_path, capsys):
    config = platform_defaults.Config(
        workloads=("reference",),
        map_tasks=("map", "2"),
        precisions=("highest",),
        rounds=1,
        output=tmp_path / "cells",
    )
    rows = platform_defaults.main(config)
    assert len(rows) == 4 and json.loads((tmp_path / "cells.json").read_text()) == rows
    assert all(row["difference"] < 1e-5 and row["seconds"] > 0 for row in rows)
    assert "fastest:\nreference" in capsys.readouterr().out
    with mock.patch.object(platform_defaults, "measure", side_effect=AssertionError("timed again")):
        assert platform_defaults.main(config) == rows


def test_a_cell_that_fails_is_recorded_and_the_others_go_on(tiny, tmp_path, capsys):
    config = platform_defaults.Config(
        workloads=("reference",), map_tasks=("map",), precisions=("highest",), output=tmp_path / "c"
    )
    real, calls = platform_defaults.measure, []

    def measure(cell, *args):
        calls.append(cell)
        if len(calls) == 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return real(cell, *args)

    with mock.patch.object(platform_defaults, "measure", measure):
        failed, fine = platform_defaults.main(config)
    assert "RESOURCE_EXHAUSTED" in failed["error"] and fine["seconds"] > 0
    assert capsys.readouterr().out.count("RESOURCE_EXHAUSTED") == 1


def test_no_cell_is_begun_after_the_time_is_up(tiny, tmp_path):
    config = platform_defaults.Config(max_seconds=1e-9, output=tmp_path / "cells")
    assert platform_defaults.main(config) == []


def test_solutions_are_compared_with_exact_ones_where_these_were_reached():
    info = mock.Mock(converged=True)
    exact = [({"a": np.array([3.0, 4.0])}, info)]
    found = [({"a": np.array([3.0, 4.5], np.float32)}, None)]
    assert solvers._median_error(found, exact) == pytest.approx(0.1)
    info.converged = False
    assert solvers._median_error(found, exact) is None


@pytest.mark.slow
def test_solvers(tmp_path, capsys):
    output = tmp_path / "solvers"
    config = solvers.Config(
        sizes=("2x1",), reg_strengths=(2.0,), meta_steps=1, num_tasks=1, rounds=1, output=output
    )
    rows = {(row["curvature"], row["solver"]): row for row in solvers.main(config)}
    assert list(rows) == [(s.curvature, s.name) for s in solvers.solvers()]
    assert output.with_name("solvers.png").stat().st_size > 10_000
    assert "2-way 1-shot, lambda 2" in capsys.readouterr().out
    assert rows["Gauss-Newton", "woodbury"]["error"] < 1e-4
    assert rows["Hessian", "cg_steihaug, 100 steps"]["error"] < 1e-4
    assert rows["Hessian", "minres, 100 steps"]["error"] < 1e-4
    cut_short = [rows["Hessian", f"cg_steihaug, {k} steps"]["error"] for k in (5, 20)]
    assert cut_short[0] > cut_short[1]
    assert rows["Hessian", "cg, 5 steps"]["error"] == pytest.approx(cut_short[0], rel=1e-3)


@pytest.mark.slow
def test_throughput(tmp_path, capsys):
    config = throughput.Config(
        algorithm="fomaml", log_every=2, chunks=1, rounds=1, output=tmp_path / "rates"
    )
    results = throughput.main(config)
    assert results["share"] == results["trained"][0] / results["bare"][0] > 0
    assert json.loads((tmp_path / "rates.json").read_text())["share"] == results["share"]
    assert "meta-steps a second in training" in capsys.readouterr().out
