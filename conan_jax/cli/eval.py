"""`conan eval`: metrics of a trained model on a folder of evaluation sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from conan_jax.errors import ConfigError
from conan_jax.files import check_room, read_json, write_json


def evaluate(
    model: Path = typer.Argument(..., help="The folder of a run, of one of its stages, or of an export."),
    suite: Path = typer.Option(None, "--suite", help="Folder of sets: listed in its suite.yaml, or found by their file layout."),
    mteb: str = typer.Option("", "--mteb",
        help="Tasks of mteb in place of a suite, by name, separated by commas; needs mteb."),
    only: str = typer.Option("", "--only", help="Sets to score, by name, pattern (sts/*) or kind, separated by commas."),
    out: Path = typer.Option(None, "--out",
                             help="Folder of results.json. Default: RUN/eval/SUITE for a run, EXPORT.eval/SUITE for an export."),
    max_queries: int = typer.Option(None, "--max-queries", min=1,
                                    help="Maximum number of queries of a set, or of pairs or test texts of each language."),
    languages: str = typer.Option("", "--languages", help="Score only these values of the field `lang`, separated by commas."),
    fresh: bool = typer.Option(False, "--fresh", help="Compute all sets again, also those in results.json."),
    as_json: bool = typer.Option(False, "--json", help="Print results.json at the end, and progress on standard error."),
) -> None:
    """Score a model on retrieval (BEIR), MKQA, STS, bitext mining, classification and clustering sets in a folder.

    Retrieval metrics are those of ir_measures, the others are defined as in MTEB. Sets without a suite.yaml are read with the
    model's prompt of the same name, if there is one. The same command continues after an interruption: a finished set is not
    computed again, unless the model, the set or its settings have changed. Writes results.json, diagnostics.json, report.html.
    Tables, page and `counts` in the JSON give the number of texts of each score and show where --max-queries has limited it.
    Exit codes: 0 done, 42 stopped and resumable, 78 wrong suite, set or model.

    Examples:

        conan eval runs/demo --suite data/suite

        conan eval runs/small_multilingual --suite $CONAN_DATA --only "sts/*,clr/dev" --max-queries 200

        conan eval exports/model --suite mkqa --languages de,ja,ar --json

        conan eval exports/model --mteb STSBenchmark,SciFact --out scores
    """
    if (suite is None) == (not mteb):
        raise ConfigError("name either a folder of sets with --suite or tasks with --mteb")
    console = Console(stderr=as_json)
    if mteb:
        results = _mteb(model, _names(mteb), out or _default_folder(model) / "mteb", fresh, console)
    else:
        results = _suite(model, suite, _names(only), max_queries, _names(languages), out, fresh, console)
    if as_json:
        typer.echo(json.dumps(results))


def _suite(model: Path, suite: Path, only: list[str], max_queries: int | None, languages: list[str], out: Path | None, fresh: bool,
           console: Console) -> dict[str, Any]:
    from conan_jax.cli.tables import suite_tables
    from conan_jax.eval.dimensions import dimensions_of
    from conan_jax.eval.results import run_suite
    from conan_jax.eval.suite import read_suite, select
    from conan_jax.inference.encoder import Encoder
    from conan_jax.train.evaluation_page import write_page

    found = read_suite(suite)
    for path, why in found.left_out.items():
        console.print(f"left alone: {path}: {why}", highlight=False, markup=False, soft_wrap=True)
    chosen = select(found, only, max_queries, languages)
    encoder = Encoder.load(model)
    folder = out or _default_folder(model) / chosen.name
    with _Bars(console, len(chosen.sets)) as bars:
        results = run_suite(encoder, chosen, folder, dimensions_of(model, encoder.dimension), fresh=fresh,
                            begin=bars.begin, finished=bars.finished)
    page = write_page(folder)
    for table in suite_tables(results):
        console.print(table)
    console.print(f"results {folder / 'results.json'}\nreport  {page}", highlight=False, soft_wrap=True)
    return results


def _mteb(model: Path, tasks: list[str], folder: Path, fresh: bool, console: Console) -> dict[str, Any]:
    """Scores of mteb's own tasks, each written to FOLDER/mteb.json when it is done; those of other tasks stay."""
    from conan_jax.eval.mteb_wrapper import MtebEncoder, evaluate_tasks
    from conan_jax.eval.results import ROOM, refuse_other_run
    from conan_jax.folder_lock import FolderLock
    from conan_jax.inference.encoder import Encoder

    wrapped = MtebEncoder(Encoder.load(model))
    identity = wrapped.model.identity
    with FolderLock(folder, "`conan eval --mteb`"):
        check_room(folder, ROOM)
        before = {} if fresh else read_json(folder / "mteb.json", {})
        refuse_other_run(folder, before.get("encoder", {}), identity)
        known = before.get("tasks", {}) if before.get("encoder") == identity else {}
        results: dict[str, Any] = {"encoder": identity, "tasks": dict(known)}
        for task in tasks:
            with console.status(f"scoring {task}"):
                results["tasks"] |= evaluate_tasks(wrapped, [task])
            write_json(folder / "mteb.json", results)
            console.print(f"{task}  main score {results['tasks'][task]['main_score']:.4f}", highlight=False)
    console.print(f"results {folder / 'mteb.json'}", highlight=False, soft_wrap=True)
    return results


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _default_folder(model: Path) -> Path:
    """Inside a run or a stage; beside an export, whose manifest names every file it holds."""
    return model / "eval" if not (model / "manifest.json").is_file() else model.with_name(f"{model.resolve().name}.eval")


class _Bars:
    """A bar over the sets and one over the texts of the set at hand, with their rate and what is left."""

    def __init__(self, console: Console, sets: int) -> None:
        from conan_jax.inference.progress import text_bars

        self._console = console
        self._progress = text_bars(eta="", console=console, transient=True)
        self._sets = self._progress.add_task("sets", total=sets, rate="")
        self._texts = self._progress.add_task("", total=None, rate="", visible=False)

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def begin(self, evaluation: Any) -> Any:
        from conan_jax.inference.progress import rate

        self._progress.reset(self._texts, description=evaluation.name, total=None, rate="", visible=True)

        def encoded(done: int, total: int) -> None:
            self._progress.update(self._texts, completed=done, total=total)
            self._progress.update(self._texts, rate=rate(self._progress.tasks[self._texts].speed))

        return encoded

    def finished(self, name: str, result: dict[str, Any], computed: bool) -> None:
        self._progress.update(self._texts, visible=False)
        self._progress.advance(self._sets)
        note = f"{result['texts']:,} texts in {result['seconds']:.1f} s" if computed else "kept"
        self._console.print(f"{name}  {result['main']} {result['figures'][result['main']]:.4f}  [dim]{note}[/dim]", highlight=False)
