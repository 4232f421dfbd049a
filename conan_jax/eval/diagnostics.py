"""What the vectors of a set look like: alignment, uniformity, scores of positives and negatives, languages, dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from conan_jax import config
from conan_jax.eval.languages import split
from conan_jax.eval.memory import Remembering, Truncated
from conan_jax.eval.mkqa import read_mkqa
from conan_jax.eval.prompts import prompt_of, usable_length
from conan_jax.eval.records import read_bitext, read_records, spread
from conan_jax.eval.retrieval import read_beir
from conan_jax.inference.top_k import top_k

SAMPLE = 2000  # pairs a histogram counts and vectors uniformity is taken over
BINS = 50  # of cosine, over [-1, 1]
TEXTS_PER_LANGUAGE = 100
POINTS_PER_LANGUAGE = 40
SEED = 0
AT_DIMENSIONS = ("retrieval", "mkqa", "sts", "bitext")  # kinds that cost little to score again


@dataclass(frozen=True)
class View:
    """A set as vectors. Rows of `left` and `right` that belong together, that do not, and that do not but are near."""

    left: Float[np.ndarray, "N D"]
    right: Float[np.ndarray, "M D"]
    positives: Int[np.ndarray, "P 2"]
    negatives: Int[np.ndarray, "Q 2"]
    hard_negatives: Int[np.ndarray, "R 2"]


def diagnose(encoder: Remembering, evaluation: config.Evaluation, dimensions: Sequence[int], main: str, evaluate: Any) -> dict[str, Any]:
    """Everything a page shows of a set besides its figures, as JSON: {pairs, alignment, uniformity, histogram, dimensions, languages}.

    `dimensions`: figure `main` of `evaluate` at each, vectors cut and of length 1 again. `languages` where the set has several.
    """
    found: dict[str, Any] = {}
    view = view_of(encoder, evaluation)
    if len(view.positives):
        found |= {"pairs": len(view.positives), "alignment": alignment(view.left[view.positives[:, 0]], view.right[view.positives[:, 1]]),
                  "uniformity": uniformity(view.right), "histogram": histogram(view)}
    if evaluation.kind in AT_DIMENSIONS:
        found["dimensions"] = {str(d): evaluate(Truncated(encoder, d), evaluation)[main] for d in dimensions}
    spoken = texts_by_language(evaluation)
    if len(spoken) > 1:
        found["languages"] = language_clusters(encoder, evaluation, spoken)
    return found


def alignment(left: Float[np.ndarray, "P D"], right: Float[np.ndarray, "P D"]) -> float:
    """Mean squared distance of positives, E ||f(x) - f(y)||^2: 0 when they coincide (Wang & Isola 2020, arXiv 2005.10242, alpha = 2)."""
    return float(np.mean(np.sum((left.astype(np.float64) - right) ** 2, axis=1)))


def uniformity(vectors: Float[np.ndarray, "N D"]) -> float:
    """log E exp(-2 ||f(x) - f(y)||^2) over pairs of different rows: 0 when all coincide, lower when spread
    over the sphere (the same paper, t = 2).

    Over `SAMPLE` rows evenly spaced when there are more.
    """
    from scipy.spatial.distance import pdist

    rows = vectors[np.linspace(0, len(vectors) - 1, min(len(vectors), SAMPLE)).astype(int)]
    return float(np.log(np.mean(np.exp(-2 * pdist(rows.astype(np.float64), "sqeuclidean"))))) if len(rows) > 1 else 0.0


def histogram(view: View) -> dict[str, Any]:
    """Counts and means of the cosines of each sort of pair, in BINS equal bins over [-1, 1]."""
    sorts = {"positives": view.positives, "negatives": view.negatives, "hard negatives": view.hard_negatives}
    counts, means = {}, {}
    for name, pairs in sorts.items():
        if len(pairs):
            cosine = np.sum(view.left[pairs[:, 0]] * view.right[pairs[:, 1]], axis=1)
            counts[name] = np.histogram(np.clip(cosine, -1, 1), bins=BINS, range=(-1, 1))[0].tolist()
            means[name] = float(np.mean(cosine))
    return {"counts": counts, "means": means}


def view_of(encoder: Any, evaluation: config.Evaluation) -> View:
    """The vectors and pairs of a set.

    Searches: query and relevant document; a random other one; the nearest that is not judged relevant. Bitext: the same with
    translations, over all languages. STS: pairs in the highest fifth of the range of scores; sentences of different
    pairs; pairs in the lowest fifth.
    Labels: texts of one label; texts of different labels.
    """
    rng = np.random.default_rng(SEED)
    options = {"prompt": prompt_of(encoder, evaluation), "max_length": usable_length(encoder, evaluation)}
    if evaluation.kind in ("retrieval", "mkqa"):
        data = read_search(evaluation)
        right = encoder.encode_document(data.documents, max_length=options["max_length"])
        left = encoder.encode_query(data.queries, **options)
        row = {document: i for i, document in enumerate(data.document_ids)}
        relevant = [{row[d] for d, grade in data.qrels[q].items() if grade > 0} for q in data.query_ids]
        return _searched(left, right, relevant, rng)
    if evaluation.kind == "bitext":
        records = read_bitext(evaluation.path, evaluation.max_queries, evaluation.languages)
        left, right = (encoder.encode([r[side] for r in records], **options) for side in ("sentence1", "sentence2"))
        alike: dict[str, set[int]] = {}
        for i, record in enumerate(records):
            alike.setdefault(record["sentence2"], set()).add(i)
        return _searched(left, right, [alike[r["sentence2"]] for r in records], rng)
    if evaluation.kind == "sts":
        records = read_records(evaluation.path, "sts", evaluation.max_queries, evaluation.languages)
        left, right = (encoder.encode([r[side] for r in records], **options) for side in ("sentence1", "sentence2"))
        scores = np.array([r["score"] for r in records])
        share = (scores - scores.min()) / (np.ptp(scores) or 1)  # a scale may begin above 0, or be negative
        own = np.stack([np.arange(len(records))] * 2, axis=1)
        return View(left, right, own[share >= 0.8], _others(len(left), [{i} for i in range(len(left))], len(right), rng), own[share <= 0.2])
    records = spread(read_records(evaluation.path, "labelled", evaluation.max_queries, evaluation.languages), SAMPLE)
    vectors = encoder.encode([r["text"] for r in records], **options)
    labels = np.array([r["label"] for r in records])
    pairs = rng.integers(0, len(labels), (20 * SAMPLE, 2))
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    same = labels[pairs[:, 0]] == labels[pairs[:, 1]]
    return View(vectors, vectors, pairs[same][:SAMPLE], pairs[~same][:SAMPLE], pairs[:0])


def read_search(evaluation: config.Evaluation) -> Any:
    """The `RetrievalSet` of a search, whichever kind."""
    if evaluation.kind == "mkqa":
        return read_mkqa(evaluation.path, evaluation.max_queries, evaluation.languages)
    return read_beir(evaluation.path, evaluation.split, evaluation.max_queries, evaluation.languages)


def _searched(left: np.ndarray, right: np.ndarray, relevant: list[set[int]], rng: np.random.Generator) -> View:
    asked = [q for q, rows in enumerate(relevant) if rows][:SAMPLE]
    positives = np.array([(q, d) for q in asked for d in sorted(relevant[q])][: 4 * SAMPLE], np.int64).reshape(-1, 2)
    nearest = top_k(left[asked], right, 100)[0] if asked else np.zeros((0, 0), np.int64)
    hard = [(q, next((int(d) for d in row if int(d) not in relevant[q]), -1)) for q, row in zip(asked, nearest, strict=True)]
    return View(left, right, positives, _others(len(left), relevant, len(right), rng),
                np.array([pair for pair in hard if pair[1] >= 0], np.int64).reshape(-1, 2))


def _others(count: int, relevant: Sequence[set[int]], size: int, rng: np.random.Generator) -> np.ndarray:
    """Random pairs of a left row and a right row that do not belong together."""
    drawn = zip(rng.integers(0, count, SAMPLE).tolist(), rng.integers(0, size, SAMPLE).tolist(), strict=True)
    return np.array([(q, d) for q, d in drawn if d not in relevant[q]], np.int64).reshape(-1, 2)


def texts_by_language(evaluation: config.Evaluation) -> dict[str, list[tuple[str, str]]]:
    """Up to TEXTS_PER_LANGUAGE (what it says, text) of each language. Texts with the same first half are translations of each other."""
    if evaluation.kind in ("retrieval", "mkqa"):
        data = read_search(evaluation)
        records = [{"lang": lang, "key": q.partition(":")[2] if evaluation.kind == "mkqa" else q, "text": text}
                   for lang, q, text in zip(data.languages, data.query_ids, data.queries, strict=True)]
    elif evaluation.kind == "bitext":
        pairs = read_bitext(evaluation.path, evaluation.max_queries, evaluation.languages)
        if not any(r["lang"] for r in pairs):
            return {}
        records = [{"lang": r["lang"], "key": r["sentence2"], "text": r["sentence1"]} for r in pairs]
        records += [{"lang": "sentence2", "key": text, "text": text} for text in dict.fromkeys(r["sentence2"] for r in pairs)]
    elif evaluation.kind == "sts":
        records = [r | {"key": r["sentence1"], "text": r["sentence1"]}
                   for r in read_records(evaluation.path, "sts", evaluation.max_queries, evaluation.languages)]
    else:
        records = [r | {"key": r["text"]} for r in read_records(evaluation.path, "labelled", evaluation.max_queries, evaluation.languages)]
    spoken = {language: part for language, part in split(records).items() if language and len(part) > 1}
    # Texts that many languages share go first: translations of each other are what shows whether languages have merged.
    shared: dict[str, int] = {}
    for part in spoken.values():
        for record in part:
            shared[record["key"]] = shared.get(record["key"], 0) + 1
    return {language: [(r["key"], r["text"]) for r in sorted(part, key=lambda r: -shared[r["key"]])[:TEXTS_PER_LANGUAGE]]
            for language, part in spoken.items()}


def language_clusters(encoder: Any, evaluation: config.Evaluation, spoken: dict[str, list[tuple[str, str]]]) -> dict[str, Any]:
    """Do languages lie apart, or does meaning decide?

    `similarity[a][b]`: mean cosine of texts of language a with texts of b that say something else. `translations`: mean cosine of
    texts that say the same in different languages (None without any). `same_language`: share of texts whose nearest other text is
    of their language, and `chance`, what it is when languages play no part. `points`: first two principal components of some texts.
    """
    names = list(spoken)
    prompt = prompt_of(encoder, evaluation)
    vectors = encoder.encode([text for part in spoken.values() for _, text in part], prompt=prompt,
                             max_length=usable_length(encoder, evaluation))
    of = np.repeat(np.arange(len(names)), [len(part) for part in spoken.values()])
    keys = np.unique([key for part in spoken.values() for key, _ in part], return_inverse=True)[1]
    cosine = vectors @ vectors.T
    same_meaning = keys[:, None] == keys[None, :]
    members = np.eye(len(names), dtype=np.float32)[of]
    weights = members.T @ (~same_meaning).astype(np.float32) @ members
    similarity = members.T @ np.where(same_meaning, 0, cosine) @ members / np.maximum(weights, 1)
    translated = same_meaning & (of[:, None] != of[None, :])
    nearest = np.where(same_meaning & ~translated, -np.inf, cosine).argmax(axis=1)
    sizes = np.bincount(of)
    centred = vectors - vectors.mean(axis=0)
    plane = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T
    return {
        "names": names, "similarity": np.round(similarity, 4).tolist(),
        "translations": float(cosine[translated].mean()) if translated.any() else None,
        "same_language": float(np.mean(of[nearest] == of)), "chance": float(np.mean((sizes[of] - 1) / (len(of) - 1))),
        "points": {name: np.round(plane[of == i][:POINTS_PER_LANGUAGE], 4).tolist() for i, name in enumerate(names)},
    }
