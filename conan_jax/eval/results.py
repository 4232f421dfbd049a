"""A suite carried out: results.json, set by set, so that what was stopped goes on where it was.

    OUT/results.json       {"suite", "encoder", "versions", "sets": {NAME: {"kind", "main", "figures", "settings", "data_sha256",
                           "counts", "input", "texts", "seconds"}}}
    OUT/diagnostics.json   {NAME: what eval.diagnostics found}

`score_set` scores one set and `key_of` tells when its score is still valid; recipes use the same two.
"""

from __future__ import annotations

import dataclasses
import hashlib
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from conan_jax import config
from conan_jax.errors import ConfigError, DataError
from conan_jax.eval import MAIN_FIGURES, evaluate
from conan_jax.eval.counts import count
from conan_jax.eval.diagnostics import diagnose
from conan_jax.eval.memory import Remembering
from conan_jax.eval.prompts import prompt_of, usable_length
from conan_jax.eval.suite import Suite, files_of, with_prompts
from conan_jax.figures import Figures
from conan_jax.files import check_room, read_json, write_json
from conan_jax.folder_lock import FolderLock
from conan_jax.inference.identity import described
from conan_jax.inference.prompts import DOCUMENT
from conan_jax.versions import versions_of

RESULTS, DIAGNOSTICS = "results.json", "diagnostics.json"
ROOM = 2**20  # bytes: more than results.json, diagnostics.json and report.html of a usual suite
PACKAGES = ("conan_jax", "jax", "numpy", "scikit-learn", "scipy", "ir-measures", "sentencepiece")

Results = dict[str, Any]
Progress = Callable[[int, int], None]


def run_suite(
    encoder: Any, suite: Suite, out: Path, dimensions: Sequence[int], *, fresh: bool = False,
    begin: Callable[[config.Evaluation], Progress] = lambda evaluation: lambda done, total: None,
    finished: Callable[[str, Results, bool], None] = lambda name, result, again: None,
) -> Results:
    """Score `encoder` on every set and return what `OUT/results.json` then holds; each set is written when it is done.

    A set with an equal key (`key_of`) in results.json is not computed again unless `fresh`. `dimensions` are those it is looked at
    beside its width. `begin(set)` gives the progress of its encoding; `finished(name, result, computed)` follows each.
    Raises `FolderInUseError` when another process writes in `out`, `ConfigError` when it holds results of another run, and `DataError`
    when it cannot be written.
    """
    with FolderLock(out, "`conan eval`"):
        check_room(out, ROOM)
        identity = encoder.identity
        before = {} if fresh else read_json(out / RESULTS, {})
        refuse_other_run(out, before.get("encoder", {}), identity)
        known = before.get("sets", {}) if before.get("encoder") == identity else {}
        pictures = read_json(out / DIAGNOSTICS, {}) if known else {}
        results: Results = {"suite": suite.name, "encoder": identity, "versions": versions(), "sets": dict(known)}
        for evaluation in suite.sets:
            if not suite.listed:
                evaluation = with_prompts(evaluation, encoder.prompts)
            found, name = known.get(evaluation.name, {}), evaluation.name
            new = name not in pictures or _kept_key(found, identity) != key_of(evaluation, identity)
            if new:
                results["sets"][name], pictures[name] = score_set(encoder, evaluation, dimensions, progress=begin(evaluation))
                write_json(out / DIAGNOSTICS, pictures)
                write_json(out / RESULTS, results)
            finished(name, results["sets"][name], new)
        write_json(out / RESULTS, results)
    return results


def refuse_other_run(out: Path, before: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Results of one run give way to those of its other weights, never to those of another run."""
    if before and before.get("run") != identity.get("run"):
        raise ConfigError(f"{out} holds results of {described(before)}, not of {described(identity)}; name another folder with --out, or "
                          "replace them with --fresh")


def score_set(
    encoder: Any, evaluation: config.Evaluation, dimensions: Sequence[int], *,
    diagnosed: Callable[[Figures], bool] = lambda figures: True, progress: Progress = lambda done, total: None,
) -> tuple[Results, Results | None]:
    """Score `encoder` on one set: (what results.json holds of it, what diagnostics.json holds of it).

    The first has `kind`, `main` (name of the main metric), `figures`, `settings` and `data_sha256` (see `key_of`), `counts`
    (`eval.counts.count`), `input` (see `input_of`), `texts` (number of texts encoded) and `seconds`. The second is None where
    `diagnosed(figures)` is false. Every text is encoded once.

    Raises `DataError` for a set that cannot be read, `ConfigError` for a kind or a prompt name that is not known.
    """
    began, digest = time.perf_counter(), data_sha256(evaluation)
    remembering = Remembering(encoder, progress)
    figures, main = evaluate(remembering, evaluation), MAIN_FIGURES[evaluation.kind]
    read = input_of(remembering, evaluation)
    pictures = diagnose(remembering, evaluation, dimensions, main, evaluate) if diagnosed(figures) else None
    settings = {**dataclasses.asdict(evaluation), "languages": list(evaluation.languages)}
    return {
        "kind": evaluation.kind, "main": main, "figures": figures, "settings": settings, "data_sha256": digest,
        "counts": count(evaluation), "input": read, "texts": remembering.texts, "seconds": round(time.perf_counter() - began, 2),
    }, pictures


def input_of(encoder: Remembering, evaluation: config.Evaluation) -> dict[str, Any]:
    """What the model read of a set: `max_length` (tokens, prompt and EOS included), `prompt`, the prompt of documents in a search
    (`document_prompt`), `texts` (number of different texts) and `cut` (number of texts longer than `max_length`)."""
    documents = {"document_prompt": encoder.prompts[DOCUMENT]} if evaluation.kind in ("retrieval", "mkqa") else {}
    return {"max_length": usable_length(encoder, evaluation), "prompt": prompt_of(encoder, evaluation), **documents,
            "texts": encoder.texts, "cut": encoder.cut}


def key_of(evaluation: config.Evaluation, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that a score follows from, as JSON: `settings` of the set, `data_sha256` of its files and `encoder`, the identity
    of what was scored (`Encoder.identity`, or the name and version of another method).

    Two scores with equal keys are equal. The paths of the files are no part of it: their content is.
    Raises `DataError` for a file that is missing or cannot be read.
    """
    return _key(dataclasses.asdict(evaluation), data_sha256(evaluation), identity)


def _key(settings: Mapping[str, Any], digest: Any, identity: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in settings.items() if name not in ("path", "train_path")}
    return {"settings": {**kept, "languages": list(kept.get("languages", ()))}, "data_sha256": digest, "encoder": dict(identity)}


def _kept_key(found: Mapping[str, Any], identity: Mapping[str, Any]) -> dict[str, Any]:
    """The key of what results.json holds of a set; one written before the input was kept has none, and is computed again."""
    return _key(found["settings"], found.get("data_sha256"), identity) if "input" in found else {}


def data_sha256(evaluation: config.Evaluation) -> str:
    """One sha256 over the files of a set, in their order."""
    digest = hashlib.sha256()
    for file in files_of(evaluation):
        try:
            with open(file, "rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Python and the packages that figures depend on."""
    return {"python": platform.python_version(), **versions_of(PACKAGES)}
