"""Raw records out of files or TFDS, in a fixed order, with the place each one came from.

A reader never holds more than one record (parquet: one batch of 1,024) in memory, whatever the size of the file.
"""

from __future__ import annotations

import csv
import fnmatch
import glob
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from conan_jax.data.lines import COMPRESSIONS, MAX_LINE_BYTES, read_lines
from conan_jax.data.locations import expand_variables
from conan_jax.data.manifest import MANIFEST
from conan_jax.data.schema import Reject, is_blank, shortened
from conan_jax.errors import DataError

MAX_RECORD_BYTES = MAX_LINE_BYTES  # of one line or paragraph; longer ones are skipped unread
SEPARATOR = ";"
TEXT_UNITS = ("paragraph", "line", "file")
EVERY_LINE = "every line"  # as "line", and blank lines too: for readers whose rows are numbered as the lines of the file


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
    left_out: tuple[Path, ...] = ()  # files of no known type below a directory, directories that a pattern matched

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that will be read, in order."""
        return tuple(part for part in self.parts if isinstance(part, Path))

    @property
    def total_bytes(self) -> int | None:
        """Bytes on disk to read; None when a TFDS part makes that unknown."""
        return sum(file.stat().st_size for file in self.files) if len(self.files) == len(self.parts) else None

    @property
    def note(self) -> str:
        """A sentence that names what is left out; empty when all is read."""
        if not self.left_out:
            return ""
        names = ", ".join(map(str, self.left_out[:5])) + (", ..." if len(self.left_out) > 5 else "")
        return f"{len(self.left_out):,} files or folders of no known type are left out of {self.source}: {names}"


def expand(source: str) -> Plan:
    """Resolve `source`: paths, globs (`**` too), directories or `tfds:NAME[/CONFIG]:SPLIT`, several joined by ";".

    `$NAME` and `${NAME}` are taken from the environment; a path that exists as it is written is taken as it is. A directory stands
    for all files below it that have a known suffix, in upper or lower case, hidden ones excepted. Symbolic links are followed.
    Files of one pattern come sorted by name; none is read twice, whatever number of links lead to it.

    Raises:
        DataError: a variable is not set, nothing matches, a file is of no known type, or a link leads to nothing.
    """
    parts: list[Path | str] = []
    left_out: list[Path] = []
    seen: set[str] = set()
    for part in split(source):
        if part.startswith("tfds:"):
            parts.append(part)
            continue
        path = Path(os.path.expanduser(part))
        found, others = _in_directory(path) if path.is_dir() else _matching(path, source)
        left_out += others
        for file in found:
            if (real := os.path.realpath(file)) not in seen:
                seen.add(real)
                parts.append(file)
    if not parts:
        raise DataError("the source is empty; give a file, a glob, a directory or tfds:NAME[/CONFIG]:SPLIT")
    return Plan(source, tuple(parts), tuple(left_out))


def files_below(folder: Path) -> list[Path]:
    """All files below `folder`, sorted, hidden files and folders excepted. Symbolic links are followed, each folder is entered once.

    Raises `DataError` for a link that leads to nothing and for a folder that cannot be read.
    """
    files: list[Path] = []
    links: list[Path] = []
    seen: set[str] = set()

    def walk(directory: Path) -> None:
        if (real := os.path.realpath(directory)) in seen:
            return
        seen.add(real)
        try:
            entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"{directory} cannot be read: {error.strerror}") from None
        for entry in entries:
            path = directory / entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_symlink() and not os.path.exists(path):
                raise DataError(f"{path} is a link to {os.readlink(path)}, which is not there; remove the link, or restore the file")
            if entry.is_dir(follow_symlinks=False):
                walk(path)
            elif entry.is_dir():
                links.append(path)
            elif entry.is_file():
                files.append(path)

    walk(folder)
    while links:  # after all that is here without links, so that files keep the names they have here
        walk(links.pop(0))
    return _once(files)


def _once(files: Iterable[Path]) -> list[Path]:
    """`files` sorted, each file once, under the shortest of its names."""
    names: dict[str, Path] = {}
    for file in sorted(files, key=lambda file: (len(file.parts), file)):
        names.setdefault(os.path.realpath(file), file)
    return sorted(names.values())


def split(source: str) -> list[str]:
    """The parts of a source, variables expanded; a ";" or "$" in the name of a path that exists belongs to the name."""
    pieces, parts = source.split(SEPARATOR), []
    while pieces:
        whole = next((n for n in range(len(pieces), 0, -1) if os.path.exists(SEPARATOR.join(pieces[:n]).strip())), 0)
        part = SEPARATOR.join(pieces[: whole or 1]).strip()
        pieces = pieces[whole or 1 :]
        if part:
            parts.append(part if whole else expand_variables(part))
    return parts


def _in_directory(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files of known types below `folder`, and the others."""
    files = files_below(folder)
    built = next((file for file in files if ".array_record" in file.name), None)
    if built is not None:
        if (built.parent / MANIFEST).exists():
            raise DataError(f"{built.parent} is a built dataset already. A recipe takes its folder as the whole source of a dataset; "
                            "to build another one, name the raw files")
        raise DataError(f"{built.parent} is an ArrayRecord dataset already; read it as tfds:{built.parent.absolute()}:SPLIT")
    known = [file for file in files if _format(file)]
    if not known:
        raise DataError(f"the directory {folder} holds no file of a known type ({_KNOWN})")
    return known, [file for file in files if not _format(file)]


def _matching(pattern: Path, source: str) -> tuple[list[Path], list[Path]]:
    """The files that `pattern` names, and the directories that it matches and of which it takes no file."""
    found = [pattern] if pattern.is_file() else _glob(pattern)
    for path in found:
        if not path.exists():
            raise DataError(f"{path} is a link to {os.readlink(path)}, which is not there; remove the link, or restore the file")
    files = _once(path for path in found if path.is_file())
    if not files:
        raise DataError(f"no file matches {pattern}" + (f" (from {source})" if str(pattern) != source else "") + "; check the path")
    for file in files:
        if _format(file) is None:
            raise DataError(f"{file} is of no known type; name it {_KNOWN}")
    entered = {parent for file in files for parent in file.parents}
    return files, sorted(path for path in found if path.is_dir() and path not in entered and path.resolve() not in entered)


def _glob(pattern: Path) -> list[Path]:
    """As `glob.glob`, but `**` enters each folder once: two links to a folder above make 2^40 paths there."""
    if "**" not in pattern.parts:
        return [Path(path) for path in glob.glob(str(pattern))]
    place = pattern.parts.index("**")
    heads = [Path(head) for head in glob.glob(str(Path(*pattern.parts[:place])))] if place else [Path()]
    return [file for head in heads if head.is_dir() for file in files_below(head)
            if _fits(file.relative_to(head).parts, pattern.parts[place:])]


def _fits(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern or not parts:
        return not parts and all(part == "**" for part in pattern)
    if pattern[0] == "**":
        return _fits(parts, pattern[1:]) or _fits(parts[1:], pattern)
    return fnmatch.fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])


def _format(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
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
        for item in read_file(part, fields):
            yield item._replace(done=before + item.done)
        before += part.stat().st_size


def read_file(path: Path, fields: Mapping[str, str] | None = None) -> Iterator[Item]:
    """All raw records of one file of a known type, in order, as `read` gives them."""
    for where, raw, done in _READERS[_format(path) or ""](path, fields or {}):
        yield Item(f"{path}:{where}", raw, done)


def _too_long() -> Reject:
    return Reject("too_long", f"longer than {MAX_RECORD_BYTES:,} bytes")


def _jsonl(path: Path, fields: Mapping[str, str]) -> Iterator[tuple[int, Any, int]]:
    for number, line, done in read_lines(path, MAX_RECORD_BYTES):
        if line is None:
            yield number, _too_long(), done
        elif line.strip():
            raw = parse_json(line)
            if number == 1:
                _check_one_value_a_line(path, line.strip(), raw)
            yield number, raw, done


def _check_one_value_a_line(path: Path, line: bytes, raw: Any) -> None:
    """Refuse a file that is one JSON value over several lines, or one array of objects on its first line."""
    if line.startswith(b"[") and (isinstance(raw, Reject) or (isinstance(raw, list) and all(isinstance(item, dict) for item in raw))):
        raise DataError(f"{path} is one JSON array, not one object a line; convert it: jq -c '.[]' IN > OUT.jsonl")
    if line == b"{":
        raise DataError(f"{path} has a JSON object over several lines, not one object a line; convert it: jq -c . IN > OUT.jsonl")


def parse_json(line: bytes) -> Any:
    """The JSON value of a line, or a `Reject` that says why the line has none. An object that gives a key twice has none."""

    def reject(reason: str, detail: str) -> Reject:
        return Reject(reason, detail, line[:2000].decode("utf-8", "replace"))

    if b"\0" in line:
        return reject("nul", f"the line holds a NUL byte at {line.index(0)}")
    try:
        return json.loads(line.decode("utf-8"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        return reject("invalid_utf8", f"{error.reason} at byte {error.start}")
    except json.JSONDecodeError as error:
        return reject("broken_json", f"{error.msg} at character {error.pos}")
    except KeyError as error:
        return reject("repeated_key", f"the key {error.args[0][:80]!r} is given twice in one object")
    except (ValueError, RecursionError) as error:  # a number of too many digits, too deep a nesting
        return reject("broken_json", str(error))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise KeyError(_repeated(names)[0])
    return found


def _table(path: Path, fields: Mapping[str, str]) -> Iterator[tuple[int, Any, int]]:
    """csv with quotes (RFC 4180); tsv without any, as text/tab-separated-values has it, unless its header is quoted. Both with a header.

    A cell of an unquoted tsv that is wholly in quotes is a reject: whether they belong to the text cannot be known.
    """
    tsv = _format(path) == ".tsv"
    csv.field_size_limit(MAX_RECORD_BYTES)
    number = done = 0

    def lines() -> Iterator[str]:
        nonlocal number, done
        for number, line, done in read_lines(path, MAX_RECORD_BYTES):
            if line is None:
                raise DataError(f"{path}:{number} is longer than {MAX_RECORD_BYTES:,} bytes; is it really a table?")
            yield line.decode("utf-8", "surrogateescape") + "\n"  # bad bytes are found, and counted, by schema.parse

    source = lines()
    first = next(source, None)
    if first is None:
        raise DataError(f"{path} is empty; a table needs a header line")
    unquoted = tsv and not all(map(_quoted, first.rstrip("\n").split("\t")))
    rows = csv.reader(itertools.chain([first], source), strict=not unquoted, delimiter="\t" if tsv else ",",
                      quoting=csv.QUOTE_NONE if unquoted else csv.QUOTE_MINIMAL)
    header: list[str] | None = None
    end = 0
    while True:
        start = end + 1
        try:
            row = next(rows)
        except StopIteration:
            break
        except csv.Error as error:
            end = number
            if "unexpected end of data" in str(error) or "field larger than" in str(error):
                raise DataError(f"{path}: the quote opened at or after line {start} is never closed; "
                                "fix the file or save it as jsonl") from None
            yield start, Reject("broken_row", f"lines {start}-{number}: {error}"), done
            continue
        end = number
        if header is None:
            header = row
            if len(set(header)) != len(header):
                raise DataError(f"{path} names a column twice in its header: {shortened(_repeated(header))}")
        elif row:
            excerpt = (",\t"[tsv]).join(row)[:2000]
            if len(row) != len(header):
                what = f"{len(row)} columns, the header has {len(header)} ({shortened(header)})"
                yield start, Reject("broken_row", what, excerpt), done
            elif unquoted and (quoted := next(filter(_quoted, row), None)) is not None:
                what = f"{quoted[:80]!r} is wholly in quotes, and tsv has none; save the file as csv, or as jsonl if they belong to the text"
                yield start, Reject("quoted_cell", what, excerpt), done
            else:
                yield start, dict(zip(header, row)), done


def _repeated(names: Sequence[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _quoted(cell: str) -> bool:
    """True for a cell that a writer of quoted tables may have made: in quotes, and each quote inside of it doubled."""
    return len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in cell[1:-1].replace('""', "")


def _plain(path: Path, fields: Mapping[str, str]) -> Iterator[tuple[int, Any, int]]:
    """Paragraphs (parted by blank lines), lines, or the whole file."""
    unit = fields.get("text", "paragraph")
    if unit not in (*TEXT_UNITS, EVERY_LINE):
        raise DataError(f"{path} is plain text, which has no column {unit!r}; map text to one of {', '.join(TEXT_UNITS)}")
    held: list[str] = []
    start, size, done = 1, 0, 0

    def taken() -> Any:
        return _too_long() if size > MAX_RECORD_BYTES else {unit: "\n".join(held).strip("\n")}

    for number, line, done in read_lines(path, MAX_RECORD_BYTES):
        text = None if line is None else line.decode("utf-8", "surrogateescape")
        if text is not None and is_blank(text) and unit not in ("file", EVERY_LINE):
            if size:
                yield start, taken(), done
            held, size = [], 0
        elif unit in ("line", EVERY_LINE):
            yield number, _too_long() if text is None else {"line": text}, done
        else:
            start = start if size else number
            size += MAX_RECORD_BYTES + 1 if line is None else len(line) + 1
            held = [] if size > MAX_RECORD_BYTES else held
            held.append(text or "")
    if size and (unit != "file" or not is_blank("".join(held))):
        yield start, taken(), done


def _parquet(path: Path, fields: Mapping[str, str]) -> Iterator[tuple[int, Any, int]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        size = path.stat().st_size
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if len(set(names)) != len(names):
                raise DataError(f"{path} has a column twice: {shortened(_repeated(names))}")
            total = max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(batch_size=1024):
                done = size * min(row + len(batch), total) // total
                try:
                    records: list[Any] = batch.to_pylist()
                except Exception:  # text that is not UTF-8, a date beyond year 9999, ...: of some rows only
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
    except Exception as error:  # pyarrow raises many types for values that Python cannot hold
        return Reject("broken_row", f"{type(error).__name__}: {error}")


_READERS = {".jsonl": _jsonl, ".json": _jsonl, ".ndjson": _jsonl, ".csv": _table, ".tsv": _table, ".parquet": _parquet, ".txt": _plain}
_KNOWN = f"{', '.join(_READERS)}, each as it is or compressed ({', '.join(COMPRESSIONS)})"
