"""The experiments that report on finished runs: comparison and tuning."""

import json
import os
from unittest import mock

import pytest

from imaml_jax import protocols

# Importing the experiments must not change the devices of the other tests.
with mock.patch.dict(os.environ, XLA_FLAGS=os.environ.get("XLA_FLAGS", "")):
    from experiments import compare, few_shot, tune


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
    earlier = output.with_name("table.json")
    more = compare.Config((earlier, write_run(tmp_path / "c", 0.8)), tmp_path / "more")
    assert [row["run"] for row in compare.main(more)] == ["b", "c", "a"]


def test_what_cannot_be_compared_is_refused(tmp_path):
    run = write_run(tmp_path / "a", 0.7)
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "other.json").write_text("[1]")
    for runs, message in (
        ((tmp_path / "other.json",), r"other\.json is no comparison"),
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
