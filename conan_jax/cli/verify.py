"""`conan verify`: an export compared with its manifest, with JAX and with PyTorch; an import with the folder that it came from."""

from __future__ import annotations

import json
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table


def verify(
    folder: Path = typer.Argument(..., help="A folder that `conan export` or `conan import` wrote."),
    texts: Path | None = typer.Option(None, "--texts", help="A UTF-8 file with a text on each line; default: texts in many scripts."),
    jax_only: bool = typer.Option(False, "--jax-only", help="Files, check vectors and token ids alone: needs no PyTorch."),
    original: Path | None = typer.Option(None, "--original", help="The folder that a run was imported from; default: where it was then."),
    as_json: bool = typer.Option(False, "--json", help="One JSON object: ok, error, min_cosine, checks, layers, versions."),
) -> None:
    """Check that an export is whole and that PyTorch computes from it what JAX does, or that an imported run computes what its folder does.

    sha256 of every file, check vectors, token ids, vectors (batched and alone, padded left and right, with prompts, cut to fewer
    numbers) and every layer. Exit code 1 when a cosine is below 0.9999 in float32,
    78 when a file is not as it was written. A run of `conan import` is compared with the folder that it came from: token ids by the
    tokenizers library, vectors by PyTorch. Without PyTorch the command says how to
    install it.

    Examples:

        conan verify exports/demo

        conan verify exports/demo --texts questions.txt --json

        conan verify exports/demo --jax-only

        conan verify runs/qwen3 --original models/Qwen3-Embedding-0.6B
    """
    from conan_jax.errors import ConanError
    from conan_jax.export.verify import Report
    from conan_jax.export.verify import verify as compare

    console = Console(stderr=as_json)
    try:
        with console.status("checking") as status:
            report = compare(folder, None if texts is None else _lines(texts), jax_only=jax_only, original=original,
                             progress=lambda what: status.update(f"{what} ..."))
    except ConanError as error:
        if as_json:  # a script that reads the object learns why, as people do from the line on standard error
            typer.echo(json.dumps(Report(str(folder), error=str(error), jax_only=jax_only).to_dict(), indent=2))
        raise
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        _print(console, report)
    if not report.ok:
        raise typer.Exit(1)


def _lines(file: Path) -> list[str]:
    from conan_jax.errors import DataError

    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as UTF-8 text: {error}") from error
    if not lines:
        raise DataError(f"{file} holds no text; write one on each line")
    return lines


def _print(console: Console, report) -> None:
    table = Table(title=f"{report.folder}: {report.kind}, {report.dtype}", title_justify="left")
    table.add_column("compared")
    for column in ("vectors", "worst cosine", "largest difference"):
        table.add_column(column, justify="right", no_wrap=True)
    for group in (report.layers, report.checks):
        for check in group:
            style = None if check.ok else "bold red"
            table.add_row(check.name, f"{check.vectors:,}", f"{check.min_cosine:.9f}", f"{check.max_abs_diff:.1e}", style=style)
        table.add_section()
    if report.layers or report.checks:
        console.print(table)
    if report.files:
        console.print(f"{report.files} files are as they were written", highlight=False)
    if report.token_rows:
        console.print(f"token ids: {report.token_rows_that_differ} of {report.token_rows} rows differ",
                      style="bold red" if report.token_rows_that_differ else None, highlight=False)
    for problem in report.problems:
        console.print(f"[bold red]problem:[/bold red] {problem}", highlight=False)
    console.print("  ".join(f"{name} {version}" for name, version in report.versions.items()), highlight=False)
    verified = "verified in JAX alone, PyTorch was not asked" if report.jax_only else "verified"
    verdict = f"[bold green]{verified}[/bold green]" if report.ok else "[bold red]not the same[/bold red]"
    worst = f": worst cosine {report.min_cosine:.9f}" if report.layers or report.checks else ""
    console.print(f"{verdict}{worst}", highlight=False)
