"""A signal ends a command with 42, also one that arrives where Python drops what a handler raises; every exit code is told."""

import signal
import subprocess
import sys
import textwrap
import time
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


MOMENTS = """
import atexit, hashlib, os, signal, threading, time
from conan_jax.cli import exits

def later(seconds=0.3):
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM)).start()

def deaf():
    later()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 200_000_000)  # a minute or more outside of Python

def clean():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        time.sleep(60)

def replaced():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except BaseException:
        raise TypeError("expected a message argument") from None

def command():
    {how}

exits.run(command)
"""


@pytest.mark.parametrize("how", ["collected()", "os.kill(os.getpid(), signal.SIGTERM)"])
def test_a_stop_is_never_lost_and_cleaning_up_is_not_disturbed(how):
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(COMMAND).format(how=how)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (42, "cleaned up\n"), done.stderr
    assert done.stderr == "conan: stopped; start the same command again to go on\n"


@pytest.mark.parametrize("how", [
    "exits.end_at_once(); deaf()",
    "exits.DEAF_SECONDS = 0.5; deaf()",
    "exits.DEAF_SECONDS = 0.1; exits.CLEANING_SECONDS = 0.5; clean()",
    "replaced()",
    "atexit.register(os.abort); os.kill(os.getpid(), signal.SIGINT)",
], ids=["at once", "in compiled code", "cleaning up for too long", "replaced by another error", "the interpreter would crash at its end"])
def test_a_stop_ends_with_42_whatever_the_main_thread_does(how):
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(MOMENTS).format(how=how)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (42, ""), done.stderr
    assert done.stderr == "conan: stopped; start the same command again to go on\n"


def test_real_commands_end_with_42_at_spread_moments(tmp_path):
    """Each process tells when it has started; a signal follows somewhat later."""
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    started = "import sys; from conan_jax import __main__; print('started', flush=True); __main__.run()"
    commands = {"preflight": ("preflight", ROOT / "configs" / "demo.py:tiny", "-t", "cpu:2"), "data": ("data", "inspect", tmp_path / "a.jsonl"),
                "encode": ("encode", tmp_path, tmp_path / "a.jsonl", "--out", tmp_path / "a.npy")}
    running = []
    for name, delay in (("preflight", 0.3), ("data", 0.1), ("encode", 0.3), ("preflight", 2.0), ("preflight", 3.0)):
        process = subprocess.Popen([sys.executable, "-c", started, *map(str, commands[name])], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   text=True, cwd=ROOT)
        running.append((name, delay, process))
    for i, (name, delay, process) in enumerate(running):
        assert process.stdout.readline() == "started\n"
        time.sleep(delay)
        process.send_signal((signal.SIGTERM, signal.SIGINT)[i % 2])
        _, said = process.communicate(timeout=60)
        assert process.returncode in ((42,) if name == "preflight" else (0, 42, 78)) and "Traceback" not in said, (name, delay, said)


def test_every_exit_code_is_listed_where_people_look():
    for said in (CliRunner().invoke(app, ["--help"]).output, (ROOT / "README.md").read_text(encoding="utf-8")):
        line = " ".join(said.replace("*", "").split()).partition("Exit codes:")[2]
        assert [line.find(f" {code} ") >= 0 for code in (0, 1, 42, 78)] == [True] * 4, line
        assert line.index(" 1 a check that failed") < line.index(" 42 stopped")
