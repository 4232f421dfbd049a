"""`conan`: the command line. Every command imports what it needs when it runs, so `--help` is instant."""

from __future__ import annotations

from typing import NoReturn

import typer

from conan_jax.cli import exits

app = typer.Typer(
    name="conan",
    help="Train text embedders from scratch in JAX: raw text -> pretrain -> sft -> weak -> supervised -> search.",
    epilog="Start with [bold]conan demo[/bold], then [bold]conan search[/bold]. "
           "Exit codes: 0 done, 1 a check that failed (conan verify) or an unexpected error, 42 stopped and resumable, "
           "78 wrong configuration or data.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _version(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        from conan_jax import __version__

        typer.echo(__version__)
        raise typer.Exit()


def _mount() -> None:
    from conan_jax.cli import config, data, demo, encode, export, import_, launch, merge, preflight, search, tokenizer, train, verify
    from conan_jax.cli import eval as evaluation

    app.command("demo")(demo.demo)
    app.command("train")(train.train)
    app.command("prepare")(train.prepare)
    app.command("preflight")(preflight.preflight)
    app.command("encode", epilog=encode.EXAMPLES)(encode.encode)
    app.command("search")(search.search)
    app.command("export")(export.export)
    app.command("verify")(verify.verify)
    app.command("merge")(merge.merge)
    app.command("eval")(evaluation.evaluate)
    app.command("report")(train.report)
    app.add_typer(import_.app, name="import")
    app.add_typer(data.app, name="data")
    app.add_typer(tokenizer.app, name="tokenizer")
    app.add_typer(config.app, name="config")
    app.add_typer(launch.app, name="launch")


_mount()


def run() -> NoReturn:
    """Entry point: see `exits.run`."""
    exits.run(lambda: app())
