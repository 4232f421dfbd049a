"""Which texts are encoded together, in rows of which length: few shapes, so few programs, and little padding.

A batch is one of few shapes, (rows, row length). All of it follows from the lengths of the texts alone, so the same texts always meet
in the same batches.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

SHORTEST, STEP = 16, 8  # tokens


class Batch(NamedTuple):
    """Numbers of the texts to encode together, and the shape they are padded to."""

    members: Int[np.ndarray, " n"]
    rows: int
    length: int


def batches(lengths: Int[np.ndarray, " N"], *, longest: int, most_rows: int, most_tokens: int, shape_tokens: float,
            multiple: int = 1) -> list[Batch]:
    """Every text in one batch, the longest first.

    Args:
        lengths: tokens of each text, at most `longest`.
        most_rows, most_tokens: bounds of a batch; one text a device is always taken.
        shape_tokens: how many tokens of padding are worth one more row length, with its programs to compile.
        multiple: of which the number of rows is one: the number of devices.
    """
    if not len(lengths):
        return []
    chosen = np.array(row_lengths(lengths, longest, shape_tokens))
    order = np.argsort(-lengths, kind="stable")
    made, start = [], 0
    while start < len(order):
        length = int(chosen[np.searchsorted(chosen, lengths[order[start]])])
        rows = max(1, min(most_rows, most_tokens // length) // multiple) * multiple
        members = order[start : start + rows]
        start += rows
        # The last batch may be small: half the rows until it is no longer half empty.
        while rows % (2 * multiple) == 0 and rows // 2 >= len(members):
            rows //= 2
        made.append(Batch(members, rows, length))
    return made


def row_lengths(lengths: Int[np.ndarray, " N"], longest: int, shape_tokens: float) -> list[int]:
    """The row lengths, rising, that take the fewest tokens in all, each further length counted as `shape_tokens` more.

    They are drawn from `grid`; for few texts from its powers of two, so that single texts of many lengths share programs.
    """
    fine = grid(longest, 8)
    few = int(lengths.sum()) <= shape_tokens
    offered = np.array(grid(longest, 1) if few else fine)
    counts = np.bincount(np.searchsorted(offered, lengths), minlength=len(offered))
    used = np.flatnonzero(counts)
    offered, counts = offered[used], counts[used]
    before = np.concatenate([[0], np.cumsum(counts)])
    # best[j]: the cheapest way to hold the texts of the first j lengths, whose longest rows are offered[j - 1].
    best, cut = [0.0], [0]
    for j in range(1, len(offered) + 1):
        costs = [best[i] + float(before[j] - before[i]) * offered[j - 1] + shape_tokens for i in range(j)]
        cut.append(int(np.argmin(costs)))
        best.append(costs[cut[-1]])
    kept, j = [], len(offered)
    while j:
        kept.append(int(offered[j - 1]))
        j = cut[j]
    return kept[::-1]


def grid(longest: int, steps: int) -> list[int]:
    """Row lengths from 16 to `longest`: powers of two, and `steps` - 1 even steps between two of them, or fewer of at least 8 tokens."""
    made, low = [SHORTEST], SHORTEST
    while made[-1] < longest:
        step = max(STEP, low // steps)
        made += range(low + step, 2 * low + 1, step)
        low *= 2
    return [length for length in made if length < longest] + [longest]
