"""How much a figure stands on: the queries, pairs or texts of a set that were asked, out of all it holds, language by language."""

from __future__ import annotations

from collections import Counter
from typing import Any

from conan_jax import config
from conan_jax.eval.mkqa import read_questions
from conan_jax.eval.records import Records, limited, read_bitext, read_records, spread
from conan_jax.eval.retrieval import read_queries

UNITS = {"retrieval": "queries", "mkqa": "questions", "sts": "pairs", "bitext": "pairs", "classification": "texts", "clustering": "texts"}


def count(evaluation: config.Evaluation) -> dict[str, Any]:
    """`{"unit": "queries", "used": 200, "all": 1000, "capped": True, "languages": {"de": {"used": 20, "all": 90}}}`.

    `used` is what `max_queries` leaves of `all`, the set in the languages that are looked at; a figure that is `capped` does not
    compare with that of the whole set. Training texts of a classification do not count: they are bounded in no run.
    """
    every = _asked(evaluation)
    kept = (spread if evaluation.kind == "retrieval" else limited)(every, evaluation.max_queries)
    used, known = (Counter(record["lang"] for record in records) for records in (kept, every))
    return {"unit": UNITS[evaluation.kind], "used": len(kept), "all": len(every), "capped": len(kept) < len(every),
            "languages": {language: {"used": used[language], "all": known[language]} for language in sorted(known) if language}}


def _asked(evaluation: config.Evaluation) -> Records:
    """What a set asks, without a bound; of a corpus nothing is read."""
    if evaluation.kind == "retrieval":
        return read_queries(evaluation.path, evaluation.split, evaluation.languages)[0]
    if evaluation.kind == "mkqa":
        return read_questions(evaluation.path, evaluation.languages)
    if evaluation.kind == "bitext":
        return read_bitext(evaluation.path, languages=evaluation.languages)
    return read_records(evaluation.path, "sts" if evaluation.kind == "sts" else "labelled", languages=evaluation.languages)
