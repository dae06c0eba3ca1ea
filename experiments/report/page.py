"""The report as one HTML file that needs nothing else: no network, no other file."""

import base64
import datetime
import html
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import imaml_jax
from experiments.report import charts
from experiments.report.rows import Group, algorithm_name, mean, tasks_scored, trained_steps
from experiments.report.runs import Run, number, provenance
from experiments.shared import accuracy_table, common

_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>Runs of imaml_jax</title>
"""
_STYLE = Path(__file__).with_name("style.css")
_HOW = (
    "An interval is 1.96 standard errors over test tasks, the spread that of several seeds; the "
    "two are never mixed. Within the interval: ours and the published value differ by no more "
    "than both half-widths together. Budget too small: ours is below and has fewer meta-steps "
    "than its protocol; not known: the record does not tell them. Numbers of different protocols "
    "do not compare: see the deviations."
)
_COLUMNS = (
    *("task", "algorithm", "ours", "published", "status", "tasks and seeds", "protocol"),
    *("budget", "training", "memory", "device", "commit", "command"),
)
_CURVES = ("loss", "accuracy", "validation", "return", "mse")
_NOT_DRAWN = ("step", "seconds", "validation_ci95")


def page(groups: Sequence[Group], *, command: str, refresh: float | None = None) -> str:
    """The whole file.

    Args:
      groups: what is reported.
      command: the one that makes the report.
      refresh: seconds after which a browser loads it again, None for never.
    """
    judged = [g for g in groups if g.runs[0].raw is None]
    others = [g for g in groups if g.runs[0].raw is not None]
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    runs = [run for group in groups for run in group.runs]
    states = [f"{n} {s}" for s in ("finished", "running", "unfinished") if (n := _count(runs, s))]
    body = [
        f"<h1>Runs of imaml_jax {_safe(imaml_jax.__version__)}</h1>",
        f"<p>{_safe(', '.join(states))}; written {now}</p>\n{_command(command)}",
        *(["<h2>Ours beside published</h2>", _results(judged)] if judged else []),
        *_all_charts(judged),
        *(["<h2>Other results</h2>", _others(others)] if others else []),
        *_pictures(runs),
        *_deviations(judged),
        *_systems(runs),
        "<h2>Data</h2>",
        "<p>All numbers of this page, and those of the files it is made of, are in it as JSON: "
        '<code>JSON.parse(document.getElementById("runs").textContent)</code></p>',
        f'<script type="application/json" id="runs">{_json(groups)}</script>',
    ]
    reload = "" if refresh is None else f'<meta http-equiv="refresh" content="{refresh:g}">\n'
    style = f"<style>\n{_STYLE.read_text(encoding='utf-8')}</style>\n"
    text = _HEAD + style + reload + "</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    return text.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair has no UTF-8


def _count(runs: Sequence[Run], state: str) -> int:
    return sum(run.state == state for run in runs)


def _table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Cells are HTML already."""
    head = "".join(f'<th scope="col">{_safe(column)}</th>' for column in columns)
    body = "\n".join(
        "<tr>"
        + "".join(
            f'<td data-label="{_safe(column)}">{cell}</td>'
            for column, cell in zip(columns, line, strict=True)
        )
        + "</tr>"
        for line in lines
    )
    return (
        f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n'
        "</tbody>\n</table></div>"
    )


def _results(groups: Sequence[Group]) -> str:
    return _table(_COLUMNS, [_line(group) for group in groups]) + f"\n<p>{_safe(_HOW)}</p>"


def _line(group: Group) -> list[str]:
    results, published = group.runs[0].results, group.published
    made = [provenance(run.results) for run in group.runs]
    seeds = [run.results.get("seed") for run in group.runs]
    tasks = tasks_scored(group)
    counted = ([tasks] if tasks else []) + [
        f"{len(seeds)} seed{'s' * (len(seeds) > 1)}: {', '.join(map(str, seeds))}"
        if None not in seeds
        else "seed not told"
    ]
    settings = results.get("settings")
    settings = settings if isinstance(settings, dict) else {}
    trained = [trained_steps(run) for run in group.runs]
    steps = [f"{each:,}" for each in trained if each is not None]
    full = f" of {group.full_steps:,}" if group.full_steps else ""
    protocol = str(settings.get("name") or results.get("protocol") or "")
    value = "" if published is None else accuracy_table.printed(*published[:2])
    seconds = [each for run in group.runs if (each := _seconds(run)) is not None]
    return [
        _cell(group.task),
        _cell(algorithm_name(results), *(run.name for run in group.runs)),
        _ours(group),
        _cell(value, "" if published is None else published.kind),
        _cell(group.status),
        _cell("; ".join(counted)),
        _cell(protocol, str(settings.get("source", ""))),
        _cell(f"{', '.join(steps)}{full} meta-steps" if steps else ""),
        _cell(", ".join(f"{each:,.0f} s" for each in seconds)),
        _memory(results),
        _cell(_each(made, "device")),
        _command(_each(made, "commit")),
        _command(_each(made, "command")),
    ]


def _cell(text: str, *notes: str) -> str:
    return _safe(text) + "".join(f"<small>{_safe(note)}</small>" for note in notes if note)


def _ours(group: Group) -> str:
    scores = [score for score in group.scores if score is not None]
    average = mean(scores)
    if average is None:
        return ""
    if len(scores) == 1:
        half = scores[0].half_width
        kind = "no interval" if half is None else "95% interval"
        return _cell(_value(average, half), f"{scores[0].what}; {kind}")
    spread = statistics.stdev(score.value for score in scores)
    each = ", ".join(_value(score.value, score.half_width) for score in scores)
    return _cell(
        _value(average, None),
        f"{scores[0].what}; standard deviation of {len(scores)} seeds {spread:.2g}",
        f"each with its 95% interval: {each}",
    )


def _value(value: float, half_width: float | None) -> str:
    digits = 2 if half_width is None else max(2, 1 - math.floor(math.log10(half_width or 1)))
    said = f"{value:.{digits}f}"
    return said if half_width is None else f"{said} ± {half_width:.{digits}f}"


def _seconds(run: Run) -> float | None:
    last = run.history[-1].get("seconds") if run.history else None
    return number(run.results.get("seconds")) or number(last)


def _memory(results: dict[str, Any]) -> str:
    if (mib := number(results.get("memory_mib"))) is not None:
        return _cell(f"{mib:,.1f} MiB", "of one meta-gradient")
    if (mib := number(results.get("peak_memory_mib"))) is not None:
        return _cell(f"{mib:,.0f} MiB", "peak of the process or device")
    return ""


def _each(made: Sequence[dict[str, Any]], name: str) -> str:
    return ", ".join(dict.fromkeys(str(each[name]) for each in made if each.get(name)))


def _command(text: str) -> str:
    if not text:
        return ""
    if len(text) < 60:
        return f"<code>{_safe(text)}</code>"
    return f"<details><summary>command</summary><code>{_safe(text)}</code></details>"


def _all_charts(groups: Sequence[Group]) -> Iterable[str]:
    """Of each task: learning curves, then diagnostics, one line for each seed."""
    for task in dict.fromkeys(group.task for group in groups):
        own = [
            group for group in groups if group.task == task and any(r.history for r in group.runs)
        ]
        fields = sorted({
            name for group in own for run in group.runs for row in run.history for name in row
            if name not in _NOT_DRAWN and number(row[name]) is not None
        })  # fmt: skip
        curves = [name for name in fields if name.endswith(_CURVES)]
        if not own:
            continue
        yield f"<h2>{_safe(task)}</h2>"
        yield _legend(own)
        drawn = [(name, "step") for name in curves]
        drawn += [("validation", "seconds")] * ("validation" in fields)
        yield "<h3>Learning curves</h3>"
        yield _charts(own, drawn)
        if len(curves) < len(fields):
            yield "<h3>Diagnostics</h3>"
            yield _charts(own, [(name, "step") for name in fields if name not in curves])


def _charts(groups: Sequence[Group], drawn: Sequence[tuple[str, str]]) -> str:
    found = []
    for name, abscissa in drawn:
        lines = [
            charts.Line(
                f"{group.name}, {run.name}",
                index,
                sorted(
                    (x, y) for row in run.history
                    if (x := number(row.get(abscissa))) is not None
                    and (y := number(row.get(name))) is not None
                ),
            )
            for index, group in enumerate(groups)
            for run in group.runs
        ]  # fmt: skip
        label = {"step": "meta-steps"}.get(abscissa, abscissa)
        found.append(charts.line_chart(name.replace("_", " "), label, lines))
    return f'<div class="charts">{"".join(f"<div>{each}</div>" for each in found if each)}</div>'


def _legend(groups: Sequence[Group]) -> str:
    items = []
    for index, group in enumerate(groups):
        line = f'<path d="M0 5H32" class="line {charts.style(index)}"/>'
        name = group.runs[0].name
        seeds = f", {len(group.runs)} seeds" if len(group.runs) > 1 else ""
        items.append(
            f'<li><svg viewBox="0 0 32 10" aria-hidden="true">{line}</svg> '
            f"{_safe(group.name + seeds)}<small> {_safe(name)}</small></li>"
        )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _others(groups: Sequence[Group]) -> str:
    made = [(group.runs[0].name, provenance(group.runs[0].results)) for group in groups]
    columns = ("result", "command", "date", "device", "commit")
    return _table(
        columns,
        [
            [
                _safe(name),
                _command(str(each.get("command", ""))),
                *(_safe(str(each.get(column) or "")) for column in columns[2:]),
            ]
            for name, each in made
        ],
    )


def _pictures(runs: Sequence[Run]) -> Iterable[str]:
    if any(run.pictures for run in runs):
        yield "<h2>Pictures</h2>"
    for run in runs:
        for path in run.pictures:
            try:
                content = base64.b64encode(path.read_bytes()).decode()
            except OSError:  # gone since it was listed
                continue
            said = _safe(f"{run.name}: {path.name}")
            yield (
                f"<details><summary>{said}</summary>"
                f'<img alt="{said}" src="data:image/png;base64,{content}"></details>'
            )


def _deviations(groups: Sequence[Group]) -> Iterable[str]:
    if any(group.deviations for group in groups):
        yield "<h2>Deviations</h2>"
    for group in groups:
        if group.deviations:
            items = "".join(f"<li>{_safe(each)}</li>" for each in group.deviations)
            title = f"{group.task}, {group.name}: {len(group.deviations)}"
            yield f"<details><summary>{_safe(title)}</summary><ul>{items}</ul></details>"


def _systems(runs: Sequence[Run]) -> Iterable[str]:
    names = ("device", "machine", "cores", "versions")
    found: dict[str, list[str]] = {}
    for run in runs:
        made = provenance(run.results)
        said = [_safe(_system(made.get(name))) for name in names]
        if any(said):
            found.setdefault(json.dumps(said), []).append(run.name)
    rows = [[*json.loads(said), str(len(named))] for said, named in found.items()]
    if rows:
        yield "<h2>Systems</h2>"
        yield _table((*names, "runs"), rows)


def _system(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {version}" for name, version in value.items())
    return "" if value is None else str(value)


def _json(groups: Sequence[Group]) -> str:
    content = {
        "version": imaml_jax.__version__,
        "groups": [
            {
                "task": group.task,
                "name": group.name,
                "status": group.status,
                "published": group.published and group.published._asdict(),
                "full_meta_steps": group.full_steps,
                "deviations": group.deviations,
                "runs": [
                    {
                        "name": run.name,
                        "state": run.state,
                        "score": score and score._asdict(),
                        "results": run.results,
                        "history": run.history,
                        "raw": run.raw,
                    }
                    for run, score in zip(group.runs, group.scores, strict=True)
                ],
            }
            for group in groups
        ],
    }
    return common.json_for_html(content)


def _safe(text: str) -> str:
    return html.escape(text)
