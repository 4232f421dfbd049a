"""The model card: what is known of the weights from the run's own files. What is not known is left out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

import jinja2

from conan_jax import config
from conan_jax.data.prepared import dataset_manifest
from conan_jax.export.source import Source
from conan_jax.files import read_json
from conan_jax.model import num_params

TEMPLATE = Path(__file__).with_name("card.md.jinja")
BASELINES = ("untrained", "initial", "bm25")
MOST_FIGURES = 6  # columns of a table; all of them stand in the run's evaluation.json


def render(source: Source, described: dict[str, Any]) -> str:
    """README.md of an export, with the front matter that model hubs read. `described` is the content of its `conan.json`."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters["json"] = lambda value: json.dumps(value, ensure_ascii=False)
    stages = _stages(source)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=source.run.name, stage=source.stage, step=source.step, causal=source.causal, described=described, model=described["model"],
        parameters=num_params(replace(source.run.model, tie_word_embeddings=described["model"]["tie_word_embeddings"])),
        stages=[_recipe(stage) for stage in stages], datasets=_datasets(source, stages), tables=_tables(source, stages),
        longest=max((length for stage in stages for length in source.run.lengths(stage)), default=None),
        merged=_merged(source), prompts={name: prompt for name, prompt in source.prompts.items() if prompt},
    )


def _stages(source: Source) -> list[config.Stage]:
    """The stages these weights went through."""
    names = [stage.name for stage in source.run.stages]
    return list(source.run.stages[: names.index(source.stage.name) + 1])


def _recipe(stage: config.Stage) -> dict[str, Any]:
    """One row of the recipe: what the configuration says of a stage."""
    notes = []
    if isinstance(stage, config.LMStage):
        notes.append(f"rows of {stage.sequence_length} tokens")
    if isinstance(stage, config.WeakStage):
        notes.append("queries/passages of " + ", ".join(f"{b.query_length}/{b.passage_length}" for b in stage.buckets) + " tokens")
        notes.append(f"soft mask, {stage.soft_mask.schedule}")
    if isinstance(stage, config.SupervisedStage):
        notes += [f"{t.name}: {t.kind}, {t.global_batch_size} examples, {t.bucket.query_length}/{t.bucket.passage_length} tokens"
                  for t in stage.tasks]
        notes.append(f"hard negatives {stage.hard_negatives.rule}, {stage.hard_negatives.num_negatives} a query")
    if contrastive := getattr(stage, "contrastive", None):
        notes.append(f"temperature {contrastive.temperature:g}")
    if dims := getattr(stage, "matryoshka", config.Matryoshka()).dims:
        notes.append(f"widths {', '.join(map(str, dims))}")
    tasks = getattr(stage, "tasks", ())
    batch = getattr(stage, "global_batch_size", None) or sum(task.global_batch_size for task in tasks) or None
    return {"name": stage.name, "kind": stage.kind, "steps": stage.steps, "batch": batch, "learning_rate": stage.optimizer.learning_rate,
            "notes": "; ".join(notes)}


def _merged(source: Source) -> list[str]:
    """Of an average of checkpoints, what was averaged: "0.5 x a/supervised, step 30"."""
    sources = read_json(source.folder / "merge.json", {}).get("sources", [])
    return [f"{s['weight']:g} x {'/'.join(PurePath(s['folder']).parts[-2:])}, step {s['step']}" for s in sources]


def _datasets(source: Source, stages: list[config.Stage]) -> list[dict[str, Any]]:
    """The datasets of those stages, with their counts where they were built here."""
    rows = []
    for dataset in source.run.datasets:
        users = [stage.name for stage in stages if dataset.name in _used(stage)]
        if not users:
            continue
        manifest = dataset_manifest(source.folder, source.run, dataset.name)
        rows.append({"name": dataset.name, "kind": dataset.kind, "stages": ", ".join(users), "source": _origin(dataset.source),
                     "records": manifest.records if manifest else None})
    return rows


def _used(stage: config.Stage) -> set[str]:
    mixes = [*getattr(stage, "datasets", ()), *(mix for task in getattr(stage, "tasks", ()) for mix in task.datasets)]
    return {mix.dataset for mix in mixes}


def _origin(source: str) -> str:
    """Where a dataset came from, without the folders of the machine it was read on."""
    if source.startswith(("tfds:", "docstrings:")):
        return source
    return "; ".join(PurePath(part.strip()).name for part in source.split(";"))


def _tables(source: Source, stages: list[config.Stage]) -> list[dict[str, Any]]:
    """One table an evaluation: a row for each baseline and stage that was scored, up to these weights."""
    rows = [*BASELINES, *(stage.name for stage in stages)]
    if source.step != source.stage.steps:
        rows.remove(source.stage.name)  # its figures are those of its last step
    found = {row: read_json(source.folder / row / "evaluation.json", {}) for row in rows}
    tables = []
    for name in dict.fromkeys(name for figures in found.values() for name in figures):
        scored = {row: {m: v for m, v in figures[name].items() if isinstance(v, float)}
                  for row, figures in found.items() if name in figures}
        metrics = list(dict.fromkeys(m for values in scored.values() for m in values if "/" not in m))[:MOST_FIGURES]
        if metrics:
            cells = [(row, [f"{values[m]:.4f}" if m in values else "" for m in metrics]) for row, values in scored.items()]
            tables.append({"name": name, "metrics": metrics, "rows": cells})
    return tables
