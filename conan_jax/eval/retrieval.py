"""Retrieval on a BEIR folder: exact search, nDCG, recall and MRR by ir_measures, and BM25 on the same folder by the same code.

A BEIR folder (Thakur et al. 2021, arXiv 2104.08663) holds `corpus.jsonl[.gz]` (_id, title, text), `queries.jsonl[.gz]`
(_id, text, optionally lang) and `qrels/SPLIT.tsv` (query id, document id, grade; a header line is allowed).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ir_measures
import numpy as np
from jaxtyping import Int

from conan_jax import config
from conan_jax.data.bm25 import bm25_ranks
from conan_jax.errors import DataError
from conan_jax.eval.prompts import prompt_of, usable_length
from conan_jax.eval.records import Records, keep, language_of, spread
from conan_jax.figures import Figures
from conan_jax.inference.top_k import top_k

MEASURES = {
    "ndcg@10": ir_measures.nDCG @ 10,
    "recall@10": ir_measures.R @ 10,
    "recall@20": ir_measures.R @ 20,
    "recall@100": ir_measures.R @ 100,
    "mrr@10": ir_measures.RR @ 10,
}
DEPTH = 100  # ranks kept a query: what the deepest measure reads

@dataclass(frozen=True)
class RetrievalSet:
    """A BEIR folder in memory. `qrels[query id][document id]` is the grade; every query has at least one."""

    document_ids: list[str]
    documents: list[str]
    query_ids: list[str]
    queries: list[str]
    languages: list[str]  # "" where the file says nothing
    qrels: dict[str, dict[str, int]]


def read_beir(folder: str | Path, split: str = "dev", max_queries: int | None = None, languages: Sequence[str] = ()) -> RetrievalSet:
    """Read a folder. Queries without a positive judgement in `split` are left out, and those of other languages than `languages`
    where some are named; `max_queries` are spread evenly over the rest. A title and its text are joined by a space.

    Raises `DataError` naming file and line for what is missing, malformed or unknown.
    """
    folder = Path(folder)
    documents = read_corpus(folder)
    judged, qrels = read_queries(folder, split, languages, documents)
    asked = spread(judged, max_queries)
    return RetrievalSet(
        document_ids=list(documents), documents=list(documents.values()), query_ids=[q["_id"] for q in asked],
        queries=[q["text"] for q in asked], languages=[q["lang"] for q in asked], qrels={q["_id"]: qrels[q["_id"]] for q in asked},
    )


def read_queries(
    folder: str | Path, split: str = "dev", languages: Sequence[str] = (), documents: Collection[str] | None = None,
) -> tuple[Records, dict[str, dict[str, int]]]:
    """The queries with a positive judgement in `split`, each {_id, text, lang}, and all judgements.

    What is judged must be of `documents` where these are given. Raises `DataError` as `read_beir` does.
    """
    folder = Path(folder)
    queries = {row["_id"]: row for row in read_rows(find(folder, "queries.jsonl"))}
    qrels = _read_qrels(find(folder, f"qrels/{split}.tsv"), queries, documents)
    judged = [q for q in queries if any(grade > 0 for grade in qrels.get(q, {}).values())]
    if not judged:
        raise DataError(f"{folder}: no query of queries.jsonl has a positive judgement in qrels/{split}.tsv")
    records = [{"_id": q, "text": queries[q]["text"], "lang": language_of(queries[q])} for q in judged]
    return keep(records, languages, str(folder)), qrels


def read_corpus(folder: Path) -> dict[str, str]:
    """Document id -> title and text, of `corpus.jsonl[.gz]`."""
    return {row["_id"]: " ".join(filter(None, (row.get("title"), row["text"]))).strip() for row in read_rows(find(folder, "corpus.jsonl"))}


def evaluate_retrieval(encoder: Any, evaluation: config.Evaluation) -> Figures:
    """Figures of `encoder` on the folder `evaluation.path`: every key of MEASURES, and `KEY/LANG` where queries carry languages.

    Documents are encoded as documents, which are bare unless the encoder says otherwise, and queries after the set's prompt.
    The figure of the whole is the mean over queries, as published figures of such sets are.
    """
    data = read_beir(evaluation.path, evaluation.split, evaluation.max_queries, evaluation.languages)
    return score(data, ranks_of(encoder, data, evaluation))


def ranks_of(encoder: Any, data: RetrievalSet, evaluation: config.Evaluation) -> Int[np.ndarray, "Q k"]:
    """Rows of the DEPTH nearest documents of each query, exact."""
    length = usable_length(encoder, evaluation)
    documents = encoder.encode_document(data.documents, max_length=length)
    queries = encoder.encode_query(data.queries, prompt=prompt_of(encoder, evaluation), max_length=length)
    return top_k(queries, documents, DEPTH)[0]


def evaluate_bm25(evaluation: config.Evaluation) -> Figures:
    """Figures of BM25 on the same folder (see `data.bm25`)."""
    data = read_beir(evaluation.path, evaluation.split, evaluation.max_queries, evaluation.languages)
    return score(data, bm25_ranks(data.queries, data.documents, DEPTH))


def score(data: RetrievalSet, ranks: Int[np.ndarray, "Q k"], measures: Mapping[str, Any] = MEASURES) -> Figures:
    """Means over the queries, and over those of each language (`ndcg@10/de`) when there is more than one. -1 is no document."""
    # Scores that fall with the rank keep ir_measures from breaking ties its own way.
    run = {q: {data.document_ids[d]: float(-i) for i, d in enumerate(row) if d >= 0} for q, row in zip(data.query_ids, ranks, strict=True)}
    values: dict[str, dict[str, float]] = {name: dict.fromkeys(data.query_ids, 0.0) for name in measures}
    names = {measure: name for name, measure in measures.items()}
    for result in ir_measures.iter_calc(list(measures.values()), data.qrels, run):
        values[names[result.measure]][result.query_id] = result.value
    figures = {name: float(np.mean(list(per_query.values()))) for name, per_query in values.items()}
    languages = sorted(set(data.languages) - {""})
    for language in languages if len(set(data.languages)) > 1 else ():
        members = [q for q, spoken in zip(data.query_ids, data.languages, strict=True) if spoken == language]
        figures |= {f"{name}/{language}": float(np.mean([values[name][q] for q in members])) for name in measures}
    return figures


def find(folder: Path, name: str) -> Path:
    """`folder/name` or `folder/name.gz`. Raises `DataError` when there is neither."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise DataError(f"{folder / name} is missing; a retrieval set needs corpus.jsonl, queries.jsonl (each may be .gz) and qrels/SPLIT.tsv")


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line) of the lines that are not blank."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, line
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a jsonl file, each with an `_id` of its own and a `text`. Raises `DataError` naming the line that is none."""
    seen: set[str] = set()
    for number, line in read_lines(path):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number} is not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("_id"), str) or not isinstance(row.get("text"), str):
            raise DataError(f"{path}:{number} must be an object with the strings _id and text")
        if row["_id"] in seen:
            raise DataError(f"{path}:{number} repeats the _id {row['_id']!r}")
        seen.add(row["_id"])
        yield row


def _read_qrels(path: Path, queries: Collection[str], documents: Collection[str] | None) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    for number, line in read_lines(path):
        fields = line.rstrip("\r\n").split("\t")
        if number == 1 and len(fields) == 3 and not _is_int(fields[2]):
            continue
        if len(fields) != 3 or not _is_int(fields[2]):
            raise DataError(f"{path}:{number} must be QUERY_ID<tab>DOCUMENT_ID<tab>GRADE, got {line.strip()!r:.80}")
        query, document, grade = fields
        for what, known, name, file in (("query", queries, query, "queries"), ("document", documents, document, "corpus")):
            if known is not None and name not in known:
                raise DataError(f"{path}:{number} judges the {what} {name!r}, which is not in the {file} file")
        qrels.setdefault(query, {})[document] = int(grade)
    return qrels


def _is_int(text: str) -> bool:
    return text.strip().removeprefix("-").isdigit()
