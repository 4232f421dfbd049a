"""Training records of every kind, made from documented objects (see `docstrings.build_corpus` for the files)."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from conan_jax.data.bm25 import bm25_ranks
from conan_jax.data.docstring_reader import Doc
from conan_jax.data.docstring_selection import document_of, full_text, is_query, key
from conan_jax.data.docstring_text import fingerprint_text, one_line, sentences, shorten, spoken

DESCRIBE = {"module": "Describe this Python module.", "class": "Describe this Python class.",
            "function": "Describe this Python function.", "method": "Describe this Python method."}
SUMMARISE = "Summarise this documentation in one sentence."
MAX_TEXT_CHARS = 6000

Record = dict[str, Any]


def texts(docs: Sequence[Doc]) -> Iterator[Record]:
    """Heading and documentation, as a manual page shows them."""
    for doc in docs:
        yield {"text": shorten(f"{heading(doc)}\n{full_text(doc)}", MAX_TEXT_CHARS)}


def heading(doc: Doc) -> str:
    """`numpy.average(a, axis=None)`; a module's is its name."""
    owner = doc.name.rpartition(".")[0]
    return f"{owner}.{doc.signature}" if doc.signature and doc.kind != "module" and "(" in doc.signature else doc.name


def instructions(docs: Sequence[Doc]) -> Iterator[Record]:
    """Describe an object from its heading; one in two documented at length is summarised from its body instead."""
    for doc in docs:
        if len(doc.summary.split()) < 3:
            continue
        body = document_of(doc, 600)
        if body and int(key("sft", doc.module, doc.qualname)[0], 16) % 2:
            yield {"instruction": SUMMARISE, "input": body, "output": doc.summary}
        else:
            yield {"instruction": DESCRIBE[doc.kind], "input": shorten(heading(doc), 300), "output": doc.summary}


def summary_pairs(docs: Sequence[Doc], document_chars: int) -> Iterator[Record]:
    """Summary -> body without the summary: what the held-out set asks."""
    for doc in docs:
        body = document_of(doc, document_chars)
        if body and len(doc.summary.split()) >= 3:
            yield {"query": doc.summary, "pos": body}


def name_pairs(docs: Sequence[Doc], document_chars: int) -> Iterator[Record]:
    """The words of package and name -> documentation: what someone types who half remembers a name."""
    for doc in docs:
        words = spoken(".".join([doc.package, *doc.qualname.split(".")[-2:]]) if doc.qualname else doc.name)
        text = shorten(one_line(full_text(doc)), document_chars)
        if doc.is_public and len(words.split()) >= 3 and len(text) >= 30:
            yield {"query": words, "pos": text}


def cloze_pairs(docs: Sequence[Doc], document_chars: int) -> Iterator[Record]:
    """One sentence of the body -> the rest of it (inverse cloze, Lee et al. 2019, arXiv 1906.00300)."""
    for doc in docs:
        parts = sentences(shorten(one_line(doc.body), 2 * document_chars))
        askable = [i for i, s in enumerate(parts) if 5 <= len(s.split()) <= 30]
        if len(parts) < 3 or not askable:
            continue
        chosen = askable[int(key("cloze", doc.module, doc.qualname)[:8], 16) % len(askable)]
        rest = " ".join(parts[:chosen] + parts[chosen + 1:])
        if len(rest) >= 120 and fingerprint_text(parts[chosen]) not in fingerprint_text(rest):
            yield {"query": parts[chosen], "pos": shorten(rest, document_chars)}


def hard_negative_pools(
    docs: Sequence[Doc], pools: int, pool_size: int, document_chars: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Record]:
    """Summary, body, and the bodies that BM25 ranks highest for the summary, hardest first, for the first `pools` askable objects.

    Never in a pool: the positive, an equal text, the body of an object of the same name or with the same summary (these answer the
    query as well as the positive does).
    """
    held = [(doc, body) for doc in docs if (body := document_of(doc, document_chars))]
    askers = [i for i, (doc, _) in enumerate(held) if is_query(doc)][:pools]
    if len(held) < 2 or not askers:
        return
    ranked = bm25_ranks([held[i][0].summary for i in askers], [body for _, body in held], pool_size + 12, progress)
    summaries = [fingerprint_text(doc.summary) for doc, _ in held]
    leaves = [doc.qualname.rpartition(".")[2] for doc, _ in held]
    for i, candidates in zip(askers, ranked, strict=True):
        doc, positive = held[i]
        seen, pool = {positive}, []
        for c in candidates[candidates >= 0]:
            body = held[c][1]
            if body in seen or summaries[c] == summaries[i] or leaves[c] == leaves[i]:
                continue
            seen.add(body)
            pool.append(body)
        yield {"query": doc.summary, "pos": [positive], "neg": pool[:pool_size]}


def graded_pairs(docs: Sequence[Doc], total: int, scores: dict[str, float]) -> Iterator[Record]:
    """Two summaries, scored by the closest thing their objects share: a class, a module, a package, nothing. A quarter of each."""
    docs = [d for d in docs if is_query(d)]
    groups: dict[str, dict[str, list[int]]] = {"class": defaultdict(list), "module": defaultdict(list), "package": defaultdict(list)}
    for i, doc in enumerate(docs):
        groups["package"][doc.package].append(i)
        groups["module"][doc.module].append(i)
        if ":" in doc.parent:
            groups["class"][doc.parent].append(i)
    rng = random.Random(0)
    made: dict[tuple[int, int], str] = {}
    for level in scores:
        wanted, tries = total // len(scores), 0
        while wanted and tries < 20 * total:
            tries += 1
            a = rng.randrange(len(docs))
            doc = docs[a]
            mates = {"class": groups["class"].get(doc.parent, []), "module": groups["module"][doc.module],
                     "package": groups["package"][doc.package]}.get(level, range(len(docs)))
            b = mates[rng.randrange(len(mates))] if len(mates) > 1 else a
            pair = (min(a, b), max(a, b))
            new = a != b and pair not in made and fingerprint_text(doc.summary) != fingerprint_text(docs[b].summary)
            if new and _shared(doc, docs[b]) == level:
                made[pair] = level
                wanted -= 1
    for (a, b), level in sorted(made.items(), key=lambda item: key("sts", *item[0])):
        yield {"sentence1": docs[a].summary, "sentence2": docs[b].summary, "score": scores[level]}


def _shared(a: Doc, b: Doc) -> str:
    if a.parent == b.parent and ":" in a.parent:
        return "class"
    return "module" if a.module == b.module else "package" if a.package == b.package else "other"


def labelled(docs: Sequence[Doc], label_size: tuple[int, int], document_chars: int) -> Iterator[Record]:
    """Documentation and its area: `scipy stats` where that part of a package is large enough, else the package."""
    smallest, largest = label_size
    areas = Counter(_area(d) for d in docs)
    labels = [_area(d) if areas[_area(d)] >= smallest else d.package for d in docs]
    sizes, kept = Counter(labels), Counter()
    for doc, label in zip(docs, labels, strict=True):
        if sizes[label] >= smallest and kept[label] < largest and len(full_text(doc)) >= 30:
            kept[label] += 1
            yield {"text": shorten(one_line(full_text(doc)), document_chars), "label": spoken(label)}


def _area(doc: Doc) -> str:
    public = [part for part in doc.name.split(".")[:-1] if not part.startswith("_")]
    return ".".join(public[:2]) or doc.package


def search_documents(docs: Sequence[Doc], limit: int, document_chars: int) -> list[Record]:
    """Public objects, the most prominent `limit` of them (with a body, and a short path), sorted by name."""
    public = [d for d in docs if d.is_public and len(d.summary.split()) >= 3]
    public.sort(key=lambda d: (not document_of(d, document_chars), d.name.count("."), key(d.name)))
    return [{"id": d.name, "text": shorten(one_line(full_text(d)), document_chars), "summary": d.summary, "module": d.module}
            for d in sorted(public[:limit], key=lambda d: d.name)]
