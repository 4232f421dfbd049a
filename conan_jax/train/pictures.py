"""Charts of the results of eval.diagnostics: one set of one model, or the stages of a run side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conan_jax.train.charts import Line, heatmap, points, steps, trace

Found = dict[str, Any]
Chart = dict[str, Any]

_SORTS = ("positives", "negatives", "hard negatives")
HARD_NEGATIVES_ABOVE = (
    "A hard negative is the most similar of all texts that are not the answer, so its mean cosine can exceed that of the positives: here by"
)


def pictures_of(name: str, found: Found, figure: str) -> list[Chart]:
    """The charts of a set: cosines, dimensions, languages, as far as it has data for them. `figure` is the set's main metric."""
    charts = []
    if "histogram" in found:
        charts.append(scores(name, found))
    if len(found.get("dimensions", {})) > 1:
        charts.append(dimensions(f"{name}: {figure} by dimension", {name: found["dimensions"]}, figure))
    if "languages" in found:
        charts += languages(name, found["languages"])
    return charts


def scores(name: str, found: Found) -> Chart:
    """Histograms of the cosines of positives, negatives and hard negatives, each as shares of its pairs."""
    counts, means = found["histogram"]["counts"], found["histogram"]["means"]
    lines = []
    for i, sort in enumerate(_SORTS):
        if sort in counts:
            total, width = sum(counts[sort]), 2 / len(counts[sort])
            edges = [-1 + width * i for i in range(len(counts[sort]) + 1)]
            lines.append(Line(f"{sort} (mean {means[sort]:.2f})", edges, [c / total for c in counts[sort]], i))
    note = f"alignment {found['alignment']:.3f}, uniformity {found['uniformity']:.3f}, {found['pairs']:,} positive pairs"
    if means.get(_SORTS[2], -1.0) > means.get(_SORTS[0], 1.0):
        note += f". {HARD_NEGATIVES_ABOVE} {means[_SORTS[2]] - means[_SORTS[0]]:.2f}"
    return {"title": f"{name}: cosines", "note": note, "svg": steps(f"cosines of {name}", lines, "cosine")}


def dimensions(title: str, found: Mapping[str, Mapping[str, float]], figure: str) -> Chart:
    """A metric against the number of dimensions kept, one line for each name."""
    lines = [Line(name if len(found) > 1 else "", [int(d) for d in values], list(values.values()), i, noisy=False)
             for i, (name, values) in enumerate(found.items())]
    return {"title": title, "note": "vectors cut to their first dimensions and normalised again",
            "svg": trace(title, lines, "dimensions", figure)}


def languages(name: str, found: Found) -> list[Chart]:
    """The texts of each language in the plane, and the similarity between languages (Conan-Embedding-v2, figure 3)."""
    near = f"nearest text of the same language {found['same_language']:.0%}, by chance {found['chance']:.0%}"
    alike = "" if found["translations"] is None else f"; translations have cosine {found['translations']:.2f}"
    return [
        {"title": f"{name}: languages", "note": f"first two principal components; {near}",
         "svg": points(f"languages of {name}", found["points"])},
        {"title": f"{name}: between languages", "note": f"mean cosine of texts that are not translations{alike}",
         "svg": heatmap(f"similarity between languages of {name}", found["names"], found["similarity"])},
    ]


def alignment_and_uniformity(title: str, found: Mapping[str, Found]) -> Chart | None:
    """A point for each name. Alignment is low when positives are close; uniformity is low when vectors spread over the sphere."""
    known = {name: f for name, f in found.items() if "alignment" in f}
    if not known:
        return None
    spots = {name: [[f["alignment"], f["uniformity"]]] for name, f in known.items()}
    return {"title": title, "note": "lower is better on both axes (Wang & Isola 2020)",
            "svg": points(title, spots, ("alignment", "uniformity"))}


def of_stages(name: str, stages: Mapping[str, Found], figure: str) -> list[Chart]:
    """Charts of one set over the stages of a run: alignment and uniformity of each stage, and the charts of the last stage."""
    charts = []
    moved = alignment_and_uniformity(f"{name}: alignment and uniformity", stages) if len(stages) > 1 else None
    if moved:
        charts.append(moved)
    with_dimensions = {stage: f["dimensions"] for stage, f in stages.items() if len(f.get("dimensions", {})) > 1}
    last, found = list(stages.items())[-1]
    made = pictures_of(name, {key: value for key, value in found.items() if key != "dimensions"}, figure)
    for chart in made:
        chart["note"] = f"after {last}; {chart['note']}"
    if with_dimensions:
        charts.append(dimensions(f"{name}: {figure} by dimension", with_dimensions, figure))
    return charts + made

