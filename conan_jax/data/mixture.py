"""Which records make up the batch of step t: shuffled epochs of each stream, streams interleaved by weight.

A stream is one dataset, or one length bucket of it; a batch holds records of a single stream. Everything here is
arithmetic on record numbers: nothing is read, and step t costs the same as step 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import grain
import numpy as np
from jaxtyping import Int32, Int64

from conan_jax.config import Mix
from conan_jax.errors import ConfigError, DataError


@dataclass(frozen=True)
class Stream:
    """A dataset (`dataset` is its place in the mixture), or the part of it in one bucket: `records` numbers, or None for all `size`."""

    dataset: int
    bucket: int
    size: int
    weight: float
    seed: int
    records: Int64[np.ndarray, "N"] | None = None


@dataclass(frozen=True)
class Draw:
    """This host's rows of one global batch: record numbers within a dataset, and how often that stream was read through before."""

    dataset: int
    bucket: int
    epoch: int
    records: Int64[np.ndarray, "B"]


class Schedule:
    """`schedule[t]` is this host's `Draw` of step t.

    Each stream is shuffled as a whole, cut to a multiple of the global batch, divided among the hosts in contiguous
    blocks and repeated, reshuffled every epoch. So the global batch is the same for any `host_count`, holds no
    record twice, and an epoch shows each record at most once. Streams take turns in proportion to their weights.
    """

    def __init__(self, streams: Sequence[Stream], global_batch_size: int, *, host_index: int = 0, host_count: int = 1) -> None:
        """Every stream must hold a batch. Raises `ConfigError` when the hosts cannot share the batch evenly."""
        if global_batch_size % host_count:
            raise ConfigError(f"a global batch of {global_batch_size} cannot be divided among {host_count} hosts")
        if not 0 <= host_index < host_count:
            raise ConfigError(f"host_index {host_index} must lie in [0, {host_count})")
        self.streams = tuple(streams)
        self._epoch_batches = [stream.size // global_batch_size for stream in streams]
        rows = [self._rows(stream, global_batch_size, host_index, host_count) for stream in streams]
        self._mixed = grain.MapDataset.mix(rows, [stream.weight for stream in streams]) if len(rows) > 1 else rows[0]

    def __getitem__(self, step: int) -> Draw:
        stream_index, turn, rows = self._mixed[step]
        stream = self.streams[stream_index]
        records = rows if stream.records is None else stream.records[rows]
        return Draw(stream.dataset, stream.bucket, turn // self._epoch_batches[stream_index], records)

    def _rows(self, stream: Stream, size: int, host_index: int, host_count: int) -> grain.MapDataset:
        shuffled = grain.MapDataset.range(stream.size).shuffle(seed=stream.seed)[: stream.size // size * size]
        blocks = shuffled.batch(size // host_count, batch_fn=lambda rows: np.asarray(rows, np.int64))[host_index::host_count].repeat()
        place = self.streams.index(stream)
        return blocks.map_with_index(lambda turn, rows: (place, turn, rows))


def shares(mixes: Sequence[Mix], sizes: Sequence[int], owner: str) -> list[float]:
    """The share of batches of each dataset: its weight, or its number of records when no weight is given.

    Raises `ConfigError` when only some datasets have a weight: a share and a count cannot be compared.
    """
    given = [mix.weight is not None for mix in mixes]
    if any(given) and not all(given):
        without = ", ".join(mix.dataset for mix in mixes if mix.weight is None)
        raise ConfigError(f"{owner} gives a weight to some datasets but not to {without}: give one to all, or to none (then records count)")
    raw = [float(size if mix.weight is None else mix.weight) for mix, size in zip(mixes, sizes)]
    return [value / sum(raw) for value in raw]


def check_size(size: int, global_batch_size: int, dataset: str, owner: str) -> None:
    """Raises `DataError` when a dataset cannot fill one global batch without showing a record twice."""
    if size < global_batch_size:
        raise DataError(f"dataset {dataset!r} holds {size:,} records, fewer than the global batch of {global_batch_size:,} of {owner}: "
                        "add records, lower the batch size, or leave the dataset out")


def assign_buckets(
    lengths: Int32[np.ndarray, "N 2"], buckets: Sequence[tuple[int, int]], global_batch_size: int,
) -> dict[int, Int64[np.ndarray, "M"]]:
    """Record numbers of each bucket used: the first (they are taken by size) that holds both sides, the last for whatever is longer.

    A bucket with too few records for one batch hands them to the next larger one; when the largest is short, it
    takes over the one before it, so that nothing is cut that need not be. At least `global_batch_size` records are needed.
    """
    order = sorted(range(len(buckets)), key=lambda b: sum(buckets[b]))
    sizes = np.array([buckets[b] for b in order])
    fits = (lengths[:, None, :] <= sizes[None]).all(-1)
    fits[:, -1] = True
    first = fits.argmax(1)
    groups = {rank: np.flatnonzero(first == rank) for rank in range(len(order))}
    for rank in range(len(order) - 1):
        if 0 < len(groups[rank]) < global_batch_size:
            groups = _hand_up(groups, rank, fits)
    last = len(order) - 1
    for rank in range(last - 1, -1, -1):
        if 0 < len(groups[last]) < global_batch_size:
            groups[last] = np.sort(np.concatenate([groups[last], groups.pop(rank)]))
    return {order[rank]: members for rank, members in groups.items() if len(members)}


def _hand_up(groups: dict[int, np.ndarray], rank: int, fits: np.ndarray) -> dict[int, np.ndarray]:
    members = groups[rank]
    target = rank + 1 + fits[members, rank + 1 :].argmax(1)
    moved = {up: np.sort(np.concatenate([groups[up], members[target == up]])) for up in range(rank + 1, fits.shape[1])}
    return {**groups, **moved, rank: members[:0]}
