"""One run a folder: the second is refused by name, and no death leaves a lock behind."""

import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from conan_jax.errors import EXIT_BAD_INPUT, ConfigError
from conan_jax.folder_lock import FolderInUseError, FolderLock

ROOT = Path(__file__).parents[1]
HOLDER = """
import os, sys, time
from conan_jax.folder_lock import FolderLock
with FolderLock(sys.argv[1], "the other run"):
    child = os.fork() if sys.argv[2] == "fork" else 1
    os.write(1, b"%d\\n" % child)  # one write: the lines of two processes do not mix, however Python buffers
    time.sleep(600)
"""


def holder(folder, *, fork=False):
    command = [sys.executable, "-c", HOLDER, str(folder), "fork" if fork else "alone"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    return process, sorted(int(process.stdout.readline()) for _ in range(1 + fork))[-1]


def end(process):
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_process_is_refused_with_the_name_of_the_first(tmp_path):
    process, _ = holder(tmp_path / "runs" / "new")  # the folder does not exist yet
    try:
        with pytest.raises(FolderInUseError) as refused, FolderLock(tmp_path / "runs" / "new", "this run"):
            raise AssertionError("two in one folder")
        message = str(refused.value)
        assert f"the other run (process {process.pid} on {socket.gethostname()}, since 20" in message and str(tmp_path / "runs/new") in message
        assert refused.value.exit_code == EXIT_BAD_INPUT
        with FolderLock(tmp_path / "runs" / "other", "this run"):
            pass
    finally:
        end(process)
    with FolderLock(tmp_path / "runs" / "new", "this run"):  # kill -9 freed it
        pass


def test_a_forked_child_that_outlives_its_parent_holds_nothing(tmp_path):
    process, child = holder(tmp_path, fork=True)
    try:
        end(process)
        os.kill(child, 0)  # it lives
        with FolderLock(tmp_path, "this run"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_one_process_does_not_enter_twice_and_may_enter_again(tmp_path):
    with FolderLock(tmp_path, "the first"):
        with pytest.raises(FolderInUseError, match="in use by the first"), FolderLock(tmp_path, "the second"):
            pass
    with FolderLock(tmp_path, "the third"), pytest.raises(FolderInUseError, match="in use by the third"), FolderLock(tmp_path, "x"):
        pass


def test_it_is_freed_by_an_error_inside(tmp_path):
    with pytest.raises(KeyError), FolderLock(tmp_path, "the first"):
        raise KeyError
    with FolderLock(tmp_path, "the second"):
        assert json.loads((tmp_path / ".lock").read_text())["what"] == "the second"


def test_a_folder_replaced_while_it_was_being_locked_is_locked_anew(tmp_path, monkeypatch):
    folder, real = tmp_path / "run", fcntl.flock
    calls = []

    def replace_first(descriptor, operation):
        calls.append(descriptor)
        if len(calls) == 1:
            shutil.rmtree(folder)
            folder.mkdir()
        return real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", replace_first)
    with FolderLock(folder, "the first"), pytest.raises(FolderInUseError), FolderLock(folder, "the second"):
        pass
    assert len(calls) == 3


def test_a_file_in_the_place_of_the_folder_is_explained(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(ConfigError, match="cannot write in .*run.*name another folder"), FolderLock(tmp_path / "run", "x"):
        pass


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def unable(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unable)
    with pytest.warns(UserWarning, match="has no locks"), FolderLock(tmp_path, "x"):
        pass
