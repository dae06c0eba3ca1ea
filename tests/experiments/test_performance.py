"""The experiments on solvers, mappings and rates: what they compute, at a tiny size."""

import json
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import platform_defaults, solvers, throughput
from experiments.benchmark import profile

TINY = platform_defaults.Workload(2, 2, 1, 1, 2, 8, 1, {"filters": 4, "num_blocks": 2})


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(platform_defaults.WORKLOADS, "reference", TINY)
    monkeypatch.setattr(platform_defaults, "_CPU_MATRIX", 64)
    monkeypatch.setattr(platform_defaults, "_NUMBERS", 64)
    monkeypatch.setattr(platform_defaults.workload, "CG_STEPS", 2)


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


def test_products_by_a_library_of_the_gpu_are_products():
    text = """
ENTRY %main {
  %g.1 = (f32[4]) custom-call(%a, %b), custom_call_target="__cublas$gemm"
  %c.2 = (f32[4]) custom-call(%a, %b), custom_call_target="__cudnn$convForward"
  %e.3 = f32[4] add(%a, %b), metadata={op_name="jit(f)/gemm_like"}
  ROOT %s.4 = f32[4] custom-call(%a), custom_call_target="Sort"
}"""
    kinds = {name: kind for name, kind, _ in profile.parsed(text)}
    assert kinds["g.1"] == kinds["c.2"] == "matrix products"
    assert kinds["e.3"] == kinds["s.4"] == "elementwise"


@pytest.mark.slow
def test_cells_are_timed_once_and_agree(tiny, tmp_path, capsys):
    config = platform_defaults.Config(
        workloads=("reference",),
        map_tasks=("map", "1"),
        precisions=("highest",),
        rounds=1,
        output=tmp_path / "cells",
    )
    rows = platform_defaults.main(config)
    assert len(rows) == 4 and json.loads((tmp_path / "cells.json").read_text()) == rows
    assert all(row["difference"] < 1e-5 and row["seconds"] > 0 for row in rows)
    assert "fastest in highest over 1 workload(s): map_tasks=" in capsys.readouterr().out
    with mock.patch.object(platform_defaults, "measure", side_effect=AssertionError("timed again")):
        assert platform_defaults.main(config) == rows


def test_a_cell_that_fails_is_recorded_and_tried_again(tiny, tmp_path, capsys):
    config = platform_defaults.Config(
        workloads=("reference",), map_tasks=("map",), precisions=("highest",), output=tmp_path / "c"
    )
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
    fine = {"seconds": 1.0, "difference": 0.0}
    shown = mock.patch.object(platform_defaults, "line", str)
    with shown, mock.patch.object(platform_defaults, "measure", side_effect=[error, fine]):
        failed, other = platform_defaults.main(config)
    assert "RESOURCE_EXHAUSTED" in failed["error"] and other["seconds"] == 1.0
    with shown, mock.patch.object(platform_defaults, "measure", side_effect=[fine]):
        rows = platform_defaults.main(config)
    assert [row["seconds"] for row in rows] == [1.0, 1.0]
    assert "1 cells of" in capsys.readouterr().out


def test_cells_of_another_machine_are_kept(tiny, tmp_path):
    place = {"device": "H200", "machine": "m", "cores": 16, "versions": {}, "date": "2026-01-01"}
    other = {**platform_defaults.Cell("reference", "vmap", "lax", "highest")._asdict(), **place}
    path = tmp_path / "cells.json"
    path.write_text(json.dumps([other]))
    config = platform_defaults.Config(
        workloads=("reference",), map_tasks=("map",), output=tmp_path / "cells"
    )
    with (
        mock.patch.object(platform_defaults, "line", str),
        mock.patch.object(platform_defaults, "measure", return_value={"error": "no"}),
    ):
        rows = platform_defaults.main(config)
    assert len(rows) == 4 and json.loads(path.read_text()) == [other, *rows]


@pytest.mark.parametrize("content", ["[", '[{"workload": 1}]', "3", '{"a": 1}'])
def test_a_file_of_something_else_is_refused(tmp_path, content):
    (tmp_path / "cells.json").write_text(content)
    with pytest.raises(ValueError, match=r"cells\.json holds no cells"):
        platform_defaults.main(platform_defaults.Config(output=tmp_path / "cells"))


def test_the_roofline_counts_each_product_once():
    products, numbers = platform_defaults.costs(platform_defaults.WORKLOADS["reference"])
    assert products == platform_defaults.workload.flops("imaml")
    assert 10 < products / (4 * numbers) < 100  # operations a byte


@pytest.mark.slow
def test_a_solve_cut_short_is_no_measurement(tiny, monkeypatch):
    monkeypatch.setattr(platform_defaults.workload, "CG_STEPS", 500)
    cell = platform_defaults.Cell("reference", "map", "patches", "highest")
    row = platform_defaults.measure(cell, 1, platform_defaults.Measurements())
    assert "CG steps on average" in row["error"]


def test_no_cell_is_begun_after_the_time_is_up(tiny, tmp_path):
    config = platform_defaults.Config(max_seconds=1e-12, output=tmp_path / "cells")
    assert platform_defaults.main(config) == []


def test_solutions_are_compared_with_exact_ones_where_these_were_reached():
    exact = [({"a": np.array([3.0, 4.0])}, None)]
    found = [({"a": np.array([3.0, 4.5], np.float32)}, None)]
    assert solvers._median_error(found, exact) == pytest.approx(0.1)
    assert solvers._median_error(found, None) is None


@pytest.mark.slow
def test_solvers(tmp_path, capsys):
    output = tmp_path / "solvers"
    config = solvers.Config(
        sizes=("2x1",), reg_strengths=(2.0,), meta_steps=1, num_tasks=1, rounds=1, output=output
    )
    rows = {(row["curvature"], row["solver"]): row for row in solvers.main(config)}
    assert list(rows) == [(s.curvature, s.name) for s in solvers.solvers()]
    assert len(json.loads((tmp_path / "solvers.json").read_text())) == len(rows)
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
