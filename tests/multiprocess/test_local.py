"""The launcher alone, over commands that know no jax: lines, signals, grace, exit codes, and nothing left behind."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from conan_jax.launch.local import environment_of
from tests.multiprocess.runs import Command, gone, state

PRELUDE = "import os, signal, subprocess, sys, time\nrank = int(os.environ['CONAN_PROCESS_ID'])\n"
FORKS = "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)'])\nprint(child.pid, flush=True)\n"


def launch(tmp_path, body, processes=2, grace=1.0):
    """`Local` in a process of its own, as the command line runs it, over `body`."""
    (tmp_path / "body.py").write_text(PRELUDE + textwrap.dedent(body))
    (tmp_path / "starter.py").write_text(
        "import sys\nfrom conan_jax.launch.local import Local\n"
        f"sys.exit(Local([sys.executable, {str(tmp_path / 'body.py')!r}], {processes}, 2, {grace}).run())\n"
    )
    return Command(tmp_path / "out.log", "starter", PYTHONPATH=os.pathsep.join([os.getcwd(), str(tmp_path)]))


@pytest.mark.parametrize("codes, expected", [((0, 0), 0), ((0, 42), 42), ((1, 0), 42), ((42, 78), 78), ((78, -6), 78), ((-6, 0), 42)])
def test_the_exit_code_is_the_gravest(tmp_path, codes, expected):
    command = launch(tmp_path, f"code = {codes}[rank]\nos.abort() if code < 0 else sys.exit(code)")
    assert command.wait(30) == expected, command.text


def test_lines_carry_their_rank_and_each_process_knows_who_it_is(tmp_path):
    command = launch(tmp_path, """
        names = ("CONAN_COORDINATOR", "CONAN_NUM_PROCESSES", "CONAN_PROCESS_ID", "JAX_PLATFORMS", "XLA_FLAGS")
        print(*(os.environ[n] for n in names)); print("to standard error", file=sys.stderr)
    """)
    assert command.wait(30) == 0
    lines = command.text.splitlines()
    said = {line.split()[0]: line.split() for line in lines if "standard" not in line}
    assert sorted(said) == ["[0]", "[1]"] and said["[0]"][1] == said["[1]"][1]  # one coordinator
    assert [said[f"[{r}]"][2:5] for r in (0, 1)] == [["2", "0", "cpu"], ["2", "1", "cpu"]]
    assert said["[0]"][-1] == "--xla_force_host_platform_device_count=2"
    assert {"[0] to standard error", "[1] to standard error"} <= set(lines)


def test_flags_that_were_given_stay_and_the_number_of_devices_does_not():
    base = {"XLA_FLAGS": "--a=1 --xla_force_host_platform_device_count=8 --b", "HOME": "/h"}
    flags = environment_of(1, 4, 2, 1234, base)["XLA_FLAGS"].split()
    assert flags == ["--a=1", "--b", "--xla_force_host_platform_device_count=2"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_each_process_once(tmp_path, number):
    command = launch(tmp_path, """
        got = []
        signal.signal(signal.SIGTERM, lambda *_: got.append("TERM"))
        signal.signal(signal.SIGINT, lambda *_: got.append("INT"))
        print("ready", flush=True)
        while not got: time.sleep(0.02)
        time.sleep(0.3); print("got", *got); sys.exit(42)
    """)
    command.until(lambda: command.text.count("ready") == 2, "both ready")
    command.process.send_signal(number)
    assert command.wait(30) == 42
    assert sorted(line for line in command.text.splitlines() if "got" in line) == ["[0] got TERM", "[1] got TERM"]


def test_a_second_signal_ends_the_deaf(tmp_path):
    command = launch(tmp_path, "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('ready', flush=True)\ntime.sleep(100)")
    command.until(lambda: command.text.count("ready") == 2, "both ready")
    children = command.children()
    command.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert command.process.poll() is None
    command.process.send_signal(signal.SIGTERM)
    assert command.wait(30) == 42 and gone(children)


def test_the_others_have_their_grace_and_not_more(tmp_path):
    began = time.monotonic()
    command = launch(tmp_path, f"{FORKS}sys.exit(3) if rank else time.sleep(100)")
    assert command.wait(30) == 42
    assert 1.0 <= time.monotonic() - began < 20
    assert "launch: process 1 ended with 3; the others have 1 s" in command.text
    assert gone(numbers_of_forks(command))  # their descendants too


def numbers_of_forks(command):
    return [int(line.split()[1]) for line in command.text.splitlines() if line.startswith("[") and line.split()[1].isdigit()]


def test_a_launcher_killed_leaves_no_process(tmp_path):
    command = launch(tmp_path, "print('ready', flush=True)\ntime.sleep(100)", processes=3)
    command.until(lambda: command.text.count("ready") == 3, "all ready")
    children = command.children()
    assert len(children) == 3 and all(map(state, children))
    command.process.kill()
    command.process.wait()
    assert gone(children)


def test_a_wrong_recipe_is_said_once_before_anything_starts(tmp_path):
    command = [sys.executable, "-m", "conan_jax", "launch", "local", str(tmp_path / "none.py")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 78 and result.stderr.count("none.py") == 1 and "[0]" not in result.stdout


def test_the_arguments_reach_each_process(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from conan_jax.cli import main
    from conan_jax.launch import local

    seen = []

    class Fake:
        def __init__(self, *arguments):
            seen.append(arguments)

        def run(self):
            return 42

    monkeypatch.setattr(local, "Local", Fake)
    arguments = ["launch", "local", "--processes", "4", "--devices-per-process", "2", "configs/demo.py:tiny", "--set", "seed=3",
                 "--stage", "weak", "--fallback", "--grace-seconds", "5"]
    assert CliRunner().invoke(main.app, arguments).exit_code == 42
    command, *rest = seen[0]
    passed_on = ["--set", "seed=3", "--stage", "weak", "--fallback"]
    assert rest == [4, 2, 5.0] and command[1:] == ["-m", "conan_jax", "train", "configs/demo.py:tiny", *passed_on]
