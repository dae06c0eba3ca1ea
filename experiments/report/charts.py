"""Line charts as SVG that takes its colours from the page's style."""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

COLOURS = 8  # classes c0 to c7 of the page's style; then dashes
_WIDTH, _HEIGHT = 420, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 22, 28, 40


class Line(NamedTuple):
    """One line: what it is, the number of its group, and its points in order of x."""

    name: str
    group: int
    points: Sequence[tuple[float, float]]


def line_chart(title: str, x_label: str, lines: Sequence[Line]) -> str:
    """An SVG of the lines; y is logarithmic where it is positive and spans more than a hundredfold.

    Args:
      title: text.
      x_label: text.
      lines: their points are finite; those without points are left out.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    ys = [y for line in lines for _, y in line.points]
    is_log = min(ys) > 0 and max(ys) > 100 * min(ys)
    x_low, x_high = _range([x for line in lines for x, _ in line.points])
    y_low, y_high = _range([math.log10(y) for y in ys] if is_log else ys)

    def at(x: float, y: float) -> str:
        y = math.log10(y) if is_log else y
        across = (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)
        up = (y - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)
        return f"{_LEFT + across:.1f},{_HEIGHT - _BOTTOM - up:.1f}"

    heading = title + ", logarithmic" * is_log
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{_safe(title)}">',
        f'<text x="{_LEFT}" y="16" class="title">{_safe(heading)}</text>',
    ]
    for tick in _ticks(x_low, x_high):
        x, y = at(tick, ys[0]).split(",")[0], _HEIGHT - _BOTTOM
        parts.append(f'<path class="grid" d="M{x},{_TOP}V{y}"/>')
        parts.append(f'<text x="{x}" y="{y + 15}" text-anchor="middle">{_short(tick)}</text>')
    for tick in _ticks(y_low, y_high):
        value = 10.0**tick if is_log else tick
        y = at(x_low, value).split(",")[1]
        parts.append(f'<path class="grid" d="M{_LEFT},{y}H{_WIDTH - _RIGHT}"/>')
        said = _short(value)
        parts.append(
            f'<text x="{_LEFT - 5}" y="{float(y) + 4:.1f}" text-anchor="end">{said}</text>'
        )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">{_safe(x_label)}</text>'
    )
    for line in lines:
        shown = f'class="line {style(line.group)}"><title>{_safe(line.name)}</title>'
        if len(line.points) == 1:
            x, y = at(*line.points[0]).split(",")
            parts.append(f'<circle cx="{x}" cy="{y}" r="3" {shown}</circle>')
        else:
            path = "M" + "L".join(at(*point) for point in line.points)
            parts.append(f'<path d="{path}" {shown}</path>')
    return "\n".join([*parts, "</svg>"])


def style(group: int) -> str:
    """The classes of a group's lines: a colour, and dashes where the colours are used up."""
    return f"c{group % COLOURS} d{group // COLOURS % 3}"


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high - low > max(1e-12 * max(abs(low), abs(high)), 1e-300):
        return low, high
    margin = abs(low) / 10 or 1.0
    return low - margin, high + margin


def _ticks(low: float, high: float) -> list[float]:
    """Up to six round numbers between the two."""
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _short(value: float) -> str:
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _safe(text: str) -> str:
    return html.escape(text)
