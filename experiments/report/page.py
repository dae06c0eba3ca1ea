"""The report as one HTML file that needs nothing else: no network, no other file."""

import base64
import collections
import contextlib
import datetime
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import imaml_jax
from experiments.report import charts
from experiments.report.rows import Group, algorithm_name, mean, tasks_scored, trained_steps
from experiments.report.runs import Run, mapping, number, provenance
from experiments.shared import accuracy_table, common

_STYLE = Path(__file__).with_name("style.css")
_HOW = (
    "An interval is 1.96 standard errors over test tasks, the spread that of several seeds; the "
    "two are never mixed. Within the interval: ours and the published value differ by no more "
    "than both half-widths together. Budget too small: ours is below and has fewer meta-steps "
    "than its protocol; not known: the record does not tell them. Numbers of different protocols "
    "do not compare: see the deviations."
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
    counts = collections.Counter(run.state for run in runs)
    states = [f"{counts[s]} {s}" for s in ("finished", "running", "unfinished") if counts[s]]
    body = [
        f"<h1>Runs of imaml_jax {escape(imaml_jax.__version__)}</h1>",
        f"<p>{escape(', '.join(states))}; written {now}</p>\n{_command(command)}",
        *_section("Ours beside published", _results(judged)),
        *_all_charts(judged),
        *_section("Other results", _table(map(_other, others))),
        *_section("Pictures", _pictures(runs)),
        *_section("Deviations", _deviations(judged)),
        *_section("Systems", _table(_systems(runs))),
        "<h2>Data</h2>",
        "<p>All numbers of this page, and those of the files it is made of, are in it as JSON: "
        '<code>JSON.parse(document.getElementById("runs").textContent)</code></p>',
        f'<script type="application/json" id="runs">{_json(groups)}</script>',
    ]
    text = "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<link rel="icon" href="data:,">\n<title>Runs of imaml_jax</title>',
            f"<style>\n{_STYLE.read_text(encoding='utf-8')}</style>",
            *([] if refresh is None else [f'<meta http-equiv="refresh" content="{refresh:g}">']),
            "</head>\n<body>",
            *body,
            "</body>\n</html>\n",
        ]
    )
    return text.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair has no UTF-8


def _section(title: str, content: Iterable[str]) -> list[str]:
    """Under a heading, or nothing where there is nothing."""
    parts = list(content)
    return [f"<h2>{title}</h2>", *parts] if parts else []


def _table(rows: Iterable[dict[str, str]]) -> Iterator[str]:
    """Rows of cells, which are HTML already, by the heads of their columns."""
    head = ""
    for row in rows:
        if not head:
            head = "".join(f'<th scope="col">{escape(column)}</th>' for column in row)
            yield f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>'
        cells = (f'<td data-label="{escape(name)}">{cell}</td>' for name, cell in row.items())
        yield f"<tr>{''.join(cells)}</tr>"
    if head:
        yield "</tbody>\n</table></div>"


def _results(groups: Sequence[Group]) -> list[str]:
    return [*_table(map(_row, groups)), f"<p>{escape(_HOW)}</p>"] if groups else []


def _row(group: Group) -> dict[str, str]:
    results, published = group.runs[0].results, group.published
    made = [provenance(run.results) for run in group.runs]
    seeds = [run.results.get("seed") for run in group.runs]
    told = f"{len(seeds)} seed{'s' * (len(seeds) > 1)}: {', '.join(map(str, seeds))}"
    counted = [tasks_scored(group), "seed not told" if None in seeds else told]
    settings = mapping(results, "settings")
    trained = [trained_steps(run) for run in group.runs]
    steps = ", ".join(f"{each:,}" for each in trained if each is not None)
    full = f" of {group.full_steps:,}" if group.full_steps else ""
    protocol = str(settings.get("name") or results.get("protocol") or "")
    value = accuracy_table.printed(*published[:2]) if published else ""
    seconds = [each for run in group.runs if (each := _seconds(run)) is not None]
    return {
        "task": _cell(group.task),
        "algorithm": _cell(algorithm_name(results), *(run.name for run in group.runs)),
        "ours": _ours(group),
        "published": _cell(value, published.kind if published else ""),
        "status": _cell(group.status),
        "tasks and seeds": _cell("; ".join(filter(None, counted))),
        "protocol": _cell(protocol, str(settings.get("source", ""))),
        "budget": _cell(f"{steps}{full} meta-steps" if steps else ""),
        "training": _cell(", ".join(f"{each:,.0f} s" for each in seconds)),
        "memory": _memory(results),
        "device": _cell(_each(made, "device")),
        "commit": _command(_each(made, "commit")),
        "command": _command(_each(made, "command")),
    }


def _cell(text: str, *notes: str) -> str:
    return escape(text) + "".join(f"<small>{escape(note)}</small>" for note in notes if note)


def _ours(group: Group) -> str:
    scores = [score for score in group.scores if score is not None]
    average = mean(scores)
    if average is None:
        return ""
    what, half = scores[0].what, scores[0].half_width
    if len(scores) == 1:
        kind = "no interval" if half is None else "95% interval"
        return _cell(_value(average, half), f"{what}; {kind}")
    spread = statistics.stdev(score.value for score in scores)
    each = ", ".join(_value(score.value, score.half_width) for score in scores)
    return _cell(
        _value(average, None),
        f"{what}; standard deviation of {len(scores)} seeds {spread:.2g}",
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
    code = f"<code>{escape(text)}</code>" if text else ""
    return code if len(text) < 60 else _folded("command", code)


def _folded(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def _all_charts(groups: Sequence[Group]) -> Iterator[str]:
    """Of each task: learning curves, then diagnostics, one line for each seed."""
    for task in dict.fromkeys(group.task for group in groups):
        own = [g for g in groups if g.task == task and any(run.history for run in g.runs)]
        rows = [row for group in own for run in group.runs for row in run.history]
        names = {name for row in rows for name in row if number(row[name]) is not None}
        fields = sorted(names.difference(_NOT_DRAWN))
        curves = [name for name in fields if name.endswith(_CURVES)]
        if own:
            yield f"<h2>{escape(task)}</h2>"
            yield _legend(own)
            yield "<h3>Learning curves</h3>"
            by_time = [("validation", "seconds")] * ("validation" in fields)
            yield _charts(own, [(name, "step") for name in curves] + by_time)
        if len(curves) < len(fields):
            yield "<h3>Diagnostics</h3>"
            yield _charts(own, [(name, "step") for name in fields if name not in curves])


def _charts(groups: Sequence[Group], drawn: Sequence[tuple[str, str]]) -> str:
    found = []
    for name, abscissa in drawn:
        lines = [
            charts.Line(f"{group.name}, {run.name}", index, _points(run, abscissa, name))
            for index, group in enumerate(groups)
            for run in group.runs
        ]
        label = {"step": "meta-steps"}.get(abscissa, abscissa)
        found.append(charts.line_chart(name.replace("_", " "), label, lines))
    return f'<div class="charts">{"".join(f"<div>{each}</div>" for each in found if each)}</div>'


def _points(run: Run, abscissa: str, name: str) -> list[tuple[float, float]]:
    pairs = [(number(row.get(abscissa)), number(row.get(name))) for row in run.history]
    return sorted((x, y) for x, y in pairs if x is not None and y is not None)


def _legend(groups: Sequence[Group]) -> str:
    items = []
    for index, group in enumerate(groups):
        line = f'<path d="M0 5H32" class="line {charts.style(index)}"/>'
        name = group.runs[0].name
        seeds = f", {len(group.runs)} seeds" if len(group.runs) > 1 else ""
        items.append(
            f'<li><svg viewBox="0 0 32 10" aria-hidden="true">{line}</svg> '
            f"{escape(group.name + seeds)}<small> {escape(name)}</small></li>"
        )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _other(group: Group) -> dict[str, str]:
    made = provenance(group.runs[0].results)
    return {
        "result": escape(group.runs[0].name),
        "command": _command(str(made.get("command", ""))),
        **{name: escape(str(made.get(name) or "")) for name in ("date", "device", "commit")},
    }


def _pictures(runs: Sequence[Run]) -> Iterator[str]:
    for run in runs:
        for path in run.pictures:
            with contextlib.suppress(OSError):  # gone since it was listed
                content = base64.b64encode(path.read_bytes()).decode()
                said = f"{run.name}: {path.name}"
                image = f'<img alt="{escape(said)}" src="data:image/png;base64,{content}">'
                yield _folded(said, image)


def _deviations(groups: Sequence[Group]) -> Iterator[str]:
    for group in groups:
        if group.deviations:
            items = "".join(f"<li>{escape(each)}</li>" for each in group.deviations)
            title = f"{group.task}, {group.name}: {len(group.deviations)}"
            yield _folded(title, f"<ul>{items}</ul>")


def _systems(runs: Sequence[Run]) -> Iterator[dict[str, str]]:
    names = ("device", "machine", "cores", "versions")
    made = [provenance(run.results) for run in runs]
    found = collections.Counter(tuple(_system(each.get(name)) for name in names) for each in made)
    for said, count in found.items():
        if any(said):
            yield {**dict(zip(names, said, strict=True)), "runs": str(count)}


def _system(value: Any) -> str:
    if isinstance(value, dict):
        value = ", ".join(f"{name} {version}" for name, version in value.items())
    return "" if value is None else escape(str(value))


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
