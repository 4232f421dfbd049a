"""What must be known of a whole dataset before its first batch: token lengths (for buckets), labels (for classes)."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from conan_jax.data.access import blocks
from conan_jax.data.tokenizer import AnyTokenizer
from conan_jax.data.transforms import as_pair, count_tokens, instruction_of
from conan_jax.files import replacing, unusable


class Labels:
    """The classes of a labelled dataset: `names[of[i]]` is the label of record i; `members(c)` are the records of class c."""

    def __init__(self, names: Sequence[str], of: Int32[np.ndarray, "N"]) -> None:
        self.names, self.of = list(names), of
        self.by_class = np.argsort(of, kind="stable")
        self.starts = np.searchsorted(of[self.by_class], np.arange(len(self.names) + 1))

    def members(self, label: int) -> np.ndarray:
        """Record numbers of one class, in order."""
        return self.by_class[self.starts[label] : self.starts[label + 1]]

    def outside(self, label: int, places: np.ndarray) -> np.ndarray:
        """The records at `places` of the list of all records that are not of class `label`."""
        start, stop = self.starts[label], self.starts[label + 1]
        return self.by_class[np.where(places < start, places, places + stop - start)]


def pair_lengths(
    source: Sequence[Any], kind: str, instruction: str, tokenizer: AnyTokenizer, cache: Path | None = None,
) -> Int32[np.ndarray, "N 2"]:
    """Tokens of query (prompt included) and positive of each record, EOS included; the longest positive where there are several.

    `cache` is a file that is read when it exists and written, whole or not at all, when it does not.
    """
    threads = os.cpu_count() or 1

    def compute() -> dict[str, np.ndarray]:
        lengths = np.zeros((len(source), 2), np.int32)
        for start, records in blocks(source):
            here = slice(start, start + len(records))
            queries = [as_pair(kind, r)[0] for r in records]
            instructions = [instruction_of(kind, r, instruction) for r in records]
            lengths[here, 0] = count_tokens(tokenizer, queries, instructions, threads)
            positives = [r["pos"] if kind == "retrieval" else [as_pair(kind, r)[1]] for r in records]
            flat = count_tokens(tokenizer, [p for group in positives for p in group], [""] * sum(map(len, positives)), threads)
            lengths[here, 1] = np.maximum.reduceat(flat, np.cumsum([0] + [len(group) for group in positives[:-1]]))
        return {"lengths": lengths}

    return _cached(cache, compute)["lengths"]


def labels(source: Sequence[Any], cache: Path | None = None) -> Labels:
    """The classes of `source`, names in sorted order."""
    def compute() -> dict[str, np.ndarray]:
        found = [record["label"] for _, records in blocks(source) for record in records]
        names = sorted(set(found))
        number = {name: i for i, name in enumerate(names)}
        return {"of": np.array([number[label] for label in found], np.int32),
                "names": np.frombuffer(json.dumps(names).encode(), np.uint8)}

    arrays = _cached(cache, compute)
    return Labels(json.loads(arrays["names"].tobytes()), arrays["of"])


def _cached(cache: Path | None, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    if cache is not None and cache.is_file():
        # A damaged file is made again: what is in it follows from the records.
        with suppress(OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error), np.load(cache, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    arrays = compute()
    if cache is not None:
        try:
            with replacing(cache) as partial, open(partial, "wb") as file:
                np.savez(file, **arrays)
        except OSError as error:
            raise unusable(cache, error) from error
    return arrays
