"""Raw records -> validated records -> ArrayRecord shards that TFDS opens, with a manifest and the rejects.

`write_dataset` fills an empty folder. `build_dataset` does so beside a place that the user names and renames the folder when it is
whole: a process that is killed at any moment leaves the old dataset or none, never half of one.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import conan_jax
from conan_jax.config import Dataset
from conan_jax.data import example, readers, shards
from conan_jax.data.artifacts import lock
from conan_jax.data.manifest import MANIFEST, REJECTS, Manifest, SourceFile, manifest_in, read_manifest, sha256_of, verify
from conan_jax.data.schema import REASONS, Reject, check_fields, parse
from conan_jax.errors import ConfigError, DataError
from conan_jax.files import partial_path, unusable

_EXCERPT = 500
_HOPELESS = 1000  # a source whose first so many records are all bad is not read to its end


@dataclass(frozen=True)
class Progress:
    """How far a build is. `done` of `total` counts bytes on disk; `total` is None where TFDS is read."""

    records: int
    rejected: int
    done: int
    total: int | None


def build_dataset(dataset: Dataset, out_dir: str | os.PathLike[str], *, num_shards: int | None = None, force: bool = False,
                  progress: Callable[[Progress], None] | None = None, say: Callable[[str], None] | None = None,
                  tfds_data_dir: str | None = None) -> Manifest:
    """Build `dataset` in `out_dir`, or find that it is already there, and return its manifest.

    Records keep the order of the source: files by name, lines in order. Memory stays bounded whatever the size.

    Args:
        num_shards: the number of ArrayRecord files; None starts a new one every 256 MiB of records.
        force: build even if `out_dir` holds the same dataset from the same source bytes.
        progress: called now and then with a `Progress`, at least once if anything is built.
        say: told, in a sentence, what a user would want to know of what was in `out_dir` before: damaged, replaced, sourceless.
        tfds_data_dir: where TFDS keeps its datasets (default `$TFDS_DATA_DIR`).

    Raises:
        ConfigError: `dataset.fields` maps a field the kind does not have.
        DataError: nothing to read, an unreadable file, or more than `max_reject_rate` of the records are bad; the
            rejects then lie in `OUT_DIR.rejects.jsonl`, one JSON object a line with place, reason and excerpt.
    """
    say = say or (lambda _: None)
    out = Path(out_dir).absolute()
    check_fields(dataset.kind, dataset.fields)
    _refuse_foreign(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with lock(out):  # a second builder of this folder waits, then finds the work done
            _restore(out)
            built = None if force else find_dataset(dataset, [out], num_shards=num_shards, say=say)
            if built is not None:
                return built[1]
            replaced = None if force else manifest_in(out)
            if replaced is not None and (why := difference(dataset, replaced, num_shards)):
                say(f"{out}: {why}; replacing its {replaced.records:,} {replaced.kind} records")
            private = partial_path(out)
            try:
                private.mkdir()
                manifest = write_dataset(dataset, private, rejects_file(out), num_shards=num_shards, progress=progress,
                                         say=say, tfds_data_dir=tfds_data_dir)
                _move_into_place(private, out)
            finally:
                shutil.rmtree(private, ignore_errors=True)
            return manifest
    except OSError as error:
        raise unusable(out, error) from None


def rejects_file(place: Path) -> Path:
    """The file that says why the last build of `place` was refused; gone when one succeeds."""
    return place.with_name(f"{place.name}.{REJECTS}")


def find_dataset(dataset: Dataset, folders: Iterable[Path], *, num_shards: int | None = None,
                 say: Callable[[str], None] = lambda _: None) -> tuple[Path, Manifest] | None:
    """The first of `folders` with a whole dataset of these settings and of the bytes of this source, and its manifest.

    Where the source is gone, the first one with these settings. Raises `DataError` when the source is gone and there is none.
    """
    built = list(_built(folders, _settings(dataset, num_shards), say))
    try:
        plan = readers.expand(dataset.source)
    except DataError as error:
        if not built:
            raise
        say(f"{error}; using the dataset already built in {built[0][0]}")
        return built[0]
    sha256 = functools.cache(sha256_of)
    return next(((folder, manifest) for folder, manifest in built
                 if manifest.reject_rate <= dataset.max_reject_rate and _same_source(manifest, plan, sha256)), None)


def named_dataset(dataset: Dataset) -> tuple[Path, Manifest] | None:
    """The folder and the manifest of the built dataset that `dataset.source` names, None where the source is raw data.

    The records are used as they were built. Raises `ConfigError` when `dataset` asks for others (another kind, fields, limit, clean, or
    fewer rejects), and `DataError` when the folder is damaged.
    """
    parts = readers.split(dataset.source)
    folder = Path(os.path.expanduser(parts[0])) if len(parts) == 1 else None
    if folder is None or not (folder / MANIFEST).is_file():
        return None
    manifest = read_manifest(folder)
    where = f"dataset {dataset.name!r}: {folder} is a built dataset"
    if manifest.kind != dataset.kind:
        raise ConfigError(f"{where} of kind {manifest.kind!r}, and the recipe says {dataset.kind!r}; set kind to {manifest.kind!r}")
    if read := [name for name in ("fields", "limit", "clean") if getattr(dataset, name)]:
        raise ConfigError(f"{where}, which is used as it is: {' and '.join(read)} cannot change it; remove {' and '.join(read)} here, and "
                          "give what you need to `conan data build`")
    if manifest.reject_rate > dataset.max_reject_rate:
        raise ConfigError(f"{where} with a share of {manifest.reject_rate:.3g} of its records rejected, above max_reject_rate "
                          f"{dataset.max_reject_rate:g}; raise max_reject_rate, or build it from better records")
    verify(folder, manifest, hashes=False)
    return folder, manifest


def difference(dataset: Dataset, built: Manifest, num_shards: int | None = None) -> str:
    """What of settings and source differs between `dataset` and a build of it, in words; "" when nothing does."""
    if (named := named_dataset(dataset)) is not None:
        same = named[1].shards == built.shards
        return "" if same else f"its source {named[0]} holds {named[1].records:,} other records; it gave {built.records:,}"
    if built.settings != (settings := _settings(dataset, num_shards)):
        pairs = {key: (built.settings.get(key), settings.get(key)) for key in settings | built.settings}
        changed = [f"{key} {before!r} -> {now!r}" for key, (before, now) in pairs.items() if before != now]
        return f"its settings have changed: {', '.join(changed)}"
    plan = readers.expand(dataset.source)
    if _same_source(built, plan, sha256_of):
        return ""
    before, now = sum(file.bytes for file in built.files), sum(file.stat().st_size for file in plan.files)
    return (f"its source {dataset.source} has changed (files: {len(built.files)} -> {len(plan.files)}, bytes: {before:,} -> {now:,}; "
            f"it gave {built.records:,} records)")


def _settings(dataset: Dataset, num_shards: int | None) -> dict[str, Any]:
    return {"kind": dataset.kind, "name": dataset.name, "fields": dict(dataset.fields), "limit": dataset.limit, "num_shards": num_shards,
            **({"clean": dataset.clean} if dataset.clean else {})}


def _refuse_foreign(out: Path) -> None:
    """A folder is replaced only if it is empty or has a manifest of ours: nobody else's files are ever deleted."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        ours = {"format", "kind", "shards"} <= set(json.loads((out / MANIFEST).read_bytes()))
    except (OSError, ValueError, TypeError):
        ours = False
    if not ours:
        raise DataError(f"{out} exists and is not a dataset built by conan (or its manifest is damaged); "
                        "name another folder, or move it away")


def _built(folders: Iterable[Path], settings: dict[str, Any], say: Callable[[str], None]) -> Iterator[tuple[Path, Manifest]]:
    """The folders with a whole dataset that was built with these settings."""
    for folder in folders:
        if not (folder / MANIFEST).exists():
            continue
        try:
            manifest = read_manifest(folder)
            if manifest.settings == settings:
                verify(folder, manifest, hashes=False)
                yield folder, manifest
        except DataError as error:
            say(f"{str(error).partition(';')[0]}; building it again from its source")


def _same_source(built: Manifest, plan: readers.Plan, sha256: Callable[[Path], str]) -> bool:
    """True when the files hold the bytes that `built` was made from; hashed only where size or time differ."""
    tfds_parts = [part for part in plan.parts if isinstance(part, str)]
    if len(built.files) != len(plan.files) or (tfds_parts and built.source != plan.source):
        return False
    for old, file in zip(built.files, plan.files):
        stat = file.stat()
        unmoved = old.path == str(file) and old.mtime_ns == stat.st_mtime_ns
        if stat.st_size != old.bytes or not (unmoved or sha256(file) == old.sha256):
            return False
    return True


def write_dataset(dataset: Dataset, folder: Path, kept: Path, *, num_shards: int | None = None,
                  progress: Callable[[Progress], None] | None = None, say: Callable[[str], None] = lambda _: None,
                  tfds_data_dir: str | None = None) -> Manifest:
    """Build `dataset` in the empty `folder`, the manifest last; raises as `build_dataset`. The rejects of a failure go to `kept`."""
    check_fields(dataset.kind, dataset.fields)
    plan = readers.expand(dataset.source)
    if plan.note:
        say(plan.note)
    try:
        files = tuple(_source_file(file) for file in plan.files)
        writer = shards.ShardWriter(folder)
        tally = _convert(dataset, plan, folder, writer, progress or (lambda _: None), tfds_data_dir)
        if tally.rejects.total() > dataset.max_reject_rate * tally.read or not writer.records:
            os.replace(folder / REJECTS, kept)
            raise DataError(_failure(dataset, tally, kept))
        for key, count in tally.dropped.items():
            name, _, part = key.removeprefix("no_").partition(":")
            if key.startswith("no_") and count == writer.records:
                missing = f", but no record of {dataset.source} has {part or 'it'}; check the spelling"
                raise DataError(f"{dataset.name}: fields maps {name} to {dataset.fields[name]!r}{missing}")
        for file in files:
            if (stat := Path(file.path).stat()).st_size != file.bytes or stat.st_mtime_ns != file.mtime_ns:
                raise DataError(f"{file.path} changed while it was being read; build again when it is complete")
        if num_shards:
            writer = shards.reshard(writer, num_shards)
        built = shards.finish(folder, dataset.name, dataset.kind, writer)
        manifest = Manifest(name=dataset.name, kind=dataset.kind, source=dataset.source, records=writer.records, read=tally.read,
                            shards=built, files=files, settings=_settings(dataset, num_shards), rejects=_counts(tally.rejects),
                            dropped=_counts(tally.dropped), dialects=_counts(tally.dialects), version=conan_jax.__version__)
        manifest.write(folder)
        kept.unlink(missing_ok=True)
        return manifest
    except OSError as error:
        raise unusable(kept.with_name(kept.name.removesuffix(f".{REJECTS}")), error) from None


@dataclass
class _Tally:
    read: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)  # reason -> where it was met first, and what was found there
    dropped: Counter[str] = field(default_factory=Counter)
    dialects: Counter[str] = field(default_factory=Counter)


def _counts(counter: Counter[str]) -> dict[str, int]:
    return {name: count for name, count in sorted(counter.items()) if count}


def _convert(dataset: Dataset, plan: readers.Plan, folder: Path, writer: shards.ShardWriter, report: Callable[[Progress], None],
             tfds_data_dir: str | None) -> _Tally:
    """Every record of the source into `writer` or into `rejects.jsonl`."""
    tally, total, done = _Tally(), plan.total_bytes, 0
    with open(folder / REJECTS, "w", encoding="utf-8", errors="backslashreplace") as rejects_file:
        for item in readers.read(plan, dataset.fields, tfds_data_dir=tfds_data_dir):
            tally.read, done = tally.read + 1, item.done
            try:
                if isinstance(item.raw, Reject):
                    raise item.raw
                parsed = parse(item.raw, dataset.kind, dataset.fields, dataset.clean)
            except Reject as reject:
                tally.rejects[reject.reason] += 1
                tally.first.setdefault(reject.reason, f"{item.location}: {reject.detail}")
                excerpt = (reject.raw or _show(item.raw))[:_EXCERPT]
                line = {"location": item.location, "reason": reject.reason, "detail": reject.detail, "raw": excerpt}
                rejects_file.write(json.dumps(line, ensure_ascii=False) + "\n")
                if tally.read == tally.rejects.total() == _HOPELESS and dataset.max_reject_rate < 1:
                    break
            else:
                writer.write(example.encode(parsed.record, dataset.kind))
                tally.dialects[parsed.dialect] += 1
                tally.dropped.update(parsed.dropped)
                if writer.records == dataset.limit:
                    break
            if tally.read % 256 == 0:
                report(Progress(writer.records, tally.rejects.total(), done, total))
    writer.close()
    report(Progress(writer.records, tally.rejects.total(), done, total))
    return tally


def _show(raw: Any) -> str:
    try:
        return json.dumps(raw, ensure_ascii=False, default=repr)
    except RecursionError:
        return "(nested too deep to show)"


def _source_file(file: Path) -> SourceFile:
    stat = file.stat()
    return SourceFile(str(file), stat.st_size, sha256_of(file), stat.st_mtime_ns)


def _failure(dataset: Dataset, tally: _Tally, kept: Path) -> str:
    if not tally.read:
        return f"{dataset.source} holds no records"
    reasons = "".join(f"\n  {count:,} {reason}: {REASONS[reason]}\n    first at {tally.first[reason]}"
                      for reason, count in tally.rejects.most_common())
    return (f"{dataset.name}: {tally.rejects.total():,} of the {tally.read:,} records read from {dataset.source} cannot be used "
            f"as {dataset.kind} (max_reject_rate is {dataset.max_reject_rate:g}):{reasons}\nAll of them are in {kept}. Fix the source, "
            "map its columns with fields (--field OURS=COLUMN), or raise max_reject_rate (--max-reject-rate)")


def _move_into_place(temporary: Path, out: Path) -> None:
    old = out.parent / f".{out.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.replace(out, old)
    os.replace(temporary, out)
    shutil.rmtree(old, ignore_errors=True)


def _restore(out: Path) -> None:
    """Undo a replacement that was killed between its two renames."""
    old = out.parent / f".{out.name}.old"
    if old.exists() and not out.exists():
        os.replace(old, out)
