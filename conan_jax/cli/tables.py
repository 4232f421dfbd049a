"""Tables for the terminal: metrics by stage, and by set of a suite."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from conan_jax.figures import by_language, cap_of, how_many, input_of
from conan_jax.train.report import BASELINES, HEADLINES


def results_table(summary: dict[str, Any]) -> Table:
    """A block of rows for each evaluation, one row for each stage; the best value of a trained stage in bold. Fits 80 columns."""
    stages = summary["evaluations"]
    names = list(dict.fromkeys(name for figures in stages.values() for name in figures))
    metrics = [m for m in HEADLINES if any(m in found for figures in stages.values() for found in figures.values())]
    table = Table(title="Metrics on held-out data after each stage", title_justify="left")
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
    """A table for each kind of set, the main metric first, and one for each set in several languages. Fits 100 columns.

    The caption gives the token limit and the prompts of each set: scores with different ones cannot be compared.
    """
    tables = []
    for kind in dict.fromkeys(found["kind"] for found in results["sets"].values()):
        sets = {name: found for name, found in results["sets"].items() if found["kind"] == kind}
        counts = {name: found.get("counts", {}) for name, found in sets.items()}
        table = _figures_table(kind, "set", {name: found["figures"] for name, found in sets.items()}, counts, mean=True)
        tables.append(_with_caption(table, "\n".join(filter(None, [cap_of(counts.values()), *_inputs(sets)]))))
        for name, found in sets.items():
            if rows := by_language(found["figures"]):
                parts = {language: {**counts[name], **part} for language, part in counts[name].get("languages", {}).items()}
                tables.append(_with_caption(_figures_table(f"{name}, by language", "language", rows, parts), cap_of([counts[name]])))
    return tables


def _inputs(sets: dict[str, Any]) -> list[str]:
    """One line for each input of the sets of a table, and the sets that have it."""
    lines: dict[str, list[str]] = {}
    for name, found in sets.items():
        if line := input_of(found.get("input", {})):
            lines.setdefault(line, []).append(name)
    return [f"{', '.join(names)}: {line}" for line, names in lines.items()]


def _with_caption(table: Table, caption: str) -> Table:
    table.caption, table.caption_justify = caption or None, "left"
    return table


def _figures_table(
    title: str, first: str, rows: dict[str, dict[str, float]], counts: dict[str, dict[str, Any]], mean: bool = False,
) -> Table:
    """`counts`: number of queries, pairs or texts of each row, in the second column."""
    figures = list(dict.fromkeys(key for found in rows.values() for key in found if "/" not in key))
    table = Table(title=title, title_justify="left")
    table.add_column(first, overflow="fold")
    table.add_column(next((count["unit"] for count in counts.values() if count), "n"), justify="right")
    for figure in figures:
        table.add_column(figure, justify="right", no_wrap=True)
    for name, found in rows.items():
        table.add_row(name, how_many(counts.get(name, {})), *(_cell(found.get(figure), bold=i == 0) for i, figure in enumerate(figures)))
    if mean and len(rows) > 1:
        table.add_section()
        means = [sum(found[figure] for found in rows.values()) / len(rows) for figure in figures]
        table.add_row("mean", "", *(_cell(value, bold=i == 0) for i, value in enumerate(means)))
    return table
