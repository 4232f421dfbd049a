"""`conan export`: a trained stage as a folder for PyTorch."""

from __future__ import annotations

import json
from pathlib import Path

import typer
from rich.console import Console


def export(
    run: Path = typer.Argument(..., help="The folder of a run, or of one of its stages."),
    out: Path = typer.Argument(..., help="The folder to write; it appears whole or not at all."),
    stage: str | None = typer.Option(None, "--stage", help="Stage to export. Default: the last trained stage."),
    step: int | None = typer.Option(None, "--step", min=1, help="Step of the checkpoint. Default: the newest."),
    dtype: str | None = typer.Option(None, "--dtype", help="dtype of the weights in the file: float32 or bfloat16. Default: that of "
                                     "the imported model, otherwise float32."),
    force: bool = typer.Option(False, "--force", help="Replace an existing export."),
    as_json: bool = typer.Option(False, "--json", help="Print the contents of conan.json."),
) -> None:
    """Write a trained model as a folder that sentence-transformers and transformers load, without remote code.

    The stages pretrain and sft become a causal language model, all other stages a text embedder. An imported model that was not
    trained further is exported unchanged. torch is not needed.

    Examples:

        conan export runs/demo exports/demo

        conan export runs/demo exports/demo-bf16 --dtype bfloat16

        conan export runs/demo exports/lm --stage pretrain

        conan verify exports/demo
    """
    from conan_jax.export.folder import export as write

    described = write(run, out, stage=stage, step=step, dtype=dtype, force=force)
    if as_json:
        typer.echo(json.dumps(described, indent=2, ensure_ascii=False))
        return
    what = "a causal language model" if described["kind"] == "causal" else "a text embedder"
    identity = described["identity"]
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    Console(soft_wrap=True).print(f"[bold]{out}[/bold]: {what}, {identity['run']} {identity['stage']} step {identity['step']}, "
                                  f"{described['architecture']}, {described['dtype']}, {size / 1e6:,.1f} MB. Check it with "
                                  f"[bold]conan verify {out}[/bold]", highlight=False)
