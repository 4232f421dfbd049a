"""One run a folder: a lock that dies with its process."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
import warnings
from pathlib import Path
from types import TracebackType

from conan_jax.errors import ConanError, ConfigError

NAME = ".lock"
_held: set[int] = set()


def _let_go() -> None:
    """A forked child holds what its parent held, and could outlive it."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


class FolderInUseError(ConanError):
    """Another process works in this folder; restarting does not help while it does."""


class FolderLock:
    """`with FolderLock(folder, "a training run"):` nobody else enters the block for this folder, on any host that shares it.

    The kernel holds the lock (`flock` on FOLDER/.lock) and frees it when the process ends, by whatever signal. The folder is made
    where there is none, and removed at the end when it was made here and holds no file. Where the file system has no locks a warning
    says so and the block is entered.

    Args:
        folder: the folder to be alone in.
        what: what the holder does there, for the message to the second one.

    Raises:
        FolderInUseError: at once, naming who holds it and since when.
        ConfigError: the folder cannot be made or written.
    """

    def __init__(self, folder: str | os.PathLike[str], what: str) -> None:
        self.folder, self.what = Path(folder), what
        self._descriptor: int | None = None
        self._made: list[Path] = []  # folders that this object made, the innermost first

    def __enter__(self) -> FolderLock:
        try:
            self._made = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
            self.folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = self._take()
        except OSError as error:
            raise ConfigError(f"cannot write in {self.folder}: {error.strerror}; name another folder") from error
        _held.add(self._descriptor)
        holder = {"what": self.what, "host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        with contextlib.suppress(OSError):  # on a full disk the message will say less
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(holder).encode(), 0)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._descriptor in _held:  # a forked child has let go already
            with contextlib.suppress(OSError):
                self._remove_what_is_empty()
            _held.remove(self._descriptor)
            os.close(self._descriptor)

    def _remove_what_is_empty(self) -> None:
        """Remove the folders that were made for this lock when no file is in them, as after an error."""
        lock = self.folder / NAME
        if not self._made or any(not path.is_dir() for path in self.folder.rglob("*") if path != lock):
            return
        lock.unlink()
        for folder in (*sorted(self.folder.rglob("*"), reverse=True), *self._made):
            folder.rmdir()

    def _take(self) -> int:
        path = self.folder / NAME
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(descriptor, 4096, 0)
                os.close(descriptor)
                raise FolderInUseError(f"{self.folder} is in use by {_described(holder)}; wait for it to end, or end it, "
                                       "or use another folder") from None
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    os.close(descriptor)
                    raise
                warnings.warn(f"the file system of {self.folder} has no locks ({error.strerror}): see to it that no other process "
                              "works in that folder", stacklevel=3)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
            os.close(descriptor)  # the folder was removed or replaced in between


def _described(holder: bytes) -> str:
    try:
        said = json.loads(holder)
        return f"{said['what']} (process {said['pid']} on {said['host']}, since {said['since']})"
    except (ValueError, KeyError, TypeError):
        return "another process"
