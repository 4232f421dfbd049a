"""From a recipe to everything training reads: datasets, tokenizer, packed rows, indexes. Only what is missing or out of date is made."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from conan_jax import config
from conan_jax.data import locations
from conan_jax.data.access import blocks
from conan_jax.data.convert import build_dataset
from conan_jax.data.folders import RESERVED, content_fingerprint, dataset_folder, fingerprint, packed_folder, tokenizer_folder
from conan_jax.data.manifest import Manifest
from conan_jax.data.packing import pack
from conan_jax.data.pipeline import Pipeline
from conan_jax.data.sources import open_source
from conan_jax.data.tokenizer import AnyTokenizer, Tokenizer, read_settings, train_tokenizer
from conan_jax.data.transforms import record_texts
from conan_jax.errors import ConfigError, DataError

Advance = Callable[[float, float | None], None]  # done, total


@dataclass(frozen=True)
class Prepared:
    """What `prepare` made or found: the tokenizer, and the folders by dataset name and by (stage, dataset) of packed rows."""

    tokenizer: AnyTokenizer
    datasets: dict[str, Path]
    packed: dict[tuple[str, str], Path]


def prepare(run: config.Run, *, console: Console | None = None) -> Prepared:
    """Build the datasets, the tokenizer and the packed rows of `run` in `run.data_dir`; finished parts are kept.

    Each part lies under its own fingerprint (source bytes, settings, tokenizer), so a changed recipe rebuilds exactly
    what depends on the change. Every part appears whole or not at all: a killed `prepare` goes on where it was.
    `console` shows progress bars.

    Raises:
        ConfigError: a dataset name that is a folder of ours, or a tokenizer larger than the model's vocabulary.
        DataError: as `build_dataset`, `train_tokenizer` and `pack`.
    """
    built = _datasets(run, _used(run), console)
    tokenizer = _tokenizer(run, built, console)
    packed = {}
    for stage in run.stages:
        if isinstance(stage, config.LMStage):
            for mix in stage.datasets:
                packed[stage.name, mix.dataset] = _pack(run, stage, mix.dataset, built[mix.dataset], tokenizer, console)
        Pipeline(run, stage, tokenizer)  # makes the cached indexes, and refuses data that cannot fill a batch before anything trains
    return Prepared(tokenizer, {name: dataset_folder(run, name) for name in built}, packed)


def prepare_tokenizer(run: config.Run, *, console: Console | None = None) -> AnyTokenizer:
    """Only the tokenizer of `run`, and the datasets it is trained on; raises as `prepare`."""
    names = [] if run.tokenizer.path is not None else list(run.tokenizer.datasets) or _stage_datasets(run)
    return _tokenizer(run, _datasets(run, names, console), console)


def dataset_texts(folders: Iterable[Path]) -> Iterator[str]:
    """Every text a tokenizer may learn from in built datasets, one after the other."""
    for folder in folders:
        source = open_source(folder)
        for _, records in blocks(source):
            for record in records:
                yield from record_texts(source.kind, record)


def _used(run: config.Run) -> list[str]:
    own = run.tokenizer.datasets if run.tokenizer.path is None else ()
    return list(dict.fromkeys([*own, *_stage_datasets(run)]))


def _stage_datasets(run: config.Run) -> list[str]:
    names = []
    for stage in run.stages:
        mixes = sum((t.datasets for t in stage.tasks), ()) if isinstance(stage, config.SupervisedStage) else stage.datasets
        names += [mix.dataset for mix in mixes]
    return list(dict.fromkeys(names))


def _datasets(run: config.Run, names: Iterable[str], console: Console | None) -> dict[str, Manifest]:
    built = {}
    # One look at the installed packages serves all datasets that are parts of the same corpus.
    build_corpus = functools.cache(functools.partial(_build_corpus, console))
    for name in names:
        if name in RESERVED:
            raise ConfigError(f"a dataset cannot be called {name!r}, which is a folder of the prepared data; rename it")
        with _bar(console, f"dataset {name}", "bytes") as advance:
            located = dataclasses.replace(run.dataset(name), source=locations.resolve(run, run.dataset(name).source, build_corpus))
            built[name] = build_dataset(located, dataset_folder(run, name), progress=lambda p: advance(p.done, p.total),
                                        say=console.print if console else None)
    return built


def _build_corpus(console: Console | None, folder: Path) -> None:
    from conan_jax.data.docstrings import build_corpus

    with _bar(console, "reading documentation", "files") as read, _bar(console, "hard negatives", "queries") as rank:
        build_corpus(folder, progress=lambda what, done, total: {"files": read, "queries": rank}[what](done, total))


def _tokenizer(run: config.Run, built: dict[str, Manifest], console: Console | None) -> AnyTokenizer:
    settings = run.tokenizer
    if settings.path is not None:
        tokenizer = Tokenizer.load(locations.expand_variables(settings.path))
    else:
        names = list(settings.datasets or built)
        mark = fingerprint(settings={**dataclasses.asdict(settings), "datasets": names, "path": None},
                           content=[content_fingerprint(built[name]) for name in names])
        tokenizer = _trained(tokenizer_folder(run), mark)
        if tokenizer is None:
            total = sum(shard.bytes for name in names for shard in built[name].shards)
            with _bar(console, "tokenizer", "bytes") as advance:
                tokenizer = train_tokenizer(
                    dataset_texts(dataset_folder(run, name) for name in names), settings, tokenizer_folder(run),
                    extra={"datasets": names, "fingerprint": mark}, progress=lambda read: advance(min(read, total), total),
                )
    if tokenizer.vocab_size > run.model.vocab_size:
        raise ConfigError(f"the tokenizer has {tokenizer.vocab_size} tokens but model.vocab_size is {run.model.vocab_size}: "
                          "raise model.vocab_size to a multiple of 128 above it")
    return tokenizer


def _trained(folder: Path, mark: str) -> AnyTokenizer | None:
    try:
        return Tokenizer.load(folder) if read_settings(folder).get("fingerprint") == mark else None
    except DataError:
        return None


def _pack(run: config.Run, stage: config.LMStage, name: str, manifest: Manifest, tokenizer: AnyTokenizer, console: Console | None) -> Path:
    folder = packed_folder(run, stage.name, name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _bar(console, f"packing {name} for {stage.name}", "records") as advance:
        pack(open_source(dataset_folder(run, name)), tokenizer, stage.kind, stage.sequence_length, folder,
             record_kind=run.dataset(name).kind, content=content_fingerprint(manifest), progress=advance)
    return folder


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
