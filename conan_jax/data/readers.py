"""Raw records out of files or TFDS, in a fixed order, with the place each one came from.

A reader never holds more than one record (parquet: one batch of 1,024) in memory, whatever the size of the file.
"""

from __future__ import annotations

import csv
import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from conan_jax.data.locations import expand_variables
from conan_jax.data.schema import Reject, is_blank
from conan_jax.errors import DataError

MAX_RECORD_BYTES = 64 * 2**20  # of one line or paragraph; longer ones are skipped unread
SEPARATOR = ";"
TEXT_UNITS = ("paragraph", "line", "file")


class Item(NamedTuple):
    """One raw record, or why it cannot be read; where it is; and the units (see `Plan.unit`) consumed so far."""

    location: str
    raw: Any | Reject
    done: int


@dataclass(frozen=True)
class Plan:
    """What a source string stands for: files in reading order, or TFDS datasets."""

    source: str
    parts: tuple[Path | str, ...]  # a str is a "tfds:" part

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that will be read, in order."""
        return tuple(part for part in self.parts if isinstance(part, Path))

    @property
    def total_bytes(self) -> int | None:
        """Bytes on disk to read; None when a TFDS part makes that unknown."""
        return sum(file.stat().st_size for file in self.files) if len(self.files) == len(self.parts) else None


def expand(source: str) -> Plan:
    """Resolve `source`: paths, globs (`**` too), directories or `tfds:NAME[/CONFIG]:SPLIT`, several joined by ";".

    `$NAME` and `${NAME}` are taken from the environment. A directory stands for all files below it that have a
    known suffix, hidden ones excepted. Files of one pattern come sorted by name; none is read twice.

    Raises:
        DataError: a variable is not set, nothing matches, or a file is of no known type.
    """
    parts: list[Path | str] = []
    seen: set[str] = set()
    for part in filter(None, (p.strip() for p in source.split(SEPARATOR))):
        part = expand_variables(part)
        if part.startswith("tfds:"):
            parts.append(part)
            continue
        for file in _files(part, source):
            if (real := os.path.realpath(file)) not in seen:
                seen.add(real)
                parts.append(file)
    if not parts:
        raise DataError("the source is empty; give a file, a glob, a directory or tfds:NAME[/CONFIG]:SPLIT")
    return Plan(source, tuple(parts))


def _files(pattern: str, source: str) -> list[Path]:
    path = Path(os.path.expanduser(pattern))
    if path.is_dir():
        if any(path.glob("*.array_record*")):
            raise DataError(f"{path} is an ArrayRecord dataset already; read it as tfds:{path}:train, or train on it as it is")
        files = sorted(f for f in path.rglob("*") if f.is_file() and _format(f) and not _hidden(f.relative_to(path)))
        if not files:
            raise DataError(f"the directory {path} holds no file of a known type ({', '.join(_READERS)}, each with or without .gz)")
        return files
    files = [path] if path.is_file() else sorted(Path(p) for p in glob.glob(str(path), recursive=True) if os.path.isfile(p))
    if not files:
        raise DataError(f"no file matches {path}" + (f" (from {source})" if str(path) != source else "") + "; check the path")
    for file in files:
        if _format(file) is None:
            raise DataError(f"{file} is of no known type; name it {', '.join(_READERS)}, each with or without .gz")
    return files


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _format(path: Path) -> str | None:
    suffixes = path.suffixes[:-1] if path.suffix == ".gz" else path.suffixes
    return suffixes[-1] if suffixes and suffixes[-1] in _READERS else None


def read(plan: Plan, fields: Mapping[str, str] | None = None, *, tfds_data_dir: str | None = None) -> Iterator[Item]:
    """All raw records of `plan`, in order. `fields={"text": "line"}` (or "file") changes the unit of plain text.

    Raises:
        DataError: a file cannot be read on: a truncated gzip, a damaged parquet, an unclosed quote, UTF-16.
    """
    before = 0
    for part in plan.parts:
        if isinstance(part, str):
            from conan_jax.data import tfds_reader  # the import takes a second; most sources are files

            yield from tfds_reader.read(part, before, data_dir=tfds_data_dir)
            continue
        reader = _READERS[_format(part) or ""]
        done = 0
        for where, raw, done in reader(part, fields or {}):
            yield Item(f"{part}:{where}", raw, before + done)
        before += part.stat().st_size


class _Opened:
    """A binary stream over a file, unzipped if need be, with the position in the file on disk."""

    def __init__(self, path: Path) -> None:
        try:
            self._disk = open(path, "rb")
        except OSError as error:
            raise DataError(f"{path} cannot be opened: {error.strerror}") from None
        self.stream: BinaryIO = gzip.open(self._disk) if path.suffix == ".gz" else self._disk  # type: ignore[assignment]

    def __enter__(self) -> _Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()
        self._disk.close()

    @property
    def done(self) -> int:
        return self._disk.tell()


def _lines(path: Path, opened: _Opened) -> Iterator[tuple[int, bytes | None]]:
    """(line number, line without its end), or None for one that is too long. Refuses UTF-16, drops a BOM."""
    number = 0
    try:
        while line := opened.stream.readline(MAX_RECORD_BYTES):
            number += 1
            if number == 1:
                if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise DataError(f"{path} is UTF-16; convert it: iconv -f UTF-16 -t UTF-8 IN > OUT")
                line = line.removeprefix(b"\xef\xbb\xbf")
            if len(line) >= MAX_RECORD_BYTES - 3 and not line.endswith(b"\n"):
                while (rest := opened.stream.readline(MAX_RECORD_BYTES)) and not rest.endswith(b"\n"):
                    pass
                yield number, None
            else:
                yield number, line.rstrip(b"\r\n")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is truncated or damaged after line {number:,} ({error}); fetch or compress it again") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read after line {number:,}: {error}") from None


def _too_long() -> Reject:
    return Reject("too_long", f"longer than {MAX_RECORD_BYTES:,} bytes")


def _jsonl(path: Path, fields: Mapping[str, str]) -> Iterator[tuple[int, Any, int]]:
    with _Opened(path) as opened:
        for number, line in _lines(path, opened):
            if number == 1 and line is not None and line.lstrip().startswith(b"["):
                raise DataError(f"{path} is one JSON array, not one object a line; convert it: jq -c '.[]' IN > OUT.jsonl")
            if line is None:
                yield number, _too_long(), opened.done
            elif line.strip():
                yield number, _json(line), opened.done


def _json(line: bytes) -> Any:
    def reject(reason: str, detail: str) -> Reject:
        return Reject(reason, detail, line[:2000].decode("utf-8", "replace"))

    if b"\0" in line:
        return reject("nul", f"the line holds a NUL byte at {line.index(0)}")
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return reject("invalid_utf8", f"{error.reason} at byte {error.start}")
    except json.JSONDecodeError as error:
        return reject("broken_json", f"{error.msg} at character {error.pos}")
    except (ValueError, RecursionError) as error:  # a number of too many digits, too deep a nesting
        return reject("broken_json", str(error))


def _table(path: Path, fields: Mapping[str, str]) -> Iterator[tuple[int, Any, int]]:
    """csv with quotes (RFC 4180); tsv without any, as the text/tab-separated-values type has it. Both with a header."""
    tsv = _format(path) == ".tsv"
    csv.field_size_limit(MAX_RECORD_BYTES)
    with _Opened(path) as opened:
        number = 0

        def lines() -> Iterator[str]:
            nonlocal number
            for number, line in _lines(path, opened):
                if line is None:
                    raise DataError(f"{path}:{number} is longer than {MAX_RECORD_BYTES:,} bytes; is it really a table?")
                yield line.decode("utf-8", "surrogateescape") + "\n"  # bad bytes are found, and counted, by schema.parse

        rows = csv.reader(lines(), delimiter="\t", quoting=csv.QUOTE_NONE) if tsv else csv.reader(lines(), strict=True)
        header: list[str] | None = None
        while True:
            start = number + 1
            try:
                row = next(rows)
            except StopIteration:
                break
            except csv.Error as error:
                if "unexpected end of data" in str(error) or "field larger than" in str(error):
                    raise DataError(f"{path}: the quote opened at or after line {start} is never closed; "
                                    "fix the file or save it as jsonl") from None
                yield start, Reject("broken_row", f"lines {start}-{number}: {error}"), opened.done
                continue
            if header is None:
                header = row
                if len(set(header)) != len(header):
                    raise DataError(f"{path} names a column twice in its header: {', '.join(header)}")
            elif row:
                if len(row) != len(header):
                    what = f"{len(row)} columns, the header has {len(header)} ({', '.join(header)})"
                    yield start, Reject("broken_row", what, (",\t"[tsv]).join(row)[:2000]), opened.done
                else:
                    yield start, dict(zip(header, row)), opened.done
        if header is None:
            raise DataError(f"{path} is empty; a table needs a header line")


def _plain(path: Path, fields: Mapping[str, str]) -> Iterator[tuple[int, Any, int]]:
    """Paragraphs (parted by blank lines), lines, or the whole file."""
    unit = fields.get("text", "paragraph")
    if unit not in TEXT_UNITS:
        raise DataError(f"{path} is plain text, which has no column {unit!r}; map text to one of {', '.join(TEXT_UNITS)}")
    held: list[str] = []
    start, size = 1, 0

    def taken() -> Any:
        return _too_long() if size > MAX_RECORD_BYTES else {unit: "\n".join(held).strip("\n")}

    with _Opened(path) as opened:
        for number, line in _lines(path, opened):
            text = None if line is None else line.decode("utf-8", "surrogateescape")
            if text is not None and is_blank(text) and unit != "file":
                if size:
                    yield start, taken(), opened.done
                held, size = [], 0
            elif unit == "line":
                yield number, _too_long() if text is None else {unit: text}, opened.done
            else:
                start = start if size else number
                size += MAX_RECORD_BYTES + 1 if line is None else len(line) + 1
                held = [] if size > MAX_RECORD_BYTES else held
                held.append(text or "")
        if size and (unit != "file" or not is_blank("".join(held))):
            yield start, taken(), opened.done


def _parquet(path: Path, fields: Mapping[str, str]) -> Iterator[tuple[int, Any, int]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        size = path.stat().st_size
        with pq.ParquetFile(path) as file:
            total = max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(batch_size=1024):
                done = size * min(row + len(batch), total) // total
                try:
                    records: list[Any] = batch.to_pylist()
                except UnicodeDecodeError:
                    records = [_parquet_row(batch, i) for i in range(len(batch))]
                for record in records:
                    row += 1
                    yield row, record, done
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable parquet file after row {row:,} ({error}); fetch or write it again") from None


def _parquet_row(batch: Any, index: int) -> Any:
    try:
        return batch.slice(index, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        return Reject("invalid_utf8", f"{error.reason} at byte {error.start}")


_READERS = {".jsonl": _jsonl, ".json": _jsonl, ".ndjson": _jsonl, ".csv": _table, ".tsv": _table, ".parquet": _parquet, ".txt": _plain}
