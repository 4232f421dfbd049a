"""A signal ends a command with 42, also one that arrives where Python drops what a handler raises; every exit code is told."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conan_jax.cli.main import app

ROOT = Path(__file__).parents[2]
COMMAND = """
import gc, os, signal, sys, time
from conan_jax.cli import main

def inside(phase, info):
    gc.callbacks.remove(inside)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)  # the handler runs here

def collected():
    gc.callbacks.append(inside)
    gc.collect()

def app():
    try:
        {how}
        for _ in range(100):
            time.sleep(0.1)
        print("to the end")
    finally:
        time.sleep(1.2)  # longer than the time after which an unheard stop is repeated
        print("cleaned up", flush=True)

main.app = app
main.run()
"""


@pytest.mark.parametrize("how", ["collected()", "os.kill(os.getpid(), signal.SIGTERM)"])
def test_a_stop_is_never_lost_and_cleaning_up_is_not_disturbed(how):
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(COMMAND).format(how=how)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (42, "cleaned up\n"), done.stderr
    assert "conan: stopped" in done.stderr


def test_every_exit_code_is_listed_where_people_look():
    for said in (CliRunner().invoke(app, ["--help"]).output, (ROOT / "README.md").read_text(encoding="utf-8")):
        line = " ".join(said.replace("*", "").split()).partition("Exit codes:")[2]
        assert [line.find(f" {code} ") >= 0 for code in (0, 1, 42, 78)] == [True] * 4, line
        assert line.index(" 1 a check that failed") < line.index(" 42 stopped")
