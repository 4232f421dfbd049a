"""`conan encode`: a file of texts -> a file of vectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from conan_jax.errors import ConfigError, DataError

EXAMPLES = """[bold]Examples[/bold]

 conan encode docs.jsonl docs.npy --model runs/small

 conan encode docs.csv.gz docs.parquet --model exports/small --field body --id-field id --truncate-dim 128

 conan encode questions.txt questions.npy --model runs/small --prompt-name query

 conan encode docs.jsonl docs.3.npy --model runs/small --shard 3/8      # one of eight machines

 conan encode docs.jsonl docs.npy --model runs/small --precision ubinary --json

The same command continues after an interruption and writes the same bytes. An existing OUT is replaced only with --force.
Search the result with [bold]conan search --corpus[/bold].
"""


def encode(
    source: Annotated[str, typer.Argument(metavar="IN", help="jsonl, csv, tsv, parquet or txt (a text a line), each with or without .gz; "
                                                             "a glob or a directory of them.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="OUT.npy, or OUT.parquet with the columns id and embedding.")],
    model: Annotated[Path, typer.Option("--model", help="Folder of a run, a stage, or an export.")],
    text_field: Annotated[str, typer.Option("--field", help="Name of the text field.")] = "text",
    id_field: Annotated[Optional[str], typer.Option(
        "--id-field", help="Name of the id field.  [dim]default: number the texts[/dim]")] = None,
    prompt_name: Annotated[Optional[str], typer.Option(
        "--prompt-name", help="Name of the model's prompt for the texts.  [dim]default: document[/dim]")] = None,
    prompt: Annotated[Optional[str], typer.Option("--prompt", help="Prompt text to put before each text.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Maximum number of texts that a device encodes at once.")] = 256,
    precision: Annotated[str, typer.Option(
        "--precision",
        help="float32, int8, uint8, binary or ubinary. int8 and uint8 take each dimension's range from the texts of this call "
                            "unless --ranges is given; shards need --ranges, the same for all.")] = "float32",
    ranges: Annotated[Optional[Path], typer.Option(
        "--ranges", metavar="SAMPLE.npy", help="float32 vectors whose lowest and highest values int8 and uint8 use.")] = None,
    truncate_dim: Annotated[Optional[int], typer.Option(
        "--truncate-dim", help="Keep only this many dimensions, and normalise again.")] = None,
    max_length: Annotated[Optional[int], typer.Option("--max-length",
        help="Maximum number of tokens; longer texts are cut.  [dim]default: 512[/dim]")] = None,
    shard: Annotated[Optional[str], typer.Option("--shard", metavar="I/N", help="Encode part I of N, 1 <= I <= N.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing OUT, or one that was started with other settings.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the description of the result as JSON.")] = False,
) -> None:
    """Encode a corpus in bounded memory, on all local devices."""
    from conan_jax.inference.corpus import Settings, check_settings, encode_corpus
    from conan_jax.inference.encoder import Encoder
    from conan_jax.inference.precision import kept_dimensions
    from conan_jax.inference.source import TextSource

    texts = TextSource(source, text_field, id_field)
    piece = _shard(shard)
    encoder = Encoder.load(model)
    settings = Settings(prompt=encoder.prompt(prompt_name or "document", prompt), batch_size=batch_size,
                        precision=precision, truncate_dim=truncate_dim, max_length=max_length, shard=piece)
    sample = None if ranges is None else _ranges(ranges, kept_dimensions(truncate_dim, encoder.dimension), truncate_dim)
    check_settings(encoder, out, settings, sample)
    with _Bar(f"encoding {out.name}") as bar:
        meta = encode_corpus(encoder, texts, out, settings, ranges=sample, force=force, advance=bar, say=bar.say)
    if as_json:
        typer.echo(json.dumps(meta, ensure_ascii=False))
    else:
        typer.echo(f"{out}: {meta['count']:,} x {meta['dimension']} {meta['precision']}")


def _shard(text: str | None) -> tuple[int, int]:
    if text is None:
        return 1, 1
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal()):
        raise ConfigError(f"--shard {text!r} must be I/N, for instance 3/8")
    return int(index), int(count)


def _ranges(file: Path, dimension: int, truncate_dim: int | None) -> Any:
    import numpy as np

    from conan_jax.inference.precision import ranges_of

    try:
        sample = np.load(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as .npy: {error}") from error
    if sample.ndim != 2 or not np.issubdtype(sample.dtype, np.floating):
        raise DataError(f"{file} holds {sample.dtype}{list(sample.shape)}; --ranges takes float vectors, as `conan encode` writes them")
    if sample.shape[1] != dimension:
        how = "without --truncate-dim, by the model of this run" if truncate_dim is None else f"with --truncate-dim {truncate_dim}"
        raise ConfigError(f"{file} holds vectors of {sample.shape[1]} numbers, this run writes {dimension}: encode the sample {how}")
    return ranges_of(sample)


class _Bar:
    """Rows done, rows a second since this start, time left; on standard error."""

    def __init__(self, title: str) -> None:
        from rich.console import Console

        from conan_jax.inference.progress import text_bars

        self._progress = text_bars(console=Console(stderr=True))
        self._task = self._progress.add_task(title, total=None, rate="")
        self._first: int | None = None

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, line: str) -> None:
        self._progress.console.print(f"conan: {line}", highlight=False, soft_wrap=True)

    def __call__(self, done: int, total: int) -> None:
        from conan_jax.inference.progress import rate

        if self._first is None:
            self._first = done
            self._progress.reset(self._task, total=total, completed=done)
        elapsed = self._progress.tasks[0].elapsed or 0
        self._progress.update(self._task, completed=done, rate=rate((done - self._first) / elapsed if elapsed else None))
