"""Which documented objects train, which are held out, and the retrieval set made of the latter."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from conan_jax.data.docstring_reader import Doc
from conan_jax.data.docstring_text import fingerprint_text, one_line, shorten


def key(*parts: object) -> str:
    """A hash that orders and splits: the same on every machine and run."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()


def full_text(doc: Doc) -> str:
    """Summary, blank line, body."""
    return f"{doc.summary}\n\n{doc.body}".strip()


def deduplicate(docs: Iterable[Doc]) -> list[Doc]:
    """One object per text (public and shallow names win), in pseudo-random order."""
    best: dict[str, Doc] = {}
    for doc in docs:
        text = fingerprint_text(full_text(doc))
        if len(text.split()) >= 3 and (text not in best or _preference(doc) < _preference(best[text])):
            best[text] = doc
    return sorted(best.values(), key=lambda d: key(d.module, d.qualname))


def _preference(doc: Doc) -> tuple[bool, int, str, str]:
    return not doc.is_public, doc.name.count("."), doc.name, doc.module


def balance(docs: Sequence[Doc], max_per_package: int) -> list[Doc]:
    """At most `max_per_package` objects of each package, those with a body first; the order is kept."""
    groups: dict[str, list[Doc]] = defaultdict(list)
    for doc in docs:
        groups[doc.package].append(doc)
    kept = {id(d) for group in groups.values() for d in sorted(group, key=lambda d: not d.body)[:max_per_package]}
    return [d for d in docs if id(d) in kept]


def hold_out(docs: Iterable[Doc], percent: int) -> tuple[list[Doc], list[Doc]]:
    """(training, held out) by a hash of the module name. A training object that shares its summary or body with a held-out one goes."""
    docs = list(docs)
    held = {m for m in {d.module for d in docs} if int(key("held out", m)[:8], 16) % 100 < percent}
    held_out = [d for d in docs if d.module in held]
    seen = {fingerprint_text(t) for d in held_out for t in (d.summary, d.body) if t}
    train = [d for d in docs if d.module not in held and not {fingerprint_text(d.summary), fingerprint_text(d.body)} & seen]
    return train, held_out


def is_query(doc: Doc) -> bool:
    """Whether the summary reads as something a person would ask."""
    return 4 <= len(doc.summary.split()) <= 30


def document_of(doc: Doc, limit: int) -> str:
    """The body as one line; "" when it is too short to answer anything or repeats the summary."""
    body = shorten(one_line(doc.body), limit)
    return "" if len(body) < 60 or fingerprint_text(doc.summary) in fingerprint_text(body) else body


def _shingles(text: str, width: int = 8) -> set[int]:
    words = fingerprint_text(text).split()
    return {zlib.crc32(" ".join(words[i: i + width]).encode()) for i in range(len(words) - width + 1)}


def evaluation_set(
    train: Sequence[Doc], held_out: Sequence[Doc], *, document_chars: int, max_queries: int, max_documents: int
) -> dict[str, list[str]]:
    """The BEIR folder of held-out modules, as lines per file: the query is a summary, its document the body without it.

    Left out: queries that several objects share, and documents more than half of whose 8-word sequences also stand in a training text.
    """
    shared = Counter(fingerprint_text(d.summary) for d in [*train, *held_out])
    trained = set().union(*(_shingles(shorten(d.body, 2 * document_chars)) for d in train))
    documents: dict[str, Doc] = {}
    for doc in held_out:
        text = document_of(doc, document_chars)
        shingles = _shingles(text)
        if text and text not in documents and 2 * len(shingles & trained) <= len(shingles):
            documents[text] = doc
    asked = [(text, d) for text, d in documents.items() if is_query(d) and d.is_public and shared[fingerprint_text(d.summary)] == 1]
    asked = asked[: max_queries]
    answers = dict.fromkeys(text for text, _ in asked)
    chosen = [*answers, *(text for text in documents if text not in answers)][: max(max_documents, len(asked))]
    return {
        "corpus.jsonl": [json.dumps({"_id": documents[t].name, "title": "", "text": t}, ensure_ascii=False) for t in chosen],
        "queries.jsonl": [json.dumps({"_id": f"q:{d.name}", "text": d.summary}, ensure_ascii=False) for _, d in asked],
        "qrels/dev.tsv": ["query-id\tcorpus-id\tscore", *(f"q:{d.name}\t{d.name}\t1" for _, d in asked)],
    }
