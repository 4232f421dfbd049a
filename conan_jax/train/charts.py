"""Charts as inline SVG that follow the colours of the page around them, light or dark.

matplotlib draws with placeholder colours. CSS variables replace them, so one chart serves both themes. Legends are HTML below the
chart: they wrap on a narrow screen and keep the size of the page's text.
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
MARKERS = {"o": "\u25cf", "s": "\u25a0", "^": "\u25b2", "D": "\u25c6", "v": "\u25bc", "P": "\u271a"}  # of matplotlib -> in a legend
DASHES = {"-": "\u2501", "--": "\u2505", ":": "\u2509"}
WIDTH = 4.2  # inches; 302 units of the viewBox, so that text of 10 units is 11 px on a screen of 390 px
SMOOTHED_FROM = 40  # points; a noisy line of more is drawn with its moving average
INK, FAINT, MUTED = "#0000e1", "#0000e2", "#0000e3"
_VARIABLES = {**{c: f"var(--series-{i})" for i, c in enumerate(SERIES, 1)}, INK: "var(--ink)", FAINT: "var(--line)", MUTED: "var(--muted)"}
_STYLE = {
    "svg.fonttype": "none", "font.size": 10, "text.parse_math": False, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": FAINT, "axes.labelcolor": MUTED, "axes.grid": True, "axes.grid.axis": "y", "grid.color": FAINT, "grid.linewidth": 0.7,
    "axes.axisbelow": True, "xtick.color": FAINT, "ytick.color": FAINT, "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED,
    "text.color": INK, "lines.linewidth": 1.8, "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Line:
    """One curve. `colour` counts from 0. A curve without a label has no entry in the legend.

    A noisy curve of more than `SMOOTHED_FROM` points is drawn faint, with its moving average on top. `faint` are other values at the
    same steps, drawn faint instead.
    """

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    colour: int = 0
    noisy: bool = True
    faint: Sequence[float] = ()

    @property
    def half_window(self) -> int:
        """The moving average of a point takes so many points on each side; 0 without smoothing."""
        return len(self.values) // 20 if self.noisy and len(self.values) > SMOOTHED_FROM else 0

    @property
    def dash(self) -> str:
        return tuple(DASHES)[self.colour // len(SERIES) % len(DASHES)]


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
            axes.set_xticks([i + 0.5 for i in range(len(stages))], stages, fontsize=10 if len(stages) < 5 else 7.5)
            axes.tick_params(axis="x", length=0)
            for boundary in range(1, len(stages)):
                axes.axvline(boundary, color=FAINT, linewidth=0.9)
        else:
            axes.margins(x=0.01)
            axes.set_xlabel("step")
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        return _svg(figure, title) + _legend_of(lines)


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
        return _svg(figure, title) + _legend_of(lines)


def trace(title: str, lines: Sequence[Line], x_label: str, y_label: str) -> Markup:
    """Lines through marked points over a logarithmic axis of whole numbers, each of which is written."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _canvas()
        for line in lines:
            axes.plot(line.steps, line.values, line.dash, color=SERIES[line.colour % len(SERIES)], marker="o", markersize=4)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({x for line in lines for x in line.steps}))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.margins(y=0.12)
        return _svg(figure, title) + _legend_of(lines)


def points(title: str, groups: Mapping[str, Sequence[Sequence[float]]], labels: tuple[str, str] | None = None) -> Markup:
    """Groups of points in the plane, each with a colour and a marker.

    With `labels` of the axes, the axes have numbers and the points are few: they are large and hollow, so that points at nearly the
    same place stay visible, and the legend gives their coordinates.
    """
    with matplotlib.rc_context(_STYLE | {"axes.grid.axis": "both"}):
        figure, axes = _canvas()
        entries = []
        for i, (name, spots) in enumerate(groups.items()):
            colour, marker = SERIES[i % len(SERIES)], tuple(MARKERS)[i % len(MARKERS)]
            x, y = zip(*spots, strict=True)
            if labels:
                axes.plot(x, y, color=colour, marker=marker, markersize=9, linestyle="", fillstyle="none", markeredgewidth=1.8)
            else:
                axes.plot(x, y, color=colour, marker=marker, markersize=3.5, linestyle="", alpha=0.75, markeredgewidth=0)
            entries.append((f"{name} ({x[0]:.2f}, {y[0]:.2f})" if labels else name, i, MARKERS[marker]))
        axes.margins(0.16 if labels else 0.06)
        if labels:
            axes.set_xlabel(labels[0])
            axes.set_ylabel(labels[1])
        else:
            axes.set_xticks([])
            axes.set_yticks([])
        return _svg(figure, title) + _legend(entries)


def heatmap(title: str, names: Sequence[str], values: Sequence[Sequence[float]]) -> Markup:
    """A square table of numbers, shaded from the smallest to the largest. The numbers are written for up to 10 names."""
    low, high = min(min(row) for row in values), max(max(row) for row in values)
    with matplotlib.rc_context(_STYLE | {"axes.grid": False}):
        figure, axes = _canvas(height=WIDTH if len(names) > 8 else 3.2)
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


def _canvas(height: float = 2.5) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _curve(axes: Axes, line: Line) -> None:
    colour, half = SERIES[line.colour % len(SERIES)], line.half_window
    faint = line.faint or (line.values if half else ())
    if faint:
        axes.plot(line.steps, faint, color=colour, alpha=0.28, linewidth=1)
    marker = "o" if len(line.values) < 3 else None
    axes.plot(line.steps, smoothed(line.values, half), line.dash, color=colour, marker=marker, markersize=4)


def _legend_of(lines: Sequence[Line]) -> Markup:
    """The legend of labelled lines; empty for a single one without a label."""
    return _legend([(line.label, line.colour, DASHES[line.dash]) for line in lines if line.label])


def _legend(entries: Sequence[tuple[str, int, str]]) -> Markup:
    """HTML for (label, number of the series, glyph); the glyph has the colour of the series."""
    items = [Markup('<li><i style="color: var(--series-{})">{}</i> {}</li>').format(series % len(SERIES) + 1, glyph, label)
             for label, series, glyph in entries]
    return Markup('<ul class="legend">{}</ul>').format(Markup("").join(items)) if items else Markup("")


def smoothed(values: Sequence[float], half: int) -> list[float]:
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
