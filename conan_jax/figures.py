"""Figures of an evaluation: `ndcg@10` of the whole set, `ndcg@10/de` of one of its languages, and in words how much they stand on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Figures = dict[str, float]


def by_language(figures: Mapping[str, float]) -> dict[str, Figures]:
    """`{"de": {"ndcg@10": ...}}` out of the keys `ndcg@10/de`; what stands for the whole is left out."""
    table: dict[str, Figures] = {}
    for key, value in figures.items():
        name, slash, language = key.partition("/")
        if slash:
            table.setdefault(language, {})[name] = value
    return table


def how_many(count: Mapping[str, Any]) -> str:
    """"200 of 1,000" of a `count` that holds `used` and `all`, "1,000" where all were used, nothing where nothing is known."""
    if not count:
        return ""
    return f"{count['used']:,}" if count["used"] == count["all"] else f"{count['used']:,} of {count['all']:,}"


def cap_of(counts: Iterable[Mapping[str, Any]]) -> str:
    """What a reader must know of figures of sets of one kind that `max_queries` bounded; nothing when it bounded none.

    `counts`: what `eval.counts.count` found of each set; an empty one where it is not known.
    """
    counts = list(counts)
    capped = [count for count in counts if count and count["capped"]]
    if not capped:
        return ""
    total = {key: sum(count[key] for count in capped) for key in ("used", "all")}
    sets = f" in {len(capped)} of {len(counts)} sets" if len(counts) > 1 else ""
    return f"Capped by max_queries: {how_many(total)} {capped[0]['unit']}{sets}. Not comparable with figures on all of them."
