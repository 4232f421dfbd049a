"""Folders that are made once: written under a private name, then renamed to an address that names their content.

Any number of processes may make the same artifact at once. A lock saves the double work; where the file system has no locks each
process makes its own copy, the first one stays, and the others are removed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from conan_jax.errors import DataError
from conan_jax.files import partial_path, unusable

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

Found = TypeVar("Found")


def make_once(place: Path, find: Callable[[], Found | None], make: Callable[[Path], Path]) -> Found:
    """The artifact that `find` returns; made first where it returns None.

    Args:
        place: names the lock and the private folder. Nothing is written there.
        find: looks for a whole artifact. It is called again after the lock was waited for, and after the making.
        make: fills the private folder that it is given and returns the address of the artifact, beside `place`. A damaged artifact
            at that address is replaced.

    Raises:
        DataError: the artifact cannot be written.
    """
    found = find()
    if found is not None:
        return found
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with lock(place):
            if (found := find()) is None:
                private = partial_path(place)
                try:
                    private.mkdir()
                    address = make(private)
                    _publish(private, address, find)
                finally:
                    shutil.rmtree(private, ignore_errors=True)
                found = find()
    except OSError as error:
        raise unusable(place, error) from error
    if found is None:
        raise DataError(f"{address} is not what was just written there; another program changes the folder, or the disk is damaged")
    return found


@contextmanager
def lock(place: Path) -> Iterator[None]:
    """Hold the lock of `place` (`flock` on a hidden file beside it), after a wait, and remove what killed processes left of `place`.

    The kernel frees the lock when the process ends, by whatever signal. Where the file system has no locks the block is entered at
    once. Raises `OSError` when the lock file cannot be opened.
    """
    with open(place.with_name(f".{place.name}.lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        else:
            _remove_unfinished(place)
        yield


def _remove_unfinished(place: Path) -> None:
    """Remove the partial folders of `place`. The caller holds the lock, so no process writes to them."""
    left = re.compile(rf"\.{re.escape(place.name)}\.[0-9a-f]{{16}}\.partial")
    for entry in [entry.path for entry in os.scandir(place.parent) if left.fullmatch(entry.name)]:
        shutil.rmtree(entry, ignore_errors=True)


def _publish(private: Path, address: Path, find: Callable[[], object | None]) -> None:
    try:
        os.rename(private, address)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if find() is None:  # else another process was first, with the same content
            damaged = partial_path(address)
            os.rename(address, damaged)
            os.rename(private, address)
            shutil.rmtree(damaged, ignore_errors=True)
