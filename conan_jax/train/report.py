"""`report.html` of a run: one file that opens offline, made from the files of the run folder.

Reads config.json, summary.json, timings.json, searches.json and each stage's metrics.jsonl and evaluation.json. Files that do not
exist yet are left out, so the report of a run can be written while it trains.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from conan_jax.errors import DataError
from conan_jax.files import read_json, write_file
from conan_jax.figures import by_language
from conan_jax.train.charts import Line, curves, smoothed
from conan_jax.train.pictures import of_stages
from conan_jax.train.smoothing import SMOOTHING_UPDATES
from conan_jax.units import duration
from conan_jax.versions import versions_of

BASELINES = ("untrained", "initial", "bm25")
HEADLINES = ("ndcg@10", "recall@10", "spearman", "accuracy", "f1", "v_measure")
MAIN = {"retrieval": "ndcg@10", "mkqa": "recall@100", "sts": "spearman", "bitext": "f1", "classification": "accuracy",
        "clustering": "v_measure"}  # the usual metric of a kind of set
PACKAGES = ("conan_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "sentencepiece", "numpy")
SCHEDULED = ("learning_rate", "alpha", "replaced_low", "replaced_drop", "exhausted")  # exact, so never smoothed
PAGES = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
                           undefined=jinja2.StrictUndefined)

Records = list[dict[str, float]]


@dataclass(frozen=True)
class RunFiles:
    """The contents of a run folder. `metrics` and `evaluations` are in the order of the stages, only those that exist."""

    folder: Path
    config: dict[str, Any]
    summary: dict[str, Any]
    searches: dict[str, list[dict[str, Any]]]
    metrics: dict[str, Records]
    evaluations: dict[str, dict[str, dict[str, float]]]
    diagnostics: dict[str, dict[str, dict[str, Any]]]  # stage -> evaluation -> result of eval.diagnostics
    timings: dict[str, float]  # phase -> seconds, over restarts

    @property
    def stages(self) -> list[str]:
        return [stage["name"] for stage in self.config.get("stages", [])]

    @property
    def main(self) -> str | None:
        """The evaluation that is marked as `main`, or the first one."""
        marked = [e["name"] for e in self.config.get("evaluations", []) if e.get("main")]
        found = _evaluation_names(self)
        return next((name for name in (*marked, *found) if name in found), None)


def write_report(run_folder: str | os.PathLike[str]) -> Path:
    """Write `report.html` into `run_folder` and return its path.

    Raises `DataError` when the folder is no run or one of its JSON files is damaged.
    """
    files = read_run(Path(run_folder))
    page = PAGES.get_template("report.html").render(
        name=files.config.get("name", files.folder.resolve().name),
        cards=cards(files),
        bars=stage_bars(files),
        tables=[table for metric in HEADLINES if (table := result_table(files, metric))],
        other_tables=[table for metric in _other_metrics(files) if (table := result_table(files, metric))] + language_tables(files),
        losses=loss_charts(files),
        vectors=vector_charts(files),
        charts=run_charts(files),
        phases=phases(files),
        searches=files.searches,
        commands=next_commands(files),
        settings=settings_sections(files.config),
        versions=versions(),
    )
    target = files.folder / "report.html"
    write_file(target, page)
    return target


def read_run(folder: Path) -> RunFiles:
    """Read the files of a run that exist. Raises `DataError` when `folder` has no config.json, or when a file is damaged."""
    if not (folder / "config.json").is_file():
        raise DataError(f"{folder} is not the folder of a run (no config.json); train one with `conan demo` or `conan train`")
    config = read_json(folder / "config.json", {})
    stages = [stage["name"] for stage in config.get("stages", [])]
    metrics = {name: _json_lines(folder / name / "metrics.jsonl") for name in stages}
    evaluations = {name: read_json(folder / name / "evaluation.json", {}) for name in (*BASELINES, *stages)}
    diagnostics = {name: read_json(folder / name / "diagnostics.json", {}) for name in (*BASELINES, *stages)}
    return RunFiles(
        folder=folder, config=config, summary=read_json(folder / "summary.json", {}), searches=read_json(folder / "searches.json", {}),
        metrics={name: records for name, records in metrics.items() if records},
        evaluations={name: figures for name, figures in evaluations.items() if figures},
        diagnostics={name: found for name, found in diagnostics.items() if found},
        timings=read_json(folder / "timings.json", {}),
    )


def _json_lines(path: Path) -> Records:
    """The records of a metrics.jsonl. An incomplete last line, which is still being written, is left out."""
    if not path.is_file():
        return []
    records = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            if number == len(lines):
                break
            raise DataError(f"{path}:{number} is not JSON; remove the line and run the command again") from None
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


# ---------------------------------------------------------------------------------------------- metrics


def cards(files: RunFiles) -> list[dict[str, str]]:
    """The most important numbers: the main metric, parameters, time, updates."""
    made = []
    trained = [name for name in files.stages if name in files.evaluations]
    main = files.main
    if trained and main:
        figures = files.evaluations[trained[-1]].get(main, {})
        metric = next((m for m in HEADLINES if m in figures), None)
        if metric:
            baselines = {b: files.evaluations.get(b, {}).get(main, {}) for b in BASELINES}
            beside = [f"{_title(b)} {found[metric]:.3f}" for b, found in baselines.items() if metric in found]
            made.append({"label": f"{metric_title(metric)} after {trained[-1]}", "value": f"{figures[metric]:.3f}",
                         "note": ", ".join(beside)})
    if "parameters" in files.summary:
        made.append({"label": "parameters", "value": _short(files.summary["parameters"]), "note": f"{files.summary['parameters']:,}"})
    if "seconds" in files.summary:
        made.append({"label": "time", "value": duration(files.summary["seconds"]), "note": "all phases, evaluation included"})
    steps = sum(records[-1]["step"] for records in files.metrics.values())
    if steps:
        made.append({"label": "updates", "value": f"{steps:,}", "note": f"{len(files.metrics)} of {len(files.stages)} stages"})
    return made


def result_table(files: RunFiles, metric: str) -> dict[str, Any] | None:
    """Rows: evaluations that have `metric`; columns: baselines and stages. The best value of a trained stage is marked."""
    values = {name: {who: figures[name][metric] for who, figures in files.evaluations.items() if metric in figures.get(name, {})}
              for name in _evaluation_names(files)}
    return shown_table(metric_title(metric), list(files.evaluations), {name: row for name, row in values.items() if row})


def language_tables(files: RunFiles) -> list[dict[str, Any]]:
    """For each evaluation with metrics by language (`ndcg@10/de`), a table whose rows are languages."""
    tables = []
    for name in _evaluation_names(files):
        rows: dict[str, dict[str, float]] = {}
        for who, figures in files.evaluations.items():
            for language, found in by_language(figures.get(name, {})).items():
                if "ndcg@10" in found:
                    rows.setdefault(language, {})[who] = found["ndcg@10"]
        if rows:
            tables.append(shown_table(f"{name}: nDCG@10 by language", list(files.evaluations), dict(sorted(rows.items())), "language"))
    return tables


def shown_table(title: str, columns: list[str], rows: dict[str, dict[str, float]], first: str = "evaluation") -> dict[str, Any] | None:
    """The table of `rows[name][column]` as the template takes it; None without rows."""
    shown = []
    for name, values in rows.items():
        best = max((v for c, v in values.items() if c not in BASELINES), default=None)
        cells = [{"text": f"{values[c]:.3f}" if c in values else "", "share": round(100 * min(max(values.get(c, 0.0), 0.0), 1.0)),
                  "best": c not in BASELINES and c in values and values[c] == best, "baseline": c in BASELINES} for c in columns]
        shown.append({"name": name, "cells": cells})
    return {"metric": title, "first": first, "columns": [_title(c) for c in columns], "rows": shown} if shown else None


def _evaluation_names(files: RunFiles) -> list[str]:
    return list(dict.fromkeys(name for figures in files.evaluations.values() for name in figures))


def _other_metrics(files: RunFiles) -> list[str]:
    found = dict.fromkeys(m for figures in files.evaluations.values() for values in figures.values() for m in values)
    return [m for m in found if m not in HEADLINES and "/" not in m]


def stage_bars(files: RunFiles) -> dict[str, Any] | None:
    """The main metric of the baselines and of each stage, as a bar chart."""
    main = files.main
    metric = next((m for m in HEADLINES if main and any(m in f.get(main, {}) for f in files.evaluations.values())), None)
    if metric is None:
        return None
    values = {who: f[main][metric] for who, f in files.evaluations.items() if metric in f.get(main, {})}
    top = max([*values.values(), 0.05])
    return {"title": f"{metric_title(metric)} by stage", "evaluation": main,
            "rows": [{"label": _title(who), "text": f"{value:.3f}", "percent": round(100 * max(value, 0.0) / top),
                      "baseline": who in BASELINES} for who, value in values.items()]}


def loss_charts(files: RunFiles) -> list[dict[str, Any]]:
    """A chart of the smoothed loss for each stage: of all updates, of each task, and of each dataset of a mixture."""
    kinds = {stage["name"]: stage for stage in files.config.get("stages", [])}
    charts = []
    for stage, records in files.metrics.items():
        several = "weighted sum of the tasks" if kinds.get(stage, {}).get("tasks") else "all datasets"
        if any("smoothed" in record for record in records):
            keys = _keys([record.get("smoothed", {}) for record in records])
            parts = [key for key in keys if key != "loss"]
            lines = [_smoothed_line(records, "loss", several if parts else "")]
            lines += [_smoothed_line(records, key, key.partition("/")[2], i) for i, key in enumerate(parts, 1)]
        else:  # written before losses were smoothed
            parts = [key for key in _keys(records) if key.startswith("loss/")]
            lines = [_line(records, "loss", several if parts else "", 0)]
            lines += [_line(records, key, key.partition("/")[2], i) for i, key in enumerate(parts, 1)]
        lines = [line for line in lines if line.values]
        if lines:
            shown = smoothed(lines[0].values, lines[0].half_window)
            charts.append({"title": stage, "svg": curves(f"loss of {stage}", lines),
                           "note": f"{shown[0]:.3f} \u2192 {shown[-1]:.3f}; {_smoothing(lines[0], 'smoothed' in records[-1])}"})
    return charts


def _smoothed_line(records: Records, key: str, label: str, colour: int = 0) -> Line:
    """The recorded mean of a loss; under the loss of the stage the losses of single batches, faint."""
    found = [record for record in records if key in record.get("smoothed", {})]
    raw = [record.get(key) for record in found] if key == "loss" else []
    faint = [float(value) if isinstance(value, int | float) else math.nan for value in raw]
    return Line(label, [r["step"] for r in found], [r["smoothed"][key]["mean"] for r in found], colour, faint=faint)


def _smoothing(line: Line, recorded: bool) -> str:
    """The number of updates that a point of `line` stands for."""
    every = (line.steps[-1] - line.steps[0]) / max(len(line.steps) - 1, 1)
    updates = max(SMOOTHING_UPDATES if recorded else 1, round((2 * line.half_window + 1) * every) if line.half_window else 1)
    return "each point is the loss of one batch" if updates == 1 else f"smoothed over {updates:,} updates; faint: single batches"


def vector_charts(files: RunFiles) -> list[dict[str, Any]]:
    """Charts of the vectors of the held-out sets, stage by stage."""
    kinds = {e["name"]: e.get("kind", "") for e in files.config.get("evaluations", [])}
    charts = []
    for name in dict.fromkeys(name for found in files.diagnostics.values() for name in found):
        stages = {stage: found[name] for stage, found in files.diagnostics.items() if name in found}
        charts += of_stages(name, stages, metric_title(MAIN.get(kinds.get(name, ""), "")))
    return charts


def run_charts(files: RunFiles) -> list[dict[str, Any]]:
    """Charts of scalars over the whole run, stages side by side."""
    wanted = [
        ("Learning rate", "AdamW, warmup then decay, stage by stage", {"learning_rate": ""}, False),
        ("Soft mask \u03b1", "0 is causal, 1 is bidirectional", {"alpha": ""}, False),
        ("Gradient norm", "before clipping, logarithmic", {"grad_norm": ""}, True),
        ("Cosine of positives and negatives",
         "means over a batch. A hard negative is chosen for its similarity to the query, so its cosine can exceed that of the positive",
         {"positive_score": "positives", "negative_score": "negatives", "hard_negative_score": "hard negatives"}, False),
        ("Hard negatives replaced", "running totals for each reason of a replacement",
         {"replaced_low": "first score too low", "replaced_drop": "score has fallen", "exhausted": "pool exhausted"}, False),
        ("Tokens per second", "without padding", {"tokens_per_second": ""}, False),
        ("MFU", "share of the peak FLOP/s of the devices", {"mfu": ""}, False),
    ]
    steps = {stage["name"]: stage.get("steps", 0) for stage in files.config.get("stages", [])}
    charts = []
    for title, note, labels, log in wanted:
        found = {stage: _leading([(key, labels[key.partition("/")[0]]) for key in _keys(records) if key.partition("/")[0] in labels])
                 for stage, records in files.metrics.items()}
        stages = [stage for stage, keys in found.items() if any(_line(files.metrics[stage], key, "", 0).values for key, _ in keys)]
        lines, named = [], set()
        for i, stage in enumerate(stages):
            for key, label in found[stage]:
                line = _line(files.metrics[stage], key, "" if label in named else label, list(labels.values()).index(label))
                if len(stages) > 1:
                    line = replace(line, steps=[i + x / max(steps[stage], files.metrics[stage][-1]["step"]) for x in line.steps])
                lines.append(line)
                named.add(label)
        if lines:
            where = f"{note}; in {stages[0]}" if len(stages) == 1 else note
            charts.append({"title": title, "note": where, "svg": curves(title, lines, log=log, stages=stages if len(stages) > 1 else ())})
    return charts


def _leading(found: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The first task of several with the same metric (retrieval comes first in a recipe), so that each label has one line."""
    chosen: dict[str, str] = {}
    for key, label in found:
        chosen.setdefault(label, key)
    return [(key, label) for label, key in chosen.items()]


def _keys(records: Records) -> list[str]:
    return list(dict.fromkeys(key for record in records for key in record))


def _line(records: Records, key: str, label: str, colour: int) -> Line:
    points = [(r["step"], float(r[key])) for r in records if isinstance(r.get(key), int | float) and math.isfinite(r[key])]
    return Line(label, [x for x, _ in points], [y for _, y in points], colour, noisy=key not in SCHEDULED)


def phases(files: RunFiles) -> list[dict[str, Any]]:
    """One row for each stage and each other phase: updates, share done, time with restarts, skipped updates."""
    rows, timings = [], dict(files.timings or files.summary.get("timings", {}))
    for stage in files.config.get("stages", []):
        records = files.metrics.get(stage["name"], [])
        last = records[-1] if records else {}
        done, steps = last.get("step", 0), stage.get("steps", 0)
        seconds = timings.pop(stage["name"], last.get("seconds"))
        rows.append({"name": stage["name"], "updates": f"{done:,} / {steps:,}", "percent": round(100 * done / steps) if steps else 0,
                     "time": duration(seconds) if isinstance(seconds, int | float) else "", "skipped": str(int(last.get("skipped") or 0))})
    before = [_phase(name, timings.pop(name)) for name in ("prepare",) if name in timings]
    return [*before, *rows, *(_phase(name, seconds) for name, seconds in timings.items())]


def _phase(name: str, seconds: float) -> dict[str, Any]:
    return {"name": name, "updates": "", "percent": None, "time": duration(seconds), "skipped": ""}


def next_commands(files: RunFiles) -> list[dict[str, str]]:
    """The commands that use this run, with its folder in them; for a run without a trained embedder, how to continue."""
    run, out = shlex.quote(os.path.relpath(files.folder)), shlex.quote(os.path.join("exports", files.config.get("name") or "export"))
    if ".." in run.split("/"):
        run = shlex.quote(str(files.folder.resolve()))
    embeds = [s["name"] for s in files.config.get("stages", []) if s.get("kind") not in ("pretrain", "sft")]
    if not any((files.folder / name / "checkpoints").is_dir() for name in embeds):
        return [{"what": "No stage of this run makes embeddings yet. Train the next stage: repeat the command that started the run.",
                 "line": ""}]
    indexed = (files.folder / "index").is_dir()
    search = f"conan search \"your question\" --run {run}" if indexed else (
        f"conan encode corpus.jsonl corpus.npy --model {run} && "
        f"conan search \"your question\" --model {run} --corpus corpus.npy --documents corpus.jsonl")
    return [
        {"what": "Search" if indexed else "Encode a corpus, one JSON object with \"text\" on each line, and search it", "line": search},
        *([{"what": "Encode a file of texts to vectors",
            "line": f"conan encode texts.jsonl vectors.npy --model {run}"}] if indexed else []),
        {"what": "Score it on evaluation sets in a folder", "line": f"conan eval {run} --suite path/to/sets"},
        {"what": "Export it for sentence-transformers", "line": f"conan export {run} {out}"},
        {"what": "Compare the export with PyTorch (needs the torch extra)", "line": f"conan verify {out}"},
    ]


def settings_sections(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The configuration as sections of (dotted key, value) rows: the run, the model, each stage ..."""
    sections: list[dict[str, Any]] = []
    plain = {key: value for key, value in config.items() if not isinstance(value, dict | list)}
    sections.append({"title": "run", "rows": list(_flat(plain))})
    for key, value in config.items():
        if isinstance(value, dict):
            sections.append({"title": key, "rows": list(_flat(value))})
        elif isinstance(value, list):
            named = [item for item in value if isinstance(item, dict) and "name" in item]
            sections += [{"title": f"{key}: {item['name']}", "rows": list(_flat(item))} for item in named]
    return [s for s in sections if s["rows"]]


def _flat(value: Any, prefix: str = "") -> Any:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for i, item in enumerate(value):
            name = item.get("name", item.get("dataset", i)) if isinstance(item, dict) else i
            yield from _flat(item, f"{prefix}[{name}]")
    else:
        yield prefix, json.dumps(value, ensure_ascii=False)


def versions() -> dict[str, str]:
    """Python, system and packages that wrote this page."""
    system = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores"
    return {"python": platform.python_version(), "system": system, **versions_of(PACKAGES)}


def _title(who: str) -> str:
    return "BM25" if who == "bm25" else who


def metric_title(name: str) -> str:
    """The usual spelling of a metric's name."""
    written = {"ndcg": "nDCG", "mrr": "MRR", "f1": "F1", "f1_weighted": "F1 weighted", "ami": "AMI", "v_measure": "V-measure",
               "v_measure_std": "V-measure std"}
    base, at, depth = name.partition("@")
    return f"{written.get(base, base.capitalize())}{at}{depth}"


def _short(number: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:g}"
