"""Labelled texts, scored pairs and translations of an evaluation file, read as strictly as training data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from conan_jax import config
from conan_jax.data import readers, schema
from conan_jax.errors import DataError
from conan_jax.eval.languages import split

Records = list[dict[str, Any]]


def read_records(path: str, kind: config.RecordKind, limit: int | None = None, languages: Sequence[str] = ()) -> Records:
    """All records of `path` (jsonl, csv, tsv, parquet, .gz), or `limit` of each language; each with its `lang`, "" if it has none.

    With `languages` only their records are kept. Raises `DataError` naming file and line of the first record that cannot be
    used, since a figure on a part of a set would not be comparable, and for a language that no record has.
    """
    return _read(path, lambda raw: dict(schema.parse(raw, kind).record), limit, languages)


def read_bitext(path: str, limit: int | None = None, languages: Sequence[str] = ()) -> Records:
    """As `read_records`, for pairs of sentences that say the same: {sentence1, sentence2, lang}. They may be equal (a name, a number)."""

    def sentences(raw: Any) -> dict[str, Any]:
        return {name: schema.parse(raw, "text", {"text": name}).record["text"] for name in ("sentence1", "sentence2")}

    return _read(path, sentences, limit, languages)


def _read(path: str, parse: Callable[[Any], dict[str, Any]], limit: int | None, languages: Sequence[str]) -> Records:
    records = []
    for item in readers.read(readers.expand(path)):
        try:
            if isinstance(item.raw, schema.Reject):
                raise item.raw
            records.append(parse(item.raw) | {"lang": language_of(item.raw)})
        except schema.Reject as reject:
            raise DataError(f"{item.location}: {reject}") from reject
    if not records:
        raise DataError(f"{path} holds no records")
    return limited(keep(records, languages, path), limit)


def language_of(raw: Any) -> str:
    """The `lang` of a raw record, "" when it has none or null. Raises `schema.Reject` for one that is no text."""
    value = raw.get("lang")
    return "" if value is None else schema.string(value, "lang", blank=True)


def keep(records: Records, languages: Sequence[str], where: str) -> Records:
    """The records of `languages`; all of them when none is named. Raises `DataError` naming a language that no record has."""
    found = {record["lang"] for record in records}
    for language in languages:
        if language not in found:
            raise DataError(f"{where} has no record in {language!r}; its languages are {', '.join(sorted(found - {''})) or 'not said'}")
    return [record for record in records if record["lang"] in languages] if languages else records


def limited(records: Records, limit: int | None) -> Records:
    """`limit` of the records of each language, evenly spaced; languages in alphabetical order where there is a limit."""
    return records if limit is None else [record for part in split(records).values() for record in spread(part, limit)]


def spread(records: Records, limit: int | None) -> Records:
    """`limit` of the records, evenly spaced, so that a sorted file is still covered; all when there are no more."""
    if limit is None or limit >= len(records):
        return records
    return [records[i * len(records) // limit] for i in range(limit)]
