"""`kill -9` at any moment, then the same command again: the end is bit-identical in every stage, the hard-negative state included."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from conan_jax.train import checkpoint

ROOT = Path(__file__).parents[2]
ORDER = ("pretrain", "sft", "weak", "supervised")
STEPS = 10
# Where each start of the command is killed: a stage, and either some way into it or while a checkpoint is being written.
KILLS = (("pretrain", "step"), ("sft", "save"), ("weak", "step"), ("supervised", "save"), ("supervised", "step"))
PATIENCE = 240.0  # seconds until a moment must have come, on a crowded machine


def launch(folder, programs):
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    with (folder.parent / f"{folder.name}.log").open("ab") as log:
        command = [sys.executable, "-m", "tests.train.kill_harness", str(folder), str(programs)]
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment)


def steps_logged(stage_folder):
    file = stage_folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def being_saved(stage_folder):
    checkpoints = stage_folder / "checkpoints"
    return checkpoints.exists() and any(not p.name.isdigit() for p in checkpoints.iterdir() if p.is_dir())


def wait_for_the_moment(process, stage_folder, moment, at_step):
    """Returns when the process should die; a save is caught as its temporary folder stands, from `at_step` on."""
    deadline = time.perf_counter() + PATIENCE
    while time.perf_counter() < deadline:
        assert process.poll() is None, "the command ended before it could be killed"
        if steps_logged(stage_folder) >= at_step and (moment == "step" or being_saved(stage_folder)):
            return
        time.sleep(0.004)
    raise AssertionError(f"no {moment} of {stage_folder.name} came")


def arrays(stage_folder, step=STEPS):
    """{name: bytes} of everything in a checkpoint, read by orbax alone."""
    trees = {item: ocp.StandardCheckpointer().restore(stage_folder / "checkpoints" / str(step) / item) for item in ("params", "train")}
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(trees)[0]}


def records(stage_folder):
    timings = {"seconds", "steps_per_second", "tokens_per_second", "data_wait"}
    lines = [json.loads(line) for line in (stage_folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in timings} for line in lines]


@pytest.fixture(scope="module")
def both_runs(tmp_path_factory):
    base = tmp_path_factory.mktemp("kill")
    calm = launch(base / "calm", base / "programs")
    assert calm.wait(2 * PATIENCE) == 0, (base / "calm.log").read_text()[-3000:]

    moments = random.Random()
    deaths = []
    for kind, moment in KILLS:
        process, stage_folder = launch(base / "killed", base / "programs"), base / "killed" / kind
        try:
            # One step more than what the start before it had left behind: each start gets somewhere.
            wait_for_the_moment(process, stage_folder, moment, at_step=1 if moment == "save" else min(steps_logged(stage_folder) + 1, 9))
            time.sleep(moments.uniform(0, 0.1) if moment == "step" else moments.uniform(0, 0.01))
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        deaths.append((kind, moment, steps_logged(stage_folder), checkpoint.latest_step(stage_folder)))
    last = launch(base / "killed", base / "programs")
    assert last.wait(2 * PATIENCE) == 0, (base / "killed.log").read_text()[-3000:]
    return base, deaths


@pytest.mark.parametrize("kind", ORDER)
def test_the_end_is_bit_identical(both_runs, kind):
    base, deaths = both_runs
    calm, killed = arrays(base / "calm" / kind), arrays(base / "killed" / kind)
    assert calm.keys() == killed.keys()
    different = [name for name in calm if calm[name].tobytes() != killed[name].tobytes()]
    assert different == [], f"after the kills {deaths}"


@pytest.mark.parametrize("kind", ORDER)
def test_every_step_is_recorded_once_with_the_same_numbers(both_runs, kind):
    base, deaths = both_runs
    assert records(base / "killed" / kind) == records(base / "calm" / kind), f"after the kills {deaths}"
    assert [line["step"] for line in records(base / "killed" / kind)] == list(range(1, STEPS + 1))


def test_each_stage_compiled_once(both_runs):
    assert "compilations [1, 1, 1, 1]" in (both_runs[0] / "calm.log").read_text()


def test_the_hard_negatives_did_move(both_runs):
    """Otherwise the stage's carried state would return unharmed from anything."""
    state = arrays(both_runs[0] / "calm" / "supervised")
    moved = {name: array for name, array in state.items() if "cursor" in name or "replaced_low" in name}
    assert len(moved) == 2 and all((array > array.min()).any() or array.sum() > 0 for array in moved.values())
    first = arrays(both_runs[0] / "calm" / "supervised", step=9)
    assert any(first[name].tobytes() != state[name].tobytes() for name in state if "carry" in name)
