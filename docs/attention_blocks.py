"""Draw docs/attention_blocks.png: which blocks of scores are visited, from the very ranges and flags that attention uses.

    python docs/attention_blocks.py [FILE]
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax.numpy as jnp
import matplotlib
import numpy as np

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from conan_jax.model import Layout, SoftMask
from conan_jax.model.ranges import all_ones, key_ranges

BLOCK, BLOCKS = 128, 16
ALPHAS = (0.0, 0.3, 1.0)
LABELS = ("not visited", "visited, no mask computed (M = 1)", "visited, mask computed in the block")
COLOURS = ("#f1f1f1", "#9ecae1", "#e6550d")


def layouts() -> dict[str, Layout]:
    """Rows of 2,048 tokens: a full one, one with padding, and one of three segments and padding, whose edges fall inside blocks."""
    L = BLOCK * BLOCKS
    lengths = (700, 500, 600)
    segment_ids, positions = np.zeros(L, int), np.zeros(L, int)
    start = 0
    for number, n in enumerate(lengths, 1):
        segment_ids[start : start + n], positions[start : start + n] = number, np.arange(n)
        start += n
    return {
        f"one sequence of {L:,} tokens": Layout.from_lengths(jnp.array([L]), L),
        "1,300 tokens, then padding": Layout.from_lengths(jnp.array([1300]), L),
        "packed: 700, 500, 600, padding": Layout.from_segments(jnp.asarray(segment_ids)[None], jnp.asarray(positions)[None]),
    }


def blocks(layout: Layout, alpha: float) -> np.ndarray:
    """[n, n], rows = blocks of queries: 0 not visited, 1 visited without a mask, 2 with."""
    mask = SoftMask(jnp.float32(alpha))
    first, end = (np.asarray(x)[0][:, None] for x in key_ranges(layout, mask, BLOCK, BLOCK))
    visited = (first <= np.arange(BLOCKS)) & (np.arange(BLOCKS) < end)
    return np.where(visited, np.where(np.asarray(all_ones(layout, mask, BLOCK, BLOCK))[0], 1, 2), 0)


def draw(file: Path) -> None:
    rows = layouts()
    figure, axes = plt.subplots(len(rows), len(ALPHAS), figsize=(9, 10.2), layout="constrained")
    for line, (name, layout) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(f"{name}\nqueries, in blocks of {BLOCK}", fontsize=9)
        for axis, alpha in zip(line, ALPHAS, strict=True):
            picture = blocks(layout, alpha)
            axis.imshow(picture, cmap=ListedColormap(COLOURS), vmin=0, vmax=2, interpolation="nearest")
            axis.set_xticks(np.arange(-0.5, BLOCKS), [])
            axis.set_yticks(np.arange(-0.5, BLOCKS), [])
            axis.grid(color="white", linewidth=1)
            axis.tick_params(length=0)
            axis.spines[:].set_visible(False)
            share = np.mean(picture > 0)
            axis.set_xlabel(f"{np.sum(picture > 0)} of {picture.size} blocks visited ({share:.0%})", fontsize=9)
    for axis, alpha in zip(axes[0], ALPHAS, strict=True):
        axis.set_title(f"alpha = {alpha:g}", fontsize=12)
    figure.suptitle("Blocks of scores (keys to the right, queries down)", fontsize=12)
    figure.legend(handles=[Patch(facecolor=c, edgecolor="#999999", label=t) for c, t in zip(COLOURS, LABELS, strict=True)],
                  loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("attention_blocks.png"))
