"""`conan tokenizer`: train one, look at it, encode with it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from conan_jax.errors import ConfigError

app = typer.Typer(help="Train a SentencePiece tokenizer, show it, encode with it.", no_args_is_help=True, rich_markup_mode="rich")

_TRAIN_EXAMPLES = """[bold]Examples[/bold]

 conan tokenizer train data/wiki data/qa --out tokenizer --vocab-size 8000

 conan tokenizer train --config configs/conan_v2.py

 conan tokenizer train --config configs/demo.py --set tokenizer.vocab_size=16000 --set model.vocab_size=16000

Datasets are folders made by [bold]conan data build[/bold]. The same texts and settings always give the same tokenizer.
"""
_INFO_EXAMPLES = """[bold]Examples[/bold]

 conan tokenizer info runs/demo

 conan tokenizer info tokenizer --json | jq -r .sha256
"""
_ENCODE_EXAMPLES = """[bold]Examples[/bold]

 conan tokenizer encode tokenizer "how do I read a file?"

 conan tokenizer encode tokenizer --pieces < notes.txt
"""

_VOCAB_SIZE = "Tokens, the 256 bytes and 4 special ids included.  [dim]default: 151000[/dim]"
_COVERAGE = "Share of characters that get a token; the rest is bytes.  [dim]default: 0.9999[/dim]"
_SAMPLE = "Train on a spread sample of this size.  [dim]default: 2000000000[/dim]"

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the tokenizer or its model file, or a run that has one.")]


@app.command("train", epilog=_TRAIN_EXAMPLES)
def train(
    datasets: Annotated[Optional[list[Path]], typer.Argument(metavar="DATASET...", help="Folders of built datasets.")] = None,
    config: Annotated[Optional[str], typer.Option("--config", help="Train this recipe's tokenizer in its data folder.")] = None,
    overrides: Annotated[Optional[list[str]], typer.Option("--set", metavar="KEY=VALUE", help="With --config: override a value.")] = None,
    out: Annotated[Optional[Path], typer.Option("--out", "-o", help="Folder of the tokenizer.")] = None,
    vocab_size: Annotated[Optional[int], typer.Option(help=_VOCAB_SIZE)] = None,
    character_coverage: Annotated[Optional[float], typer.Option(help=_COVERAGE)] = None,
    max_training_bytes: Annotated[Optional[int], typer.Option(help=_SAMPLE)] = None,
) -> None:
    """Train BPE with byte fallback: every Unicode text can be encoded and decodes to the same text."""
    from rich.console import Console

    from conan_jax import config as settings

    given = {"vocab_size": vocab_size, "character_coverage": character_coverage, "max_training_bytes": max_training_bytes}
    given = {name: value for name, value in given.items() if value is not None}
    if config is not None:
        from conan_jax import config_io
        from conan_jax.data.prepare import prepare_tokenizer

        if datasets or out or given:
            raise ConfigError("--config names datasets, folder and settings itself; change them with --set tokenizer.KEY=VALUE")
        run = config_io.load_run(config, overrides or [])
        out, tokenizer = prepare_tokenizer(run, console=Console(stderr=True))
    else:
        from conan_jax.data.prepare import dataset_texts
        from conan_jax.data.tokenizer import train_tokenizer

        if not datasets or out is None or overrides:
            raise ConfigError("give dataset folders and --out DIR, or --config FILE (with --set); see conan tokenizer train --help")
        before = _sha256(out)
        tokenizer = train_tokenizer(dataset_texts(datasets), settings.Tokenizer(**given), out)
        if before not in (None, tokenizer.sha256):
            typer.echo(f"conan: it replaces the tokenizer {before[:12]}, which models trained with it still need", err=True)
    typer.echo(f"{out}: {tokenizer.vocab_size:,} tokens, sha256 {tokenizer.sha256}")


def _sha256(folder: Path) -> str | None:
    from conan_jax.data.tokenizer import Tokenizer
    from conan_jax.errors import DataError

    try:
        return Tokenizer.load(folder).sha256
    except DataError:
        return None


def _of_run(folder: Path) -> Path:
    """The folder of the tokenizer that a run was prepared with; `folder` itself where it is not a run."""
    from conan_jax import config_io
    from conan_jax.data.prepared import FILE, tokenizer_places
    from conan_jax.files import read_json

    if not (folder / FILE).is_file() or not (folder / "config.json").is_file():
        return folder
    places = tokenizer_places(folder, config_io.from_dict(read_json(folder / "config.json")))
    return next((place for place in places if place.is_dir()), folder)


@app.command("info", epilog=_INFO_EXAMPLES)
def info(folder: Folder, as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False) -> None:
    """Show the vocabulary, special ids, sha256 and training settings."""
    from conan_jax.data.tokenizer import Tokenizer, read_settings

    folder = _of_run(folder)
    tokenizer = Tokenizer.load(folder)
    special = {"pad": tokenizer.pad_id, "unk": tokenizer.unk_id, "bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    settings = read_settings(folder) if folder.is_dir() else {}
    described = {**settings, "vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256, "special_ids": special}
    if as_json:
        typer.echo(json.dumps(described, indent=2, ensure_ascii=False))
    else:
        for name, value in described.items():
            typer.echo(f"{name}: {value}")


@app.command("encode", epilog=_ENCODE_EXAMPLES)
def encode(
    folder: Folder,
    text: Annotated[Optional[str], typer.Argument(metavar="TEXT", help="Text to encode. Default: standard input.")] = None,
    pieces: Annotated[bool, typer.Option("--pieces", help="Show the text of each token instead of its id.")] = False,
) -> None:
    """Print the tokens of a text, without special ids."""
    from conan_jax.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(_of_run(folder))
    if text is None:
        try:
            text = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"standard input is not UTF-8 (byte {error.start})") from None
    ids = tokenizer.encode(text)
    typer.echo(json.dumps([tokenizer.decode([i]) for i in ids], ensure_ascii=False) if pieces else " ".join(map(str, ids)))
