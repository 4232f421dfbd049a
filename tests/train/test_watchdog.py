"""A hang ends with stacks and 42, also where the interpreter is held; a beat in time keeps it quiet."""

import subprocess
import sys
import textwrap
import time

import pytest

from conan_jax.train.watchdog import Watchdog

IN_C = "import ctypes; ctypes.{kind}('libc.so.6').sleep(60)"  # CDLL lets other threads run meanwhile, PyDLL does not


def hang(body, seconds=1.0):
    program = f"""
        from conan_jax.train.watchdog import Watchdog
        import time
        def where_it_hangs():
            {body}
        with Watchdog({seconds}) as watchdog:
            watchdog.beat("step 7")
            where_it_hangs()
    """
    return subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=50)


@pytest.mark.parametrize("body", ["time.sleep(60)", IN_C.format(kind="CDLL")])
def test_a_hang_is_told_and_ends_with_42(body):
    result = hang(body)
    assert result.returncode == 42
    assert "process 0 hangs: nothing for 1 s since step 7 (watchdog_seconds 1)" in result.stderr
    assert "in where_it_hangs" in result.stderr and "Traceback" not in result.stderr


def test_a_hang_that_holds_the_interpreter_is_told_too():
    result = hang(IN_C.format(kind="PyDLL"))
    assert result.returncode == 1 and "in where_it_hangs" in result.stderr


def test_beats_keep_it_quiet_and_so_does_the_end(capfd):
    with Watchdog(0.4) as watchdog:
        for step in range(8):
            watchdog.beat(f"step {step}")
            time.sleep(0.1)
    time.sleep(0.8)
    assert capfd.readouterr().err == ""
