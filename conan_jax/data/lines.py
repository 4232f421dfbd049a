"""Lines of a text file with their numbers: decompressed, without a byte order mark, of bounded length.

All files of text are read through `read_lines`: training data, evaluation sets, queries. A line ends in a line feed, with or
without carriage returns before it. Other characters that Unicode counts as line ends (U+2028, U+0085, a form feed) belong to the line.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from conan_jax.errors import DataError

MAX_LINE_BYTES = 64 * 2**20  # longer lines are skipped unread


def _zstd(file: BinaryIO) -> BinaryIO:
    import pyarrow as pa  # the import takes a moment; few sources are .zst

    return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd"))  # type: ignore[arg-type]


_OPENERS: dict[str, Callable[[BinaryIO], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstd}
COMPRESSIONS = tuple(_OPENERS)  # suffixes, in lower case
_MAGIC = {".gz": re.compile(rb"\x1f\x8b"), ".bz2": re.compile(rb"BZh[1-9]1AY&SY"), ".xz": re.compile(rb"\xfd7zXZ\0"),
          ".zst": re.compile(rb"\x28\xb5\x2f\xfd")}
_OTHER_UNICODE = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_BOM = b"\xef\xbb\xbf"


class Line(NamedTuple):
    """Number from 1; bytes without the line end, None if longer than `MAX_LINE_BYTES`; bytes of the file on disk read so far."""

    number: int
    content: bytes | None
    done: int


def read_lines(path: Path, limit: int = MAX_LINE_BYTES) -> Iterator[Line]:
    """All lines of `path`, blank ones too. `.gz`, `.bz2`, `.xz` and `.zst` are decompressed; a UTF-8 byte order mark is dropped.

    Raises:
        DataError: the file cannot be opened, is damaged or cut short, is UTF-16 or UTF-32, or is compressed and not named so.
    """
    number = 0
    try:
        with open(path, "rb") as disk:
            _check_start(path, disk)
            opener = _OPENERS.get(path.suffix.lower())
            stream = disk if opener is None else opener(disk)
            while line := stream.readline(limit):
                number += 1
                if number == 1:
                    _check_unicode(path, line)
                    line = line.removeprefix(_BOM)
                if len(line) >= limit - len(_BOM) and not line.endswith(b"\n"):
                    while (rest := stream.readline(limit)) and not rest.endswith(b"\n"):
                        pass
                    yield Line(number, None, disk.tell())
                else:
                    yield Line(number, line.rstrip(b"\r\n"), disk.tell())
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise _damaged(path, number, error) from None
    except OSError as error:
        if error.errno is None:  # of a decompressor, not of the system
            raise _damaged(path, number, error) from None
        raise DataError(f"{path} cannot be read after line {number:,}: {error.strerror}") from None


def _damaged(path: Path, number: int, error: Exception) -> DataError:
    return DataError(f"{path} is truncated or damaged after line {number:,} ({error}); fetch or compress it again")


def _check_start(path: Path, disk: BinaryIO) -> None:
    """Refuse a compressed file of no bytes, and one whose name does not say that it is compressed."""
    start = disk.read(16)
    disk.seek(0)
    if path.suffix.lower() in _OPENERS:
        if not start:
            raise DataError(f"{path} is empty, which a compressed file never is; fetch or compress it again")
        return
    for suffix, magic in _MAGIC.items():
        if magic.match(start):
            raise DataError(f"{path} is compressed; name it {path.name}{suffix}")


def _check_unicode(path: Path, line: bytes) -> None:
    for mark, name in _OTHER_UNICODE.items():
        if line.startswith(mark):
            raise DataError(f"{path} is {name}; convert it: iconv -f {name} -t UTF-8 IN > OUT")
