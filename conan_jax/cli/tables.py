"""Tables for people: what each stage gained."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from conan_jax.figures import by_language
from conan_jax.train.report import BASELINES, HEADLINES


def results_table(summary: dict[str, Any]) -> Table:
    """A block of rows per evaluation, one per stage; the best figure of a trained stage in bold. Fits 80 columns."""
    stages = summary["evaluations"]
    names = list(dict.fromkeys(name for figures in stages.values() for name in figures))
    metrics = [m for m in HEADLINES if any(m in found for figures in stages.values() for found in figures.values())]
    table = Table(title="Held-out figures after each stage", title_justify="left")
    table.add_column("evaluation", overflow="fold")
    table.add_column("stage", overflow="fold")
    for metric in metrics:
        table.add_column(metric, justify="right", no_wrap=True)
    for name in names:
        rows = {stage: figures[name] for stage, figures in stages.items() if name in figures}
        best = {m: max((found[m] for stage, found in rows.items() if stage not in BASELINES and m in found), default=None) for m in metrics}
        for row, (stage, found) in enumerate(rows.items()):
            cells = [_cell(found.get(m), stage not in BASELINES and found.get(m) == best[m]) for m in metrics]
            table.add_row("" if row else name, stage, *cells, end_section=row == len(rows) - 1)
    return table


def _cell(value: float | None, bold: bool) -> str:
    text = "" if value is None else f"{value:.3f}"
    return f"[bold]{text}[/bold]" if bold and text else text


def suite_tables(results: dict[str, Any]) -> list[Table]:
    """A table for each kind of set, its main figure first, and one for each set in several languages. Fits 100 columns."""
    tables = []
    for kind in dict.fromkeys(found["kind"] for found in results["sets"].values()):
        sets = {name: found for name, found in results["sets"].items() if found["kind"] == kind}
        tables.append(_figures_table(kind, "set", {name: found["figures"] for name, found in sets.items()}, mean=True))
        for name, found in sets.items():
            if rows := by_language(found["figures"]):
                tables.append(_figures_table(f"{name}, by language", "language", rows))
    return tables


def _figures_table(title: str, first: str, rows: dict[str, dict[str, float]], mean: bool = False) -> Table:
    figures = list(dict.fromkeys(key for found in rows.values() for key in found if "/" not in key))
    table = Table(title=title, title_justify="left")
    table.add_column(first, overflow="fold")
    for figure in figures:
        table.add_column(figure, justify="right", no_wrap=True)
    for name, found in rows.items():
        table.add_row(name, *(_cell(found.get(figure), bold=i == 0) for i, figure in enumerate(figures)))
    if mean and len(rows) > 1:
        table.add_section()
        table.add_row("mean", *(_cell(sum(f[figure] for f in rows.values()) / len(rows), bold=i == 0) for i, figure in enumerate(figures)))
    return table
