"""What reports share, and the experiments that report on finished runs: comparison, tuning."""

import json
from unittest import mock

import jax
import pytest

from experiments import (
    compare,
    mini_imagenet,
    mini_imagenet_table,
    omniglot,
    omniglot_table,
    tune,
)
from experiments.shared import accuracy_table, few_shot, reports
from imaml_jax.learners.registry import ALGORITHMS
from imaml_jax.protocols import PROTOCOLS, published
from imaml_jax.training import NonFiniteError


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
    assert set(tune.TRIALS) <= set(ALGORITHMS)
    assert len({len(trials) for trials in tune.TRIALS.values()}) == 1
    for algorithm, trials in tune.TRIALS.items():
        for changes in trials:
            few_shot.Config.of(algorithm=algorithm, **changes)


def test_a_trial_is_done_if_it_was_judged_on_as_many_tasks(tmp_path):
    row = {"validation": 0.5, "validation_ci95": 0.1}
    with (
        mock.patch.object(tune.omniglot.omniglot, "load"),
        mock.patch.object(few_shot, "meta_train") as meta_train,
    ):
        meta_train.return_value.history = [row]
        for validation_tasks, trained in ((300, 4), (300, 4), (1000, 8), (300, 8)):
            config = tune.Config(validation_tasks=validation_tasks, output=tmp_path)
            rows = tune.main(config)
            assert meta_train.call_count == len(rows) == trained
    assert [row["validation_tasks"] for row in rows] == [300] * 4 + [1000] * 4


def finished(accuracy=0.875, steps=100, residual=None):
    """What a run returns, as far as the table reads it."""
    rest = dict.fromkeys(("seconds", "command", "date", "device", "versions"), "")
    results = {"test_accuracy": accuracy, "test_ci95": 0.01, "trained_meta_steps": steps}
    return {**rest, **results, "test_info": {"inner_residual": residual}}


def test_the_omniglot_table(tmp_path, capsys):
    ran = []

    def run(config):
        ran.append(config)
        if config.algorithm == "imaml":
            raise NonFiniteError(7, 2, jax.random.key(0), None)
        results = finished(steps=config.settings.outer.meta_steps, residual=0.25)
        config.workdir.mkdir(parents=True)
        (config.workdir / "results.json").write_text(json.dumps(results))
        return results

    config = omniglot_table.Config(
        ways=(20,),
        shots=(1,),
        algorithms=("fomaml", "imaml"),
        budget=0.01,
        workdir=tmp_path,
        output=tmp_path / "table",
    )
    with mock.patch.object(omniglot, "main", run):
        rows = omniglot_table.main(config)
        names = [(row["protocol"], row["algorithm"]) for row in rows]
        in_common = [("common", "fomaml"), ("common", "imaml")]
        assert names == [("finn", "fomaml"), ("imaml_paper", "imaml"), *in_common]
        assert [c.settings.outer.meta_steps for c in ran] == [600, 200, 100, 100]
        assert all(c.settings.outer.meta_steps % c.validate_every == 0 for c in ran)
        again = omniglot_table.main(config)
    assert [c.algorithm for c in ran[4:]] == ["imaml", "imaml"]  # the others were finished
    assert again == rows == json.loads((tmp_path / "table.json").read_text())
    text = (tmp_path / "table.md").read_text()
    assert "| first-order MAML | in print | 89.4 ± 0.5 |" in text
    assert "|  | finn | 87.50 ± 1.00 (r 0.25) *600 |" in text
    assert "|  | imaml_paper | diverged at step 7 |" in text
    assert text in capsys.readouterr().out
    assert "<td>89.4 ± 0.5</td>" in (tmp_path / "table.html").read_text()


def test_the_mini_imagenet_table(tmp_path):
    results = finished(accuracy=0.4, steps=100)
    with mock.patch.object(mini_imagenet, "main", lambda config: results):
        mini_imagenet_table.main(
            mini_imagenet_table.Config(
                ways=(5, 10),
                shots=(1,),
                algorithms=("reptile", "imaml"),
                protocols=("common",),
                workdir=tmp_path,
                output=tmp_path / "table",
            )
        )
    text = (tmp_path / "table.md").read_text()
    assert "| Reptile | in print | 47.07 ± 0.26 | 31.1 |" in text
    assert "| iMAML, gradient descent | in print | 48.96 ± 1.84 |  |" in text


def test_only_imaml_has_the_protocol_of_its_code():
    config = omniglot_table.Config(ways=(5,), shots=(1,), protocols=("imaml_dev",))
    assert [cell.algorithm for cell in accuracy_table.cells(config)] == ["imaml"]
    with pytest.raises(ValueError, match="nothing to run"):
        omniglot_table.main(omniglot_table.Config(protocols=("imaml_dev",), algorithms=("maml",)))


def test_a_full_budget_is_not_marked():
    row = {"full_meta_steps": 100, **finished(), "inner_residual": None}
    assert accuracy_table._shown(row) == "87.50 ± 1.00"


def test_every_published_value_has_its_place():
    for values in published.PUBLISHED.values():
        assert set(values) <= set(ALGORITHMS)
    for algorithm, name in published.OWN_PROTOCOL.items():
        assert algorithm in PROTOCOLS[name].covers


def test_a_column_is_as_wide_as_its_widest_cell():
    columns = [("", ""), ("ms", ".1f"), ("ms", ".0e")]
    table = reports.text_table(columns, [["a", 1.25, None], ["longer", 1000, "none"]])
    assert table == "            ms    ms\na          1.2\nlonger  1000.0  none"
    assert reports.text_table(dict(columns[:2]), [["a", 2]]) == "    ms\na  2.0"
    with pytest.raises(ValueError, match="longer"):
        reports.text_table({"": "", "ms": ".1f"}, [["a"]])


def test_what_is_timed_takes_turns():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = reports.seconds_in_rounds(runs, 2)
    assert calls == ["a", "b", "a", "b"] and list(seconds) == ["a", "b"]
    assert all(len(own) == 2 and min(own) >= 0 for own in seconds.values())


@pytest.mark.parametrize("shared_legend", [False, True])
def test_panels_are_written_with_what_they_have_in_common(tmp_path, shared_legend):
    path = tmp_path / "panels.png"
    with reports.panels(path, 2, (6, 3), shared_legend, xlabel="x", yscale="log") as both:
        both[0].plot([1, 2], [3, 4], label="drawn")
    assert [axes.get_yscale() for axes in both] == ["log", "log"]
    assert [axes.get_legend() is not None for axes in both] == [not shared_legend, False]
    assert len(both[0].figure.legends) == shared_legend
    assert path.stat().st_size > 1000
