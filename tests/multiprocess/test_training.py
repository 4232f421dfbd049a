"""Two real processes train, are stopped, killed and hung; one and four go on. By gloo, over loopback."""

import json
import os
import random
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from conan_jax.train import checkpoint
from tests.multiprocess.recipe import STEPS
from tests.multiprocess.runs import RECIPE, Command, gone, losses, state

ORDER = tuple(STEPS)
LONG = ("--stage", "pretrain", "--set", "pretrain.steps=100000", "--set", "pretrain.checkpoint_every=100000")
SECONDS = 60.0  # within which the end of one must be the end of all, on a crowded machine


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("multiprocess")
    r = random.Random(0)
    words = "array sum file read write socket tensor gradient parse date sort key value tree graph node edge map list set".split()

    def text(n):
        return " ".join(r.choices(words, k=n))

    records = {
        "texts": [{"text": text(12)} for _ in range(200)],
        "answers": [{"instruction": text(4), "input": "", "output": text(5)} for _ in range(80)],
        "pairs": [{"query": f"{text(4)} {i}", "pos": f"{text(6)} {i}"} for i in range(80)],
        "search": [{"query": f"{text(4)} {i}", "pos": [f"{text(6)} {i}"], "neg": [text(6) for _ in range(4)]} for i in range(80)],
    }
    for name, lines in records.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def conan(base, log, *arguments, out=None, **variables):
    """`conan ARGUMENTS` for the recipe, in the run folder `out` (default: the log's name); programs and data serve every run."""
    programs = {"JAX_COMPILATION_CACHE_DIR": str(base / "programs"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1", "CONAN_TEST_DATA": str(base)}
    here = ("--set", f"output_dir={base / (out or log)}", "--set", f"data_dir={base / 'data'}")
    return Command(base / f"{log}.log", "conan_jax", *arguments, RECIPE, *here, **programs, **variables)


def local(base, log, processes, *arguments, **options):
    return conan(base, log, "launch", "local", "--processes", processes, "--grace-seconds", 5, *arguments, **options)


@pytest.fixture(scope="module")
def single(base):
    """All four stages in one process with two devices: what the others are held against."""
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    command = conan(base, "single", "train", XLA_FLAGS=flags)
    assert command.wait() == 0, command.text[-3000:]
    assert "1 process on 1 host, 2 devices (cpu)" in command.text.splitlines()[0]
    return base / "single"


@pytest.fixture(scope="module")
def preempted(base, single):
    """The same in two processes with a device each; rank 1 alone gets SIGTERM in the middle of the last stage."""
    command = local(base, "pair", 2)
    stage = base / "pair" / "supervised"
    try:
        command.until(lambda: len(losses(stage)) >= 12, "step 12 of the last stage")
        children = command.children()
        os.kill(children[1], signal.SIGTERM)
        code = command.wait()
    finally:
        command.end()
    return command, code, children


def copy_of(base, preempted, name):
    """The preempted run under another name, so that each continuation begins where it stopped."""
    shutil.copytree(base / "pair", base / name)
    return base / name


def test_two_processes_compute_what_one_does(base, single, preempted):
    assert any("2 processes on 1 host, 2 devices (cpu)" in line for line in preempted[0].text.splitlines()[:6])
    for name in ORDER:
        one, two = losses(single / name), losses(base / "pair" / name)
        assert list(two) == list(range(1, len(two) + 1)) and len(two) >= min(STEPS[name], 12)
        np.testing.assert_allclose(list(two.values()), [one[step] for step in two], rtol=1e-5, err_msg=name)
    for name in ORDER[:-1]:
        one, two = (checkpoint.restore_params(folder / name) for folder in (single, base / "pair"))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, err_msg=name), one, two)


def test_a_signal_to_one_stops_all_at_the_same_step(base, preempted):
    command, code, children = preempted
    step = checkpoint.latest_step(base / "pair" / "supervised")
    assert code == 42 and gone(children)
    assert 12 <= step < STEPS["supervised"] and step == max(losses(base / "pair" / "supervised"))
    said = [line for line in command.text.splitlines() if f"stopped at step {step} of {STEPS['supervised']}" in line]
    assert sorted(line[:3] for line in said) == ["[0]", "[1]"]  # both, and at that step


def test_one_process_goes_on(base, single, preempted):
    copy_of(base, preempted, "one")
    command = conan(base, "resumed-on-one", "train", "--stage", "supervised", out="one")
    assert command.wait() == 0, command.text[-3000:]
    check_finished(base / "one", single)


def test_a_flipped_byte_is_refused_by_all_and_four_processes_go_on_from_the_step_before(base, single, preempted):
    stage = copy_of(base, preempted, "four") / "supervised"
    newest = checkpoint.latest_step(stage)
    largest = max((f for f in (stage / "checkpoints" / str(newest)).rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)

    command = local(base, "refused", 2, "--stage", "supervised", out="four")
    assert command.wait() == 78, command.text[-3000:]
    assert sum(largest.name in line for line in command.text.splitlines()) == 2  # each says which file
    assert checkpoint.latest_step(stage) == newest

    command = local(base, "fallback", 4, "--stage", "supervised", "--fallback", out="four")
    assert command.wait() == 0, command.text[-3000:]
    before = max(step for step in range(newest) if step % 5 == 0)
    assert f"at step {before}" in command.text and "4 processes on 1 host, 4 devices" in command.text
    check_finished(base / "four", single)


def check_finished(run, single):
    """Every step once; the same losses, so the same records in the same order: a step of other records is off in the second digit."""
    here, there = losses(run / "supervised"), losses(single / "supervised")
    assert list(here) == list(range(1, STEPS["supervised"] + 1))
    np.testing.assert_allclose(list(here.values()), list(there.values()), rtol=1e-4)
    assert (run / "report.html").exists() and not list(run.glob(".peers-*"))


def test_a_second_run_is_refused_and_one_death_is_the_end_of_all(base, single):
    first = local(base, "first", 2, *LONG)
    try:
        first.until(lambda: len(losses(base / "first" / "pretrain")) >= 3, "step 3")
        second = conan(base, "second", "train", *LONG, out="first")
        assert second.wait() == 78
        assert "first is in use by a training run (process" in second.text
        children = first.children()
        os.kill(children[1], signal.SIGKILL)
        began = time.monotonic()
        assert first.wait(SECONDS) == 42, first.text[-3000:]
        assert time.monotonic() - began < SECONDS and gone(children)
    finally:
        first.end()


def test_a_hung_process_is_told_with_stacks(base, single):
    command = local(base, "hung", 2, *LONG, "--set", "watchdog_seconds=20")  # long enough for a crowded machine to compile in
    try:
        command.until(lambda: len(losses(base / "hung" / "pretrain")) >= 3, "step 3")
        children = command.children()
        os.kill(children[1], signal.SIGSTOP)
        assert command.wait(SECONDS) == 42
        lines = command.text.splitlines()
        said = next(i for i, line in enumerate(lines) if "process 0 hangs: nothing for" in line)
        assert "since step" in lines[said] and any("in train_stage" in line for line in lines[said:])
        assert "launch: process 0 ended with 42" in command.text
        assert gone(children) and not any(map(state, children))
    finally:
        command.end()
