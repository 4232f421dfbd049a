"""`conan`: the command line. Every command imports what it needs when it runs, so `--help` is instant."""

from __future__ import annotations

import signal
import sys
import traceback
from typing import Any

import typer
from rich.console import Console

from conan_jax.errors import EXIT_BAD_INPUT, EXIT_RESUMABLE, ConanError

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


def run() -> None:
    """Entry point: errors a user can cause end in one line and their exit code, not in a traceback.

    SIGTERM and SIGINT end any command with 42: files are written whole or not at all, so the same command goes on. While a
    stage trains, its loop listens instead and saves first.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, _stop)
    code: int | str | None = 1
    try:
        app()
    except _Stopped:
        signal.setitimer(signal.ITIMER_REAL, 0)
        _say("stopped; start the same command again to go on")
        code = EXIT_RESUMABLE
    except ConanError as error:
        _say(str(error))
        code = error.exit_code
    except SystemExit as stop:  # a mistyped flag must not look resumable to a scheduler
        code = EXIT_BAD_INPUT if stop.code == 2 else stop.code
    except Exception:
        traceback.print_exc()
    if code and "conan_jax.distributed" in sys.modules:
        sys.modules["conan_jax.distributed"].leave(code)
    sys.exit(code)


_AGAIN_SECONDS = 0.5


class _Stopped(BaseException):
    """A signal asked the command to end; no `except Exception` on the way may keep it."""


def _stop(number: int, frame: Any) -> None:
    """Raise `_Stopped`, and again by SIGALRM until it is on its way: Python drops what is raised inside a garbage collection."""
    if number == signal.SIGALRM and _is_stopping():
        return
    signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)
    raise _Stopped


def _is_stopping() -> bool:
    """Whether the code that was interrupted runs because of a `_Stopped`: it cleans up, and may finish."""
    handled = sys.exception()
    while handled is not None and not isinstance(handled, _Stopped):
        handled = handled.__context__
    return handled is not None


def _say(message: str) -> None:
    from rich.markup import escape

    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]conan:[/bold red] {escape(message)}")
