"""The prepared data that one run uses: `RUN/prepared.json`, written by process 0 and read by every process.

    tokenizer   {"folder", "sha256"}
    datasets    {NAME: {"folder", "content", "records"}}             content: the fingerprint of the records
    packed      {STAGE: {NAME: {"folder", "fingerprint", "rows"}}}   packed rows of language-model stages
    corpus      the folder of the corpus behind `docstrings:` sources, or null

Folders are relative to `data_dir`: a run that was moved together with its data opens as before.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conan_jax import config
from conan_jax.data.folders import content_fingerprint, earlier_packed_folder, tokenizer_folders
from conan_jax.data.manifest import Manifest, manifest_in
from conan_jax.data.tokenizer import AnyTokenizer, Tokenizer
from conan_jax.errors import DataError
from conan_jax.files import read_json, write_json

FILE = "prepared.json"
FORMAT = 1


@dataclass(frozen=True)
class Prepared:
    """The tokenizer of a run, and its folders by dataset name and by (stage, dataset) of packed rows."""

    tokenizer: AnyTokenizer
    datasets: Mapping[str, Path]
    packed: Mapping[tuple[str, str], Path]

    def dataset(self, name: str) -> Path:
        """The folder of a dataset. Raises `DataError` when it is not prepared."""
        return self._of(self.datasets, name, f"dataset {name!r}")

    def rows(self, stage: str, dataset: str) -> Path:
        """The folder of the packed rows of a dataset for a stage. Raises `DataError` when they are not prepared."""
        return self._of(self.packed, (stage, dataset), f"dataset {dataset!r} as rows of stage {stage!r}")

    @staticmethod
    def _of(folders: Mapping[Any, Path], key: object, what: str) -> Path:
        if key not in folders:
            raise DataError(f"{what} is not prepared; run `conan prepare` first")
        return folders[key]

    @classmethod
    def load(cls, run: config.Run) -> Prepared:
        """What `RUN/prepared.json` records. Raises `DataError` when the run was not prepared, or its tokenizer is not there."""
        record, data_dir = read_record(Path(run.output_dir)), Path(run.data_dir)
        if record is None or record.tokenizer is None:
            raise DataError(f"{run.output_dir} has no {FILE}: its data is not prepared; run `conan prepare` first")
        tokenizer = Tokenizer.load(data_dir / record.tokenizer["folder"])
        if tokenizer.sha256 != record.tokenizer["sha256"]:
            raise DataError(f"{data_dir / record.tokenizer['folder']} has sha256 {tokenizer.sha256}, but {run.output_dir}/{FILE} says "
                            f"{record.tokenizer['sha256']}; run `conan prepare` again")
        return cls(tokenizer, {name: data_dir / part["folder"] for name, part in record.datasets.items()},
                   {(stage, name): data_dir / part["folder"] for stage, parts in record.packed.items() for name, part in parts.items()})


@dataclass(frozen=True)
class Record:
    """The content of `prepared.json`."""

    tokenizer: dict[str, Any] | None = None
    datasets: dict[str, dict[str, Any]] = field(default_factory=dict)
    packed: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    corpus: str | None = None


def read_record(run_folder: Path) -> Record | None:
    """The record in the folder of a run, None where there is none. Raises `DataError` when it cannot be read."""
    path = run_folder / FILE
    advice = "put it back, or remove it: the next `conan prepare` then takes the data as it is now"
    data = read_json(path, advice=advice)
    if data is None:
        return None
    try:
        if data["format"] != FORMAT:
            raise DataError(f"{path} has format {data['format']!r}; this version reads {FORMAT}; use the version that wrote it")
        record = Record(**{name: data[name] for name in Record.__dataclass_fields__})
        folders = [*record.datasets.values(), *(part for parts in record.packed.values() for part in parts.values())]
        if not all(isinstance(part["folder"], str) for part in [*folders, *([record.tokenizer] if record.tokenizer else [])]):
            raise TypeError("a folder is not a text")
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error}); {advice}") from error
    return record


def write_record(run_folder: Path, record: Record) -> None:
    """Write `record` into the folder of a run."""
    write_json(run_folder / FILE, {"format": FORMAT, **dataclasses.asdict(record)})


def earlier_record(run: config.Run) -> Record:
    """What a run of an earlier version, which wrote no record, finds in its `data_dir`."""
    data_dir = Path(run.data_dir)
    found = {dataset.name: manifest_in(data_dir / dataset.name) for dataset in run.datasets}
    datasets = {name: dataset_part(data_dir, data_dir / name, manifest) for name, manifest in found.items() if manifest is not None}
    packed: dict[str, dict[str, dict[str, Any]]] = {}
    for stage in run.stages:
        for mix in stage.datasets if isinstance(stage, config.LMStage) else ():
            folder = earlier_packed_folder(data_dir, stage.name, mix.dataset)
            if (manifest := manifest_in(folder)) is not None:
                packed.setdefault(stage.name, {})[mix.dataset] = packed_part(data_dir, folder, manifest)
    folder = tokenizer_folders(data_dir)[0]
    try:
        tokenizer = tokenizer_part(data_dir, folder, Tokenizer.load(folder))
    except DataError:
        tokenizer = None
    return Record(tokenizer, datasets, packed, "docstrings" if (data_dir / "docstrings" / "corpus.json").is_file() else None)


def tokenizer_part(data_dir: Path, folder: Path, tokenizer: AnyTokenizer) -> dict[str, Any]:
    """The record of a tokenizer."""
    return {"folder": relative(folder, data_dir), "sha256": tokenizer.sha256}


def dataset_part(data_dir: Path, folder: Path, manifest: Manifest) -> dict[str, Any]:
    """The record of a dataset."""
    return {"folder": relative(folder, data_dir), "content": content_fingerprint(manifest), "records": manifest.records}


def packed_part(data_dir: Path, folder: Path, manifest: Manifest) -> dict[str, Any]:
    """The record of packed rows."""
    return {"folder": relative(folder, data_dir), "fingerprint": manifest.settings["fingerprint"], "rows": manifest.records}


def relative(folder: Path, data_dir: Path) -> str:
    """`folder` as `prepared.json` names it: relative to `data_dir`, absolute where it is elsewhere."""
    return str(folder.relative_to(data_dir)) if folder.is_relative_to(data_dir) else os.path.abspath(folder)


def recorded_corpus(run: config.Run) -> Path | None:
    """The folder of the `docstrings:` corpus that the run was prepared with, None where none is recorded or it is gone."""
    record = read_record(Path(run.output_dir))
    folder = Path(run.data_dir) / record.corpus if record is not None and record.corpus is not None else None
    return folder if folder is not None and folder.is_dir() else None


def dataset_manifest(run_folder: Path, run: config.Run, name: str) -> Manifest | None:
    """The manifest of a dataset of a run that may have been moved with its data; None where it is gone."""
    record = read_record(run_folder)
    part = {} if record is None else record.datasets.get(name, {})
    folders = [data_dir / part.get("folder", name) for data_dir in (run_folder / "data", Path(run.data_dir))]
    return next((manifest for folder in folders if (manifest := manifest_in(folder)) is not None), None)


def tokenizer_places(run_folder: Path, run: config.Run) -> list[Path]:
    """Every folder that may hold a tokenizer of a run that may have been moved with its data, the recorded ones first."""
    record = read_record(run_folder)
    data_dirs = (run_folder / "data", Path(run.data_dir))
    part = None if record is None else record.tokenizer
    recorded = [] if part is None else [data_dir / part["folder"] for data_dir in data_dirs]
    return list(dict.fromkeys([*recorded, *(place for data_dir in data_dirs for place in tokenizer_folders(data_dir))]))
