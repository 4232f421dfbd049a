"""`conan preflight` from the outside: in a process of its own, since it decides which devices jax will find."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conan_jax.cli.preflight import _rows
from conan_jax.preflight import Report

ROOT = Path(__file__).parent.parent.parent
CONFIG = "configs/conan_v2.py:tiny"
WITHOUT_LIBTPU = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "libtpu" else find(name, *rest)
from conan_jax.cli.main import run
run()
"""


def conan(*arguments, program=("-m", "conan_jax")):
    environ = {**os.environ, "COLUMNS": "80"}
    command = [sys.executable, *program, "preflight", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300)


def test_one_object_for_one_stage():
    done = conan(CONFIG, "--topology", "cpu:4", "--stage", "weak", "--json", "--hbm-gib", "1")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["stage"] == "weak" and report["fits"] is True and report["devices"] == 4 and report["hbm_bytes_per_device"] == 2**30
    for key in ("peak_bytes_per_device", "flops_per_step", "seconds"):
        assert report[key] > 0
    assert len(report["seconds_range"]) == 2 and report["collectives"] and report["notes"]


def test_a_stage_that_does_not_fit_is_refused_with_a_proved_fix():
    """The limit lies between what 16 rows a device take at once and in micro-batches; the suggestion is compiled."""
    done = conan(CONFIG, "--topology", "cpu:2", "--stage", "pretrain", "--hbm-gib", "0.004", "--set", "pretrain.global_batch_size=128",
                 "--set", "pretrain.gradient_accumulation_steps=1", "--set", "model.num_layers=1", "--set", "model.remat=full")
    assert done.returncode == 78, done.stderr
    assert "does not fit" in done.stdout and "would help: pretrain.gradient_accumulation_steps" in done.stdout
    assert "this fits" in done.stdout and "--set pretrain.gradient_accumulation_steps=" in done.stdout
    assert max(map(len, done.stdout.splitlines()[:20])) <= 80


@pytest.mark.parametrize(("arguments", "words"), [
    (("--topology", "v5e:3x5"), "no accelerator 'v5e:3x5'"),
    (("--topology", "abacus-8"), "no accelerator 'abacus-8'"),
    (("--topology", "h100-8", "--stage", "weak"), "cpu:8"),
    (("--topology", "cpu:4", "--stage", "weka"), "no stage 'weka'"),
])
def test_what_is_wrong_ends_in_one_line_and_78(arguments, words):
    done = conan(CONFIG, *arguments)
    assert done.returncode == 78 and words in done.stderr and "Traceback" not in done.stderr


def test_without_libtpu_it_says_which_extra():
    done = conan(CONFIG, "--topology", "v5e:2x2", "--stage", "weak", program=("-c", WITHOUT_LIBTPU))
    assert done.returncode == 78 and "[preflight]" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(("chip_hours", "said"), [(6e-7, "less than 0.1 chip-hours"), (0.25, "0.2 chip-hours"), (1.0, "1.0 chip-hours"), (23_456.7, "23,456.7 chip-hours")])
def test_steps_and_time_of_a_stage_are_shown_whatever_it_costs(chip_hours, said):
    days = chip_hours / 24
    report = Report("weak", "weak", "cpu-1", 1, 1, 1, {"data": 1}, "8 x 8", None, 1, None, {}, 64, 1.0, 1.0, steps=1234, checkpoint_bytes=1,
                    checkpoint_bytes_per_host=1, num_examples={"": 8}, compile_seconds=75.0, thorough=True, collectives=(), roofline={}, seconds=1.0,
                    seconds_range=(0.5, 2.0), mfu=0.5, mfu_range=(0.25, 1.0), tokens_per_second=64.0, days=days, days_range=(days / 2, days * 2),
                    chip_hours=chip_hours)
    rows = dict(_rows(report))
    assert rows["the stage"].startswith("1,234 steps: ") and rows["the stage"].endswith(said) and rows["compilation"].startswith("1 min 15 s")
    assert "days" not in rows["the stage"]
