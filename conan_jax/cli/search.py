"""`conan search`: ask a trained model about texts it has encoded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from conan_jax.errors import ConfigError, DataError


def search(
    query: Annotated[Optional[str], typer.Argument(help="The question, in plain words.")] = None,
    run: Annotated[Path, typer.Option("--run", help="The folder of a run with the index that `conan demo` makes.")] = Path("runs/demo"),
    corpus: Annotated[Optional[list[Path]], typer.Option(
        "--corpus", metavar="FILE", help="Output of `conan encode`; repeat it for shards. Any order gives the same texts; "
                               "`row` counts through the files as they are named.")] = None,
    model: Annotated[Optional[Path], typer.Option("--model", help="Folder of the run or export that encoded the corpus.")] = None,
    documents: Annotated[Optional[str], typer.Option(
        "--documents", metavar="IN.jsonl", help="The encoded texts, to show them.")] = None,
    text_field: Annotated[str, typer.Option("--field", help="The field of the documents that holds the text.")] = "text",
    queries: Annotated[Optional[Path], typer.Option(
        "--queries", metavar="FILE", help="Many queries, one a line, instead of QUERY. An empty line has no answers.")] = None,
    k: Annotated[int, typer.Option("-k", "--top", min=1, help="Number of answers.")] = 5,
    prompt_name: Annotated[Optional[str], typer.Option("--prompt-name", help="Name of the model's prompt for queries.")] = None,
    prompt: Annotated[Optional[str], typer.Option(
        "--prompt", help="Prompt text to put before a query.  [dim]default: the prompt \"query\"[/dim]")] = None,
    faiss: Annotated[bool, typer.Option("--faiss", help="Approximate, through a faiss index made beside the corpus (extra).")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list of answers; of --queries, one {query, answers} a line.")] = False,
) -> None:
    """Find the texts nearest in meaning to a question: in the demo's documentation, or in any corpus.

    The search is exact and runs on the device, a block of the corpus at a time.

    Examples:

        conan search "how do I read a file line by line"

        conan search "weighted mean of an array" -k 10 --json

        conan search "heat pumps" --corpus out.npy --documents in.jsonl --model exports/small

        conan search --queries questions.txt --corpus part1.npy --corpus part2.npy --model runs/small -k 100 --json
    """
    asked = _queries(query, queries)
    from conan_jax.inference.encoder import Encoder
    from conan_jax.inference.search import DOCUMENTS, VECTORS, Corpus, index_documents
    from conan_jax.inference.search import search as find
    from conan_jax.inference.source import TextSource

    if corpus is None:
        if not (run / "index" / VECTORS).is_file() or not (run / "index" / DOCUMENTS).is_file():
            raise DataError(f"there is nothing to search in {run}: run `conan demo` (or `make demo`) first, name another run with --run, "
                            "or a corpus of your own with --corpus")
        model, opened, source = model or run, Corpus([run / "index" / VECTORS]), index_documents(run / "index")
    elif model is None:
        raise ConfigError("--corpus needs --model, the folder of the run or export that encoded it")
    else:
        opened, source = Corpus(corpus), TextSource(documents, text_field) if documents else None
    lines = [i for i, question in enumerate(asked) if question.strip() or queries is None]
    answers = dict(zip(lines, find(opened, Encoder.load(model), [asked[i] for i in lines], k, prompt_name=prompt_name, prompt=prompt,
                                   documents=source, approximate=faiss)))
    for i, question in enumerate(asked):
        found = answers.get(i, [])
        if not as_json and i not in answers:
            Console().print(f"line {i + 1} of {queries} is empty", highlight=False, markup=False, soft_wrap=True)
        elif not as_json:
            Console().print(results_table(question, found, "text" if corpus else "summary"))
        elif queries is None:
            typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
        else:
            typer.echo(json.dumps({"query": question, "answers": found}, ensure_ascii=False))


def _queries(query: str | None, file: Path | None) -> list[str]:
    if (query is None) == (file is None):
        raise ConfigError("give either a QUERY or --queries FILE")
    if file is None:
        return [query or ""]
    try:
        asked = file.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")  # as an editor counts lines, unlike splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    if not any(line.strip() for line in asked):
        raise DataError(f"{file} holds no queries; write one a line")
    return asked


def results_table(query: str, answers: list[dict[str, Any]], shown: str = "text") -> Table:
    """Answers as a table: cosine, id and, where texts are known, the field `shown`, or the text where that is empty. Nothing in them is
    read as markup."""
    table = Table(title=Text(query, style="bold"), title_justify="left", show_edge=False, pad_edge=False, expand=False)
    table.add_column("score", justify="right", style="cyan", no_wrap=True)
    table.add_column("name", style="bold", overflow="fold")
    known = any("text" in answer for answer in answers)
    if known:
        table.add_column("what it says")
    for answer in answers:
        says = [Text(str(answer.get(shown) or answer.get("text", ""))[:160])] if known else []
        table.add_row(f"{answer['score']:.3f}", Text(str(answer["id"])), *says)
    return table
