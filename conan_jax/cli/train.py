"""`conan train`, `conan prepare`, `conan report`: a recipe, its data alone, its page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from conan_jax.cli.config import ConfigArgument, SetOption

if TYPE_CHECKING:
    from conan_jax.cli.recipe import Recipe


def train(
    config: str = ConfigArgument,
    stage: list[str] = typer.Option([], "--stage", metavar="NAME", help="Train this stage only; it starts from the stage before it. May "
                                    "be given for several stages in a row."),
    from_stage: str = typer.Option(None, "--from-stage", metavar="NAME", help="Train this stage and all after it."),
    overrides: list[str] = SetOption,
    init_from: str = typer.Option(None, "--init-from", metavar="RUN", help="Start from the weights of this run, with its model and "
                                  "tokenizer: RUN, RUN/STAGE or RUN/STAGE@STEP. `conan import hf` makes a run from a Hugging Face folder."),
    fresh: bool = typer.Option(False, "--fresh", help="Train again: remove the checkpoints of these stages and of all later stages."),
    fallback: bool = typer.Option(False, "--fallback", help="Rename a damaged checkpoint and continue from the intact one before it."),
    as_json: bool = typer.Option(False, "--json", help="Print summary.json at the end, and progress on standard error."),
) -> None:
    """Train a recipe: prepare missing data, train each stage, evaluate after each stage, write report.html.

    The same command continues an interrupted run, bit for bit. Exit codes: 0 done, 42 stopped and resumable,
    78 wrong configuration or data.

    Examples:

        conan train configs/demo.py

        conan train configs/demo.py --set name=trial --set weak.optimizer.learning_rate=1e-3

        conan train configs/demo.py --from-stage weak --fresh

        CONAN_DATA=/data conan train configs/small_multilingual.py

        CONAN_DATA=/data conan train configs/small_multilingual.py --init-from runs/qwen3 --set name=tuned

        CONAN_DATA=/data conan train configs/conan_v2.py:tiny --set weak.soft_mask.schedule=accelerate
    """
    from conan_jax import config_io
    from conan_jax.cli.recipe import continued, select_stages, together

    run = config_io.load_run(config, overrides)
    if init_from:
        run = config_io.start_from(run, init_from)
    forget_all = fresh and select_stages(run, stage, from_stage)[0] == run.stages[0]
    run, note = continued(run, forget_all)
    with together(run, on_stderr=as_json) as (recipe, peers):
        if note:
            recipe.console.print(note, highlight=False, markup=False, soft_wrap=True)
        summary = recipe.train(peers, stage, from_stage, fresh, fallback)
        peers.alone("report", lambda: _finish(recipe, summary, as_json))


def _finish(recipe: Recipe, summary: dict[str, Any], as_json: bool) -> None:
    from conan_jax.cli.shown import next_steps
    from conan_jax.cli.tables import results_table
    from conan_jax.train.report import write_report

    report_file, console = write_report(recipe.folder), recipe.console
    if as_json:
        typer.echo(json.dumps(summary))
    elif recipe.run.evaluations:
        console.print(results_table(summary))
    else:
        console.print("no metrics: the recipe has no evaluations")
    console.print(f"summary {recipe.folder / 'summary.json'}\nreport  {report_file}\n{next_steps(recipe.folder)}", highlight=False,
                  markup=False, soft_wrap=True)


def prepare(config: str = ConfigArgument, overrides: list[str] = SetOption) -> None:
    """Build a recipe's datasets, tokenizer and packed rows, so that a pod job starts training at once.

    Examples:

        conan prepare configs/demo.py

        CONAN_DATA=/data conan prepare configs/small_multilingual.py
    """
    from conan_jax import config_io
    from conan_jax.cli.recipe import Recipe
    from conan_jax.folder_lock import FolderLock

    console = Console()
    recipe = Recipe(config_io.load_run(config, overrides), console)
    with FolderLock(recipe.folder, "`conan prepare`"):
        recipe.prepare()
    console.print(f"prepared: {recipe.run.data_dir}", highlight=False)


def report(run: Path = typer.Argument(Path("runs/demo"), help="The folder of a run.")) -> None:
    """Write report.html of a run again: metrics, curves and configuration in one file that opens offline.

    Examples:

        conan report runs/demo
    """
    from conan_jax.train.report import write_report

    typer.echo(str(write_report(run)))
