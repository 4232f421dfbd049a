"""`conan launch render | check | submit` as a person meets them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conan_jax.launch import read

ROOT = Path(__file__).parent.parent.parent
CONFIG = str(ROOT / "configs" / "demo.py") + ":tiny"


def conan(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """`conan launch ARGUMENTS`, run in `folder`."""
    return subprocess.run([sys.executable, "-m", "conan_jax", "launch", *arguments], cwd=folder, capture_output=True, text=True,
                          timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT), **environment})


def test_a_launch_is_rendered_checked_and_submitted(tmp_path):
    done = conan("render", CONFIG, "--target", "slurm", "--accelerator", "h100-8", "--out", "job", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["job/job.sbatch", "job/launch.json"]
    assert read(tmp_path / "job").name == "demo-tiny"
    done = conan("check", "job", "--json", folder=tmp_path)
    assert (done.returncode, json.loads(done.stdout)["ok"]) == (0, True), done.stdout + done.stderr

    programs = tmp_path / "programs"
    programs.mkdir()
    stub = programs / "sbatch"
    stub.write_text('#!/bin/sh\nprintf \'%s\\n\' "$@" > submitted\nexit 3\n')
    stub.chmod(0o755)
    path = f"{programs}:{os.environ['PATH']}"
    done = conan("submit", "job", "--dry-run", folder=tmp_path, PATH=path)
    assert (done.returncode, done.stdout) == (0, f"sbatch {tmp_path}/job/job.sbatch\n")
    assert not (tmp_path / "submitted").exists()
    done = conan("submit", "job", folder=tmp_path, PATH=path)
    assert done.returncode == 3, "the exit code is that of the one command"
    assert (tmp_path / "submitted").read_text() == f"{tmp_path}/job/job.sbatch\n"


def test_what_fails_its_check_is_not_submitted(tmp_path):
    conan("render", CONFIG, "--target", "slurm", "--accelerator", "h100-8", "--out", "job", "--set", "mesh.fsdp=3", folder=tmp_path)
    done = conan("check", "job", folder=tmp_path)
    assert done.returncode == 78 and "wrong  mesh:" in done.stdout
    done = conan("submit", "job", "--dry-run", folder=tmp_path)
    assert done.returncode == 78 and "mesh" in done.stderr and "sbatch" not in done.stdout


@pytest.mark.parametrize("arguments, words", [
    (["--target", "nomad", "--accelerator", "v5e-256"], "gke-jobset, slurm, tpu-vm, local"),
    (["--target", "gke-jobset", "--accelerator", "v5e-256"], "image"),
    (["--target", "slurm", "--accelerator", "v5e-257"], "v5e-256"),
    (["--target", "slurm", "--accelerator", "h100-8", "--image", "a/b"], "slurm does not read it"),
    (["--target", "local", "--accelerator", "h100-8", "--grace", "9"], "local does not read it"),
    (["--target", "slurm", "--accelerator", "h100-8", "--name", "x; rm -rf ~"], "RFC 1035"),
    (["--target", "slurm", "--accelerator", "h100-8", "--queue", "gpu\n#SBATCH --uid=0"], "control character"),
    (["--target", "gke-jobset", "--accelerator", "v5e-256", "--image", "a/b", "--output-claim", "c", "--env", "A"], "secret"),
    (["--target", "slurm", "--accelerator", "h100-8", "--slices", "2"], "no TPU slice"),
    (["--target", "slurm", "--accelerator", "h100-8", "--max-restarts", "-1"], "max_restarts"),
    (["--target", "slurm", "--accelerator", "h100-8", "--stage", "wek"], "wek"),
    (["--target", "slurm", "--accelerator", "h100-8", "--grace", "300", "--time-limit", "4"], "time_limit_minutes"),
    (["--target", "slurm", "--accelerator", "h100-8", "--name", ""], "name"),
    (["--target", "tpu-vm", "--accelerator", "v5e-8", "--project", "my-project", "--zone", "us-a", "--env", "A"], "tpu-vm does not read it"),
])
def test_what_cannot_be_rendered_is_refused_in_one_line(tmp_path, arguments, words):
    done = conan("render", CONFIG, *arguments, "--out", "job", folder=tmp_path)
    assert done.returncode == 78, done.stdout
    assert words in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "job").exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "job").write_text("a file")
    done = conan("render", CONFIG, "--target", "slurm", "--accelerator", "h100-8", "--out", "job", folder=tmp_path)
    assert done.returncode == 78 and "job" in done.stderr and "Traceback" not in done.stderr


def test_a_folder_is_not_taken_for_another_target(tmp_path):
    conan("render", CONFIG, "--target", "slurm", "--accelerator", "h100-8", "--out", "job", folder=tmp_path)
    done = conan("render", CONFIG, "--target", "local", "--accelerator", "cpu-2", "--out", "job", folder=tmp_path)
    assert done.returncode == 78 and "launch on slurm" in done.stderr


def test_jax_is_not_imported_to_render_or_check(tmp_path):
    program = ("import sys; from pathlib import Path; from conan_jax.launch import LaunchSpec, write, check; "
               f"write(LaunchSpec('slurm', 'a', {CONFIG!r}, 'h100-8'), Path('job')); print(check(Path('job'))); "
               "assert 'jax' not in sys.modules and 'numpy' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60)
    assert done.returncode == 0, done.stderr
