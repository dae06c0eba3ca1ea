"""What a person sees of a run: its progress, its learning curve, its calibration."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

Listener = Callable[[Mapping[str, Any]], None]  # takes each new row of a log
# The endings of the fields of a row that a person sees while the run goes on.
_SHOWN = ("loss", "accuracy", "residual", "curvature", "cosine", "error", "rounds", "tasks")
_SHOWN += ("validation",)


def new_figure(width: float, height: float) -> Any:
    """An empty Matplotlib figure of that many inches, without pyplot and its global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def learning_curve(history: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Draws losses and accuracies over meta-steps into an image file.

    Args:
      history: rows with a field `step`, as `training.train` returns them. Fields that end in `loss`
        go into one panel, those that end in `accuracy` and `validation` (with the band of
        `validation_ci95`) into the other; missing and null values are skipped.
      path: the image to write; its ending chooses the format.
    """
    figure = new_figure(9, 3.5)
    loss_axes, score_axes = figure.subplots(1, 2)
    for name in sorted({name for row in history for name in row}):
        if name.endswith("loss"):
            axes = loss_axes
        elif name.endswith("accuracy") or name == "validation":
            axes = score_axes
        else:
            continue
        rows = [row for row in history if row.get(name) is not None]
        steps, values = [row["step"] for row in rows], np.array([row[name] for row in rows])
        axes.plot(steps, values, label=name.replace("_", " "))
        if name == "validation":
            band = np.array([row.get("validation_ci95") or 0.0 for row in rows])
            axes.fill_between(steps, values - band, values + band, alpha=0.2)
    for axes, title in ((loss_axes, "loss"), (score_axes, "score")):
        axes.set(xlabel="meta-step", title=title)
        if axes.lines:
            axes.legend()
    figure.savefig(path, dpi=120)


def reliability_diagram(calibration: Any, path: str | os.PathLike) -> None:
    """Draws accuracy over confidence by bins, and how many examples each bin holds.

    Args:
      calibration: what `metrics.calibration_error` returns.
      path: the image to write; its ending chooses the format.
    """
    shares, confidences, accuracies = (
        np.asarray(x) for x in (calibration.shares, calibration.confidences, calibration.accuracies)
    )
    num_bins = len(shares)
    centres = (np.arange(num_bins) + 0.5) / num_bins
    figure = new_figure(4, 4.5)
    axes, share_axes = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    bars = dict(width=1 / num_bins, edgecolor="white")
    axes.bar(centres, accuracies, label="accuracy", **bars)
    occupied = shares > 0
    axes.plot(confidences[occupied], accuracies[occupied], "k.", label="at mean confidence")
    axes.plot([0, 1], [0, 1], "k--", linewidth=1)
    errors = f"ECE {float(calibration.ece):.3f}, MCE {float(calibration.mce):.3f}"
    axes.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy", title=errors)
    axes.legend(loc="upper left")
    share_axes.bar(centres, shares, color="tab:gray", **bars)
    share_axes.set(xlabel="confidence", ylabel="share")
    figure.savefig(path, dpi=120)


def prediction_bands(
    inputs: Any,
    samples: Any,
    truth: Any,
    support: Any,
    path: str | os.PathLike,
    *,
    levels: Sequence[float] = (0.5, 0.9),
) -> None:
    """Draws what samples of a regressor of one variable predict, against the true curve.

    Args:
      inputs: `[n]` points, in increasing order.
      samples: `[samples, n]` outputs there.
      truth: `[n]` values of the true curve.
      support: the `Batch` that was adapted to, `[shots, 1]` inputs and targets.
      path: the image to write; its ending chooses the format.
      levels: of the central bands, in (0, 1).
    """
    figure = new_figure(5, 3.5)
    axes = figure.subplots()
    for level in sorted(levels, reverse=True):
        low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2], axis=0)
        look = dict(color="tab:blue", alpha=0.1 + 0.5 * (1 - level), linewidth=0)
        axes.fill_between(inputs, low, high, label=f"{level:.0%}", **look)
    axes.plot(inputs, np.asarray(samples)[:5].T, color="tab:blue", alpha=0.4, linewidth=0.8)
    axes.plot(inputs, np.mean(samples, axis=0), color="tab:blue", label="mean")
    axes.plot(inputs, truth, "k--", linewidth=1, label="truth")
    axes.plot(np.ravel(support.inputs), np.ravel(support.targets), "r^", label="support")
    axes.set(xlabel="input", ylabel="output")
    figure.legend(loc="outside lower center", ncols=5, fontsize="small")
    figure.savefig(path, dpi=120)


@contextlib.contextmanager
def reporter(step: int, num_steps: int) -> Iterator[Listener]:
    """Yields what shows a row: a progress bar on a terminal, else a line for each row.

    Args:
      step: the meta-steps already done.
      num_steps: the meta-steps in all.
    """
    last_step, last_time = step, time.perf_counter()

    def show(row: Mapping[str, Any]) -> None:
        nonlocal last_step, last_time
        now, done = time.perf_counter(), row["step"] - last_step
        with contextlib.suppress(OSError):  # whoever read it may be gone
            if bar.disable:
                speed = f"{row['seconds']:.1f} s  {done / (now - last_time):.3g} steps/s"
                line = f"meta-step {row['step']}/{num_steps}  {speed}  {_summary(row)}"
                print(line, file=sys.stderr, flush=True)
            else:
                bar.set_postfix_str(_summary(row), refresh=False)
                bar.update(done)
        last_step, last_time = row["step"], now

    with tqdm(total=num_steps, initial=step, unit="step", disable=not sys.stderr.isatty()) as bar:
        yield show


def _summary(row: Mapping[str, Any]) -> str:
    shown = [name for name in row if name.endswith(_SHOWN) and row[name] is not None]
    parts = [f"{name} {row[name]:.4g}" for name in shown]
    if row.get("validation_ci95") is not None:
        parts[-1] += f" ± {row['validation_ci95']:.4f}"
    return "  ".join(parts)
