"""A disk that fills up, really: the save says what it needed, the older step is intact, and the next one succeeds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TWICE = '"$1" -m tests.train.disk_harness "$2" "$3" && "$1" -m tests.train.disk_harness "$2" again'
MOUNT = f'mount -t tmpfs -o size=8m tmpfs "$2" && {TWICE}'


def may_mount(folder):
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    try:
        return subprocess.run(command, capture_output=True, timeout=60).returncode == 0
    except OSError:
        return False


def report(folder, kind, command=("sh", "-c", TWICE)):
    """What both runs of the harness say."""
    done = subprocess.run([*command, "sh", sys.executable, str(folder), kind], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
    return {key: value for line in done.stdout.splitlines() for key, value in json.loads(line).items()}


def check(said, folder):
    assert said["first"] == "" and f"saving step 6 in {folder} failed" in said["midway"]
    assert "Step 6 needs 2,098,212 bytes and " in said["midway"] and "the older steps (4) are intact" in said["midway"]
    assert said["latest"] == 4 and said["step 4 is whole"] and "6" not in said["left"]
    assert said["again"] == "" and said["left at the end"] == ["6"] and said["step 6 is whole"]


def test_a_limit_on_file_size_met_in_the_middle_of_a_save(tmp_path):
    """What every machine has: the kernel refuses to make a file longer."""
    said = report(tmp_path, "file-size")
    check(said, tmp_path)
    assert "File too large" in said["midway"]


def test_a_full_disk_before_and_in_the_middle_of_a_save(tmp_path):
    if not may_mount(tmp_path):
        pytest.skip("this machine lets nobody mount a small tmpfs (unshare -rm); the limit on file size stands in for it")
    said = report(tmp_path, "tmpfs", ("unshare", "-rm", "sh", "-c", MOUNT))
    check(said, tmp_path)
    assert "No space left" in said["midway"]
    assert "saving step 5" in said["too big"] and "No space left" in said["too big"] and "older steps (4) are intact" in said["too big"]
    assert ".orbax-checkpoint-tmp" not in said["too big"], "it was begun all the same"
    needed, free = (int(said["too big"].split(before)[1].split(after)[0].replace(",", ""))
                    for before, after in (("needs ", " bytes"), ("bytes and ", " are free")))
    assert 2**26 < needed < 2**26 * 1.05 and free < 2**23
