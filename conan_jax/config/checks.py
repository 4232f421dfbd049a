"""Checks that the dataclasses of a recipe apply to themselves."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields
from typing import Any

from conan_jax.errors import ConfigError

LARGEST_COUNT = 2**31 - 1  # steps, batches, lengths and record numbers are int32 in the compiled programs
LARGEST_FLOAT, SMALLEST_FLOAT = 3.4028234e38, 1.1754944e-38  # float32, without denormal numbers
LONGEST_NAME_BYTES = 128  # file names of 255 bytes also hold the suffixes of shards and temporary folders

_saved: ContextVar[bool] = ContextVar("saved", default=False)


@contextmanager
def saved_configuration() -> Iterator[None]:
    """Read a configuration that an earlier version accepted and saved.

    Inside the block, options that nothing reads are dropped and names are not held to `path_name`: such a run stays readable.
    """
    token = _saved.set(True)
    try:
        yield
    finally:
        _saved.reset(token)


def check(ok: bool, message: str) -> None:
    """Raises `ConfigError` unless `ok`."""
    if not ok:
        raise ConfigError(message)


def check_new(ok: bool, message: str) -> None:
    """As `check`, for a rule that saved configurations need not follow."""
    check(ok or _saved.get(), message)


def check_values(owner: object) -> None:
    """Raises `ConfigError` naming the first field that holds a number beyond the range of its type, or text that UTF-8 cannot hold."""
    for field in fields(owner):
        _check_value(field.name, getattr(owner, field.name))


def _check_value(name: str, value: Any) -> None:
    if isinstance(value, float):
        check(math.isfinite(value) and abs(value) <= LARGEST_FLOAT, f"{name} must be a finite float32, got {value}")
    elif isinstance(value, int):
        check(-(2**63) <= value < 2**63, f"{name} must fit 64 bits, got a number of {value.bit_length()} bits")
    elif isinstance(value, str):
        check("\0" not in value and not any("\ud800" <= c <= "\udfff" for c in value),
              f"{name} = {value!r} holds a NUL or half a surrogate pair, which no file can hold")
    elif isinstance(value, tuple | list):
        for item in value:
            _check_value(name, item)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _check_value(name, key)
            _check_value(f"{name}.{key}", item)


def positive(owner: object, *names: str) -> None:
    """Raises `ConfigError` naming the first of the fields that is not above 0, or too large for int32. None passes.

    Fields whose name ends in `bytes` may have 64 bits.
    """
    for name in names:
        value = getattr(owner, name)
        if value is None:
            continue
        where = f"{type(owner).__name__}.{name}"
        check(value > 0, f"{where} must be positive, got {value}")
        if isinstance(value, float):
            check(value >= SMALLEST_FLOAT, f"{where} is 0 in float32, got {value}")
        elif not name.endswith("bytes"):
            check(value <= LARGEST_COUNT, f"{where} must be at most {LARGEST_COUNT:,}, got {value}")


def one_of(what: str, value: object, known: Collection[Any]) -> None:
    """Raises `ConfigError` unless `value` is one of `known`."""
    check(value in known, f"unknown {what} {value!r}; use one of {', '.join(map(str, known))}")


def path_name(what: str, name: str, reserved: Collection[str] = ()) -> str:
    """`name` when it may become the name of a file or folder: letters, digits, "-", "_" and ".", not hidden, at most 128 bytes.

    `reserved` holds names that the folder uses itself; they are compared without regard to upper and lower case, as some file systems do.
    Raises `ConfigError` naming `what`.
    """
    check_new(name != "", f"the {what} has an empty name; it becomes the name of a folder")
    check_new(all(c.isalnum() or c in "-_." for c in name) and not name.startswith("."),
              f"{what} name {name!r} may hold letters, digits, '-', '_' and '.' only, and must not begin with '.': it becomes a path")
    check_new(len(name.encode("utf-8", "replace")) <= LONGEST_NAME_BYTES,
              f"{what} name {name[:40]!r}... is longer than {LONGEST_NAME_BYTES} bytes")
    check_new(folded(name) not in {folded(other) for other in reserved},
              f"a {what} cannot be called {name!r}: that name is used for something else there; rename it")
    return name


def folded(name: str) -> str:
    """`name` as a file system sees it that does not tell upper from lower case, or composed from decomposed letters."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def distinct(what: str, names: Sequence[str]) -> None:
    """Raises `ConfigError` naming two equal names, and two that differ in upper and lower case only."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(folded(name), name)
        seen.setdefault(name, name)
        if names.count(name) > 1:
            raise ConfigError(f"a {what} name occurs twice: {name!r}")
        check_new(other == name, f"the {what} names {other!r} and {name!r} differ in upper and lower case only, which some file systems "
                                 "do not tell apart; rename one")


def read_under(owner: object, choice: str, value: Any, options: Mapping[str, tuple[Collection[Any], Any]]) -> None:
    """Fill in the options that `value` of `choice` reads, and refuse those that it does not.

    `options` maps a field to (the values of `choice` under which it is read, its default there). A field that is not set, None by
    its declaration, takes the default; where it is not read it stays unset. Raises `ConfigError` naming the field.
    """
    unset = {field.name: field.default for field in fields(owner)}
    for name, (readers, default) in options.items():
        given = getattr(owner, name)
        if value in readers:
            if given == unset[name]:
                object.__setattr__(owner, name, default)
            continue
        check_new(given in (unset[name], default),
                  f"{name} = {given!r} means nothing with {choice} = {value!r}, only with {' or '.join(map(repr, readers))}; "
                  f"remove it (--set ...{name}={'null' if unset[name] is None else repr(unset[name])})")
        object.__setattr__(owner, name, unset[name])
