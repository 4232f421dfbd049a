"""Clustering: do k-means clusters of the vectors agree with the labels? As MTEB defines it (Muennighoff et al. 2023, arXiv 2210.07316;
its bootstrapped form: Enevoldsen et al. 2025, arXiv 2502.13595)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from conan_jax import config
from conan_jax.errors import DataError
from conan_jax.eval.languages import combine, split
from conan_jax.eval.prompts import prompt_of, usable_length
from conan_jax.eval.records import read_records
from conan_jax.figures import Figures

EXPERIMENTS = 10
SAMPLES = 16_384  # texts drawn with replacement for each experiment
BATCH_SIZE = 512
SEED = 42


def evaluate_clustering(encoder: Any, evaluation: config.Evaluation) -> Figures:
    """`v_measure` (the MTEB main figure), its standard deviation over experiments, and adjusted mutual information `ami`.

    Each of 10 experiments draws 16,384 of the texts with replacement and clusters their vectors by mini-batch k-means into as
    many clusters as there are labels. Every text may be drawn, which is MTEB with `max_fraction_of_documents_to_embed = None`.
    Draws go on from one language to the next, as MTEB's do from subset to subset.
    Raises `DataError` for a language with fewer than two labels, which cannot be clustered, or with more labels than texts are drawn.
    """
    records = read_records(evaluation.path, "labelled", evaluation.max_queries, evaluation.languages)
    parts = split(records)
    for language, part in parts.items():
        labels = len({r["label"] for r in part})
        if labels > SAMPLES:
            raise DataError(f"{evaluation.path}: {labels:,} labels{f' in {language}' if language else ''}; an experiment draws "
                            f"{SAMPLES:,} texts, and each label needs one")
        if labels < 2:
            raise DataError(f"{evaluation.path}: all {len(part)} texts{f' in {language}' if language else ''} have one label; "
                            "clustering needs two")
    vectors = encoder.encode([r["text"] for part in parts.values() for r in part], prompt=prompt_of(encoder, evaluation),
                             max_length=usable_length(encoder, evaluation))
    rng, figures, start = random.Random(SEED), {}, 0
    for language, part in parts.items():
        figures[language] = cluster_and_score(vectors[start : start + len(part)], [r["label"] for r in part], rng)
        start += len(part)
    return combine(figures)


def cluster_and_score(vectors: Float[np.ndarray, "N D"], labels: Sequence[str], rng: random.Random) -> Figures:
    """Means over the experiments of V-measure and adjusted mutual information of clusters and labels."""
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.metrics import adjusted_mutual_info_score, v_measure_score
    from threadpoolctl import threadpool_limits

    gold = np.asarray(labels)
    kmeans = MiniBatchKMeans(n_clusters=len(set(labels)), batch_size=BATCH_SIZE, init="k-means++", n_init=1, random_state=SEED)
    v_measure, ami = [], []
    for _ in range(EXPERIMENTS):
        drawn = rng.choices(range(len(gold)), k=SAMPLES)
        with threadpool_limits(1):  # batches are small: on a busy machine, threads that wait for each other take 20 times as long
            clusters = kmeans.fit_predict(vectors[drawn])
        v_measure.append(v_measure_score(gold[drawn], clusters))
        ami.append(adjusted_mutual_info_score(gold[drawn], clusters))
    return {"v_measure": float(np.mean(v_measure)), "v_measure_std": float(np.std(v_measure)), "ami": float(np.mean(ami))}
