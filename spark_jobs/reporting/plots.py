"""Plots of the report as inline SVG in the page's own colors; every mark shows its value on hover.

A panel keeps its size whatever the page's width, so that its text stays readable; figures wrap their panels instead.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

_WIDTH, _HEIGHT = 264, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 10, 40
_CHARACTER = 7  # width of most characters of the text
_EMPTY = Markup("")
Ends = tuple[float, float]
Tick = tuple[float, str]
Point = tuple[float, float]


@dataclass(frozen=True)
class Area:
    """The area of one panel: the ends and the labels of its axes."""

    x: Ends
    y: Ends
    x_label: str
    y_label: str = ""

    def place(self, x: float, y: float) -> Point:
        """Where a point lies in the drawing."""
        (x0, x1), (y0, y1) = self.x, self.y
        across, up = (x - x0) / ((x1 - x0) or 1), (y - y0) / ((y1 - y0) or 1)
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)

    def bar(self, x: Ends, y: Ends, kind: str, said: str, opacity: float = 1.0) -> Markup:
        """A filled rectangle."""
        (left, bottom), (right, top) = self.place(x[0], y[0]), self.place(x[1], y[1])
        faint = Markup(' fill-opacity="{:.2f}"').format(opacity) if opacity < 1 else _EMPTY
        return Markup(
            '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"{}><title>{}</title></rect>'
        ).format(kind, left, top, right - left, bottom - top, faint, said)

    def curve(self, points: Sequence[Point], kind: str, said: Sequence[str] = ()) -> Markup:
        """A line through `points`, and a dot that tells its value on each for which something is said."""
        placed = [self.place(*p) for p in points]
        dots = (_dot(kind, place, text) for place, text in zip(placed, said))
        return _line(placed, kind) + _EMPTY.join(dots)

    def draw(self, title: str, marks: Iterable[Markup], x_ticks: Sequence[Tick] | None = None) -> Markup:
        """The panel with its axes."""
        (left, bottom), (right, top) = self.place(self.x[0], self.y[0]), self.place(self.x[1], self.y[1])
        parts = [*marks, _line([(left, top), (left, bottom), (right, bottom)], "axis")]
        for value, text in ticks(*self.x) if x_ticks is None else x_ticks:
            parts.append(_text(self.place(value, 0)[0], bottom + 18, "middle", text))
        for value, text in ticks(*self.y):
            parts.append(_text(left - 5, self.place(0, value)[1] + 4, "end", text))
        parts.append(_text((left + right) / 2, _HEIGHT - 6, "middle", self.x_label))
        if self.y_label:
            parts.append(Markup('<g transform="translate(11 {}) rotate(-90)">{}</g>').format(
                (top + bottom) / 2, _text(0, 0, "middle", self.y_label)
            ))  # fmt: skip
        return _svg(title, _WIDTH, _HEIGHT, parts)


def _svg(title: str, width: int, height: int, parts: Iterable[Markup]) -> Markup:
    return Markup('<svg role="img" aria-label="{}" viewBox="0 0 {w} {h}" width="{w}" height="{h}">{}</svg>').format(
        title, _EMPTY.join(parts), w=width, h=height
    )


def _dot(kind: str, place: Point, said: str, radius: float = 3.5) -> Markup:
    return Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="{}"><title>{}</title></circle>').format(
        kind, *place, radius, said
    )


def _line(placed: Sequence[Point], kind: str) -> Markup:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
    return Markup('<polyline class="line {}" points="{}"/>').format(kind, points)


def _text(x: float, y: float, anchor: str, text: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, text)


def ticks(low: float, high: float) -> list[Tick]:
    """Three to six round values between the ends of an axis, with their text."""
    if not high > low:
        return [(low, _short(low))]
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [(n * step, _short(n * step)) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _short(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 10 ** (unit == "k"):
            return f"{value / size:g}{unit}"
    return f"{value:.6g}"


def _legend(names: Sequence[str]) -> Markup:
    rows = (
        Markup('<rect class="{}" x="{}" y="{}" width="9" height="9"/>').format(kind, _LEFT + 10, 12 + 15 * n)
        + _text(_LEFT + 24, 20 + 15 * n, "start", name)
        for n, (name, kind) in enumerate(zip(names, ("a", "b")))
    )
    return _EMPTY.join(rows)


def histogram(title: str, label: str, counts: Sequence[float], ends: Ends, what: str = "pairs") -> Markup:
    """Rows per cell over `ends`."""
    edges = np.linspace(*ends, len(counts) + 1).tolist()
    area = Area(ends, (0, max(counts, default=0) or 1), label, what)
    bars = (
        area.bar((low, high), (0, n), "a", f"{low:.4g} to {high:.4g}: {n:,.0f} {what}")
        for low, high, n in zip(edges, edges[1:], counts) if n
    )  # fmt: skip
    return area.draw(title, bars)


def heat_map(title: str, x: str, y: str, counts: np.ndarray, ends: tuple[Ends, Ends]) -> Markup:
    """Rows per cell [y x x] over the ends of x and y: stronger for more (logarithmic), empty cells clear."""
    rows, columns = (np.linspace(*e, n + 1).tolist() for e, n in zip(reversed(ends), counts.shape))
    area, most = Area(*ends, x, y), math.log1p(float(counts.max(initial=1)))
    cells = (
        area.bar(
            (columns[j], columns[j + 1]), (rows[i], rows[i + 1]), "a",
            f"{x} {columns[j]:.2f} to {columns[j + 1]:.2f}, {y} {rows[i]:.2f} to {rows[i + 1]:.2f}: "
            f"{counts[i, j]:,.0f} pairs", 0.1 + 0.89 * math.log1p(counts[i, j]) / most,
        )
        for i, j in np.argwhere(counts).tolist()
    )  # fmt: skip
    return area.draw(title, cells)


def reliability(title: str, curves: Sequence[tuple[str, Sequence[float], Sequence[float]]]) -> Markup:
    """Click rate against mean label, one line per (label, x, y), and the diagonal of a calibrated label."""
    top = max([1e-3, *(max([*x, *y]) for _, x, y in curves if len(x))]) * 1.05
    area = Area((0, top), (0, top), "mean label of the group", "click rate")
    marks = [area.curve([(0, 0), (top, top)], "even")]
    for (label, x, y), kind in zip(curves, ("a", "b")):
        said = [f"{label}: mean label {a:.4g}, click rate {b:.4g}" for a, b in zip(x, y)]
        marks.append(area.curve(list(zip(x, y)), kind, said))
    return area.draw(title, [*marks, _legend([label for label, _, _ in curves])])


def code_usage(title: str, level: int, groups: Sequence[float]) -> Markup:
    """Items per code, most used codes first; the dotted line is even use."""
    edges = np.linspace(0, 100, len(groups) + 1).tolist()
    area = Area((0, 100), (0, max(groups)), f"codes of level {level} in use, %", "items per code")
    bars = [
        area.bar((low, high), (0, n), "a", f"codes {low:.0f} % to {high:.0f} %: {n:,.4g} items each")
        for low, high, n in zip(edges, edges[1:], groups)
    ]
    mean = float(np.mean(groups))
    return area.draw(title, [*bars, area.curve([(0, mean), (100, mean)], "even")])


def popularity(title: str, bands: Sequence[str], before: Sequence[float], after: Sequence[float]) -> Markup:
    """Share of positives per popularity band before and after down-sampling."""
    names = ("all positives", "kept as targets")
    area = Area((-0.5, len(bands) - 0.5), (0, max([*before, *after]) * 1.45), "positives of the item, from", "share")
    bars = [
        area.bar((at + shift, at + shift + 0.4), (0, value), kind, f"{band} positives, {name}: {value:.1%}")
        for shift, kind, name, values in zip((-0.4, 0.0), ("a", "b"), names, (before, after))
        for at, (band, value) in enumerate(zip(bands, values))
    ]
    starts = [band.partition("-")[0] for band in bands]
    every = math.ceil((_CHARACTER * max(map(len, starts)) + 6) * len(bands) / (_WIDTH - _LEFT - _RIGHT))
    shown = [(float(at), start) for at, start in enumerate(starts) if at % every == 0]
    return area.draw(title, [*bars, _legend(names)], shown)


def trend(name: str, points: Sequence[tuple[str, float | None]], figure: Callable[[float | None], str]) -> Markup:
    """A figure over dates, oldest first, under its name and newest value; a date without a value is a gap."""
    width, height, left, top, bottom = 300, 96, 6, 28, 18
    values = [v for _, v in points if v is not None]
    low, high = min(values, default=0.0), max(values, default=0.0)
    if low == high:
        low, high = low - 1, high + 1
    step = (width - 2 * left) / max(len(points) - 1, 1)
    lines: list[list[Point]] = [[]]
    marks = [_text(left, 14, "start", name), _text(width - left, 14, "end", figure(points[-1][1]))]
    for n, (day, value) in enumerate(points):
        if value is None:
            lines.append([])
            continue
        lines[-1].append((left + n * step, top + (high - value) / (high - low) * (height - top - bottom)))
        marks.append(_dot("a", lines[-1][-1], f"{day}: {figure(value)}", 3 if len(points) < 60 else 2))
    marks += [_line(line, "a") for line in lines if len(line) > 1]
    marks += [_text(left, height - 3, "start", points[0][0]), _text(width - left, height - 3, "end", points[-1][0])]
    return _svg(name, width, height, marks)
