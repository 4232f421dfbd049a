"""The global batch at step t, as fixed-shape arrays, for every kind of stage.

`batch(t)` depends on (config, seed, t) alone, so a run resumes from its step number and any number of hosts sees the
same global batch. Text is tokenised here, in the threads that read ahead; language-model rows were packed before.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain

from conan_jax import config
from conan_jax.data import feeds, indexes, mixture
from conan_jax.data.folders import content_fingerprint, fingerprint, index_file
from conan_jax.data.packing import open_packed
from conan_jax.data.prepared import Prepared
from conan_jax.data.sources import open_source
from conan_jax.data.tokenizer import AnyTokenizer
from conan_jax.data.transforms import PAIR_KINDS, Batch, stable_seed
from conan_jax.errors import ConfigError, DataError

SINGLE = ""  # the name of the only task of a stage that has no tasks
_THREADS, _AHEAD = 2, 8  # batches are large: two threads keep far ahead of a training step


class Pipeline:
    """Batches of one stage (docs/ARCHITECTURE.md, "Batches"), this host's slice of each.

    Args:
        run: the recipe.
        stage: one of `run.stages`.
        tokenizer: the tokenizer of the run.
        prepared: the folders of datasets and packed rows; default: those that `prepared.json` of the run records.
        host_index, host_count: which contiguous part of every global batch this process gets.
        sources: random-access sources by dataset name, instead of the prepared ones.

    Raises:
        ConfigError: a dataset of the wrong kind, weights for some datasets only, hosts that do not divide a batch.
        DataError: data that is missing or damaged, a dataset smaller than one global batch (both numbers named), or a
            dataset of a classification task with one label.
    """

    def __init__(
        self, run: config.Run, stage: config.AnyStage, tokenizer: AnyTokenizer, *,
        prepared: Prepared | None = None, host_index: int = 0, host_count: int = 1, sources: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        self._run, self._stage, self._tokenizer = run, stage, tokenizer
        self._given = prepared
        self._hosts = {"host_index": host_index, "host_count": host_count}
        self._sources = dict(sources or {})
        match stage:
            case config.LMStage():
                self._feeds = {SINGLE: self._packed(stage)}
            case config.WeakStage():
                self._feeds = {SINGLE: self._pairs(stage.datasets, stage.global_batch_size, stage.buckets)}
            case config.SupervisedStage():
                self._feeds = {task.name: self._task(stage, task) for task in stage.tasks}
            case config.CustomStage():
                self._feeds = {SINGLE: self._custom(stage)}

    @property
    def num_examples(self) -> dict[str, int]:
        """Examples of each task, over all its datasets; every id is below. The only task of other stages is ""."""
        return {name: feed.num_examples for name, feed in self._feeds.items()}

    def batch(self, step: int) -> Batch:
        """This host's slice of the global batch at `step`. Safe to call from many threads."""
        if SINGLE in self._feeds:
            return self._feeds[SINGLE].batch(step)
        if getattr(self._stage, "update", "") != "one_task":
            return {name: feed.batch(step) for name, feed in self._feeds.items()}
        # Only the task that is due is read and tokenised; the step function takes the others at their shapes and does not use them.
        turn, due = divmod(step, len(self._feeds))
        return {name: feed.batch(turn) if i == due else feed.zeros for i, (name, feed) in enumerate(self._feeds.items())}

    def datasets_of(self, batch: Batch) -> dict[str, str]:
        """{task: name of the dataset of its rows}, for tasks of several datasets. The only task of other stages is ""."""
        mixed = {name: feed for name, feed in self._feeds.items() if len(feed.members) > 1}
        return {name: feed.dataset_of((batch if name == SINGLE else batch[name])["ids"]) for name, feed in mixed.items()}

    def iterate(self, start: int) -> Iterator[Batch]:
        """`batch(start)`, `batch(start + 1)`, ... without end, made ahead of time by threads."""
        ahead = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_AHEAD)
        return iter(grain.MapDataset.range(start, sys.maxsize).map(self.batch).to_iter_dataset(ahead))

    @functools.cached_property
    def _prepared(self) -> Prepared:
        return self._given or Prepared.load(self._run)

    def _packed(self, stage: config.LMStage) -> feeds.Feed:
        owner = f"stage {stage.name!r}"
        for mix in stage.datasets:
            if mix.dataset not in self._sources:
                self._sources[mix.dataset] = open_packed(self._prepared.rows(stage.name, mix.dataset))
        members = self._members(stage.datasets, SINGLE)
        streams = self._streams(members, stage.datasets, stage.global_batch_size, owner)
        return feeds.Feed(members, mixture.Schedule(streams, stage.global_batch_size, **self._hosts), feeds.collate_packed)

    def _pairs(self, mixes: Sequence[config.Mix], size: int, buckets: Sequence[config.Bucket]) -> feeds.Feed:
        owner = f"stage {self._stage.name!r}"
        members = self._opened(mixes, SINGLE, owner, PAIR_KINDS)
        streams = self._streams(members, mixes, size, owner)
        if len(buckets) > 1:
            streams = [part for stream in streams for part in self._bucketed(stream, members[stream.dataset], buckets, size)]
        return feeds.Feed(members, mixture.Schedule(streams, size, **self._hosts), feeds.collate_pairs(self._tokenizer, buckets))

    def _task(self, stage: config.SupervisedStage, task: config.Task) -> feeds.Feed:
        owner = f"task {task.name!r} of stage {stage.name!r}"
        kinds, collate = {
            "retrieval": (PAIR_KINDS, lambda: feeds.collate_retrieval(self._tokenizer, task.bucket, stage.hard_negatives)),
            "classification": (("labelled",), lambda: feeds.collate_classification(self._tokenizer, task)),
            "sts": (("sts",), lambda: feeds.collate_sts(self._tokenizer, task.bucket)),
        }[task.kind]
        members = self._opened(task.datasets, task.name, owner, kinds)
        streams = self._streams(members, task.datasets, task.global_batch_size, owner)
        return feeds.Feed(members, mixture.Schedule(streams, task.global_batch_size, **self._hosts), collate())

    def _custom(self, stage: config.CustomStage) -> feeds.Feed:
        needed = ("global_batch_size", "query_length", "passage_length")
        missing = [name for name in needed if not isinstance(stage.options.get(name), int)]
        if missing or not stage.datasets:
            raise ConfigError(f"stage {stage.name!r} of kind {stage.kind!r} gets batches of pairs: give it datasets, and in options the "
                              f"numbers {', '.join(missing or needed)}")
        size, query_length, passage_length = (stage.options[name] for name in needed)
        return self._pairs(stage.datasets, size, [config.Bucket(query_length, passage_length)])

    def _opened(self, mixes: Sequence[config.Mix], task: str, owner: str, kinds: Sequence[str]) -> list[feeds.Member]:
        for mix in mixes:
            kind = self._run.dataset(mix.dataset).kind
            if kind not in kinds:
                raise ConfigError(f"{owner} needs records of kind {' or '.join(kinds)}, but dataset {mix.dataset!r} is of kind {kind}")
            if mix.dataset not in self._sources:
                self._sources[mix.dataset] = open_source(self._prepared.dataset(mix.dataset))
        return self._members(mixes, task, classes=kinds == ("labelled",))

    def _members(self, mixes: Sequence[config.Mix], task: str, classes: bool = False) -> list[feeds.Member]:
        members, offset = [], 0
        for mix in mixes:
            dataset, source = self._run.dataset(mix.dataset), self._sources[mix.dataset]
            labels = indexes.labels(source, self._cache(mix.dataset, source, "labels")) if classes else None
            if labels is not None and len(labels.names) < 2:
                raise DataError(f"dataset {mix.dataset!r} has the label {labels.names[0][:80]!r} alone; task {task!r} of stage "
                                f"{self._stage.name!r} takes its negatives from other labels: add records of other labels")
            # Stage, task and dataset are in the seed: two uses of the same records do not go through them in the same order.
            # So is the number of earlier uses in this mixture, unless it is 0: the order of datasets named once stays the same.
            earlier = sum(member.name == mix.dataset for member in members)
            seed = stable_seed(self._run.seed, self._stage.name, task, mix.dataset, *([earlier] if earlier else []))
            members.append(feeds.Member(mix.dataset, dataset.kind, source, dataset.instruction, offset, seed, labels))
            offset += len(source)
        return members

    def _streams(self, members: Sequence[feeds.Member], mixes: Sequence[config.Mix], size: int, owner: str) -> list[mixture.Stream]:
        for member in members:
            mixture.check_size(len(member.source), size, member.name, owner)
        weights = mixture.shares(mixes, [len(m.source) for m in members], owner)
        return [mixture.Stream(i, 0, len(m.source), weight, m.seed) for i, (m, weight) in enumerate(zip(members, weights))]

    def _bucketed(self, stream: mixture.Stream, member: feeds.Member, buckets: Sequence[config.Bucket], size: int) -> list[mixture.Stream]:
        cache = self._cache(member.name, member.source, "lengths", tokenizer=self._tokenizer.sha256, instruction=member.instruction)
        lengths = indexes.pair_lengths(member.source, member.kind, member.instruction, self._tokenizer, cache)
        groups = mixture.assign_buckets(lengths, [(b.query_length, b.passage_length) for b in buckets], size)
        share = {bucket: stream.weight * len(records) / stream.size for bucket, records in groups.items()}
        return [mixture.Stream(stream.dataset, bucket, len(records), share[bucket], stable_seed(stream.seed, bucket), records)
                for bucket, records in groups.items()]

    def _cache(self, name: str, source: Sequence[Any], what: str, **parts: str) -> Any:
        manifest = getattr(source, "manifest", None)
        return manifest and index_file(self._run, name, what, fingerprint(content=content_fingerprint(manifest), what=what, **parts))
