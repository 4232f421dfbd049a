"""One task's batches: a schedule of record numbers, the datasets they point into, and how records become arrays."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from conan_jax import config
from conan_jax.data import transforms
from conan_jax.data.access import read_records
from conan_jax.data.indexes import Labels
from conan_jax.data.mixture import Draw, Schedule
from conan_jax.data.tokenizer import AnyTokenizer
from conan_jax.data.transforms import Batch, stable_seed
from conan_jax.errors import DataError


@dataclass(frozen=True)
class Member:
    """One dataset of a task. `offset` is the number of examples in the datasets before it, `seed` its own stream of randomness."""

    name: str
    kind: str
    source: Sequence[Any]
    instruction: str
    offset: int
    seed: int
    labels: Labels | None = None


@dataclass(frozen=True)
class Draft:
    """The records of one batch on their way to arrays."""

    member: Member
    draw: Draw
    records: list[Any]

    @property
    def ids(self) -> np.ndarray:
        """Example numbers in the task."""
        return self.member.offset + self.draw.records

    @property
    def instructions(self) -> list[str]:
        """The task in each query prompt."""
        return [transforms.instruction_of(self.member.kind, record, self.member.instruction) for record in self.records]

    def seeds(self) -> list[int]:
        """One seed for each record and epoch: what is drawn for a record does not depend on its neighbours."""
        return [stable_seed(self.member.seed, self.draw.epoch, int(i)) for i in self.draw.records]


_PERMUTED_LABELS = 10_000  # up to so many, numpy's draw without replacement takes as long as a permutation, whose draws runs depend on
Collate = Callable[[Draft], Batch]


class Feed:
    """`feed.batch(t)`: this host's rows of the task's global batch at step t."""

    def __init__(self, members: Sequence[Member], schedule: Schedule, collate: Collate) -> None:
        self.members, self.schedule, self._collate = list(members), schedule, collate
        self.num_examples = sum(len(member.source) for member in members)

    def batch(self, step: int) -> Batch:
        """Raises `DataError` naming the dataset when a record cannot become arrays."""
        draw = self.schedule[step]
        member = self.members[draw.dataset]
        try:
            return self._collate(Draft(member, draw, read_records(member.source, draw.records)))
        except DataError as error:
            raise DataError(f"dataset {member.name!r}: {error}") from error

    @functools.cached_property
    def zeros(self) -> Batch:
        """Arrays of zeros in the shapes and dtypes of every batch."""
        return _zeros(self.batch(0))

    def dataset_of(self, ids: np.ndarray) -> str:
        """The name of the dataset that holds these example numbers. A batch holds records of one dataset."""
        return [member.name for member in self.members if member.offset <= ids[0]][-1]


def _zeros(batch: Batch) -> Batch:
    return {name: _zeros(value) if isinstance(value, dict) else np.zeros_like(value) for name, value in batch.items()}


def collate_packed(draft: Draft) -> Batch:
    """Packed rows as they are, with their ids in the mixture."""
    rows = draft.records
    batch = {name: np.stack([row[name] for row in rows]) for name in ("tokens", "segment_ids", "positions", "loss_mask")}
    return {"ids": draft.ids.astype(np.int32), **batch}


def collate_pairs(tokenizer: AnyTokenizer, buckets: Sequence[config.Bucket]) -> Collate:
    """Pairs at the lengths of their bucket; a record with several positives shows another one each epoch, drawn by its number."""
    def collate(draft: Draft) -> Batch:
        bucket = buckets[draft.draw.bucket]
        pairs = [transforms.as_pair(draft.member.kind, record, seed) for record, seed in zip(draft.records, draft.seeds())]
        queries, positives = zip(*pairs)
        lengths = (bucket.query_length, bucket.passage_length)
        return transforms.pair_batch(tokenizer, draft.ids, queries, positives, draft.instructions, lengths)

    return collate


def collate_retrieval(tokenizer: AnyTokenizer, bucket: config.Bucket, negatives: config.HardNegatives) -> Collate:
    """Pairs and their candidate pools, hardest first (METHODS 1.4)."""
    pairs = collate_pairs(tokenizer, [bucket])
    skip = negatives.skip_top if negatives.skip_top is not None else 10 * (negatives.rule == "v1")

    def collate(draft: Draft) -> Batch:
        has_pool = draft.member.kind == "retrieval"
        pools = [transforms.candidates(r, negatives.pool_size, skip) if has_pool else [] for r in draft.records]
        return {**pairs(draft), **transforms.pool_batch(tokenizer, pools, negatives.pool_size, bucket.passage_length)}

    return collate


def collate_classification(tokenizer: AnyTokenizer, task: config.Task) -> Collate:
    """A text, what stands for its class, and what stands for others (METHODS 1.5).

    `positives="label"`: label texts, the negatives drawn without replacement from the other labels. `"example"`: other
    records; a class of one record, or of one text, is shown by its label text.
    """
    choose = _by_label if task.positives == "label" else _by_example

    def collate(draft: Draft) -> Batch:
        chosen = [choose(draft.member, int(i), record, np.random.default_rng(seed), task.num_negatives)
                  for i, record, seed in zip(draft.draw.records, draft.records, draft.seeds())]
        positives, negatives = zip(*chosen)
        batch = transforms.pair_batch(tokenizer, draft.ids, [r["text"] for r in draft.records], positives, draft.instructions,
                                      (task.bucket.query_length, task.bucket.passage_length))
        stacked, sizes = transforms.stack_texts(tokenizer, negatives, task.num_negatives, task.bucket.passage_length)
        return {**batch, "negatives": stacked, "negative_mask": (np.arange(task.num_negatives) < sizes[:, None]).astype(np.float32)}

    return collate


def collate_sts(tokenizer: AnyTokenizer, bucket: config.Bucket) -> Collate:
    """Sentence pairs with their graded score."""
    def collate(draft: Draft) -> Batch:
        return transforms.sts_batch(tokenizer, draft.ids, draft.records, draft.instructions, (bucket.query_length, bucket.passage_length))

    return collate


def _by_label(member: Member, index: int, record: Any, rng: np.random.Generator, count: int) -> tuple[str, list[str]]:
    labels = member.labels
    own = labels.of[index]
    others = len(labels.names) - 1
    if others > _PERMUTED_LABELS:
        drawn = rng.choice(others, size=min(count, others), replace=False)
    else:
        drawn = rng.permutation(others)[:count]
    return transforms.label_text(record["label"]), [transforms.label_text(labels.names[o + (o >= own)]) for o in drawn]


def _by_example(member: Member, index: int, record: Any, rng: np.random.Generator, count: int) -> tuple[str, list[str]]:
    labels = member.labels
    own = labels.of[index]
    siblings = labels.members(own)
    positive = transforms.label_text(record["label"])
    for place in rng.integers(len(siblings), size=8):
        text = member.source[int(siblings[place])]["text"]
        if text != record["text"]:
            positive = text
            break
    outside = len(labels.of) - len(siblings)
    places = rng.choice(outside, size=min(count, outside), replace=False)
    return positive, [r["text"] for r in read_records(member.source, labels.outside(own, places))]
