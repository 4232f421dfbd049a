"""From a recipe to everything training reads: datasets, tokenizer, packed rows, indexes. Only what is missing or out of date is made."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from conan_jax import config
from conan_jax.data import locations
from conan_jax.data.access import blocks
from conan_jax.data.artifacts import make_once
from conan_jax.data.convert import difference, find_dataset, named_dataset, rejects_file, write_dataset
from conan_jax.data.folders import (
    content_fingerprint, dataset_folder, dataset_folders, earlier_packed_folder, fingerprint, packed_folder, tokenizer_folder,
    tokenizer_folders,
)
from conan_jax.data.manifest import Manifest, manifest_in
from conan_jax.data.packing import pack, packed_manifest, rows_fingerprint
from conan_jax.data.pipeline import Pipeline
from conan_jax.data.prepared import (
    Prepared, Record, dataset_part, earlier_record, packed_part, read_record, relative, tokenizer_part, write_record,
)
from conan_jax.data.sources import open_source
from conan_jax.data.tokenizer import AnyTokenizer, Tokenizer, read_settings, train_tokenizer
from conan_jax.data.transforms import record_texts
from conan_jax.errors import ConfigError, DataError

Advance = Callable[[float, float | None], None]  # done, total
Built = tuple[Path, Manifest]  # the folder of a dataset or of packed rows, and its manifest


def prepare(run: config.Run, *, stages: Collection[str] | None = None, begun: Collection[str] = (),
            console: Console | None = None) -> Prepared:
    """Build the datasets, the tokenizer and the packed rows of `run` in `run.data_dir`, and record them in `RUN/prepared.json`.

    Each part is addressed by what it is made of (source bytes, settings, tokenizer): a changed recipe makes new parts beside the old
    ones, and nothing is overwritten. Every part appears whole or not at all: a killed `prepare` goes on where it was. Any number of
    processes may prepare in one `data_dir` at once.

    Args:
        stages: the stages to prepare for; default: all of them.
        begun: the stages that have checkpoints. What they were trained with must be what the recipe gives now.
        console: shows progress bars.

    Raises:
        ConfigError: a begun stage was trained with other data or another tokenizer (found before anything is built), or the tokenizer
            is larger than the model's vocabulary.
        DataError: as `write_dataset`, `train_tokenizer` and `pack`.
    """
    parts = _Parts(run, begun, console)
    used = [stage for stage in run.stages if stages is None or stage.name in stages]
    names = list(dict.fromkeys([*parts.tokenizer_datasets, *_datasets_of(used)]))
    parts.refuse_changed(names, used)
    datasets = {name: parts.dataset(name) for name in names}
    place, tokenizer = parts.tokenizer(datasets)
    rows = {}
    for stage in used:
        for mix in stage.datasets if isinstance(stage, config.LMStage) else ():
            rows[stage.name, mix.dataset] = parts.rows(stage, mix.dataset, datasets[mix.dataset], tokenizer)
    folders = ({key: folder for key, (folder, _) in parts.items()} for parts in (datasets, rows))
    prepared = Prepared(tokenizer, *folders)
    for stage in used:
        Pipeline(run, stage, tokenizer, prepared=prepared)  # makes the cached indexes, and refuses data that cannot fill a batch
    parts.write_record(place, tokenizer, datasets, rows)
    return prepared


def prepare_tokenizer(run: config.Run, *, console: Console | None = None) -> tuple[Path, AnyTokenizer]:
    """Only the tokenizer of `run` and its folder, and the datasets it is trained on; raises as `prepare`."""
    parts = _Parts(run, (), console)
    return parts.tokenizer({name: parts.dataset(name) for name in parts.tokenizer_datasets})


def dataset_texts(folders: Iterable[Path]) -> Iterator[str]:
    """Every text a tokenizer may learn from in built datasets, one after the other."""
    for folder in folders:
        source = open_source(folder)
        for _, records in blocks(source):
            for record in records:
                yield from record_texts(source.kind, record)


def _datasets_of(stages: Iterable[config.Stage]) -> list[str]:
    """The datasets of `stages`, in order and each once."""
    names = []
    for stage in stages:
        mixes = sum((t.datasets for t in stage.tasks), ()) if isinstance(stage, config.SupervisedStage) else stage.datasets
        names += [mix.dataset for mix in mixes]
    return list(dict.fromkeys(names))


class _Parts:
    """The parts of one run: found in `data_dir`, compared with those that `begun` stages were trained with, made where missing."""

    def __init__(self, run: config.Run, begun: Collection[str], console: Console | None) -> None:
        self.run, self.console = run, console
        self.data_dir = Path(run.data_dir)
        self.begun = [stage for stage in run.stages if stage.name in begun]
        self.record = read_record(Path(run.output_dir)) or (earlier_record(run) if self.begun else Record())
        # A trained tokenizer knows the datasets of all stages when it names none, whichever of them run now.
        trained_on = list(run.tokenizer.datasets) or _datasets_of(run.stages)
        self.tokenizer_datasets = trained_on if run.tokenizer.path is None else []
        self._said: set[str] = set()

    def refuse_changed(self, names: Iterable[str], stages: Iterable[config.Stage]) -> None:
        """Compare what is there already with what the begun stages were trained with. Builds nothing."""
        if not self.begun:
            return
        needed = {*self.tokenizer_datasets, *_datasets_of(self.begun)}
        found: dict[str, Built] = {}
        for name in names:
            built = self._find_dataset(name)
            if built is not None:
                found[name] = built
            part = self.record.datasets.get(name) if name in needed else None
            if part is None or (built is not None and content_fingerprint(built[1]) == part["content"]):
                continue
            recorded = manifest_in(self.data_dir / part["folder"])
            if why := "" if recorded is None else difference(self._located(name), recorded):
                raise self._changed(f"dataset {name!r}", why)
            if built is not None:
                raise self._changed(f"dataset {name!r}", f"{part['records']:,} records then, {built[1].records:,} now")
        tokenizer = self._known_tokenizer(found)
        if tokenizer is not None:
            self._compare_tokenizer(tokenizer)
            for stage in stages:
                for mix in stage.datasets if isinstance(stage, config.LMStage) else ():
                    if mix.dataset in found:
                        self._compare_rows(stage, mix.dataset, self._mark_of_rows(stage, mix.dataset, found[mix.dataset][1], tokenizer))

    def dataset(self, name: str) -> Built:
        """The folder and the manifest of a dataset."""
        located = self._located(name)

        def make(private: Path) -> Path:
            with _bar(self.console, f"dataset {name}", "bytes") as advance:
                manifest = write_dataset(located, private, rejects_file(self.data_dir / name),
                                         progress=lambda p: advance(p.done, p.total), say=self._say)
            return dataset_folder(self.data_dir, manifest)

        folder, manifest = make_once(self.data_dir / name, lambda: self._find_dataset(name), make)
        part = self.record.datasets.get(name) if name in {*self.tokenizer_datasets, *_datasets_of(self.begun)} else None
        if self.begun and part is not None and part["content"] != content_fingerprint(manifest):
            raise self._changed(f"dataset {name!r}", f"{part['records']:,} records then, {manifest.records:,} others now")
        return folder, manifest

    def tokenizer(self, built: Mapping[str, Built]) -> tuple[Path, AnyTokenizer]:
        """The tokenizer and its folder."""
        settings = self.run.tokenizer
        if settings.path is not None:
            folder = Path(locations.expand_variables(settings.path))
            tokenizer = Tokenizer.load(folder)
        else:
            mark = self._mark_of_tokenizer(built)
            address = tokenizer_folder(self.data_dir, mark)

            def make(private: Path) -> Path:
                self._train(private, mark, built)
                return address

            folder, tokenizer = make_once(address, lambda: self._find_tokenizer(mark), make)
        if tokenizer.vocab_size > self.run.model.vocab_size:
            raise ConfigError(f"the tokenizer has {tokenizer.vocab_size} tokens but model.vocab_size is {self.run.model.vocab_size}: "
                              "raise model.vocab_size to a multiple of 128 above it")
        self._compare_tokenizer(tokenizer)
        return folder, tokenizer

    def rows(self, stage: config.LMStage, name: str, dataset: Built, tokenizer: AnyTokenizer) -> Built:
        """The folder and the manifest of the packed rows of a dataset for a stage."""
        folder, manifest = dataset
        mark = self._mark_of_rows(stage, name, manifest, tokenizer)
        self._compare_rows(stage, name, mark)
        earlier, address = earlier_packed_folder(self.data_dir, stage.name, name), packed_folder(self.data_dir, name, mark)
        if (packed := packed_manifest(earlier, mark)) is not None:
            return earlier, packed
        with _bar(self.console, f"packing {name} for {stage.name}", "records") as advance:
            return address, pack(open_source(folder), tokenizer, stage.kind, stage.sequence_length, address,
                                 record_kind=self.run.dataset(name).kind, content=content_fingerprint(manifest), progress=advance)

    def write_record(self, place: Path, tokenizer: AnyTokenizer, datasets: Mapping[str, Built],
                     rows: Mapping[tuple[str, str], Built]) -> None:
        """Write `prepared.json`: these parts, and those of begun stages that were not asked for."""
        before = self.record if self.begun else Record()
        packed = {stage: dict(parts) for stage, parts in before.packed.items()}
        for (stage, name), (folder, manifest) in rows.items():
            packed.setdefault(stage, {})[name] = packed_part(self.data_dir, folder, manifest)
        sources = [*(self.run.dataset(name).source for name in datasets), *(evaluation.path for evaluation in self.run.evaluations)]
        corpus = before.corpus
        if any(source.startswith(locations.DOCSTRINGS) for source in sources):
            corpus = relative(self._corpus, self.data_dir)
        made = {name: dataset_part(self.data_dir, folder, manifest) for name, (folder, manifest) in datasets.items()}
        record = Record(tokenizer_part(self.data_dir, place, tokenizer), before.datasets | made, packed, corpus)
        write_record(Path(self.run.output_dir), record)

    @functools.cached_property
    def _corpus(self) -> Path:
        """The corpus behind `docstrings:` sources: a run that has begun keeps the one it began with."""
        from conan_jax.data import docstrings

        if self.begun and self.record.corpus is not None:
            folder = self.data_dir / self.record.corpus
            if (manifest := docstrings.read_corpus(folder)) is not None:
                if manifest["fingerprint"] != docstrings.installed_fingerprint():
                    self._say(f"the installed packages have changed; this run keeps the corpus of their documentation in {folder} "
                              "(conan train with --fresh takes the new one)")
                return folder
        with _bar(self.console, "reading documentation", "files") as read, _bar(self.console, "hard negatives", "queries") as rank:
            bars = {"files": read, "queries": rank}
            return docstrings.installed_corpus(self.data_dir, lambda what, done, total: bars[what](done, total))

    def _located(self, name: str) -> config.Dataset:
        dataset = self.run.dataset(name)
        if not dataset.source.startswith(locations.DOCSTRINGS):
            return dataset  # the readers expand variables, part by part
        return dataclasses.replace(dataset, source=locations.resolve(self.run, dataset.source, lambda: self._corpus))

    def _find_dataset(self, name: str) -> Built | None:
        if (named := named_dataset(self._located(name))) is not None:
            return named
        part = self.record.datasets.get(name)
        recorded = [self.data_dir / part["folder"]] if part is not None else []
        return find_dataset(self._located(name), dict.fromkeys([*recorded, *dataset_folders(self.data_dir, name)]), say=self._say)

    def _mark_of_tokenizer(self, built: Mapping[str, Built]) -> str:
        names = self.tokenizer_datasets
        settings = {**dataclasses.asdict(self.run.tokenizer), "datasets": names, "path": None}
        return fingerprint(settings=settings, content=[content_fingerprint(built[name][1]) for name in names])

    def _find_tokenizer(self, mark: str) -> tuple[Path, AnyTokenizer] | None:
        recorded = [self.data_dir / self.record.tokenizer["folder"]] if self.record.tokenizer is not None else []
        for folder in (*recorded, tokenizer_folder(self.data_dir, mark), *tokenizer_folders(self.data_dir)[:1]):
            try:
                if read_settings(folder).get("fingerprint") == mark:
                    return folder, Tokenizer.load(folder)
            except DataError:
                continue
        return None

    def _train(self, folder: Path, mark: str, built: Mapping[str, Built]) -> None:
        names = self.tokenizer_datasets
        total = sum(shard.bytes for name in names for shard in built[name][1].shards)
        with _bar(self.console, "tokenizer", "bytes") as advance:
            train_tokenizer(dataset_texts(built[name][0] for name in names), self.run.tokenizer, folder,
                            extra={"datasets": names, "fingerprint": mark}, progress=lambda read: advance(min(read, total), total))

    def _known_tokenizer(self, found: Mapping[str, Built]) -> AnyTokenizer | None:
        """The tokenizer of the recipe, None where it is not trained yet. Refuses settings other than the recorded tokenizer's."""
        settings = self.run.tokenizer
        if settings.path is not None:
            return Tokenizer.load(locations.expand_variables(settings.path))
        if not set(self.tokenizer_datasets) <= found.keys():
            return None
        known = self._find_tokenizer(self._mark_of_tokenizer(found))
        if known is not None:
            return known[1]
        if self.record.tokenizer is not None:
            before = read_settings(self.data_dir / self.record.tokenizer["folder"])
            now = {**dataclasses.asdict(settings), "datasets": self.tokenizer_datasets}
            if changed := [f"{key} {before[key]!r} -> {now[key]!r}" for key in now if key in before and before[key] != now[key]]:
                raise self._changed("the tokenizer", ", ".join(changed))
        return None

    def _compare_tokenizer(self, tokenizer: AnyTokenizer) -> None:
        before = self.record.tokenizer if self.begun else None
        if before is not None and before["sha256"] != tokenizer.sha256:
            raise self._changed("the tokenizer", f"sha256 {before['sha256']} -> {tokenizer.sha256}")

    def _mark_of_rows(self, stage: config.LMStage, name: str, manifest: Manifest, tokenizer: AnyTokenizer) -> str:
        kind, content = self.run.dataset(name).kind, content_fingerprint(manifest)
        return rows_fingerprint(tokenizer.sha256, stage.kind, stage.sequence_length, kind, content)

    def _compare_rows(self, stage: config.LMStage, name: str, mark: str) -> None:
        before = self.record.packed.get(stage.name, {}).get(name) if stage in self.begun else None
        if before is not None and before["fingerprint"] != mark:
            raise self._changed(f"dataset {name!r} as rows of stage {stage.name!r}", f"fingerprint {before['fingerprint'][:12]} -> "
                                f"{mark[:12]}; records, tokenizer, kind or sequence_length differ")

    def _changed(self, what: str, why: str) -> ConfigError:
        run = self.run
        elsewhere = "name" if run.output_dir == f"runs/{run.name}" else "output_dir"
        return ConfigError(f"{what} is not what {run.output_dir} was trained with (stages {', '.join(s.name for s in self.begun)}): {why}. "
                           f"Put it back as it was, make another run (--set {elsewhere}=...), or train this one anew: conan train with "
                           "--fresh and without --stage")

    def _say(self, text: str) -> None:
        if self.console is not None and text not in self._said:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)
        self._said.add(text)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        """Units a second: of the last moments while it runs, of the whole when it is done."""
        speed = task.completed / task.elapsed if task.finished and task.elapsed else task.speed
        return Text(f"{speed:,.0f} {task.fields['unit']}/s" if speed else "", style="progress.data.speed")


@contextmanager
def _bar(console: Console | None, label: str, unit: str) -> Iterator[Advance]:
    """A progress bar with rate and time left, drawn from the first sign of work: what was there already shows none."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), _Rate(), TimeElapsedColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=console, disable=console is None)

    def advance(done: float, total: float | None) -> None:
        if not progress.tasks:
            progress.start()
            progress.add_task(label, unit=unit)
        progress.update(progress.tasks[0].id, completed=done, total=total)

    try:
        yield advance
        for task in progress.tasks:  # a dataset with a limit is done before its source is read to the end
            progress.update(task.id, total=max(task.completed, 1))
    finally:
        if progress.tasks:
            progress.stop()
