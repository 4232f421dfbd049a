"""Read many records of a random-access source at once, which ArrayRecord does 10-15 times faster than one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

BLOCK = 4096


def read_records(source: Sequence[Any], indices: Sequence[int]) -> list[Any]:
    """The records at `indices`, in that order. Uses `source.__getitems__` where there is one."""
    wanted = [int(i) for i in indices]
    many = getattr(source, "__getitems__", None)
    return list(many(wanted)) if many is not None else [source[i] for i in wanted]


def blocks(source: Sequence[Any], size: int = BLOCK) -> Iterator[tuple[int, list[Any]]]:
    """All records in order, `size` at a time, each block with the number of its first record."""
    for start in range(0, len(source), size):
        yield start, read_records(source, range(start, min(start + size, len(source))))
