"""Rendered jobs on a real SLURM: started by srun, preempted, requeued, completed; and refused input left alone.

The cluster is one node on loopback (see `cluster`). Where SLURM is not installed these tests say so and do not run; `.ci/run`
installs it.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, cluster, missing

ROOT = Path(__file__).parent.parent.parent
STEPS = 250
pytestmark = pytest.mark.skipif(
    bool(missing()), reason=f"SLURM is not installed here ({', '.join(missing())} missing; on Debian: slurmctld slurmd slurm-client munge)")

# Stands where Python would: leaves with 42 on SIGTERM, with 0 when it is started again.
STUB = """#!/usr/bin/env bash
if [ -e "$CONAN_TEXT.saved" ]; then echo "again: $SLURM_PROCID"; exit 0; fi
trap 'sleep 2; touch "$CONAN_TEXT.saved"; exit 42' TERM
touch "$CONAN_TEXT.started-$SLURM_PROCID"
while true; do sleep 0.1; done
"""


@pytest.fixture(scope="module")
def slurm():
    with cluster() as running:
        yield running


def conan(slurm: Cluster, *arguments: str, folder: Path) -> str:
    """The output of `conan ARGUMENTS` in `folder`, with the cluster at hand."""
    environment = {**slurm.environment, "PYTHONPATH": str(ROOT), "CONAN_TEXT": str(folder / "text.txt")}
    done = subprocess.run([sys.executable, "-m", "conan_jax", *arguments], cwd=folder, env=environment, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def submit(slurm: Cluster, folder: Path, *more: str, python: str = sys.executable) -> str:
    """Render the recipe as two tasks of a CPU device each, check it and submit it; the job's number."""
    conan(slurm, "launch", "render", str(ROOT / "tests" / "slurm" / "recipe.py"), "--target", "slurm", "--accelerator", "cpu-2",
          "--chips-per-host", "1", "--grace", "60", "--python", python, "--working-dir", str(folder), "--env", "CONAN_TEXT",
          "--out", str(folder / "job"), "--set", f"pretrain.steps={STEPS}", *more, folder=folder)
    conan(slurm, "launch", "check", str(folder / "job"), folder=folder)
    return re.search(r"Submitted batch job (\d+)", conan(slurm, "launch", "submit", str(folder / "job"), folder=folder))[1]


def wait(slurm: Cluster, number: str, done, seconds: float, folder: Path) -> dict[str, str]:
    """What SLURM knows of the job once `done` says so of it."""
    deadline = time.monotonic() + seconds
    while not done(job := slurm.job(number)):
        output = "".join(f.read_text(errors="replace")[-4000:] for f in folder.glob("*.out"))
        assert time.monotonic() < deadline, f"job {number} after {seconds:.0f} s: {job}\n{output}{slurm.logs()}"
        assert job["JobState"] not in ("FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT"), f"{job}\n{output}"
        time.sleep(0.2)
    return job


def losses(folder: Path) -> dict[int, float]:
    """Step -> loss, as far as the run has come."""
    file = folder / "runs" / "slurm" / "pretrain" / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return {row["step"]: row["loss"] for row in map(json.loads, filter(lambda line: line.endswith("}"), lines)) if "loss" in row}


def test_a_preempted_job_saves_is_requeued_and_completes(slurm, tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"the {n}th fox jumps over {n + 3} lazy dogs and {n % 7} hens\n" for n in range(800)))
    number = submit(slurm, tmp_path)
    wait(slurm, number, lambda job: max(losses(tmp_path), default=0) >= 10, 300, tmp_path)
    slurm.run("scancel", "--signal=TERM", number)
    wait(slurm, number, lambda job: job["Restarts"] == "1", 90, tmp_path)
    assert max(losses(tmp_path)) < STEPS, "the job came to its end before it was preempted"
    job = wait(slurm, number, lambda job: job["JobState"] == "COMPLETED", 300, tmp_path)
    assert (job["ExitCode"], job["Restarts"]) == ("0:0", "1")
    output = (tmp_path / f"slurm-{number}.out").read_text()
    assert "exit code 42: requeued" in output
    assert output.count("2 processes on 1 host, 2 devices (cpu)") == 2, "the tasks did not find each other"
    resumed = [int(n.replace(",", "")) for n in re.findall(r"start: .*?step ([\d,]+)", output)]
    assert len(resumed) == 1 and 10 <= resumed[0] < STEPS, output
    assert max(losses(tmp_path)) == STEPS
    assert all(loss > 0 for loss in losses(tmp_path).values())


def test_refused_input_is_not_started_again(slurm, tmp_path):
    number = submit(slurm, tmp_path)  # text.txt is missing
    deadline = time.monotonic() + 120
    while (job := slurm.job(number))["JobState"] not in ("FAILED", "COMPLETED"):
        assert time.monotonic() < deadline, job
        time.sleep(0.2)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "78:0", "0")
    assert "not requeued" in (tmp_path / f"slurm-{number}.out").read_text()


def test_a_job_that_slurm_preempts_saves_gives_way_and_comes_back(slurm, tmp_path):
    stub = tmp_path / "a stub; 'of' $python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    number = submit(slurm, tmp_path, python=str(stub))
    wait(slurm, number, lambda job: all((tmp_path / f"text.txt.started-{i}").exists() for i in range(2)), 60, tmp_path)
    urgent = slurm.run("sbatch", "--parsable", "--partition=urgent", "--ntasks=2", "--wrap=true", cwd=tmp_path).strip()
    job = wait(slurm, number, lambda job: job["JobState"] == "COMPLETED", 90, tmp_path)
    assert slurm.job(urgent)["JobState"] == "COMPLETED"
    assert (job["ExitCode"], job["Restarts"]) == ("0:0", "1")
    output = (tmp_path / f"slurm-{number}.out").read_text()
    assert "exit code 42: requeued" in output and output.count("again: ") == 2


def test_restarts_come_to_an_end(slurm, tmp_path):
    stub = tmp_path / "stub"
    stub.write_text("#!/bin/sh\nexit 9\n")
    stub.chmod(0o755)
    number = submit(slurm, tmp_path, "--max-restarts", "1", python=str(stub))
    deadline = time.monotonic() + 90
    while (job := slurm.job(number))["JobState"] != "FAILED":
        assert time.monotonic() < deadline, job
        time.sleep(0.2)
    assert (job["ExitCode"], job["Restarts"]) == ("9:0", "1")


def test_no_job_outlives_its_cluster(tmp_path):
    with cluster() as short:
        stubborn = f"trap : TERM; echo $$ >> {tmp_path}/pids; while :; do sleep 0.1; done"
        short.run("sbatch", "--ntasks=2", f"--wrap=srun sh -c '{stubborn}'", cwd=tmp_path)
        deadline = time.monotonic() + 60
        while not (tmp_path / "pids").exists() or len((tmp_path / "pids").read_text().split()) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    for pid in (tmp_path / "pids").read_text().split():
        assert not Path("/proc", pid).exists(), f"process {pid} is still there"


def test_where_slurm_is_missing_it_is_said_which_programs_are(monkeypatch):
    monkeypatch.setattr("tests.slurm.cluster.PATH", os.devnull)
    assert "slurmctld" in missing()
