"""`conan data`: build datasets and look into them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from conan_jax.errors import ConfigError

if TYPE_CHECKING:
    from conan_jax.config import Dataset
    from conan_jax.data.contents import Contents
    from conan_jax.data.manifest import Manifest

app = typer.Typer(help="Build ArrayRecord datasets with checksums from raw files or TFDS, and show their contents.", no_args_is_help=True,
                  rich_markup_mode="rich")

_PRESETS = "configs/tfds_presets.yaml"
_BUILD_EXAMPLES = """[bold]Examples[/bold]

 conan data build train.jsonl.gz --kind retrieval --out data/train

 conan data build 'wiki/*.parquet' --kind text --field text=article --out data/wiki

 conan data build qa.csv --kind pair --field query=title --field pos=answers.text.0 --out data/qa

 conan data build products.parquet --kind pair --field query=name --field pos=title+description --out data/products

 conan data build notes.txt --kind text --field text=line --out data/notes

 conan data build tfds:glue/stsb:train --kind sts --out data/stsb

 conan data build --preset stsb --out data/stsb

Kinds: text; sft (instruction, input, output); pair (query, pos); retrieval (query, pos, neg, scores); sts (sentence1, sentence2, score);
labelled (text, label). Common column names of other tools are known. csv is quoted as in RFC 4180; tsv has no quotes.
"""
_INSPECT_EXAMPLES = """[bold]Examples[/bold]

 conan data inspect data/train

 conan data inspect data/train --head 10 --verify

 conan data inspect data/train --json | jq .contents

 conan data inspect data/train --no-count
"""


@app.command("build", epilog=_BUILD_EXAMPLES)
def build(
    sources: Annotated[Optional[list[str]], typer.Argument(
        metavar="SOURCE...", help=r"Files, globs, directories, or tfds:NAME\[/CONFIG]:SPLIT; $NAME is expanded.")] = None,
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the dataset. Its last component is the name of the dataset.")],
    kind: Annotated[Optional[str], typer.Option(
        help="Kind of record: text, sft, pair, retrieval, sts or labelled.")] = None,
    field: Annotated[Optional[list[str]], typer.Option(
        metavar="OURS=COLUMN",
        help="Read our field from this column or dotted path; A+B joins the texts of two columns by a newline. Repeatable.")] = None,
    preset: Annotated[Optional[str], typer.Option(
        help="Kind, source and fields of a named public dataset; other options override it.")] = None,
    presets: Annotated[Optional[Path], typer.Option(
        help=f"YAML file of presets.  [dim]default: {_PRESETS}[/dim]")] = None,
    max_reject_rate: Annotated[Optional[float], typer.Option(
        help="Fail when more than this share of the records is bad.  [dim]default: 0.01[/dim]")] = None,
    clean: Annotated[Optional[str], typer.Option(
        metavar="html", help="Remove HTML tags from every text and decode HTML entities.")] = None,
    limit: Annotated[Optional[int], typer.Option(help="Stop after this many good records.")] = None,
    num_shards: Annotated[Optional[int], typer.Option(
        min=1, help="Number of files.  [dim]default: one for every 256 MiB[/dim]")] = None,
    tfds_data_dir: Annotated[Optional[Path], typer.Option(
        help="Folder of the TFDS datasets.  [dim]default: $TFDS_DATA_DIR[/dim]")] = None,
    force: Annotated[bool, typer.Option("--force", help="Build even when nothing changed.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON and nothing else.")] = False,
) -> None:
    """Convert raw records to an ArrayRecord dataset with a manifest. Rejected records are counted and written to rejects.jsonl."""
    dataset = _dataset(sources or [], out, kind, field or [], preset, presets, max_reject_rate, limit, clean)
    from conan_jax.data.convert import build_dataset

    with _Bar(enabled=not as_json) as bar:
        manifest = build_dataset(dataset, out, num_shards=num_shards, force=force, progress=bar, say=_note,
                                 tfds_data_dir=str(tfds_data_dir) if tfds_data_dir else None)
    if as_json:
        _print_json(manifest)
        return
    if not bar.called:
        _note(f"{out} was already built from this source; nothing to do (--force builds it again)")
    _print_manifest(out, manifest)
    if manifest.rejected:
        typer.echo(f"{manifest.rejected:,} bad records are in {out / 'rejects.jsonl'}")


@app.command("inspect", epilog=_INSPECT_EXAMPLES)
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a built dataset.")],
    head: Annotated[int, typer.Option(min=0, help="Records to show.")] = 3,
    verify: Annotated[bool, typer.Option(
        "--verify", help="Compare the sha256 of every shard with the manifest, not only counts and sizes.")] = False,
    count: Annotated[bool, typer.Option(
        "--count/--no-count", help="Read all records and count HTML entities and tags, duplicates and records with scores.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest, the counts and the first records as JSON.")] = False,
) -> None:
    """Show the contents and the first records of a built dataset."""
    from conan_jax.data.contents import count_contents
    from conan_jax.data.sources import open_source

    source = open_source(folder, hashes=verify)
    records = [source[i] for i in range(min(head, len(source)))]
    contents = count_contents(source) if count else None
    if as_json:
        _print_json(source.manifest, **({"contents": contents._asdict()} if contents else {}), head=records)
        return
    _print_manifest(folder, source.manifest, contents)
    if contents and contents.html_is_frequent and not source.manifest.settings.get("clean"):
        typer.echo(f"HTML is in {contents.with_html / contents.records:.1%} of the records; to remove it, build the dataset again with "
                   "--clean html")
    for i, record in enumerate(records):
        _print_record(i, record)
    if verify:
        typer.echo(f"all {len(source.manifest.shards)} shards match the manifest")


def _dataset(sources: list[str], out: Path, kind: str | None, field: list[str], preset: str | None, presets: Path | None,
             max_reject_rate: float | None, limit: int | None, clean: str | None) -> Dataset:
    import dataclasses
    import re
    import shlex

    from conan_jax.config import Dataset
    from conan_jax.data.presets import find_preset, load_presets
    from conan_jax.data.readers import SEPARATOR
    from conan_jax.data.schema import check_fields

    fields = {}
    for item in field:
        ours, equals, column = item.partition("=")
        if not (ours and equals and column):
            raise ConfigError(f"--field {item!r} must be OURS=COLUMN, for instance --field query=title")
        if ours in fields:
            joined = shlex.quote(f"{ours}={fields[ours]}+{column}")
            raise ConfigError(f"--field gives {ours} twice, {fields[ours]!r} and {column!r}; join columns with +: --field {joined}")
        fields[ours] = column
    given: dict[str, Any] = {"kind": kind, "source": SEPARATOR.join(sources) or None, "fields": fields or None,
                             "max_reject_rate": max_reject_rate, "limit": limit, "clean": clean}
    given = {name: value for name, value in given.items() if value is not None}
    name = re.sub(r"[^\w-]", "_", out.absolute().name, flags=re.ASCII) or "dataset"
    if preset is not None:
        dataset = find_preset(load_presets(presets or _default_presets()), preset)
        check_fields(given.get("kind", dataset.kind), fields)
        return dataclasses.replace(dataset, name=name, **(given | {"fields": dataset.fields | fields}))
    if not sources:
        raise ConfigError("name at least one SOURCE, or a --preset")
    if kind is None:
        raise ConfigError("say what the records are: --kind text, sft, pair, retrieval, sts or labelled")
    check_fields(kind, fields)  # type: ignore[arg-type]
    return Dataset(name=name, **given)


def _default_presets() -> Path:
    here, beside = Path(_PRESETS), Path(__file__).parents[2] / _PRESETS
    return here if here.exists() or not beside.exists() else beside


class _Bar:
    """A progress bar over the bytes of the source: share, records a second, ETA. Without a total it counts."""

    def __init__(self, enabled: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (TextColumn("building"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[text]}"),
                   TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), disable=not enabled)
        self._task = self._progress.add_task("", total=None, text="")
        self.called = False

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if self.called and error is None:  # with a limit the source is not read to its end
            self._progress.update(self._task, total=max(self._progress.tasks[0].completed, 1))
        self._progress.stop()

    def __call__(self, now: Any) -> None:
        self.called = True
        self._progress.start()
        elapsed = self._progress.tasks[0].elapsed or 0
        rate = f", {now.records / elapsed:,.0f}/s" if elapsed > 0 else ""
        text = f"{now.records:,} records{rate}" + (f", {now.rejected:,} bad" if now.rejected else "")
        self._progress.update(self._task, total=now.total, completed=now.done, text=text)


def _note(message: str) -> None:
    typer.echo(f"conan: {message}", err=True)


def _print_json(manifest: Manifest, **more: Any) -> None:
    import dataclasses

    typer.echo(json.dumps(dataclasses.asdict(manifest) | more, ensure_ascii=False, indent=1))


def _print_manifest(folder: Path, manifest: Manifest, contents: Contents | None = None) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    size = sum(shard.bytes for shard in manifest.shards)
    table = Table(title=escape(str(folder)), show_header=False, title_justify="left")
    count = len(manifest.files)
    files = f" ({count} {'file' if count == 1 else 'files'}, {sum(f.bytes for f in manifest.files) / 1e6:,.1f} MB)" if count else ""
    rows = {"kind": manifest.kind, "records": f"{manifest.records:,}", "shards": f"{len(manifest.shards)}, {size / 1e6:,.1f} MB",
            "source": manifest.source + files,
            "dialects": _counts(manifest.dialects), "rejected": f"{manifest.rejected:,} of {manifest.read:,} ({manifest.reject_rate:.2%})",
            "... by reason": _counts(manifest.rejects), "left out": _counts(manifest.dropped)}
    if contents is not None:
        rows["HTML"] = f"{contents.entities:,} entities and {contents.tags:,} tags in {contents.with_html:,} records"
        rows["duplicates"] = f"{contents.duplicates:,} records repeat an earlier one"
        rows["with scores"] = f"{contents.with_scores:,} records" if manifest.kind == "retrieval" else ""
    for name, value in rows.items():
        if value:
            table.add_row(name, escape(value))
    Console().print(table)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _print_record(index: int, record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"record {index}", show_header=False, title_justify="left")
    for name, value in record.items():
        shown = value if isinstance(value, list) else [value]
        if isinstance(value, list):
            name = f"{name} ({len(value)})"
        table.add_row(name, "\n".join(escape(_cut(item)) for item in shown[:3]) + ("\n..." if len(shown) > 3 else ""))
    Console().print(table)


def _cut(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 200 else text[:199] + "…"
