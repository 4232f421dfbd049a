"""A suite: a folder of evaluation sets, listed in its suite.yaml or found by their layouts.

    suite.yaml                                   sets: a list of {name, kind, path, ...}, fields of config.Evaluation; paths from the folder
    FOLDER/corpus.jsonl, queries.jsonl, qrels/   retrieval, one set for each of qrels/{test,dev,...}.tsv
    FOLDER/corpus.jsonl, mkqa.jsonl              MKQA
    FOLDER/train.jsonl + test.jsonl (or dev)     of text, label: classification
    FILE.jsonl of sentence1, sentence2, score    STS
    FILE.jsonl of sentence1, sentence2           bitext mining
    FILE.jsonl of text, label                    clustering

Files may be compressed (.gz, .bz2, .xz, .zst), and their names in upper case. Symbolic links are followed; a set counts once. Files for
training are left alone: those with `train` in their name. So are jsonl files of any other content; `Suite.left_out` names these.
"""

from __future__ import annotations

import difflib
import fnmatch
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from conan_jax import config, config_io
from conan_jax.data import readers, schema
from conan_jax.data.lines import COMPRESSIONS
from conan_jax.data.locations import expand_variables
from conan_jax.errors import ConfigError, DataError
from conan_jax.eval.mkqa import read_mkqa
from conan_jax.eval.records import read_bitext, read_records
from conan_jax.eval.retrieval import find, read_beir

SUITE_FILE = "suite.yaml"
HELD_OUT = ("test", "dev", "valid", "validation")  # in this order of preference where one is enough
FOUND_LENGTH = 512  # tokens a text of a set that says nothing of its length


@dataclass(frozen=True)
class Suite:
    """Sets under names of their own. `listed`: a suite.yaml named them. `left_out`: jsonl files that are no set, and why."""

    name: str
    sets: tuple[config.Evaluation, ...]
    listed: bool
    left_out: Mapping[Path, str] = field(default_factory=dict)


def read_suite(folder: str | Path) -> Suite:
    """The sets of a folder. Raises `ConfigError` naming the key of a suite.yaml that is wrong, and `DataError` when there is no set."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; a suite is a folder of evaluation sets")
    listed = (folder / SUITE_FILE).exists()
    search = _Search(folder)
    sets = tuple(_listed(folder / SUITE_FILE) if listed else search.sets())
    if not sets:
        others = "".join(f"\n  {path}: {why}" for path, why in search.left_out.items())
        raise DataError(f"{folder} holds no evaluation set; it needs a {SUITE_FILE}, or BEIR folders, or files of "
                        f"sentence1, sentence2, score or text, label{others}")
    names = [e.name for e in sets]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{folder}: two sets are called {name!r}; give each a name of its own")
    return Suite(folder.resolve().name, sets, listed, search.left_out)


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
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:  # the last three: a wrong date, a list as a key, deep nesting
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


class _Search:
    """The sets of a folder by their layouts; `left_out` says of each file that is no set why."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.left_out: dict[Path, str] = {}

    def sets(self) -> list[config.Evaluation]:
        """All sets below the root, each once, whatever number of links lead to it."""
        found: dict[tuple[Any, ...], config.Evaluation] = {}
        for folder in _folders(self._root):
            for evaluation in self._of_folder(folder):
                files = tuple(os.path.realpath(file) for file in files_of(evaluation))
                found.setdefault((evaluation.kind, evaluation.split, *files), evaluation)
        return sorted(found.values(), key=lambda e: e.name)

    def _of_folder(self, folder: Path) -> Iterator[config.Evaluation]:
        name = folder.relative_to(self._root).as_posix()
        name = self._root.resolve().name if name == "." else name
        files: dict[str, Path] = {}
        for file in (path for path in _entries(folder) if path.is_file()):
            stem = _stem(file)
            if not stem.endswith(".jsonl"):
                continue
            if stem in files:
                self.left_out[file] = f"{files[stem].name} is the same"
            else:
                files[stem] = file
        if "corpus.jsonl" in files:
            yield from self._searches(folder, name, set(files))
            return
        train = files.get("train.jsonl")
        held_out = next((files[f"{split}.jsonl"] for split in HELD_OUT if f"{split}.jsonl" in files), None)
        if train and held_out and self._kind(held_out) == "clustering":
            yield config.Evaluation(name, "classification", str(held_out), train_path=str(train), max_length=FOUND_LENGTH)
            others = (file for file in files.values() if file not in (train, held_out))
            self.left_out |= dict.fromkeys(others, f"the set is {train.name} and {held_out.name}")
            return
        for stem, file in files.items():
            kind = None if re.search(r"(^|[._-])train([._-]|$)", stem) else self._kind(file)
            if kind:
                label = stem.removesuffix(".jsonl")
                yield config.Evaluation(label if folder == self._root else f"{name}/{label}", kind, str(file), max_length=FOUND_LENGTH)

    def _searches(self, folder: Path, name: str, files: set[str]) -> Iterator[config.Evaluation]:
        if "mkqa.jsonl" in files:
            yield config.Evaluation(name, "mkqa", str(folder), max_length=FOUND_LENGTH)
        judged = [_stem(path) for path in _entries(folder / "qrels")] if (folder / "qrels").is_dir() else []
        names = dict.fromkeys(stem.removesuffix(".tsv") for stem in judged if stem.endswith(".tsv") and stem != "train.tsv")
        splits = list(names) if "queries.jsonl" in files else []
        if not splits and "mkqa.jsonl" not in files:
            self.left_out[folder] = "it has a corpus, but no queries with qrels/SPLIT.tsv beside it"
        for split in splits:
            label = name if len(splits) == 1 else f"{name}.{split}"
            yield config.Evaluation(label, "retrieval", str(folder), split=split, max_length=FOUND_LENGTH)

    def _kind(self, file: Path) -> Any:
        """The kind of set that the first record of a file makes it, or None."""
        first = next(iter(readers.read_file(file)), None)
        if first is not None and isinstance(first.raw, schema.Reject):
            raise DataError(f"{first.location}: {first.raw}")
        fields = set(first.raw) if first is not None and isinstance(first.raw, dict) else set()
        if {"sentence1", "sentence2"} <= fields:
            return "sts" if "score" in fields else "bitext"
        if {"text", "label"} <= fields:
            return "clustering"
        self.left_out[file] = "its first record has no sentence1 and sentence2, and no text and label"
        return None


def _folders(root: Path) -> Iterator[Path]:
    """`root` and the folders below it, hidden ones excepted, each once; those behind links last, so that sets keep their own names."""
    seen: set[str] = set()
    waiting, links = [root], []
    while waiting or links:
        folder = waiting.pop(0) if waiting else links.pop(0)
        if (real := os.path.realpath(folder)) in seen:
            continue
        seen.add(real)
        yield folder
        below = [path for path in _entries(folder) if path.is_dir()]
        # A folder of a search set holds nothing else that is looked at.
        if not any(_stem(path) == "corpus.jsonl" for path in _entries(folder)):
            waiting[:0] = [path for path in below if not path.is_symlink()]
            links += [path for path in below if path.is_symlink()]


def _entries(folder: Path) -> list[Path]:
    """What a folder holds, sorted, hidden entries excepted. Raises `DataError` for a link to nothing and an unreadable folder."""
    try:
        entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}") from error
    for path in entries:
        if path.is_symlink() and not path.exists():
            raise DataError(f"{path} is a link to {os.readlink(path)}, which is not there; remove the link, or restore the file")
    return entries


def _stem(file: Path) -> str:
    """The name in lower case, without the suffix of a compression."""
    name = file.name.lower()
    return next((name.removesuffix(suffix) for suffix in COMPRESSIONS if name.endswith(suffix)), name)


def _languages(evaluation: config.Evaluation) -> set[str]:
    """The languages that the queries or records of a set carry."""
    if evaluation.kind in ("retrieval", "mkqa"):
        data = read_beir(evaluation.path, evaluation.split) if evaluation.kind == "retrieval" else read_mkqa(evaluation.path)
        return set(data.languages) - {""}
    records = read_bitext(evaluation.path) if evaluation.kind == "bitext" else read_records(
        evaluation.path, "sts" if evaluation.kind == "sts" else "labelled")
    return {record["lang"] for record in records} - {""}
