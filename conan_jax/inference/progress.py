"""How a bar over texts looks: how many, how many a second, the time taken and the time left."""

from __future__ import annotations

from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def text_bars(*, eta: str = "ETA", **options: Any) -> Progress:
    """Bars whose tasks have a field `rate`. `eta`: what stands before the time left; `options`: those of `Progress`."""
    before = (TextColumn(eta),) if eta else ()
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
                    TimeElapsedColumn(), *before, TimeRemainingColumn(), **options)


def rate(speed: float | None) -> str:
    """Texts a second for people; nothing until it is known."""
    return f"{speed:,.0f} texts/s" if speed else ""
