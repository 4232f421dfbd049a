"""Files and folders that are written whole or not at all, and JSON objects read with an error that names the file."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from conan_jax.errors import ConfigError, DataError

STALE_SECONDS = 86_400.0  # without a change; a process that writes a partial file is never that slow
_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room there, or name another place"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "give the right to read and write there, or name another place"),
    **dict.fromkeys((errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR), "something else is there; name another place"),
    errno.EFBIG: "raise the limit for the size of a file, or name another place",
    errno.ENAMETOOLONG: "use a shorter name",
}
UNUSABLE = frozenset(_ADVICE)  # errno of what the place is the cause of, not the program


def unusable(place: object, error: OSError, how: str = "written") -> DataError:
    """The error for `place` where `error` occurred: what the system says and what to do."""
    advice = _ADVICE.get(error.errno, "check that the disk has room and that the folder may be written")
    return DataError(f"{place} cannot be {how}: {error.strerror or error}; {advice}")


def unusable_place(error: BaseException) -> DataError | None:
    """The error to show when a full disk, missing rights or the like caused `error`; None for any other cause.

    Libraries put errors of their own around the system's, or only its words into theirs.
    """
    if isinstance(error, OSError) and error.errno in UNUSABLE and error.filename is not None:
        return unusable(error.filename, error, "read or written")
    cause: BaseException | None = error
    while cause is not None:
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
            if isinstance(cause, OSError) and cause.errno == number:
                return unusable(cause.filename or "a file or standard output", cause)
            if os.strerror(number) in str(cause):
                return DataError(f"a file cannot be written: {str(cause).strip().splitlines()[0]}; {_ADVICE[number]}")
        cause = cause.__cause__ or cause.__context__
    return None


def check_room(folder: Path, size: int) -> None:
    """Raise `DataError` when the file system of `folder`, which exists, has less than `size` bytes left."""
    try:
        found = os.statvfs(folder)
    except OSError:  # a file system without this knowledge: the write itself tells
        return
    if found.f_blocks and found.f_bavail * found.f_frsize < size:
        error = OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({found.f_bavail * found.f_frsize:,} of {size:,} bytes)")
        raise unusable(folder, error)


def partial_path(path: Path) -> Path:
    """A new hidden name beside `path`, for what is not finished yet; the same for no two calls, in whatever process or host.

    Partial files and folders of `path` without a change for `STALE_SECONDS` belong to processes that were killed; they are removed.
    """
    of_this = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{16}}\.partial")
    with suppress(OSError):
        for entry in [Path(entry.path) for entry in os.scandir(path.parent) if of_this.fullmatch(entry.name)]:
            if time.time() - _last_change(entry) > STALE_SECONDS:
                _remove(entry)
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")


def _last_change(path: Path) -> float:
    """The newest modification time of a file, or of anything in a folder."""
    within = path.rglob("*") if path.is_dir() and not path.is_symlink() else ()
    return max(entry.lstat().st_mtime for entry in (path, *within))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_inside(folder: Path, root: Path) -> None:
    """Remove `folder` and all that it holds; nothing where there is no such folder.

    Raises:
        ConfigError: with links resolved, `folder` is not strictly inside of `root`, or it is a link itself. Nothing is removed then.
        OSError: something in it cannot be removed.
    """
    place, inside = folder.resolve(), root.resolve()
    if inside not in place.parents or folder.is_symlink():
        raise ConfigError(f"{folder} is not removed: it is {place}, and only a folder inside of {inside}, not a link, is ever removed; "
                          "use another name, or remove it yourself")
    with suppress(FileNotFoundError):
        shutil.rmtree(place)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to. It takes the place of `path` when the block ends well and is removed when it does not.

    A reader, or a restart after a kill, sees the old file or the new one; a power cut does not leave a hole in it. An `OSError` for
    lack of room or of rights names `path`.
    """
    partial = partial_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        if error.errno in UNUSABLE and error.filename in (None, str(partial), partial):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def replacing_folder(out: Path, force: bool = False) -> Iterator[Path]:
    """A folder to write in. It becomes `out` when the block ends well and is removed when it does not.

    An empty folder gives way, one that holds anything only by `force`. The new folder is made beside `out` and takes its place in
    one step. Where `out` cannot be renamed (the current folder, a mount point) it is made in `out`, and its entries are moved up, one
    after the other. Raises `DataError` for an `OSError`, the block's own as well.
    """
    out = out.resolve()
    in_place = out.is_dir() and (os.path.ismount(out) or out in (here := Path.cwd(), *here.parents))
    partial, old = (partial_path(out / what if in_place else out) for what in ("new", "old"))
    try:
        partial.mkdir(parents=True)
        yield partial
        if in_place:
            before = [entry for entry in out.iterdir() if entry != partial]
            if before and not force:
                raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
            old.mkdir()
            _move([*((entry, old / entry.name) for entry in before), *((entry, out / entry.name) for entry in partial.iterdir())])
        else:
            _move([*([(out, old)] if force and out.exists() else []), (partial, out)])
    except OSError as error:
        raise unusable(out, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _move(moves: Sequence[tuple[Path, Path]]) -> None:
    """Rename each first path to its second, all of them or none."""
    done: list[tuple[Path, Path]] = []
    try:
        for before, after in moves:
            os.replace(before, after)
            done.append((before, after))
    except BaseException:
        for before, after in reversed(done):
            os.replace(after, before)
        raise


def write_file(path: Path, content: str | bytes) -> None:
    """Write `content`, text as UTF-8."""
    with replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    """Write `value` for people to read."""
    write_file(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, default: Any = None, advice: str = "remove it and run the command again") -> Any:
    """The JSON object in a file, `default` where there is no file. Raises `DataError` with `advice` when the file holds anything else."""
    if not path.is_file():
        return default
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}); {advice}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} must hold a JSON object; {advice}")
    return value
