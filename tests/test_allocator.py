"""Memory settings of glibc: what a command and what a Python program start with."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conan_jax import allocator

ROOT = Path(allocator.__file__).parents[1]
REPORT = "import os, conan_jax; print(os.environ.get('GLIBC_TUNABLES', ''), conan_jax.allocator.configure())"


@pytest.fixture
def started(monkeypatch):
    """The arguments and tunables of each process that `start_with_huge_pages` starts, on a machine that has huge pages."""
    calls = []
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv(allocator.VARIABLE, raising=False)
    monkeypatch.delenv(allocator.TUNABLES, raising=False)
    monkeypatch.setattr(allocator, "_system_has_huge_pages", lambda: True)
    monkeypatch.setattr(allocator.signal, "pthread_sigmask", lambda *arguments: None)  # this process goes on
    monkeypatch.setattr(os, "execv", lambda file, arguments: calls.append((file, arguments, os.environ[allocator.TUNABLES])))
    return calls


def test_a_command_starts_itself_again_once(started, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "conan_jax", "train", "x.py"])
    allocator.start_with_huge_pages()
    allocator.start_with_huge_pages()
    assert started == [(sys.executable, [sys.executable, "-m", "conan_jax", "train", "x.py"], "glibc.malloc.hugetlb=1")]


def test_other_tunables_are_kept(started, monkeypatch):
    monkeypatch.setenv(allocator.TUNABLES, "glibc.malloc.check=1:glibc.malloc.hugetlb=0")
    allocator.start_with_huge_pages()
    assert [call[2] for call in started] == ["glibc.malloc.check=1:glibc.malloc.hugetlb=0:glibc.malloc.hugetlb=1"]
    allocator.start_with_huge_pages()
    assert len(started) == 1


@pytest.mark.parametrize(("variable", "value"), [("CONAN_MALLOC", "keep"), ("CONAN_MALLOC", "system"), ("JAX_PLATFORMS", "cuda"),
                                                 ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=2")])
def test_a_choice_is_kept(started, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    allocator.start_with_huge_pages()
    assert not started


def test_no_huge_pages_no_new_start(started, monkeypatch):
    monkeypatch.setattr(allocator, "_system_has_huge_pages", lambda: False)
    allocator.start_with_huge_pages()
    assert not started


def test_pages_and_library_are_asked(monkeypatch, tmp_path):
    monkeypatch.setattr(allocator, "_HUGE_PAGES", tmp_path / "enabled")
    for mode, library, right in (("always [madvise] never", "glibc 2.36", True), ("[always] madvise never", "glibc 2.35", True),
                                 ("always madvise [never]", "glibc 2.36", False), ("[always] madvise never", "glibc 2.34", False),
                                 ("[always] madvise never", "musl 1.2", False), (None, "glibc 2.36", False)):
        (tmp_path / "enabled").unlink(missing_ok=True)
        if mode:
            (tmp_path / "enabled").write_text(mode + "\n")
        monkeypatch.setattr(os, "confstr", lambda name, library=library: library)
        assert allocator._system_has_huge_pages() is right, (mode, library)


def test_an_unknown_choice_is_named(monkeypatch):
    monkeypatch.setenv(allocator.VARIABLE, "hugh")
    monkeypatch.setattr(allocator, "_applies", lambda: False)  # this process keeps what it was started with
    with pytest.warns(UserWarning, match="CONAN_MALLOC='hugh'.*huge, keep, system"):
        allocator.configure()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the settings are those of glibc on Linux")
def test_the_command_runs_with_its_arguments_after_the_new_start():
    done = _run([sys.executable, "-X", "utf8", "-m", "conan_jax", "--version"])
    assert done.returncode == 0 and done.stdout.strip() == "0.1.0"
    for setting, right in (("system", False), ("keep", True)):
        assert _run([sys.executable, "-c", REPORT], CONAN_MALLOC=setting).stdout.split() == [str(right)]


def _run(command, **environment):
    kept = {name: value for name, value in os.environ.items() if name not in ("CONAN_MALLOC", "GLIBC_TUNABLES")}
    return subprocess.run(command, capture_output=True, text=True, timeout=120,
                          env={**kept, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **environment})
