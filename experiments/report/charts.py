"""Line charts as SVG that takes its colours from the page's style."""

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

COLOURS = 8  # classes c0 to c7 of the page's style; then dashes
_WIDTH, _HEIGHT = 420, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 398, 28, 230  # edges of what is drawn in


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
    xs, ys = zip(*(point for line in lines for point in line.points), strict=True)
    is_log = min(ys) > 0 and max(ys) > 100 * min(ys)
    across, x_ticks = _scale(xs, _LEFT, _RIGHT)
    up, y_ticks = _scale([math.log10(y) for y in ys] if is_log else ys, _BOTTOM, _TOP)
    heading = title + ", logarithmic" * is_log
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">',
        f'<text x="{_LEFT}" y="16" class="title">{escape(heading)}</text>',
    ]
    for tick in x_ticks:
        x = across(tick)
        parts.append(f'<path class="grid" d="M{x},{_TOP}V{_BOTTOM}"/>')
        parts.append(_text(x, _BOTTOM + 15, "middle", _short(tick)))
    for tick in y_ticks:
        y = up(tick)
        parts.append(f'<path class="grid" d="M{_LEFT},{y}H{_RIGHT}"/>')
        value = _short(10.0**tick if is_log else tick)
        parts.append(_text(_LEFT - 5, f"{float(y) + 4:.1f}", "end", value))
    parts.append(_text((_LEFT + _RIGHT) / 2, _HEIGHT - 6, "middle", x_label))
    for line in lines:
        shown = f'class="line {style(line.group)}"><title>{escape(line.name)}</title>'
        places = [(across(x), up(math.log10(y) if is_log else y)) for x, y in line.points]
        if len(places) == 1:
            x, y = places[0]
            parts.append(f'<circle cx="{x}" cy="{y}" r="3" {shown}</circle>')
        else:
            path = "M" + "L".join(map(",".join, places))
            parts.append(f'<path d="{path}" {shown}</path>')
    return "\n".join([*parts, "</svg>"])


def style(group: int) -> str:
    """The classes of a group's lines: a colour, and dashes where the colours are used up."""
    return f"c{group % COLOURS} d{group // COLOURS % 3}"


def _scale(
    values: Sequence[float], start: int, end: int
) -> tuple[Callable[[float], str], list[float]]:
    """Where a value is drawn between two edges, and the numbers to be marked."""
    low, high = min(values), max(values)
    if high - low <= max(1e-12 * max(abs(low), abs(high)), 1e-300):
        margin = abs(low) / 10 or 1.0
        low, high = low - margin, high + margin

    def place(value: float) -> str:
        return f"{start + (value - low) / (high - low) * (end - start):.1f}"

    return place, _ticks(low, high)


def _text(x: float | str, y: float | str, anchor: str, said: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{escape(said)}</text>'


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
