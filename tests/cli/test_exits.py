"""Errors of the places that a command writes to, and consoles that know few characters: an exit code and words, no traceback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import errno, json, os
from pathlib import Path
from conan_jax import files
from conan_jax.cli import exits

def full(name=None):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)

def full_file():
    with files.replacing(Path("out.json")):
        full()

def inside_a_library():
    try:
        full("deep/file")
    except OSError as error:
        raise RuntimeError("a library's words") from error

def words_of_a_library():
    raise RuntimeError("write failed: Read-only file system")

def not_permitted():
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "locked/file")

def fault():
    raise KeyError("a fault of the program")

exits.run(lambda: {what})
"""


def ended(what, stdout=subprocess.PIPE, **environment):
    return subprocess.run([sys.executable, "-c", PROGRAM.replace("{what}", what)], cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE,
                          env={**os.environ, **environment}, timeout=60)


@pytest.mark.parametrize(("what", "named"), [
    ("full_file()", ["out.json", os.strerror(28)]),
    ("inside_a_library()", ["deep/file", os.strerror(28)]),
    ("words_of_a_library()", ["write failed", os.strerror(30)]),
    ("not_permitted()", ["locked/file", os.strerror(13)]),
])
def test_a_full_or_locked_place_is_bad_input_and_is_named(what, named):
    done = ended(what)
    said = done.stderr.decode()
    assert done.returncode == 78 and "Traceback" not in said and all(name in said for name in named), said


def test_a_fault_of_the_program_keeps_its_traceback():
    done = ended("fault()")
    assert done.returncode == 1 and b"Traceback" in done.stderr and b"KeyError" in done.stderr


def test_output_to_a_full_disk_is_no_success():
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "w") as out:
        done = ended("print('x')", stdout=out)
    assert done.returncode == 78 and b"Traceback" not in done.stderr and b"standard output" in done.stderr


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "latin-1"}, {"PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "LC_ALL": "C"}],
                         ids=["latin-1", "C locale"])
def test_a_console_of_few_characters_shows_all_and_json_stays_json(environment):
    text = "na\u00efve \u65e5\u672c \U0001f600"
    done = ended(f"print(json.dumps({ascii(text)}, ensure_ascii=False))", **environment)
    encoding = environment.get("PYTHONIOENCODING", "ascii")
    assert done.returncode == 0 and json.loads(done.stdout.decode(encoding)) == text, done.stderr
