"""Labelled texts and scored pairs of an evaluation file, read as strictly as training data."""

from __future__ import annotations

from typing import Any

from conan_jax import config
from conan_jax.data import readers, schema
from conan_jax.errors import DataError


def read_records(path: str, kind: config.RecordKind, limit: int | None = None) -> list[dict[str, Any]]:
    """All records of `path` (jsonl, csv, tsv, parquet, .gz), or `limit` of them spread evenly.

    Raises `DataError` naming file and line of the first record that cannot be used: a figure on a part of a set would
    not be comparable.
    """
    records = []
    for item in readers.read(readers.expand(path)):
        try:
            if isinstance(item.raw, schema.Reject):
                raise item.raw
            records.append(schema.parse(item.raw, kind).record)
        except schema.Reject as reject:
            raise DataError(f"{item.location}: {reject}") from reject
    if not records:
        raise DataError(f"{path} holds no records")
    if limit is not None and limit < len(records):
        records = [records[i * len(records) // limit] for i in range(limit)]
    return records
