"""The page beside results.json of `conan eval`: metrics by kind and by language, and charts of the vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conan_jax.errors import DataError
from conan_jax.figures import by_language, cap_of, how_many, input_of
from conan_jax.files import read_json, write_file
from conan_jax.train.pictures import alignment_and_uniformity, dimensions, pictures_of
from conan_jax.train.report import PAGES, metric_title, shown_table

TITLES = {"retrieval": "Retrieval", "mkqa": "MKQA", "sts": "Semantic similarity", "bitext": "Bitext mining",
          "classification": "Classification", "clustering": "Clustering"}
TOGETHER = 6  # sets of a kind whose lines share a chart


def write_page(folder: Path) -> Path:
    """Write `report.html` from the results.json and diagnostics.json of `folder`, and return its path.

    Raises `DataError` when `folder` holds no results.json.
    """
    results = read_json(folder / "results.json")
    if results is None:
        raise DataError(f"{folder} holds no results.json; write one with `conan eval`")
    found = read_json(folder / "diagnostics.json", {})
    sets = results["sets"]
    kinds = [kind for kind in TITLES if any(s["kind"] == kind for s in sets.values())]
    encoder = results["encoder"]
    page = PAGES.get_template("evaluation.html").render(
        name=results["suite"], count=len(sets), who=" ".join(str(encoder[key]) for key in ("run", "stage", "step") if key in encoder),
        cards=[card(kind, {n: s for n, s in sets.items() if s["kind"] == kind}) for kind in kinds],
        sections=[section(kind, {n: s for n, s in sets.items() if s["kind"] == kind}, found) for kind in kinds],
        identity={**encoder, **results["versions"]},
    )
    write_file(folder / "report.html", page)
    return folder / "report.html"


def card(kind: str, sets: dict[str, Any]) -> dict[str, str]:
    """The mean of the main metric over the sets of a kind."""
    main = next(iter(sets.values()))["main"]
    mean = sum(s["figures"][main] for s in sets.values()) / len(sets)
    count = "1 set" if len(sets) == 1 else f"{len(sets)} sets"
    capped = ", capped" if cap_of(s.get("counts", {}) for s in sets.values()) else ""
    return {"label": TITLES[kind], "value": f"{mean:.3f}", "note": f"{metric_title(main)}, {count}{capped}"}


def section(kind: str, sets: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """A kind: its table, its tables by language, the charts that compare its sets, and those of each set."""
    main = next(iter(sets.values()))["main"]
    known = {name: found[name] for name in sets if name in found}
    charts = [alignment_and_uniformity("alignment and uniformity", known)] if len(known) > 1 else []
    curves = {name: f["dimensions"] for name, f in known.items() if len(f.get("dimensions", {})) > 1}
    if 1 < len(curves) <= TOGETHER:
        charts.append(dimensions(f"{metric_title(main)} by dimension", curves, metric_title(main)))
        known = {name: {k: v for k, v in f.items() if k != "dimensions"} for name, f in known.items()}
    own = [chart for name, f in known.items() for chart in pictures_of(name, f, metric_title(main))]
    few = len(sets) == 1
    counts = {name: s.get("counts", {}) for name, s in sets.items()}
    table = figures_table("" if few else f"{len(sets)} sets", {n: s["figures"] for n, s in sets.items()}, counts)
    for row in table["rows"]:
        row["detail"] = input_of(sets[row["name"]].get("input", {}))
    return {"title": TITLES[kind], "table": table, "cap": cap_of(counts.values()),
            "languages": language_tables(sets), "charts": [*filter(None, charts), *(own if few else [])], "further": [] if few else own}


def figures_table(
    title: str, rows: dict[str, dict[str, float]], counts: dict[str, dict[str, Any]], first: str = "set",
) -> dict[str, Any]:
    """Rows: sets or languages, each with its count; columns: metrics."""
    names = list(dict.fromkeys(key for figures in rows.values() for key in figures if "/" not in key))
    table = shown_table(title, names, rows, first)
    assert table is not None
    table["columns"] = [metric_title(name) for name in names]
    table["unit"] = next((count["unit"] for count in counts.values() if count), "n")
    for row in table["rows"]:
        row["count"] = how_many(counts.get(row["name"], {}))
        for i, cell in enumerate(row["cells"]):
            cell["best"] = i == 0
    return table


def language_tables(sets: dict[str, Any]) -> list[dict[str, Any]]:
    """A table for each set in several languages."""
    tables = []
    for name, found in sets.items():
        if rows := by_language(found["figures"]):
            count = found.get("counts", {})
            parts = {language: {**count, **part} for language, part in count.get("languages", {}).items()}
            tables.append({**figures_table(f"{name} by language", rows, parts, "language"), "cap": cap_of([count])})
    return tables
