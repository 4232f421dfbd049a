"""`conan demo`: from nothing to semantic search over the documentation of this machine's packages."""

from __future__ import annotations

import importlib.util
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from conan_jax.cli.config import SetOption
from conan_jax.cli.shown import next_steps, shown_command
from conan_jax.versions import install_command

if TYPE_CHECKING:
    from conan_jax.cli.recipe import Recipe

QUESTIONS = (
    "how do I read a file line by line",
    "convert a string to a date",
    "compute the gradient of a function",
    "run code in a separate process",
    "sort a list by a key",
)


def demo(
    overrides: list[str] = SetOption,
    variant: str = typer.Option("full", help="full, or tiny for a quick look at every step."),
    fresh: bool = typer.Option(False, "--fresh", help="Train again, from the first stage."),
) -> None:
    """Train an embedder from scratch on your packages' documentation, show what each stage gained, and search with it.

    Needs no download and about ten minutes on two CPU cores. The same as `conan train configs/demo.py`, then an index of every
    documented object for `conan search`, and an export that sentence-transformers loads.

    Examples:

        conan demo

        conan demo --variant tiny

        conan demo --set weak.steps=1200 --set name=longer
    """
    import conan_jax
    from conan_jax import config_io
    from conan_jax.cli.recipe import continued, together

    configs = Path(conan_jax.__file__).parents[1] / "configs"
    run, note = continued(config_io.load_run(f"{configs / 'demo.py'}:{variant}", overrides), forget_all=fresh)
    with together(run) as (recipe, peers):
        if note:
            recipe.console.print(note, highlight=False, markup=False, soft_wrap=True)
        summary = recipe.train(peers, fresh=fresh)
        peers.alone("search", lambda: _show(recipe, summary))


def _show(recipe: Recipe, summary: dict[str, Any]) -> None:
    """Index the documentation, answer some questions, export the embedder, write the report."""
    from conan_jax.cli.search import results_table as answers_table
    from conan_jax.cli.tables import results_table
    from conan_jax.data.locations import resolve
    from conan_jax.errors import CheckpointError
    from conan_jax.export.folder import export
    from conan_jax.export.verify import verify
    from conan_jax.files import write_json
    from conan_jax.inference.encoder import Encoder
    from conan_jax.inference.search import VECTORS, Corpus, build_index, index_documents, search
    from conan_jax.train.report import write_report

    run, console = recipe.run, recipe.console
    encoder = Encoder.load(recipe.folder / run.stages[-1].name)
    index = build_index(encoder, Path(resolve(run, "docstrings:search")), recipe.folder / "index")
    answers = dict(zip(QUESTIONS, search(Corpus([index / VECTORS]), encoder, QUESTIONS, 3, documents=index_documents(index))))
    write_json(recipe.folder / "searches.json", answers)
    exported = recipe.folder / "export"
    export(recipe.folder, exported, force=True)
    if not verify(exported, jax_only=True).ok:
        raise CheckpointError(f"the export in {exported} is not what was trained; see conan verify {exported} --jax-only")
    report_file = write_report(recipe.folder)
    for question in QUESTIONS[:2]:
        console.print(answers_table(question, answers[question], "summary"))
    console.print(results_table(summary))
    console.print(f"report  {report_file}\nexport  {exported}\n{next_steps(recipe.folder, searches=True)}\n{_verification(exported)}",
                  highlight=False, markup=False, soft_wrap=True)


def _verification(exported: Path) -> str:
    """The commands that compare the export, first with what is installed here, then with PyTorch."""
    verify = f"  {shown_command()} verify {shlex.quote(str(exported))}"
    if importlib.util.find_spec("torch") and importlib.util.find_spec("sentence_transformers"):
        return verify
    return f"{verify} --jax-only\nto compare the export with PyTorch as well:\n  {install_command(extra='torch')}\n{verify}"
