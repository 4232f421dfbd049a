"""Metrics of an evaluation: `ndcg@10` of the whole set, `ndcg@10/de` of one of its languages, and the texts that describe their input."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Figures = dict[str, float]


def by_language(figures: Mapping[str, float]) -> dict[str, Figures]:
    """`{"de": {"ndcg@10": ...}}` from the keys `ndcg@10/de`. Metrics of the whole set are left out."""
    table: dict[str, Figures] = {}
    for key, value in figures.items():
        name, slash, language = key.partition("/")
        if slash:
            table.setdefault(language, {})[name] = value
    return table


def how_many(count: Mapping[str, Any]) -> str:
    """"200 of 1,000" for a `count` with `used` and `all`, "1,000" when all were used, "" for an empty count."""
    if not count:
        return ""
    return f"{count['used']:,}" if count["used"] == count["all"] else f"{count['used']:,} of {count['all']:,}"


def cap_of(counts: Iterable[Mapping[str, Any]]) -> str:
    """The note for sets of one kind that `max_queries` limited; "" when it limited none.

    `counts`: the result of `eval.counts.count` for each set; an empty one where it is not known.
    """
    counts = list(counts)
    capped = [count for count in counts if count and count["capped"]]
    if not capped:
        return ""
    total = {key: sum(count[key] for count in capped) for key in ("used", "all")}
    sets = f" in {len(capped)} of {len(counts)} sets" if len(counts) > 1 else ""
    return f"Capped by max_queries: {how_many(total)} {capped[0]['unit']}{sets}. Do not compare with scores on all of them."


def input_of(read: Mapping[str, Any]) -> str:
    """The token limit of a set, the share of texts that it cut, and the prompts. `read`: `input` of results.json; "" when empty."""
    if not read:
        return ""
    query, document = read["prompt"], read.get("document_prompt", "")
    prompts = f"prompt {query!r}" + (f", for documents {document!r}" if document else "") if query or document else "no prompt"
    return f"at most {read['max_length']:,} tokens, {read['cut'] / max(read['texts'], 1):.0%} of texts cut; {prompts}"
