"""The experiments that report on runs: comparison, tuning, benchmark."""

import json
import os
from unittest import mock

import pytest

from imaml_jax import protocols

# Importing the experiments must not change the devices of the other tests.
with mock.patch.dict(os.environ, XLA_FLAGS=os.environ.get("XLA_FLAGS", "")):
    from experiments import compare, few_shot, tune
    from experiments.benchmark import __main__ as benchmark
    from experiments.benchmark import ours, peers, workload


def write_run(path, accuracy, **changes):
    settings = {"split": "finn", "test_rotations": None, "test_queries": 5, "test_tasks": 600}
    results = {
        **{"dataset": "Omniglot", "ways": 5, "shots": 1, "algorithm": "imaml", "seconds": 3.0},
        **{"test_accuracy": accuracy, "test_ci95": 0.01, "best_step": 2, "trained_meta_steps": 2},
        **{"command": "python -m x", "date": "2026-01-01", "device": "cpu", "cores": 2},
        **{"versions": {}, "settings": {**settings, "invert": True, **changes}},
    }
    path.mkdir()
    (path / "results.json").write_text(json.dumps(results))
    rows = [{"step": s, "seconds": s, "validation": 0.5 + s / 10, "loss": 1.0} for s in (1, 2)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_runs_are_compared_best_first(tmp_path, capsys):
    runs = (write_run(tmp_path / "a", 0.7), write_run(tmp_path / "b", 0.9))
    output = tmp_path / "out" / "table"
    rows = compare.main(compare.Config(runs, output))
    assert [row["run"] for row in rows] == ["b", "a"]
    assert "90.00 ± 1.00" in capsys.readouterr().out
    assert json.loads(output.with_name("table.json").read_text()) == rows
    assert output.with_name("table.png").stat().st_size > 1000


def test_what_cannot_be_compared_is_refused(tmp_path):
    run = write_run(tmp_path / "a", 0.7)
    (tmp_path / "unfinished").mkdir()
    for runs, message in (
        ((), "at least one"),
        ((run, tmp_path / "unfinished"), r"unfinished/results\.json cannot be read"),
        ((run, write_run(tmp_path / "c", 0.7, test_queries=1)), "different tasks"),
    ):
        with pytest.raises(ValueError, match=message):
            compare.main(compare.Config(runs, tmp_path / "table"))


def test_every_algorithm_gets_the_same_number_of_valid_trials():
    assert set(tune.TRIALS) == set(protocols.ALGORITHMS)
    assert len({len(trials) for trials in tune.TRIALS.values()}) == 1
    for algorithm, trials in tune.TRIALS.items():
        for changes in trials:
            few_shot.resolve(few_shot.Config(algorithm=algorithm, **changes))


def test_flops_of_the_reference_workload():
    # conv4-64 on 28x28: 14^2*9*64 + (7^2 + 4^2 + 2^2)*576*64 + 256*5 multiply-adds
    assert workload.forward_flops() == 2 * (196 * 576 + 69 * 576 * 64 + 256 * 5)
    gradients = 16 * 3 * 5 + 3 * 75
    assert workload.flops("fomaml") == 16 * gradients * workload.forward_flops()
    assert workload.flops("imaml") == 16 * (gradients + 5 * 6 * 5) * workload.forward_flops()
    assert workload.flops("maml") == 16 * (gradients + 16 * 6 * 5) * workload.forward_flops()


def test_benchmark_compares_round_by_round(tmp_path):
    names = [benchmark.IMAML, benchmark.MAML, "torchopt MAML"]
    times = {benchmark.CEILING: [1.0, 2.0, 3.0]}
    times |= dict(zip(names, ([1.0, 2.0, 3.0], [2.0, 2.0, 2.0], [4.0, 8.0, 6.0]), strict=True))
    memory = {name: {"temp_bytes": None, "peak_rss_bytes": 2**30} for name in names}
    results = benchmark.summary(times, memory, {"torchopt MAML": 1e-14}, devices=1)
    rows = results["contenders"]
    assert results["ceiling_flops"] == 2 * ours.MATRIX**3 / 2.0
    assert rows["torchopt MAML"]["ratio"] == [3.0, 2.0, 4.0]
    assert rows[benchmark.IMAML]["ratio"] == [1.0, 1.0, 1.0]
    share = workload.flops("maml") / 2.0 / results["ceiling_flops"]
    assert rows[benchmark.MAML]["share_of_ceiling"] == share
    results |= {"machine": "m", "cores": 2, "date": "2026-01-01"}
    lines = benchmark.table(results).splitlines()
    assert [line.split("  ")[0] for line in lines[2:5]] == names
    assert "3.00 (2.00-4.00)" in lines[4] and "1e-14" in lines[4]
    benchmark.draw(results, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 5000


def test_benchmark_names():
    known = {*ours.learners(), *peers.CONTENDERS}
    assert {benchmark.IMAML, benchmark.MAML, *benchmark.QUICK} <= known
    assert {*benchmark.SAME_PROBLEM, *benchmark.SAME_PROBLEM.values()} <= known
    assert set(peers.available()) <= set(peers.CONTENDERS)


def test_benchmark_reports_a_contender_that_stops():
    with benchmark._process("no such learner", 1) as process:
        with pytest.raises(RuntimeError, match=r"(?s)no such learner stopped:.*KeyError"):
            process.ask(0)


def test_benchmark_refuses_before_it_starts():
    for changes, message in (({"rounds": 0}, "rounds=0"), ({"devices": 10**6}, "devices=1000000")):
        with pytest.raises(ValueError, match=message):
            benchmark.main(benchmark.Config(**changes))


@pytest.mark.slow
def test_quick_benchmark(tmp_path, capsys):
    output = tmp_path / "out" / "table"
    results = benchmark.main(benchmark.Config(quick=True, output=output))
    assert json.loads(output.with_name("table.json").read_text()) == results
    assert set(results["contenders"]) == set(benchmark.QUICK)
    assert all(name in capsys.readouterr().out for name in [benchmark.IMAML])
    for row in results["contenders"].values():
        assert row["disagreement"] is None or row["disagreement"] < 1e-10
