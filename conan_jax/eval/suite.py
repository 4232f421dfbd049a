"""A suite: a folder of evaluation sets, listed in its suite.yaml or found by their layouts.

    suite.yaml                                   sets: a list of {name, kind, path, ...}, fields of config.Evaluation; paths from the folder
    FOLDER/corpus.jsonl, queries.jsonl, qrels/   retrieval, one set for each of qrels/{test,dev,...}.tsv
    FOLDER/corpus.jsonl, mkqa.jsonl              MKQA
    FOLDER/train.jsonl + test.jsonl (or dev)     of text, label: classification
    FILE.jsonl of sentence1, sentence2, score    STS
    FILE.jsonl of sentence1, sentence2           bitext mining
    FILE.jsonl of text, label                    clustering

Files may end in .gz. Files for training are left alone: those with `train` in their name, and of any other content.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from conan_jax import config, config_io
from conan_jax.data import readers, schema
from conan_jax.data.locations import expand_variables
from conan_jax.errors import ConfigError, DataError
from conan_jax.eval.mkqa import read_mkqa
from conan_jax.eval.records import language_of
from conan_jax.eval.retrieval import find, read_beir

SUITE_FILE = "suite.yaml"
SUFFIXES = (".jsonl", ".jsonl.gz")
HELD_OUT = ("test", "dev", "valid", "validation")  # in this order of preference where one is enough
FOUND_LENGTH = 512  # tokens a text of a set that says nothing of its length


@dataclass(frozen=True)
class Suite:
    """Sets under names of their own. `listed` says that a suite.yaml named them."""

    name: str
    sets: tuple[config.Evaluation, ...]
    listed: bool


def read_suite(folder: str | Path) -> Suite:
    """The sets of a folder. Raises `ConfigError` naming the key of a suite.yaml that is wrong, and `DataError` when there is no set."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; a suite is a folder of evaluation sets")
    listed = (folder / SUITE_FILE).is_file()
    sets = tuple(_listed(folder / SUITE_FILE) if listed else sorted(_found(folder, folder), key=lambda e: e.name))
    if not sets:
        raise DataError(f"{folder} holds no evaluation set; it needs a {SUITE_FILE}, or BEIR folders, or files of "
                        "sentence1, sentence2, score or text, label")
    names = [e.name for e in sets]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{folder}: two sets are called {name!r}; give each a name of its own")
    return Suite(folder.resolve().name, sets, listed)


def select(suite: Suite, only: Sequence[str] = (), max_queries: int | None = None, languages: Sequence[str] = ()) -> Suite:
    """The sets that `only` names (by name, part of a path with `*`, or kind), bounded.

    `languages` keeps those languages in sets whose records carry any; a set that has none of them is left out, one that says
    nothing of languages stays. Raises `ConfigError` for a name that fits no set.
    """
    for wanted in only:
        if not any(_fits(e, wanted) for e in suite.sets):
            names = "".join(f"\n  {e.name}  ({e.kind})" for e in sorted(suite.sets, key=lambda e: -_likeness(e, wanted)))
            raise ConfigError(f"no set of the suite is called {wanted!r}, and none is of that kind; it has, nearest first:{names}")
    chosen = [e for e in suite.sets if not only or any(_fits(e, wanted) for wanted in only)]
    if max_queries is not None:
        chosen = [replace(e, max_queries=min(max_queries, e.max_queries or max_queries)) for e in chosen]
    if languages:
        spoken = {e.name: _languages(e) for e in chosen}
        kept = [replace(e, languages=tuple(sorted(spoken[e.name].intersection(languages)))) if spoken[e.name] else e for e in chosen]
        chosen = [e for e in kept if e.languages or not spoken[e.name]]
        for language in languages:
            if not any(language in found for found in spoken.values()):
                every = ", ".join(sorted(set().union(*spoken.values()))) or "none"
                raise ConfigError(f"no set has the language {language!r}; there are {every}")
    return replace(suite, sets=tuple(chosen))


def with_prompts(evaluation: config.Evaluation, prompts: dict[str, str]) -> config.Evaluation:
    """A found set with the encoder's prompt for it: the one of its name, of its last name, or of all searches; else bare.

    The order is that of MTEB: a task's own prompt before the prompt of its type.
    """
    names = [evaluation.name, evaluation.name.rsplit("/", 1)[-1], *(["query"] if evaluation.kind in ("retrieval", "mkqa") else [])]
    return replace(evaluation, prompt_name=next((name for name in names if prompts.get(name)), None))


def files_of(evaluation: config.Evaluation) -> list[Path]:
    """The files a set is read from."""
    if evaluation.kind in ("retrieval", "mkqa"):
        beside = ["queries.jsonl", f"qrels/{evaluation.split}.tsv"] if evaluation.kind == "retrieval" else ["mkqa.jsonl"]
        return [find(Path(evaluation.path), name) for name in ("corpus.jsonl", *beside)]
    return [file for source in (evaluation.path, evaluation.train_path) if source for file in readers.expand(source).files]


def _fits(evaluation: config.Evaluation, wanted: str) -> bool:
    return wanted in (evaluation.name, evaluation.kind) or fnmatch.fnmatchcase(evaluation.name, wanted)


def _likeness(evaluation: config.Evaluation, wanted: str) -> float:
    """How near a name is that was perhaps meant: 1 is equal, but for capitals."""
    known = (evaluation.name, evaluation.name.rsplit("/", 1)[-1], evaluation.kind)
    return max(difflib.SequenceMatcher(None, wanted.lower(), name.lower()).ratio() for name in known)


def _listed(file: Path) -> Iterator[config.Evaluation]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or set(content) != {"sets"} or not isinstance(content["sets"], list):
        raise ConfigError(f"{file} must hold one key, sets: a list of sets, each with name, kind and path")
    for i, item in enumerate(content["sets"]):
        label = item.get("name", i) if isinstance(item, dict) else i
        evaluation = config_io.build(config.Evaluation, item, f"{file}: sets.{label}")
        yield replace(evaluation, path=_resolved(file.parent, evaluation.path),
                      train_path=_resolved(file.parent, evaluation.train_path) if evaluation.train_path else None)


def _resolved(folder: Path, path: str) -> str:
    return str(folder / expand_variables(path))


def _found(root: Path, folder: Path) -> Iterator[config.Evaluation]:
    name = folder.relative_to(root).as_posix()
    name = root.resolve().name if name == "." else name
    files = {re.sub(r"\.gz$", "", f.name): f for f in sorted(folder.iterdir()) if f.is_file() and f.name.endswith(SUFFIXES)}
    if "corpus.jsonl" in files:
        yield from _found_search(folder, name, set(files))
        return
    train = next((f for stem, f in files.items() if stem == "train.jsonl"), None)
    held_out = next((files[f"{split}.jsonl"] for split in HELD_OUT if f"{split}.jsonl" in files), None)
    if train and held_out and _kind(held_out) == "clustering":
        yield config.Evaluation(name, "classification", str(held_out), train_path=str(train), max_length=FOUND_LENGTH)
        return
    for stem, file in files.items():
        kind = None if re.search(r"(^|[._-])train([._-]|$)", stem) else _kind(file)
        if kind:
            label = stem.removesuffix(".jsonl")
            yield config.Evaluation(label if folder == root else f"{name}/{label}", kind, str(file), max_length=FOUND_LENGTH)
    for below in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        yield from _found(root, below)


def _found_search(folder: Path, name: str, files: set[str]) -> Iterator[config.Evaluation]:
    if "mkqa.jsonl" in files:
        yield config.Evaluation(name, "mkqa", str(folder), max_length=FOUND_LENGTH)
    splits = [p.stem for p in sorted((folder / "qrels").glob("*.tsv")) if p.stem != "train"] if "queries.jsonl" in files else []
    for split in splits:
        label = name if len(splits) == 1 else f"{name}.{split}"
        yield config.Evaluation(label, "retrieval", str(folder), split=split, max_length=FOUND_LENGTH)


def _kind(file: Path) -> Any:
    """The kind of set that the first record of a file makes it, or None."""
    first = next(iter(readers.read(readers.expand(str(file)))), None)
    if first is None or isinstance(first.raw, schema.Reject):
        return None
    fields = set(first.raw)
    if {"sentence1", "sentence2"} <= fields:
        return "sts" if "score" in fields else "bitext"
    return "clustering" if {"text", "label"} <= fields else None


def _languages(evaluation: config.Evaluation) -> set[str]:
    """The languages that the queries or records of a set carry."""
    if evaluation.kind in ("retrieval", "mkqa"):
        data = read_beir(evaluation.path, evaluation.split) if evaluation.kind == "retrieval" else read_mkqa(evaluation.path)
        return set(data.languages) - {""}
    items = readers.read(readers.expand(evaluation.path))
    return {language_of(item.raw) for item in items if not isinstance(item.raw, schema.Reject)} - {""}
