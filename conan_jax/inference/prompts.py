"""The prompts of a run: what stands before a text, by name (METHODS 1.7)."""

from __future__ import annotations

from conan_jax import config
from conan_jax.data.transforms import query_prompt

QUERY, DOCUMENT = "query", "document"


def prompts_of(run: config.Run) -> dict[str, str]:
    """`{"query": ..., "document": "", NAME: ...}`: full strings such as "Instruct: {task}\\nQuery: ".

    NAME is a dataset or an evaluation of the run that carries an instruction; of one name, the evaluation's counts. "query" is
    the prompt of the main retrieval evaluation, else of the first one; in a run that evaluates no retrieval, of the first
    retrieval or pair dataset with an instruction. Documents are bare.
    """
    usual = {QUERY: query_prompt(_usual_instruction(run)), DOCUMENT: ""}
    named = {item.name: query_prompt(item.instruction) for item in (*run.datasets, *run.evaluations) if item.instruction}
    return named | usual


def _usual_instruction(run: config.Run) -> str:
    main = [e for e in run.evaluations if e.main and e.kind == "retrieval"]
    searched = main or [e for e in run.evaluations if e.kind == "retrieval"]
    if searched:
        return searched[0].instruction
    return next((d.instruction for d in run.datasets if d.kind in ("retrieval", "pair") and d.instruction), "")
