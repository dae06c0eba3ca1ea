"""What every command that reports measurements shares: how it begins, times, writes and draws."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.shared import common
from imaml_jax.training.plots import new_figure


def check_not_empty(config: Any, *names: str) -> None:
    """Raises ValueError for the first of these settings that holds no value."""
    for name in names:
        if not getattr(config, name):
            raise ValueError(f"{name}={getattr(config, name)} must name at least one")


def begin(config: Any) -> None:
    """To be called before anything is computed.

    Makes the folder of `config.output`, and keeps compiled programs for a second run.

    Raises:
      ValueError: the report could not be written there.
    """
    common.check_output(config.output)
    common.cache_compilations()


def about(config: Any) -> dict[str, Any]:
    """The settings, and where, when and by which command a result was made."""
    return {**dataclasses.asdict(config), **common.provenance()}


def report(
    config: Any,
    measured: Mapping[str, Any],
    table: Callable[[dict[str, Any]], str],
    draw: Callable[[dict[str, Any], Path], None] | None = None,
) -> dict[str, Any]:
    """Writes OUTPUT.json and, where there is something to draw, OUTPUT.png; prints the table.

    Args:
      config: the settings; `config.output` is OUTPUT.
      measured: fields of the results; they take precedence over those of `about`.
      table: `results -> text`.
      draw: `(results, path) -> None` writes the image; None for none.

    Returns:
      The results: settings, provenance and what was measured.
    """
    results = {**about(config), **measured}
    common.write_report(config.output, results, table, draw)
    return results


def text_table(
    columns: Mapping[str, str] | Sequence[tuple[str, str]], rows: Iterable[Sequence[Any]]
) -> str:
    """A table of fixed-width text, its first column to the left, the others to the right.

    Args:
      columns: the format of the values by the head of each column, such as `{"ms": ".1f"}`; as
        pairs where two heads can be the same.
      rows: values of each column; text is taken as it is, None leaves its place empty.
    """
    columns = list(columns.items()) if isinstance(columns, Mapping) else columns
    lines = [[head for head, _ in columns]]
    for row in rows:
        lines.append([_cell(value, form) for value, (_, form) in zip(row, columns, strict=True)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]).rstrip()
        for first, *others in lines
    )


def _cell(value: Any, form: str) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else format(value, form)


@contextlib.contextmanager
def panels(
    path: Path, count: int, size: tuple[float, float], shared_legend: bool = False, **labels: Any
) -> Iterator[Sequence[Any]]:
    """Axes side by side to draw on, written into an image file at the end.

    All get a grid. Each gets a legend of what was drawn with a label.

    Args:
      path: the image; its ending chooses the format.
      count: number of axes.
      size: width and height of the whole, in inches.
      shared_legend: one legend of all labels, to the right of the axes.
      **labels: what all axes have in common, as `Axes.set` takes it: xlabel, yscale, ...
    """
    figure = new_figure(*size)
    all_axes = figure.subplots(1, count, squeeze=False)[0]
    for axes in all_axes:
        axes.set(**labels)
        axes.grid(alpha=0.3)
    yield all_axes
    drawn = [axes.get_legend_handles_labels() for axes in all_axes]
    if shared_legend:
        by_label = {
            label: handle
            for handles, own in drawn
            for handle, label in zip(handles, own, strict=True)
        }
        places = dict(loc="outside right upper", fontsize=8)
        figure.legend(by_label.values(), by_label.keys(), **places)
    else:
        for axes, (handles, _) in zip(all_axes, drawn, strict=True):
            if handles:
                axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def jit_small(fn: Callable[..., Any]) -> Any:
    """`jax.jit` of a program so small that LLVM's optimisations take longer than they save."""
    return jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0})


def seconds_in_rounds(runs: Mapping[Any, Callable[[], Any]], rounds: int) -> dict[Any, list[float]]:
    """Seconds of each run until its results are there, one for each round.

    The runs take turns, so that a machine that slows down slows all of them. What they compile must
    be compiled before.
    """
    seconds: dict[Any, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - started)
    return seconds
