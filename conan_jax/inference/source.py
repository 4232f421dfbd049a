"""The texts of a file to encode, in order, each with its id; what cannot be encoded is refused by file and line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from conan_jax.data import readers
from conan_jax.data.manifest import sha256_of
from conan_jax.data.schema import Reject
from conan_jax.errors import DataError


class Text(NamedTuple):
    """A text, its id (its number in the source when no field holds ids), and the record it is of."""

    text: str
    id: str
    record: dict[str, Any]


@dataclass(frozen=True)
class TextSource:
    """`source` as `data.readers` takes it: jsonl, csv, tsv, parquet or txt files, each with or without .gz, globs, directories.

    Attributes:
        text_field: the column that holds the text. Of plain text each line is a text, a blank one too, so that rows are numbered as lines.
        id_field: the column that holds ids; None numbers the texts from 0.
    """

    source: str
    text_field: str = "text"
    id_field: str | None = None
    _plan: readers.Plan = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_plan", readers.expand(self.source))

    def __iter__(self) -> Iterator[Text]:
        """Read from the beginning. Raises `DataError` naming file and line of the first record that cannot be encoded."""
        for number, item in enumerate(readers.read(self._plan, {"text": readers.EVERY_LINE})):
            if isinstance(item.raw, Reject):
                raise DataError(f"{item.location}: {item.raw}")
            if not isinstance(item.raw, dict):
                raise DataError(f"{item.location} is {type(item.raw).__name__}, not an object with the field {self.text_field!r}")
            record = {self.text_field: item.raw["line"], **item.raw} if "line" in item.raw and len(item.raw) == 1 else item.raw
            text = self._value(record, self.text_field, item.location)
            identity = str(number) if self.id_field is None else self._value(record, self.id_field, item.location)
            yield Text(_valid(text, item.location), identity, record)

    def identity(self) -> list[dict[str, Any]]:
        """Name, bytes and sha256 of each file, in order; says whether two sources hold the same, wherever they lie."""
        return [{"name": file.name, "bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in self._plan.files]

    def _value(self, record: dict[str, Any], name: str, location: str) -> str:
        value = record.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and name == self.id_field:
            return str(value)
        if not isinstance(value, str):
            there = ", ".join(map(str, record)) or "nothing"
            option = "--id-field" if name == self.id_field else "--field"
            problem = f"no field {name!r}" if name not in record else f"{type(value).__name__} in the field {name!r}, not text"
            raise DataError(f"{location} has {problem}; it has {there}. Name another with {option}")
        return value


def _valid(text: str, location: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{location} is no valid Unicode text at character {error.start}; save the file as UTF-8") from None
    return text
