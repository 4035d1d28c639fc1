"""Plots of the report as inline SVG: transparent, drawn in the page's own text color, so they follow its theme."""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Stands for the page's text color: replaced by `currentColor` in the SVG.
_INK = "#010203"
Extent = tuple[float, float, float, float]
_FIRST, _SECOND = "#2a78b5", "#c8641e"  # readable on white and on near-black
_STYLE: dict[Any, Any] = {
    "text.color": _INK, "axes.edgecolor": _INK, "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK,
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9.0, "axes.spines.top": False,
    "axes.spines.right": False, "axes.titlesize": 10.0,
}  # fmt: skip


def _svg(figure: Figure, name: str, title: str) -> Markup:
    """The figure as SVG for a page; `name` makes its ids differ from those of the other plots."""
    with matplotlib.rc_context({"svg.hashsalt": name}):
        out = io.BytesIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Title": title})
    text = out.getvalue().decode()
    return Markup(text[text.index("<svg") :].replace(_INK, "currentColor"))


def _axes(columns: int, height: float = 2.4) -> tuple[Figure, list[Axes]]:
    width = min(3.4 * columns, 10.2)  # a wider one would be scaled down on the page, its text too
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def histograms(name: str, title: str, panels: Sequence[tuple[str, np.ndarray, tuple[float, float]]]) -> Markup:
    """One panel per (label, rows per cell, axis ends)."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(len(panels))
        for ax, (label, counts, (low, high)) in zip(axes, panels):
            ax.stairs(counts, np.linspace(low, high, len(counts) + 1), fill=True, color=_FIRST)
            ax.set_xlabel(label)
        axes[0].set_ylabel("pairs")
        return _svg(figure, name, title)


def heat_maps(name: str, title: str, panels: Sequence[tuple[str, str, np.ndarray, Extent]]) -> Markup:
    """One panel per (x label, y label, rows [y x x], extent): log color, empty cells clear."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(len(panels), height=2.9)
        for ax, (x, y, counts, extent) in zip(axes, panels):
            values = np.ma.masked_equal(np.log10(np.maximum(counts, 1e-9)), -9.0)
            ax.imshow(values, origin="lower", aspect="auto", extent=extent, cmap="viridis", interpolation="nearest")
            ax.set_xlabel(x)
            ax.set_ylabel(y)
        return _svg(figure, name, title)


def reliability(name: str, title: str, curves: Sequence[tuple[str, Sequence[float], Sequence[float]]]) -> Markup:
    """Click rate against mean label, one line per (label, x, y), and the diagonal of a calibrated label."""
    with matplotlib.rc_context(_STYLE):
        figure, (ax,) = _axes(1, height=3.0)
        top = max([1e-3, *(max([*x, *y]) for _, x, y in curves if len(x))]) * 1.05
        ax.plot([0, top], [0, top], color=_INK, linewidth=0.8, linestyle=":")
        for (label, x, y), color in zip(curves, (_FIRST, _SECOND)):
            ax.plot(x, y, marker="o", markersize=3.5, color=color, label=label)
        ax.set_xlabel("mean label of the group")
        ax.set_ylabel("click rate")
        ax.legend(frameon=False)
        return _svg(figure, name, title)


def weight_error(
    name: str, title: str, weights: Sequence[float], errors: Sequence[float], calibration: Sequence[float]
) -> Markup:
    """Error of the label against its weight, by groups of equal size."""
    with matplotlib.rc_context(_STYLE):
        figure, (left, right) = _axes(2)
        for ax, values, label in ((left, errors, "mean squared error"), (right, calibration, "|label - click rate|")):
            ax.plot(weights, values, marker="o", markersize=3.5, color=_FIRST)
            ax.set_xlabel("mean weight of the group")
            ax.set_ylabel(label)
            ax.set_ylim(bottom=0)
        return _svg(figure, name, title)


def code_usage(name: str, title: str, levels: Sequence[Sequence[float]]) -> Markup:
    """Items per code, most used codes first, one panel per level; the dotted line is even use."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(len(levels))
        for number, (ax, counts) in enumerate(zip(axes, levels), start=1):
            ax.stairs(counts, np.linspace(0, 100, len(counts) + 1), fill=True, color=_FIRST)
            ax.axhline(float(np.mean(counts)), color=_INK, linewidth=0.8, linestyle=":")
            ax.set_xlabel(f"codes of level {number} in use, %")
        axes[0].set_ylabel("items per code")
        return _svg(figure, name, title)


def popularity(name: str, title: str, labels: Sequence[str], before: Sequence[float], after: Sequence[float]) -> Markup:
    """Share of positives per popularity band before and after down-sampling."""
    with matplotlib.rc_context(_STYLE):
        figure, (ax,) = _axes(1, height=2.6)
        at = np.arange(len(labels))
        ax.bar(at - 0.2, before, 0.4, color=_FIRST, label="all positives")
        ax.bar(at + 0.2, after, 0.4, color=_SECOND, label="kept as targets")
        ax.set_xticks(at, labels, rotation=45, ha="right")
        ax.set_xlabel("positives of the item")
        ax.set_ylabel("share of positives")
        ax.legend(frameon=False)
        return _svg(figure, name, title)
