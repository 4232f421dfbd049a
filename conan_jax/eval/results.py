"""A suite carried out: results.json, set by set, so that what was stopped goes on where it was.

    OUT/results.json       {"suite", "encoder", "versions", "sets": {NAME: {"kind", "main", "figures", "settings", "data_sha256",
                           "texts", "seconds"}}}
    OUT/diagnostics.json   {NAME: what eval.diagnostics found}
"""

from __future__ import annotations

import dataclasses
import hashlib
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from conan_jax import config
from conan_jax.eval import MAIN_FIGURES, evaluate
from conan_jax.eval.diagnostics import diagnose
from conan_jax.eval.memory import Remembering
from conan_jax.eval.suite import Suite, files_of, with_prompts
from conan_jax.files import read_json, write_json
from conan_jax.versions import versions_of

RESULTS, DIAGNOSTICS = "results.json", "diagnostics.json"
PACKAGES = ("conan_jax", "jax", "numpy", "scikit-learn", "scipy", "ir-measures", "sentencepiece")

Results = dict[str, Any]
Progress = Callable[[int, int], None]


def run_suite(
    encoder: Any, suite: Suite, out: Path, dimensions: Sequence[int], *, fresh: bool = False,
    begin: Callable[[config.Evaluation], Progress] = lambda evaluation: lambda done, total: None,
    finished: Callable[[str, Results, bool], None] = lambda name, result, again: None,
) -> Results:
    """Score `encoder` on every set and return what `OUT/results.json` then holds; each set is written when it is done.

    A set that the same weights were scored on under the same settings, and whose files have not changed, is not computed again
    unless `fresh`. `dimensions` are those it is looked at beside its width. `begin(set)` gives the
    progress of its encoding; `finished(name, result, computed)` follows each.
    """
    identity = encoder.identity
    before = {} if fresh else read_json(out / RESULTS, {})
    known = before.get("sets", {}) if before.get("encoder") == identity else {}
    pictures = read_json(out / DIAGNOSTICS, {}) if known else {}
    results: Results = {"suite": suite.name, "encoder": identity, "versions": versions(), "sets": dict(known)}
    for evaluation in suite.sets:
        if not suite.listed:
            evaluation = with_prompts(evaluation, encoder.prompts)
        settings, digest = dataclasses.asdict(evaluation), data_sha256(evaluation)
        settings["languages"] = list(evaluation.languages)
        found = known.get(evaluation.name, {})
        new = found.get("settings") != settings or found.get("data_sha256") != digest or evaluation.name not in pictures
        if new:
            began = time.perf_counter()
            remembering = Remembering(encoder, begin(evaluation))
            figures, main = evaluate(remembering, evaluation), MAIN_FIGURES[evaluation.kind]
            pictures[evaluation.name] = diagnose(remembering, evaluation, dimensions, main, evaluate)
            results["sets"][evaluation.name] = {
                "kind": evaluation.kind, "main": main, "figures": figures, "settings": settings, "data_sha256": digest,
                "texts": remembering.texts, "seconds": round(time.perf_counter() - began, 2),
            }
            write_json(out / DIAGNOSTICS, pictures)
            write_json(out / RESULTS, results)
        finished(evaluation.name, results["sets"][evaluation.name], new)
    write_json(out / RESULTS, results)
    return results


def data_sha256(evaluation: config.Evaluation) -> str:
    """One sha256 over the files of a set, in their order."""
    digest = hashlib.sha256()
    for file in files_of(evaluation):
        with open(file, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Python and the packages that figures depend on."""
    return {"python": platform.python_version(), **versions_of(PACKAGES)}
