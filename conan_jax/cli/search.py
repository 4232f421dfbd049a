"""`conan search`: ask a trained model about the documentation of this machine's packages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text


def search(
    query: str = typer.Argument(..., help="What you look for, in plain words."),
    run: Path = typer.Option(Path("runs/demo"), "--run", help="The folder of a run that has a search index."),
    k: int = typer.Option(5, "-k", "--top", min=1, help="How many answers."),
    as_json: bool = typer.Option(False, "--json", help="One JSON list of answers."),
) -> None:
    """Find the documented objects nearest in meaning to a question.

    Examples:

        conan search "how do I read a file line by line"

        conan search "weighted mean of an array" -k 10

        conan search "parse a date" --json
    """
    from conan_jax.errors import DataError
    from conan_jax.inference.encoder import Encoder
    from conan_jax.inference.search import META
    from conan_jax.inference.search import search as find

    index = run / "index"
    if not (index / META).is_file():
        raise DataError(f"there is nothing to search in {run}: run `conan demo` (or `make demo`) first, or name another run with --run")
    answers = find(index, Encoder.load(run), query, k)
    if as_json:
        typer.echo(json.dumps(answers, indent=2, ensure_ascii=False))
    else:
        Console().print(results_table(query, answers))


def results_table(query: str, answers: list[dict[str, Any]]) -> Table:
    """Answers as a table: cosine, qualified name, first sentence. Nothing in them is read as markup."""
    table = Table(title=Text(query, style="bold"), title_justify="left", show_edge=False, pad_edge=False, expand=False)
    table.add_column("score", justify="right", style="cyan", no_wrap=True)
    table.add_column("name", style="bold", overflow="fold")
    table.add_column("what it says")
    for answer in answers:
        table.add_row(f"{answer['score']:.3f}", Text(str(answer["id"])), Text(str(answer.get("summary") or answer["text"])[:160]))
    return table
