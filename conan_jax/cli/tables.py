"""Tables for people: what each stage gained."""

from __future__ import annotations

from typing import Any

from rich.table import Table

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
