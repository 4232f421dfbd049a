"""Counts over the records of a built dataset: HTML in their texts, repeated records, scores."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import numpy as np

from conan_jax.data import example
from conan_jax.data.access import blocks
from conan_jax.data.markup import strip_html
from conan_jax.data.sources import Source, open_serialized

_FREQUENT = 0.01


class Contents(NamedTuple):
    """Counts of a dataset. `duplicates` are records equal to an earlier one in every field."""

    records: int
    entities: int
    tags: int
    with_html: int
    duplicates: int
    with_scores: int

    @property
    def html_is_frequent(self) -> bool:
        """True when one record in a hundred, or more, has HTML entities or tags."""
        return self.with_html > 0 and self.with_html >= _FREQUENT * self.records


def count_contents(source: Source) -> Contents:
    """Read every record of `source` once, 4,096 at a time. 8 bytes a record stay in memory: duplicates are found by a hash of 64 bits."""
    hashes = np.zeros(len(source), np.uint64)
    entities = tags = with_html = with_scores = 0
    for start, block in blocks(open_serialized(source.folder, source.manifest)):
        for i, raw in enumerate(block, start):
            hashes[i] = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big")
            record = example.decode(raw, source.kind)
            found = [strip_html(text) for text in _texts(record)]
            here = sum(markup.entities for markup in found), sum(markup.tags for markup in found)
            entities, tags, with_html = entities + here[0], tags + here[1], with_html + any(here)
            with_scores += bool(record.get("scores"))
    return Contents(len(source), entities, tags, with_html, len(hashes) - len(np.unique(hashes)), with_scores)


def _texts(record: dict[str, Any]) -> list[str]:
    values = [item for value in record.values() for item in (value if isinstance(value, list) else [value])]
    return [value for value in values if isinstance(value, str)]
