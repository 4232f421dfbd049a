"""What processes tell each other, and how they find each other; by processes that only import jax."""

import errno
import json
import os

import pytest

from conan_jax.distributed import Peers
from conan_jax.errors import ConfigError

from tests.multiprocess.runs import Command

VARIABLES = ("CONAN_COORDINATOR", "CONAN_NUM_PROCESSES", "CONAN_PROCESS_ID")


def peers(tmp_path, scenario):
    command = Command(tmp_path / "out.log", "tests.multiprocess.peers_harness", "2", scenario, tmp_path)
    code = command.wait()
    return code, sorted(line for line in command.text.splitlines() if "Gloo" not in line)


def test_the_others_wait_for_process_0_and_all_agree_on_a_step(tmp_path):
    code, lines = peers(tmp_path, "work")
    assert code == 0, lines
    assert {"[0] alone gave 7 after 0", "[1] alone gave None after 1"} <= set(lines)
    assert {"[0] stops before step 5", "[1] stops before step 5"} <= set(lines)  # rank 1 was asked before step 4
    assert {"[0] settled True", "[1] settled True"} <= set(lines)
    assert not list(tmp_path.glob(".peers-*"))


def test_what_fails_on_process_0_fails_alike_elsewhere(tmp_path):
    code, lines = peers(tmp_path, "fails")
    assert code == 78
    assert "[0] conan: the data is bad" in lines
    assert any(line.startswith("[1] conan: process 0 on ") and line.endswith("the data is bad") for line in lines)
    assert not any("Terminating process" in line for line in lines)  # neither was aborted by jax: both ended with 78


def test_a_process_that_does_not_see_a_failure_is_ended(tmp_path):
    code, lines = peers(tmp_path, "elsewhere")
    assert code == 78
    assert any(line.startswith("[0] conan: process 1 on ") and line.endswith("a shard is damaged") for line in lines)
    assert "[0] was never ended" not in lines and "launch: ending those that are left" not in lines


def test_a_folder_that_is_not_shared_is_named(tmp_path):
    code, lines = peers(tmp_path, "unshared")
    assert code == 78
    assert any("file system that all hosts share" in line and "of-1 what process 0" in line for line in lines)


@pytest.mark.parametrize("values, words", [
    (("127.0.0.1:9", "", ""), "CONAN_NUM_PROCESSES and CONAN_PROCESS_ID not set, while CONAN_COORDINATOR is"),
    (("127.0.0.1", "2", "1"), "it must be host:port of process 0"),
    (("127.0.0.1:9", "2", "2"), "0 <= ID < NUM"),
    (("127.0.0.1:9", "two", "0"), "0 <= ID < NUM"),
])
def test_wrong_variables_are_named(monkeypatch, values, words):
    from conan_jax import distributed
    from conan_jax.errors import ConfigError

    for name, value in zip(VARIABLES, values):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=words):
        distributed._from_variables()


def test_a_coordinator_that_does_not_answer_is_an_error_one_can_restart(tmp_path):
    port = "1"  # nobody listens there
    values = dict(zip(VARIABLES, (f"127.0.0.1:{port}", "2", "1")))
    command = Command(tmp_path / "out.log", "tests.multiprocess.peers_harness", "0", "unreachable", tmp_path, **values)
    assert command.wait() == 42
    assert "no coordinator answers at 127.0.0.1:1" in command.text and "Traceback" not in command.text



@pytest.mark.parametrize(("error", "code"), [
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a file"), 78), (ConfigError("x"), 78), (KeyError("x"), 1), (KeyboardInterrupt(), 42)])
def test_the_others_are_told_the_code_that_the_failed_process_ends_with(tmp_path, error, code):
    peers = Peers(tmp_path)
    peers._folder.mkdir()
    peers._say_failed(error)
    [failed] = tmp_path.glob(".peers-*/failed")
    assert json.loads(failed.read_text())["exit_code"] == code
