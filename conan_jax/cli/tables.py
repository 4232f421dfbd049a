"""Tables for people: what each stage gained."""

from __future__ import annotations

from typing import Any

from rich.table import Table

METRICS = ("ndcg@10", "recall@10", "spearman", "accuracy")


def results_table(summary: dict[str, Any]) -> Table:
    """Every evaluation by stage, the best figure of a trained stage in bold."""
    stages = list(summary["evaluations"])
    table = Table(title="Held-out figures after each stage", title_justify="left")
    table.add_column("evaluation")
    table.add_column("metric")
    for stage in stages:
        table.add_column(stage, justify="right")
    names = dict.fromkeys(name for figures in summary["evaluations"].values() for name in figures)
    for name in names:
        for metric in METRICS:
            row = {s: summary["evaluations"][s].get(name, {}).get(metric) for s in stages}
            trained = [v for s, v in row.items() if v is not None and s not in ("untrained", "bm25")]
            if all(v is None for v in row.values()):
                continue
            cells = ["" if v is None else f"[bold]{v:.3f}[/bold]" if trained and v == max(trained) and s not in ("untrained", "bm25")
                     else f"{v:.3f}" for s, v in row.items()]
            table.add_row(name, metric, *cells)
    return table
