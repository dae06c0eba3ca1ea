"""The report of runs: what it reads, how it judges, and that its page is whole and safe."""

import html.parser
import json
import os
import platform
import re
from pathlib import Path

import pytest

from experiments.report import __main__ as report
from experiments.report import charts, rows, runs

RESULTS = Path(__file__).resolve().parents[2] / "experiments" / "results"
HOSTILE = "</script><img src=x onerror=alert(1)>&\u2028\"'"
CONFIG = {
    **{"dataset": "Omniglot", "algorithm": "maml", "protocol": "common", "ways": 5, "shots": 1},
    **{"meta_steps": None, "settings": {"name": "common", "test_tasks": 600, "meta_batch": 8}},
}
MADE = {"device": "cpu", "machine": HOSTILE, "versions": {"jax": "1"}, "command": "python -m x"}
MADE |= {"commit": "abc123+", "peak_memory_mib": 512.0, "seconds": 3.0}


def write_run(folder, accuracy=None, *, seed=0, steps=5000, lines=(), half=0.004, **changes):
    """A run's folder; finished where an accuracy is given."""
    folder.mkdir(parents=True)
    config = CONFIG | changes | {"seed": seed}
    (folder / "config.json").write_text(json.dumps(config | {"root_key": [0, seed]}))
    known = {"query_accuracy": 0.5, "validation": 0.7, "min_curvature": float("nan")}
    history = [{"step": s, "seconds": s / 10, "inner_residual": 10.0**-s} | known for s in (1, 2)]
    text = "".join(json.dumps(row) + "\n" for row in history)
    (folder / "metrics.jsonl").write_text(text + "".join(lines))
    if accuracy is not None:
        tested = {"test_accuracy": accuracy, "test_ci95": half, "trained_meta_steps": steps}
        if steps is None:
            (folder / "metrics.jsonl").unlink()
        (folder / "results.json").write_text(json.dumps(config | MADE | tested))
    return folder


def make(tmp_path, *paths, **settings):
    """The groups of a report and its page."""
    output = tmp_path / "out" / "report.html"
    groups = report.main(report.Config(runs=tuple(paths), output=output, **settings))
    return groups, output.read_text(encoding="utf-8")


class Page(html.parser.HTMLParser):
    """Tags and attributes, and the text of the script."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.script, self.open = [], [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.open = tag == "script"

    def handle_endtag(self, tag):
        self.open &= tag != "script"

    def handle_data(self, data):
        self.script += data if self.open else ""


def test_seeds_share_a_row_and_have_a_line_each(tmp_path):
    folders = [write_run(tmp_path / f"seed{s}", 0.98 + s / 100, seed=s) for s in (0, 1)]
    other = write_run(tmp_path / "other", 0.9, shots=5)
    again = write_run(tmp_path / "again", 0.9, seed=1)  # a seed that the group has already
    groups, page = make(tmp_path, *folders, other, again, folders[0])
    assert [[run.name for run in g.runs] for g in groups] == [
        ["seed0", "seed1"], ["again"], ["other"]
    ]  # fmt: skip
    assert rows.mean(groups[0].scores) == pytest.approx(98.5)
    assert "standard deviation of 2 seeds 0.71" in page
    assert "98.00 ± 0.40, 99.00 ± 0.40" in page  # each with its own interval
    assert "2 seeds: 0, 1" in page and "600 test tasks" in page
    assert "512 MiB" in page and "abc123+" in page and "common" in page
    drawn = page[page.index('aria-label="inner residual"') :]
    assert drawn[: drawn.index("</svg>")].count('class="line') == 3
    assert 'aria-label="min curvature"' not in page  # it was never finite


@pytest.mark.parametrize(
    ("accuracy", "steps", "changes", "status"),
    [
        (0.9845, 5000, {}, "within the interval"),
        (0.9845, 10, {}, "within the interval"),
        (0.9955, 5000, {}, "above"),
        (0.97, 5000, {}, "below"),
        (0.97, 10, {}, "budget too small"),
        (0.97, None, {}, "below, budget not known"),
        (0.97, 10, {"dataset": "glyphs"}, "no published value"),
        (None, None, {}, "unfinished"),
    ],
)
def test_status(tmp_path, accuracy, steps, changes, status):
    """In print are 98.7 ± 0.4 per cent, and ours has ± 0.4 too."""
    (group,), page = make(tmp_path, write_run(tmp_path / "a", accuracy, steps=steps, **changes))
    assert group.status == status
    assert ("98.7 ± 0.4" in page) == ("dataset" not in changes)


def test_deviations_are_told(tmp_path):
    (group,), _ = make(tmp_path, write_run(tmp_path / "a", 0.9, steps=10))
    assert "10 of 5,000 meta-steps" in group.deviations and "one seed" in group.deviations
    assert "meta_batch: 8, in protocol finn 32" in group.deviations


def test_a_run_that_goes_on(tmp_path):
    lines = ('{"step": 3, "validation": 0.8, "new field": {"a": [1]}, "loss": "nan"}\n',)
    lines += ("no json\n", '{"step": 4, "valida')
    folder = write_run(tmp_path / "a", lines=lines)
    (folder / ".lock").write_text(f"{os.getpid()} on {platform.node()}\n")
    (group,), page = make(tmp_path, folder)
    assert (group.status, rows.trained_steps(group.runs[0])) == ("running", 3)
    assert group.scores[0].value == pytest.approx(0.8)
    assert "metrics.jsonl: line 4 is not a JSON object" in page
    (folder / ".lock").write_text("gone\n")
    assert runs.read(folder)[0].state == "unfinished"
    (folder / "results.json").write_text('{"half')
    (damaged,) = runs.read(folder)
    assert damaged.state == "unfinished" and "results.json cannot be read" in damaged.notes[0]


def test_the_page_is_whole_and_safe(tmp_path):
    folder = write_run(tmp_path / "a<b>&", 0.9, algorithm=HOSTILE, task=HOSTILE)
    (folder / "bands.png").write_bytes(b"\x89PNG")
    _, text = make(tmp_path, folder)
    page = Page(text)
    assert page.tags.count("script") == 1 and page.tags.count("img") == 1
    for name, value in page.attributes:
        assert not name.startswith("on")
        assert name not in ("src", "href") or value.startswith("data:")
    assert not re.search(r"url\(|@import|http-equiv=.refresh", text)
    assert {"viewport"} <= {value for name, value in page.attributes if name == "name"}
    stored = json.loads(page.script, parse_constant=pytest.fail)
    (run,) = stored["groups"][0]["runs"]
    assert run["results"]["algorithm"] == HOSTILE
    assert run["history"][0]["min_curvature"] is None


def test_the_committed_results(tmp_path):
    paths = sorted(RESULTS.rglob("*.json"))
    groups, text = make(tmp_path, *paths)
    found = json.loads(Page(text).script)["groups"]
    told = [score["value"] for g in found for r in g["runs"] if (score := r["score"])]
    table = json.loads((RESULTS / "omniglot_5way5shot.json").read_text(encoding="utf-8"))
    assert {100 * row["test_accuracy"] for row in table} <= set(told)
    names = {run.name for group in groups for run in group.runs}
    assert {"benchmark", "solvers", "navigation: maml", "leo: 1_shot: leo"} <= names
    statuses = {group.status for group in groups}
    assert {"budget too small", "within the interval", "no published value"} <= statuses
    assert len(text) < 8 * 2**20


def test_folders_of_runs_and_runs_of_several_algorithms(tmp_path):
    parts = {"leo": {"test_accuracy": 0.4}, "deterministic": {"test_accuracy": 0.5}}
    leo = tmp_path / "runs" / "leo"
    write_run(leo / "leo")
    (leo / "results.json").write_text(json.dumps(CONFIG | MADE | {"rows": parts}))
    write_run(tmp_path / "runs" / "deep" / "demo" / "imaml", 0.9)
    (tmp_path / "runs" / "deep" / "demo" / "results.json").write_text('[{"name": "imaml"}]')
    found = runs.read(tmp_path / "runs")
    assert [run.name for run in found] == ["imaml", "leo: leo", "leo: deterministic"]
    assert [len(run.history) for run in found] == [2, 2, 0]
    assert [run.results["test_accuracy"] for run in found] == [0.9, 0.4, 0.5]


NUMBERS = ("test_accuracy", "test_ci95", "trained_meta_steps", "seconds", "seed", "ways", "shots")
WORDS = ("algorithm", "protocol", "dataset", "task", "settings", "command", "constants")
HUGE, DEEP = 10**400, "[" * 600 + "]" * 600


@pytest.mark.parametrize(
    "changes",
    [
        *({name: value} for value in (HUGE, -0.1, 1.7e308, 1e-320, [1]) for name in NUMBERS),
        *({name: value} for value in (["a"], {"a": []}, 3, "\ud800") for name in WORDS),
        {"settings": {"name": ["a"], "test_tasks": HUGE}},
        {"task": f"Omniglot {'9' * 5000}-way 1-shot"},
        {"dataset": "navigation", "algorithm": ["maml"]},
        {"dataset": "mini_imagenet", "shots": HUGE, "ways": 10**308},
    ],
)
def test_odd_records_end_no_report(tmp_path, changes):
    folder = write_run(tmp_path / "odd", 0.9)
    (folder / "results.json").write_text(json.dumps(CONFIG | MADE | {"test_accuracy": 1} | changes))
    groups, page = make(tmp_path, folder, write_run(tmp_path / "good", 0.987))
    assert "within the interval" in {group.status for group in groups}
    json.loads(Page(page).script, parse_constant=pytest.fail)


@pytest.mark.parametrize(
    "line",
    [
        f'{{"step": 3, "loss": {HUGE}}}',
        f'{{"step": {HUGE}, "loss": 1}}',
        '{"step": 3, "loss": 1e308}\n{"step": 4, "loss": -1e308}',
        '{"step": 3, "loss": 5e-324}\n{"step": 4, "loss": 0}',
        f'{{"step": 3, "deep": {DEEP}}}',
        f'{{"step": 3, "deep": {"[" * 10**5}',
        '{"step": 3, "\\ud800": "\\ud800"}',
    ],
    ids=["huge", "step", "span", "tiny", "deep", "deeper", "surrogate"],
)
def test_odd_lines_end_no_report(tmp_path, line):
    (group,), page = make(tmp_path, write_run(tmp_path / "odd", 0.987, lines=[line + "\n"]))
    assert group.status == "within the interval"
    json.loads(Page(page).script, parse_constant=pytest.fail)


def test_a_run_is_reported_once_however_many_links_lead_to_it(tmp_path):
    write_run(tmp_path / "runs" / "b", 0.9)
    for name in ("a", "x", "y"):
        (tmp_path / "runs" / name).symlink_to(tmp_path / "runs" / ("b" if name == "a" else ""))
    assert [run.name for run in runs.read(tmp_path / "runs")] == ["b"]


def test_seeds_are_in_the_order_of_numbers(tmp_path):
    folders = [write_run(tmp_path / f"s{i}", 0.9, seed=s) for i, s in enumerate((10, "x", 2, None))]
    groups, _ = make(tmp_path, *folders)
    assert [run.results["seed"] for group in groups for run in group.runs] == [2, 10, None, "x"]


def test_what_is_no_run_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("x")
    for name, text in (("other", '{"name": "x"}'), ("torn", "[1"), ("number", "3")):
        (tmp_path / f"{name}.json").write_text(text)
    run = write_run(tmp_path / "run", 0.9)
    for path, message in (
        ("empty", "empty is no run: neither it nor a folder in it has results.json"),
        ("absent", "absent does not exist"),
        ("text.txt", "text.txt is no run: name a folder, or a JSON file"),
        ("other.json", "other.json is no result of these experiments"),
        ("torn.json", "torn.json cannot be read"),
        ("number.json", "number.json is no result"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            make(tmp_path, run, tmp_path / path)
    assert not (tmp_path / "out" / "report.html").exists()
    with pytest.raises(ValueError, match="runs: name at least one"):
        make(tmp_path)
    for seconds in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"watch={seconds} must be a finite number,? above 0"):
            make(tmp_path, run, watch=seconds)


@pytest.mark.parametrize("ends_by", ["the end of the run", "Ctrl-C"])
def test_watch(tmp_path, monkeypatch, capsys, ends_by):
    folder, seen = write_run(tmp_path / "a"), []

    def sleep(seconds):
        seen.append((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
        if ends_by == "Ctrl-C":
            raise KeyboardInterrupt
        if len(seen) == 2:
            tested = {"test_accuracy": 0.9, "test_ci95": 0.1, "trained_meta_steps": 2}
            (folder / "results.json").write_text(json.dumps(CONFIG | MADE | tested))

    monkeypatch.setattr(report.time, "sleep", sleep)
    (group,), last = make(tmp_path, folder, watch=30.0)
    assert len(seen) == {"Ctrl-C": 1}.get(ends_by, 2)
    assert all('http-equiv="refresh" content="30"' in page for page in seen)
    assert "http-equiv" not in last
    assert (group.status == "unfinished") == (ends_by == "Ctrl-C")
    assert "1 run in" in capsys.readouterr().out


def test_charts():
    line = charts.Line("a<b", 9, [(0.0, 1e-4), (10.0, 1.0)])
    drawn = charts.line_chart("t", "x", [line, charts.Line("none", 0, [])])
    assert "logarithmic" in drawn and "a&lt;b" in drawn and 'class="line c1 d1"' in drawn
    assert 'd="M52.0,230.0L398.0,28.0"' in drawn  # from corner to corner
    assert charts.line_chart("t", "x", [charts.Line("none", 0, [])]) == ""
    alone = charts.line_chart("t", "x", [charts.Line("one", 0, [(5.0, 0.0)])])
    assert "<circle" in alone and "logarithmic" not in alone
    assert charts._ticks(0.0, 10.0) == [0, 2, 4, 6, 8, 10]
    assert charts._ticks(-0.3, 0.31) == pytest.approx([-0.2, 0, 0.2])
