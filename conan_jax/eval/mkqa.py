"""MKQA's protocol: questions in many languages, English passages, and a passage is right when it holds an answer.

The questions are those of Longpre et al. 2021 (arXiv 2007.15207), the protocol that of M3-Embedding (Chen et al. 2024, arXiv
2402.03216, section 4.2), the answer match that of DPR (Karpukhin et al. 2020, arXiv 2004.04906). A folder holds

    corpus.jsonl[.gz]   _id, title, text of each passage
    mkqa.jsonl[.gz]     the release's lines: example_id, queries {lang: text}, answers {lang: [{type, text, aliases}]};
                        or one question a line: _id, text, lang, answers [text, ...]
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ir_measures

from conan_jax import config
from conan_jax.data import schema
from conan_jax.errors import DataError
from conan_jax.eval.languages import combine
from conan_jax.eval.records import Records, keep, language_of, limited
from conan_jax.eval.retrieval import RetrievalSet, find, ranks_of, read_corpus, read_objects, score
from conan_jax.figures import Figures, by_language

MEASURES = {"recall@20": ir_measures.Success @ 20, "recall@100": ir_measures.Success @ 100, "ndcg@10": ir_measures.nDCG @ 10}
ANSWER_LANGUAGE = "en"  # of the passages
LEFT_OUT = ("unanswerable", "binary", "long_answer")  # what no short passage can hold


def evaluate_mkqa(encoder: Any, evaluation: config.Evaluation) -> Figures:
    """`recall@20`, `recall@100` (shares of questions with an answer in the first k passages) and `ndcg@10`, for each
    language and their mean.

    nDCG counts every passage of the corpus that holds an answer as relevant. A question no passage answers counts as 0.
    `max_queries` bounds the questions of each language.
    """
    data = read_mkqa(evaluation.path, evaluation.max_queries, evaluation.languages)
    figures = score(data, ranks_of(encoder, data, evaluation), MEASURES)
    return combine(by_language(figures) or {"": figures})


def read_mkqa(folder: str | Path, max_queries: int | None = None, languages: Sequence[str] = ()) -> RetrievalSet:
    """Read a folder; a passage is relevant to a question when it holds one of its answers, in title or text.

    Raises `DataError` naming file and line for what is missing or malformed.
    """
    folder = Path(folder)
    corpus = read_corpus(folder)
    questions = limited(read_questions(folder, languages), max_queries)
    rows = PassageIndex(list(corpus.values())).holding(sorted({a for q in questions for a in q["answers"]}))
    ids = list(corpus)
    return RetrievalSet(
        document_ids=ids, documents=list(corpus.values()), query_ids=[f"{q['lang']}:{q['_id']}" for q in questions],
        queries=[q["text"] for q in questions], languages=[q["lang"] for q in questions],
        qrels={f"{q['lang']}:{q['_id']}": {ids[row]: 1 for answer in q["answers"] for row in rows[answer]} for q in questions},
    )


def read_questions(folder: str | Path, languages: Sequence[str] = ()) -> Records:
    """The questions of a folder, one a language: {_id, text, lang, answers}. Raises `DataError` as `read_mkqa` does."""
    file = find(Path(folder), "mkqa.jsonl")
    questions: Records = []
    seen: set[tuple[str, str]] = set()
    for where, row in read_objects(file):
        try:
            found = list(_questions(row))
        except (schema.Reject, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{where} is no question with answers ({error}); it must hold example_id, queries and answers, "
                            "or _id, text, lang and answers") from error
        for question in found:
            if (question["lang"], question["_id"]) in seen:
                raise DataError(f"{where} repeats the question {question['_id']!r} in {question['lang']!r}")
            seen.add((question["lang"], question["_id"]))
        questions += found
    if not questions:
        raise DataError(f"{file} holds no question with a short answer")
    return keep(questions, languages, str(file))


def _questions(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The questions of a line, one a language; none when it has no short answer."""
    if "queries" not in row:
        yield {"_id": _name(row["_id"]), "text": _text(row["text"], "text"), "lang": language_of(row),
               "answers": [_text(a, "answers") for a in _list(row["answers"], "answers")]}
        return
    given = _list(row["answers"][ANSWER_LANGUAGE], "answers")
    if any(answer["type"] in LEFT_OUT for answer in given):
        return
    answers = [_text(text, "answers") for answer in given for text in (answer["text"], *_list(answer.get("aliases", []), "aliases")) if text]
    asked = {ANSWER_LANGUAGE: row["query"]} if "query" in row else {}
    for language, text in (asked | row["queries"]).items() if answers else ():
        yield {"_id": _name(row["example_id"]), "text": _text(text, "queries"), "lang": _text(language, "queries"), "answers": answers}


def _name(value: Any) -> str:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else schema.string(value, "_id", blank=False)


def _text(value: Any, name: str) -> str:
    return schema.string(value, name, blank=True)


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{name} must be a list, found {type(value).__name__}")
    return value


class PassageIndex:
    """Passages by the words they hold, for finding those that hold a phrase without reading all of them for each phrase."""

    def __init__(self, passages: Sequence[str]) -> None:
        self._passages = passages

    def holding(self, phrases: Sequence[str]) -> dict[str, list[int]]:
        """For each phrase, the numbers of the passages that hold its words side by side (see `words`); none for a phrase without words."""
        spelt = {phrase: words(phrase) for phrase in phrases}
        wanted = {word for sequence in spelt.values() for word in sequence}
        lines: list[str] = []
        rows: dict[str, list[int]] = {word: [] for word in wanted}
        for row, passage in enumerate(self._passages):
            found = words(passage)
            lines.append(_line(found))
            for word in wanted.intersection(found):
                rows[word].append(row)
        held = {}
        for phrase, sequence in spelt.items():
            rarest = min((rows[word] for word in sequence), key=len, default=[])
            held[phrase] = [row for row in rarest if _line(sequence) in lines[row]]
        return held


def _line(sequence: Sequence[str]) -> str:
    return f" {' '.join(sequence)} "


def words(text: str) -> list[str]:
    """Lower-cased words of DPR's answer match: after NFD, runs of letters, digits and marks, and every other visible character alone."""
    return unicodedata.normalize("NFD", text).translate(_SPACED).lower().split()


class _Spaced(dict[int, str]):
    """Characters as they stand in a line of words: part of a word, a word alone, or a space. Filled as they are met."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        kind = unicodedata.category(character)[0]
        spaced = character if kind in "LNM" else " " if kind in "ZC" else f" {character} "
        return self.setdefault(code, spaced)


_SPACED = _Spaced()
