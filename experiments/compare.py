"""Finished runs side by side: a table of test accuracies and one picture of all learning curves.

    python -m experiments.compare --runs runs/imaml runs/maml --output experiments/results/omniglot

Writes OUTPUT.json, OUTPUT.md and OUTPUT.png. Runs are compared only where they were tested on the
same tasks.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from experiments.shared import common, reports
from imaml_jax.learners.settings import Record
from imaml_jax.training import json_lines

_SAME = ("dataset", "ways", "shots")
_KEPT = (
    *("algorithm", "test_accuracy", "test_ci95", "best_step", "trained_meta_steps", "seconds"),
    *("command", "date", "device", "cores", "versions", "settings"),
)
_SAME_SETTINGS = ("split", "test_rotations", "test_queries", "test_tasks", "invert")


@dataclasses.dataclass(frozen=True)
class Config(Record):
    """What is compared."""

    runs: tuple[Path, ...] = ()
    """Working directories of finished runs, or JSON files of earlier comparisons."""
    output: Path = Path("runs/comparison")
    """Where to write, without an ending."""


def main(config: Config) -> list[dict[str, Any]]:
    """Writes the comparison and prints its table.

    Returns:
      One row a run, best first.

    Raises:
      ValueError: no run, a run that is not finished, or runs with different test tasks.
    """
    if not config.runs:
        raise ValueError("runs: name at least one working directory")
    rows = [row for run in config.runs for row in _rows(run)]
    tasks = {json.dumps(row["test_tasks"], sort_keys=True) for row in rows}
    if len(tasks) > 1:
        raise ValueError(f"runs were tested on different tasks: {sorted(tasks)}")
    rows.sort(key=lambda row: -row["test_accuracy"])
    common.check_output(config.output)
    common.write_report(config.output, rows, _table, _draw)
    common.with_ending(config.output, "md").write_text(_table(rows), encoding="utf-8")
    return rows


def _rows(run: Path) -> list[dict[str, Any]]:
    if run.suffix != ".json":
        return [_row(run)]
    rows = _read(run)
    if not isinstance(rows, list) or not all(isinstance(r, dict) and "curve" in r for r in rows):
        raise ValueError(f"{run} is no comparison that this program wrote")
    return rows


def _read(path: Path, remedy: str = "") -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}){remedy}") from None


def _row(run: Path) -> dict[str, Any]:
    results = _read(run / "results.json", ": finish that run first")
    missing = [name for name in (*_SAME, "settings", "test_accuracy") if name not in results]
    if missing:
        raise ValueError(
            f"{run}/results.json lacks {missing}: only runs of the few-shot classification "
            "experiments are compared"
        )
    history = json_lines.read(run / "metrics.jsonl")
    curve = [
        {name: row.get(name) for name in ("step", "seconds", "validation", "validation_ci95")}
        for row in history
        if row.get("validation") is not None
    ]
    return {
        "run": run.name,
        **{name: results[name] for name in _KEPT},
        "test_tasks": {name: results[name] for name in _SAME}
        | {name: results["settings"][name] for name in _SAME_SETTINGS},
        "last_inner_residual": history[-1].get("inner_residual") if history else None,
        "curve": curve,
    }


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| run | test accuracy, 95% CI | meta-steps | seconds | inner residual | command |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        residual = row["last_inner_residual"]
        lines.append(
            f"| {row['run']} | {100 * row['test_accuracy']:.2f} ± {100 * row['test_ci95']:.2f} "
            f"| {row['trained_meta_steps']} | {row['seconds']:.0f} "
            f"| {'' if residual is None else f'{residual:.3f}'} | `{row['command']}` |"
        )
    return "\n".join(lines) + "\n"


def _draw(rows: list[dict[str, Any]], path: Path) -> None:
    labels = {"step": "meta-steps", "seconds": "seconds"}
    with reports.panels(path, 2, (10, 4.5), shared_legend=True, yscale="log") as panels:
        for axes, (abscissa, label) in zip(panels, labels.items(), strict=True):
            for row in rows:
                points = row["curve"]
                errors = [100 * (1 - point["validation"]) for point in points]
                axes.plot([point[abscissa] for point in points], errors, label=row["run"])
            axes.set(xlabel=label, ylabel="validation error (%)")
            axes.grid(alpha=0.3, which="both")


if __name__ == "__main__":
    common.run_cli(main, Config, __doc__)
