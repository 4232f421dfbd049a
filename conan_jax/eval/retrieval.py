"""Retrieval on a BEIR folder: exact search, nDCG, recall and MRR by ir_measures, and BM25 on the same folder by the same code.

A BEIR folder (Thakur et al. 2021, arXiv 2104.08663) holds `corpus.jsonl[.gz]` (_id, title, text), `queries.jsonl[.gz]`
(_id, text, optionally lang) and `qrels/SPLIT.tsv` (query id, document id, grade; a header line is allowed). Each file may be compressed
in any way that `data.lines` reads.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ir_measures
import numpy as np
from jaxtyping import Int

from conan_jax import config
from conan_jax.data import readers, schema
from conan_jax.data.bm25 import bm25_ranks
from conan_jax.data.lines import COMPRESSIONS, read_lines
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
    records = [{"_id": q, "text": queries[q]["text"], "lang": queries[q]["lang"]} for q in judged]
    return keep(records, languages, str(folder)), qrels


def read_corpus(folder: Path) -> dict[str, str]:
    """Document id -> title and text, of `corpus.jsonl[.gz]`."""
    return {row["_id"]: " ".join(filter(None, (row["title"], row["text"]))).strip() for row in read_rows(find(folder, "corpus.jsonl"))}


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
    """`folder/name`, as it is or compressed. Raises `DataError` when there is neither."""
    for path in (folder / name, *(folder / f"{name}{suffix}" for suffix in COMPRESSIONS)):
        if path.is_file():
            return path
    raise DataError(f"{folder / name} is missing; a retrieval set needs corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv, each as it is or "
                    f"compressed ({', '.join(COMPRESSIONS)})")


def read_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(FILE:LINE, object) of a jsonl file. Raises `DataError` naming the line that holds anything else."""
    for item in readers.read_file(path):
        if isinstance(item.raw, schema.Reject):
            what = f"is not JSON: {item.raw.detail}" if item.raw.reason == "broken_json" else f"cannot be used: {item.raw}"
            raise DataError(f"{item.location} {what}")
        if not isinstance(item.raw, dict):
            raise DataError(f"{item.location} must be an object with named fields, found {type(item.raw).__name__}")
        yield item.location, item.raw


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a jsonl file: `_id` (of its own), `text`, `title` and `lang` ("" where it has none), all of them text.

    An `_id` may be a whole number, since qrels name it by its digits. Raises `DataError` naming the line of anything else.
    """
    seen: set[str] = set()
    for where, raw in read_objects(path):
        name = raw.get("_id")
        name = str(name) if isinstance(name, int) and not isinstance(name, bool) else name
        try:
            row = {"_id": schema.string(name, "_id", blank=False), "text": schema.string(raw.get("text"), "text", blank=True),
                   "title": schema.string("" if raw.get("title") is None else raw["title"], "title", blank=True), "lang": language_of(raw)}
        except schema.Reject as reject:
            raise DataError(f"{where} must be an object with the texts _id and text, and title if it has one: {reject}") from None
        if row["_id"] in seen:
            raise DataError(f"{where} repeats the _id {row['_id']!r}")
        seen.add(row["_id"])
        yield row
    if not seen:
        raise DataError(f"{path} holds no records")


def _read_qrels(path: Path, queries: Collection[str], documents: Collection[str] | None) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    for number, line, _ in read_lines(path):
        fields = _fields(path, number, line)
        if not fields or number == 1 and _is_header(fields, queries):
            continue
        if len(fields) != 3 or not _GRADE.fullmatch(fields[2]):
            raise DataError(f"{path}:{number} must be QUERY_ID<tab>DOCUMENT_ID<tab>GRADE, the grade a whole number of at most 9 digits; got "
                            f"{' '.join(fields)!r:.80}")
        query, document, grade = fields[0], fields[1], int(fields[2])
        for what, known, name, file in (("query", queries, query, "queries"), ("document", documents, document, "corpus")):
            if known is not None and name not in known:
                raise DataError(f"{path}:{number} judges the {what} {name!r}, which is not in the {file} file")
        if qrels.setdefault(query, {}).setdefault(document, grade) != grade:
            raise DataError(f"{path}:{number} judges {query!r} and {document!r} again, as {grade} and not {qrels[query][document]}")
    return qrels


_GRADE = re.compile(r"\s*-?[0-9]{1,9}\s*")


def _fields(path: Path, number: int, line: bytes | None) -> list[str]:
    """The columns of a line of qrels; none of a blank one."""
    try:
        text = (line or b"").decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number} is not UTF-8: {error.reason} at byte {error.start}") from None
    if line is None:
        raise DataError(f"{path}:{number} is too long for qrels")
    return text.split("\t") if text.strip() else []


def _is_header(fields: list[str], queries: Collection[str]) -> bool:
    """True for three names: no grade, and no judgement whose grade is wrong."""
    try:
        float(fields[-1])
    except ValueError:
        return len(fields) == 3 and fields[0] not in queries
    return False
