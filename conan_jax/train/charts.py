"""Charts as inline SVG that follow the colours of the page around them, light or dark.

matplotlib draws with stand-in colours; they are then replaced by CSS variables, so one picture serves both themes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator, PercentFormatter

SERIES = tuple(f"#0000f{i}" for i in range(1, 7))  # --series-1 ... --series-6
MARKERS = ("o", "s", "^", "D", "v", "P")
INK, FAINT, MUTED = "#0000e1", "#0000e2", "#0000e3"
_VARIABLES = {**{c: f"var(--series-{i})" for i, c in enumerate(SERIES, 1)}, INK: "var(--ink)", FAINT: "var(--line)", MUTED: "var(--muted)"}
_STYLE = {
    "svg.fonttype": "none", "font.size": 9.5, "text.parse_math": False, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": FAINT, "axes.labelcolor": MUTED, "axes.grid": True, "axes.grid.axis": "y", "grid.color": FAINT, "grid.linewidth": 0.7,
    "axes.axisbelow": True, "xtick.color": FAINT, "ytick.color": FAINT, "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED,
    "text.color": INK, "legend.frameon": False, "legend.labelcolor": INK, "lines.linewidth": 1.8, "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Line:
    """One curve. `colour` counts from 0; a curve without a label stays out of the legend; a noisy one of many points is
    drawn faint under its moving average."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    colour: int = 0
    noisy: bool = True


def bars(title: str, labels: Sequence[str], values: Sequence[float], baselines: Sequence[str] = ()) -> Markup:
    """A bar for each label, its value above it; those named in `baselines` are muted."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8.4, 2.5), layout="constrained")
        axes = figure.subplots()
        colours = [MUTED if label in baselines else SERIES[0] for label in labels]
        drawn = axes.bar(range(len(labels)), values, color=colours, width=0.62)
        axes.bar_label(drawn, [f"{v:.3f}" for v in values], padding=3, color=INK, fontsize=10.5, fontweight="bold")
        axes.set_xticks(range(len(labels)), labels, color=INK)
        axes.tick_params(axis="x", length=0)
        axes.set_ylim(0, max([*values, 0.05]) * 1.15)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        return _svg(figure, title)


def curves(title: str, lines: Sequence[Line], *, log: bool = False, stages: Sequence[str] = ()) -> Markup:
    """Lines over steps; or, with `stages`, over stages of equal width, where x = 1.5 is half-way through the second.

    `log` takes effect when every value is positive.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _canvas()
        for line in lines:
            _curve(axes, line)
        if log and all(v > 0 for line in lines for v in line.values):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        elif max((abs(v) for line in lines for v in line.values), default=0) >= 10_000:
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        elif max((abs(v) for line in lines for v in line.values), default=0) < 0.01:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        if stages:
            axes.set_xlim(-0.02, len(stages) + 0.02)
            axes.set_xticks([i + 0.5 for i in range(len(stages))], stages)
            axes.tick_params(axis="x", length=0)
            for boundary in range(1, len(stages)):
                axes.axvline(boundary, color=FAINT, linewidth=0.9)
        else:
            axes.margins(x=0.01)
            axes.set_xlabel("step")
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        named = [line.label for line in lines if line.label]
        if len(named) > 1:
            figure.legend(loc="outside lower center", ncols=len(named) if len(named) < 4 else 2, fontsize=9, handlelength=1.3)
        return _svg(figure, title)


def steps(title: str, lines: Sequence[Line], label: str) -> Markup:
    """Histograms as filled outlines: `line.steps` are the edges of the bins, one more than `line.values`."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _canvas()
        for line in lines:
            colour = SERIES[line.colour % len(SERIES)]
            axes.stairs(line.values, line.steps, color=colour, fill=True, alpha=0.22)
            axes.stairs(line.values, line.steps, color=colour, linewidth=1.6, label=line.label)
        used = [x for line in lines for x, value in zip(line.steps, line.values, strict=False) if value > 0]
        axes.set_xlim(min(used, default=-1) - 0.06, 1.02)
        axes.set_xlabel(label)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        figure.legend(loc="outside lower center", ncols=1, fontsize=9, handlelength=1.3)
        return _svg(figure, title)


def trace(title: str, lines: Sequence[Line], x_label: str, y_label: str) -> Markup:
    """Lines through marked points over a logarithmic axis of whole numbers, each of which is written."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _canvas()
        for line in lines:
            axes.plot(line.steps, line.values, color=SERIES[line.colour % len(SERIES)], label=line.label, marker="o", markersize=4)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({x for line in lines for x in line.steps}))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.margins(y=0.12)
        if len(lines) > 1:
            figure.legend(loc="outside lower center", ncols=min(len(lines), 3), fontsize=9, handlelength=1.3)
        return _svg(figure, title)


def points(
    title: str, groups: Mapping[str, Sequence[Sequence[float]]], labels: tuple[str, str] | None = None, named: bool = False
) -> Markup:
    """Groups of points in the plane. `labels` of the axes, which have no numbers without; `named` writes names beside points."""
    with matplotlib.rc_context(_STYLE | {"axes.grid.axis": "both"}):
        figure, axes = _canvas()
        for i, (name, spots) in enumerate(groups.items()):
            colour, marker = SERIES[i % len(SERIES)], MARKERS[i // len(SERIES) % len(MARKERS)]
            x, y = zip(*spots, strict=True)
            axes.scatter(x, y, s=44 if named else 13, color=colour, marker=marker, linewidths=0, alpha=1 if named else 0.75, label=name)
            if named:
                axes.annotate(name, (x[0], y[0]), xytext=(6, 4), textcoords="offset points", color=INK, fontsize=9)
        axes.margins(0.16 if named else 0.06)
        if labels:
            axes.set_xlabel(labels[0])
            axes.set_ylabel(labels[1])
        else:
            axes.set_xticks([])
            axes.set_yticks([])
        if not named:
            figure.legend(loc="outside right upper", fontsize=8, handlelength=0.8, ncols=1 + (len(groups) - 1) // 14, columnspacing=0.8)
        return _svg(figure, title)


def heatmap(title: str, names: Sequence[str], values: Sequence[Sequence[float]]) -> Markup:
    """A square table of numbers, shaded from their smallest to their largest; written out where there is room."""
    low, high = min(min(row) for row in values), max(max(row) for row in values)
    with matplotlib.rc_context(_STYLE | {"axes.grid": False}):
        figure, axes = _canvas(height=3.4 if len(names) > 8 else 2.75)
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                share = (value - low) / (high - low) if high > low else 0.5
                axes.add_patch(Rectangle((j - 0.5, i - 0.5), 0.96, 0.96, facecolor=SERIES[0], alpha=0.08 + 0.72 * share, linewidth=0))
                if len(names) <= 10:
                    axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color=INK)
        size = 9 if len(names) <= 10 else 7
        axes.set_xticks(range(len(names)), names, rotation=90 if len(names) > 6 else 0, fontsize=size)
        axes.set_yticks(range(len(names)), names, fontsize=size)
        axes.tick_params(length=0)
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_ylim(len(names) - 0.5, -0.5)
        for spine in axes.spines.values():
            spine.set_visible(False)
        return _svg(figure, title)


def _canvas(height: float = 2.75) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.6, height), layout="constrained")
    return figure, figure.subplots()


def _curve(axes: Axes, line: Line) -> None:
    colour = SERIES[line.colour % len(SERIES)]
    if line.noisy and len(line.values) > 40:
        axes.plot(line.steps, line.values, color=colour, alpha=0.28, linewidth=1)
        axes.plot(line.steps, _smoothed(line.values, len(line.values) // 20), color=colour, label=line.label)
    else:
        axes.plot(line.steps, line.values, color=colour, label=line.label, marker="o" if len(line.values) < 3 else None, markersize=4)


def _smoothed(values: Sequence[float], half: int) -> list[float]:
    """Centred moving average over 2 half + 1 values, fewer near the ends, the same number on both sides."""
    smoothed = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)
        window = values[i - reach : i + reach + 1]
        smoothed.append(sum(window) / len(window))
    return smoothed


def _svg(figure: Figure, title: str) -> Markup:
    """The figure as markup. matplotlib escapes every label; the title goes through Markup's own escaping."""
    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": title}):  # ids of several charts on one page must differ, and not between runs
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)  # figure_1, axes_1 ...: only clip paths and markers are referred to
    svg = re.sub(r"font: ((?:\w+ )?[\d.]+px) [^;\"]*", r"font: \1 var(--sans)", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"([^>]*?) width="[^"]*"|(<svg[^>]*?) width="[^"]*"([^>]*?) height="[^"]*"',
                 lambda m: (m[1] or m[3]) + (m[2] or m[4] or ""), svg, count=1)
    label = Markup.escape(title)
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1))
