"""`conan import`: a model from elsewhere as a run whose weights any stage starts from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(help="Make a run of a model that was trained elsewhere.", no_args_is_help=True, rich_markup_mode="rich")


@app.callback()
def _group() -> None:
    """Make a run from a model that was trained elsewhere."""


@app.command("hf")
def hf(
    folder: Annotated[Path, typer.Argument(help="config.json, safetensors and tokenizer.json of a Llama, Mistral, Qwen2 or Qwen3.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The run folder to write; it appears only when complete.")],
    head: Annotated[bool, typer.Option("--head/--no-head", help="Keep an untied output head, which language modelling needs.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Import a local Hugging Face folder: Llama, Mistral, Qwen2 or Qwen3, as safetensors.

    Pickled weights (.bin, .pt) are refused: reading a pickle can run code. Code in the folder is never run.

    Examples:

        conan import hf models/Qwen3-0.6B --out runs/qwen3

        conan train configs/small_multilingual.py --init-from runs/qwen3 --set name=tuned

        conan import hf models/Llama-3.2-1B --out runs/llama --no-head --json
    """
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from conan_jax.hf.importer import import_folder
    from conan_jax.model import num_params

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(f"reading {folder}", total=None)
        made = import_folder(folder, out, head=head, progress=lambda done, total: bar.update(task, completed=done, total=total))
    model, tokenizer, parameters = made.run.model, made.tokenizer, num_params(made.run.model)
    if as_json:
        typer.echo(json.dumps({
            "run": str(out), "architecture": made.origin.architecture, "dtype": made.origin.dtype, "parameters": parameters,
            "mask": made.run.stages[0].options["mask"], "vocab_size": model.vocab_size, "max_length": model.max_length,
            "tokenizer": {"vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256, "eos_id": tokenizer.eos_id,
                          "pad_id": tokenizer.pad_id, "prefix_ids": tokenizer.prefix_ids, "suffix_ids": tokenizer.suffix_ids},
            "notes": made.notes}))
        return
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(f"{out}: {made.origin.architecture}, {parameters:,} parameters, rows of up to {model.max_length:,} tokens, "
                  f"{made.run.stages[0].options['mask']}; token ids before a text: {_ids(tokenizer.prefix_ids)}, after it: "
                  f"{_ids(tokenizer.suffix_ids)}, padding: {tokenizer.pad_id}")
    for note in made.notes:
        console.print(f"note: {note}")
    if made.origin.embedder:
        prompts = ", ".join(name for name, prompt in made.run.stages[0].options["prompts"].items() if prompt)
        console.print(f"a sentence-transformers folder: {model.pooling} pooling, prompts: {prompts or 'none'}")
    console.print(f"compare it with that folder: conan verify {out}")
    console.print(f"start a recipe from it: conan train RECIPE --init-from {out}; or encode with it: conan_jax.Encoder.load({str(out)!r})")


def _ids(ids: tuple[int, ...]) -> str:
    return " ".join(map(str, ids)) or "none"
