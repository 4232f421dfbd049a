"""Scores of one row of a recipe's results (a stage or a baseline), computed again exactly when what they follow from has changed.

    FOLDER/evaluation.json           {SET: {metric: value}}
    FOLDER/evaluation_details.json   {SET: {"key", "counts", "input", "texts", "seconds"}}: `key` is that of `eval.results.key_of`
    FOLDER/diagnostics.json          {SET: diagnostics of its vectors}

The details of a set are removed before its score changes and written after it. A score without details is not used again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from conan_jax import config
from conan_jax.eval.results import DIAGNOSTICS, key_of
from conan_jax.files import read_json, write_json

FIGURES, DETAILS = "evaluation.json", "evaluation_details.json"
KEPT = ("counts", "input", "texts", "seconds")  # of a result, in the details

Score = Callable[[config.Evaluation], tuple[dict[str, Any], dict[str, Any] | None]]


def update(folder: Path, evaluations: Sequence[config.Evaluation], identity: Mapping[str, Any], score: Callable[[], Score]) -> bool:
    """Bring the files of `folder` up to date; True when a set was scored.

    `score()` is called once, when the first score is missing. It returns a function from a set to its result (`figures` and, where
    known, `counts`, `input`, `texts`, `seconds`) and its diagnostics. Each set is written when it is scored.
    `identity` tells what is scored from everything else, as JSON. Raises as `key_of`.
    """
    keys = {e.name: key_of(e, identity) for e in evaluations}
    before, figures, pictures = (read_json(folder / name, {}) for name in (DETAILS, FIGURES, DIAGNOSTICS))
    details = {name: before[name] for name, key in keys.items() if name in figures and before.get(name, {}).get("key") == key}
    if details.keys() == keys.keys() == figures.keys():
        return False

    def write(name: str, content: Mapping[str, Any]) -> None:
        write_json(folder / name, {e.name: content[e.name] for e in evaluations if e.name in content})

    figures, pictures = ({name: found[name] for name in details if name in found} for found in (figures, pictures))
    for name, content in ((DETAILS, details), (FIGURES, figures), (DIAGNOSTICS, pictures)):
        write(name, content)
    scorer = None
    for evaluation in evaluations:
        name = evaluation.name
        if name in details:
            continue
        scorer = scorer or score()
        result, picture = scorer(evaluation)
        figures[name] = result["figures"]
        if picture is not None:
            pictures[name] = picture
            write(DIAGNOSTICS, pictures)
        write(FIGURES, figures)
        details[name] = {"key": keys[name], **{key: result[key] for key in KEPT if key in result}}
        write(DETAILS, details)
    return scorer is not None
