"""The demo's corpus: every record kind of the recipe, from the documentation installed on the user's machine.

`build_corpus(out_dir)` reads the standard library and the installed packages (`docstring_reader`), holds whole modules out and
writes, beside the held-out BEIR folder `eval/`:

    text.jsonl       text: heading and documentation, for next-token training
    sft.jsonl        instruction, input, output: "describe this" from a signature, "summarise this" from a body
    pairs.jsonl      query, pos: summary -> body
    names.jsonl      query, pos: the words of a qualified name -> its documentation
    cloze.jsonl      query, pos: a sentence of a body -> the body without it
    retrieval.jsonl  query, pos [body], neg: bodies that BM25 ranks high for the summary, hardest first
    sts.jsonl        sentence1, sentence2, score: summaries of one class 5, one module 3.5, one package 1.5, else 0
    labelled.jsonl   text, label: documentation and the package area it belongs to
    search.jsonl     id, text, summary, module: the public objects that `conan search` answers with

Records stand in a fixed pseudo-random order (by hash), so the first n of a file are a fair sample of it. Nothing depends on
where the packages lie. A folder whose `corpus.json` carries the same fingerprint is left as it is.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from conan_jax.data import bm25, docstring_reader, docstring_records, docstring_selection, docstring_text
from conan_jax.data.artifacts import make_once
from conan_jax.data.docstring_reader import default_roots, find_modules, read_docstrings
from conan_jax.data.docstring_selection import balance, deduplicate, evaluation_set, hold_out
from conan_jax.data.folders import corpus_folder
from conan_jax.errors import DataError
from conan_jax.files import write_file

MANIFEST = "corpus.json"
EARLIER = "docstrings"  # the folder under DATA_DIR that earlier versions wrote a corpus to
STS_SCORES = {"class": 5.0, "module": 3.5, "package": 1.5, "other": 0.0}


@dataclass(frozen=True)
class CorpusOptions:
    """Sizes of the corpus. Lengths are in characters."""

    max_per_package: int = 2500
    held_out_percent: int = 12  # of the modules
    document_chars: int = 1000
    pools: int = 16_000
    pool_size: int = 16
    pool_document_chars: int = 500
    max_queries: int = 700
    max_documents: int = 2000
    sts_pairs: int = 8000
    label_size: tuple[int, int] = (60, 300)  # records an area must have to be a label, and keeps at most
    max_search: int = 10_000
    search_chars: int = 300


def build_corpus(
    out_dir: str | os.PathLike[str],
    roots: Sequence[str | os.PathLike[str]] | None = None,
    *,
    options: CorpusOptions = CorpusOptions(),
    processes: int = 2,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, int]:
    """Write the corpus into `out_dir` and return its counts (records per file, files read and skipped).

    `roots` are folders of Python packages; None takes the running environment's. Files appear whole (written aside, then
    renamed) and the manifest last, so an interrupted build is done again and a finished one is reused.
    `progress(what, done, total)` counts the units of each long part of the work: "files", then "queries" of the pools.
    Raises `DataError` when a root is no folder or documents too little to hold modules out.
    """
    out = Path(out_dir)
    roots = default_roots() if roots is None else [Path(r) for r in roots]
    fingerprint = _fingerprint(tuple(roots), options)
    done = read_corpus(out)
    if done is not None and done["fingerprint"] == fingerprint:
        return done["counts"]

    found, counts = read_docstrings(roots, processes=processes, progress=functools.partial(progress, "files"))
    docs = balance(deduplicate(found), options.max_per_package)
    train, held_out = hold_out(docs, options.held_out_percent)
    evaluation = evaluation_set(train, held_out, document_chars=options.document_chars, max_queries=options.max_queries,
                                max_documents=options.max_documents)
    if not evaluation["queries.jsonl"]:
        raise DataError(f"only {len(docs)} documented objects under {', '.join(map(str, roots))}: too few to hold modules out")

    records = {
        "text": docstring_records.texts(train),
        "sft": docstring_records.instructions(train),
        "pairs": docstring_records.summary_pairs(train, options.document_chars),
        "names": docstring_records.name_pairs(train, options.document_chars),
        "cloze": docstring_records.cloze_pairs(train, options.document_chars),
        "retrieval": docstring_records.hard_negative_pools(train, options.pools, options.pool_size, options.pool_document_chars,
                                                           progress=functools.partial(progress, "queries")),
        "sts": docstring_records.graded_pairs(train, options.sts_pairs, STS_SCORES),
        "labelled": docstring_records.labelled(train, options.label_size, options.document_chars),
        "search": docstring_records.search_documents(docs, options.max_search, options.search_chars),
    }
    hashes = {}
    for name, items in records.items():
        lines = [json.dumps(item, ensure_ascii=False) for item in items]
        counts[name] = len(lines)
        hashes[f"{name}.jsonl"] = _write(out / f"{name}.jsonl", lines)
    for name, lines in evaluation.items():
        hashes[f"eval/{name}"] = _write(out / "eval" / name, lines)
    counts |= {"eval_queries": len(evaluation["queries.jsonl"]), "eval_documents": len(evaluation["corpus.jsonl"]),
               "held_out_modules": len({d.module for d in held_out})}
    manifest = {"fingerprint": fingerprint, "counts": counts, "sha256": hashes}
    _write(out / MANIFEST, [json.dumps(manifest, indent=2, sort_keys=True)])
    return counts


def installed_corpus(data_dir: Path, progress: Callable[[str, int, int], None] = lambda what, done, total: None) -> Path:
    """The folder under `data_dir` with the corpus of the packages installed here, built at its address on first use.

    `progress` as for `build_corpus`, which also says what is raised.
    """
    mark = installed_fingerprint()
    address = corpus_folder(data_dir, mark)

    def find() -> Path | None:
        found = ((folder, read_corpus(folder)) for folder in (address, data_dir / EARLIER))
        return next((folder for folder, manifest in found if manifest is not None and manifest["fingerprint"] == mark), None)

    def make(private: Path) -> Path:
        build_corpus(private, progress=progress)
        return address

    return make_once(address, find, make)


def installed_fingerprint() -> str:
    """The fingerprint of the corpus that the packages installed here give."""
    return _fingerprint(tuple(default_roots()), CorpusOptions())


@functools.lru_cache  # the environment does not change under a running process, and a recipe names many parts of one corpus
def _fingerprint(roots: tuple[Path, ...], options: CorpusOptions) -> str:
    """Identity of a corpus: its settings, the code that makes it, and the names and sizes of the modules read."""
    digest = hashlib.sha256(json.dumps(asdict(options), sort_keys=True).encode())
    for module in (bm25, docstring_reader, docstring_text, docstring_selection, docstring_records, sys.modules[__name__]):
        digest.update(Path(module.__file__).read_bytes())
    for name, path in find_modules(roots):
        digest.update(f"{name}\0{path.stat().st_size}\n".encode())
    return digest.hexdigest()


def read_corpus(folder: Path) -> dict[str, Any] | None:
    """The manifest of a complete, unaltered corpus: `fingerprint`, `counts`, `sha256` by file; None where there is none."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        unaltered = all(_sha256(*_state(folder / name)) == sha256 for name, sha256 in manifest["sha256"].items())
        return manifest if unaltered and {"fingerprint", "counts"} <= manifest.keys() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _state(path: Path) -> tuple[Path, int, int]:
    status = path.stat()
    return path, status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=256)
def _sha256(path: Path, size: int, modified: int) -> str:
    """Hash of a file in the given state; hashed again when it changes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, lines: Iterable[str]) -> str:
    """Write `lines` to a file that appears whole, and return its sha256."""
    data = "".join(f"{line}\n" for line in lines).encode()
    write_file(path, data)
    return hashlib.sha256(data).hexdigest()
