"""No value reaches a shell as anything but itself: scripts are run for real, with a harmless program in the place of the command."""

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from conan_jax.errors import ConfigError
from conan_jax.launch import LaunchSpec, render, submit_command
from conan_jax.launch.command import train_command

NASTY = ["x; rm -rf ~", "; touch pwned", "$(touch pwned)", "`touch pwned`", "' ; touch pwned ; '", '" ; touch pwned ; "',
         "&& touch pwned #", "| touch pwned", "> pwned",
         "$HOME", "${IFS}", "*", "~", "--help", "-", "a\nb", "a\rb", "a\x00b", "\x1b[31m", "$$",
         "$(HOME)", "!x", "\\", "é ü", "#SBATCH --uid=0", "{a,b}", "<(touch pwned)"]
# What a launch takes as it is: printable, not empty, not an option. Nothing of it is refused, so no example is lost.
_PIECES = st.lists(st.sampled_from(NASTY), min_size=2, max_size=3).map("".join)
TEXT = st.one_of(st.sampled_from(NASTY), st.text(max_size=12), _PIECES).filter(
    lambda text: text.isprintable() and not text.startswith("-") and text.strip(".") and text not in ("/", " "))
STUB = '#!/bin/sh\nfor a in "$0" "$@"; do printf \'%s\\0\' "$a"; done > "$ARGUMENTS"\n'
FIELDS = ("name", "config", "stage", "python", "working_dir", "image", "namespace", "output_claim", "output_mount", "queue", "account",
          "service_account", "project", "zone", "secret", "accelerator", "target")
NEEDED = {"gke-jobset": dict(image="a/b:1", output_claim="claim"), "tpu-vm": dict(project="my-project", zone="us-east5-b"), "slurm": {},
          "local": {}}
ACCELERATOR = {"gke-jobset": "v5e-16", "slurm": "h100-16", "tpu-vm": "v5e-16", "local": "v5e-16"}
needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed here, and these tests run scripts with it")


def spec_of(target: str, /, **fields) -> LaunchSpec:
    """A launch of `target`, with what it needs."""
    return LaunchSpec(**{**dict(target=target, name="job", config="c.py", accelerator=ACCELERATOR[target]), **NEEDED[target], **fields})


def run_script(script: str, folder, first: Path | None = None) -> list[str] | None:
    """What the script's program was given, itself first; None when it was not started."""
    folder.mkdir(exist_ok=True)
    for path in (folder / "srun", *([first] if first else ())):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(STUB)
        path.chmod(0o755)
    file, arguments = folder / "script", folder / "arguments"
    arguments.unlink(missing_ok=True)
    file.write_text(script.replace("/var/lock/", f"{folder}/lock-"))
    assert subprocess.run(["bash", "-n", str(file)], capture_output=True).returncode == 0
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "ARGUMENTS": str(arguments), "HOME": str(folder)}
    done = subprocess.run(["bash", str(file)], cwd=folder, env=environment, capture_output=True, timeout=30)
    assert not list(folder.rglob("pwned")), script
    if not arguments.exists():
        return None
    assert done.returncode == 0, done.stderr
    return arguments.read_bytes().decode().split("\0")[:-1]


def kubernetes_reads(argument: str, variables: dict[str, str]) -> str:
    """A command's argument as the kubelet reads it: $(NAME) of a known variable is its value, $$ is $."""
    return re.sub(r"\$\$|\$\(([^)]*)\)", lambda m: "$" if m[0] == "$$" else variables.get(m[1], m[0]), argument)


@needs_bash
@pytest.mark.parametrize("target", ["slurm", "tpu-vm", "local"])
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(config=TEXT, value=TEXT, python=TEXT, folder=TEXT)
@example(config="x; rm -rf ~", value="x; rm -rf ~", python="x; rm -rf ~", folder="x; rm -rf ~")
@example(config="$(touch pwned)", value="'; touch pwned; '", python="p", folder="`touch pwned`")
def test_scripts_hand_every_value_on_as_it_is(target, config, value, python, folder, tmp_path):
    root = tmp_path / "run"
    shutil.rmtree(root, ignore_errors=True)
    place, program = root / "at" / folder.replace("/", "_"), root / "bin" / python.replace("/", "_")
    override = f"name={value}"
    spec = spec_of(target, config=config, overrides=(override,), python=str(program), working_dir=str(place))
    place.mkdir(parents=True, exist_ok=True)
    got = run_script(render(spec)[{"slurm": "job.sbatch", "tpu-vm": "startup.sh", "local": "local.sh"}[target]], root, first=program)
    tail = [config, "--set", override]
    if target == "slurm":
        assert got[1:4] == ["--kill-on-bad-exit=0", "--wait=300", str(program)] and got[4:] == ["-m", "conan_jax", "train", *tail]
    elif target == "tpu-vm":
        assert got == [str(program), "-m", "conan_jax", "train", *tail]
    else:
        assert got == [str(program), "-m", "conan_jax", "launch", "local", "--processes", "4", "--devices-per-process", "4", *tail]


@settings(max_examples=100, deadline=None)
@given(config=TEXT, value=TEXT, python=TEXT, working_dir=TEXT)
@example(config="$(HOME)", value="$$(HOME) $HOME", python="$(HOME)", working_dir="x")
def test_manifests_hand_every_value_on_as_it_is(config, value, python, working_dir):
    working_dir, override = working_dir.replace(":", "_").replace("..", "_"), f"name={value}"
    spec = spec_of("gke-jobset", config=config, overrides=(override,), python=python, working_dir=f"/{working_dir}")
    manifest = yaml.safe_load(render(spec)["jobset.yaml"])
    [container] = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    read = [kubernetes_reads(argument, {"HOME": "replaced", "touch pwned": "replaced"}) for argument in container["command"]]
    assert read == train_command(spec)
    assert override in read and config in read
    assert container["workingDir"] == f"/{working_dir}"


@pytest.mark.parametrize("target", NEEDED)
@pytest.mark.parametrize("field", FIELDS)
def test_a_nasty_value_in_any_field_is_refused_or_quoted(target, field, tmp_path):
    for value in NASTY:
        try:
            spec = spec_of(target, **{field: value})
        except ConfigError as error:
            assert str(error).isprintable(), "an error must not carry control characters to a terminal"
            continue
        assert field in ("config", "python"), f"{field} took {value!r}"
        name, manifest = next(item for item in render(spec).items() if item[0] != "launch.json")
        assert not any(line.startswith("#SBATCH") and value in line for line in manifest.splitlines())
        (tmp_path / name).write_text(manifest)
        assert all(isinstance(argument, str) for argument in submit_command(spec, tmp_path))


@pytest.mark.parametrize("value", ["a\nb", "a\rb", "a\x00b", "\x1b[31m", "\u202e", "", "a\u2028b"])
@pytest.mark.parametrize("field", ["config", "python", "stage", "working_dir", "image", "queue", "name"])
def test_what_a_terminal_or_a_line_would_stumble_over_is_refused(field, value):
    with pytest.raises(ConfigError, match="printable"):
        spec_of("gke-jobset", **{field: value})
    with pytest.raises(ConfigError, match="printable"):
        spec_of("gke-jobset", overrides=(f"name=x{value}", value))


@pytest.mark.parametrize("value", [*NASTY, "=x", "A=B", "lower", "1A", "A B", "CONAN_PROCESS_ID", "JAX_PLATFORMS"])
def test_names_of_variables_are_names(value):
    with pytest.raises(ConfigError, match="environment"):
        spec_of("slurm", environment=(value,))


@pytest.mark.parametrize("field, target", [("sbatch", "slurm"), ("node_selector", "gke-jobset"), ("tolerations", "gke-jobset")])
@pytest.mark.parametrize("value", [v for v in NASTY if v != "-"])
def test_what_a_site_adds_is_plain(field, target, value):
    harmless = field == "sbatch" and value in ("*", "--help")  # SLURM reads globs and lists there, and a comment line no option twice
    for item in (value, f"a.b/c={value}", *(() if harmless else (f"qos={value}",))):
        with pytest.raises(ConfigError, match=field):
            spec_of(target, **{field: (item,)})


def test_what_a_site_adds_reaches_the_manifest():
    script = render(spec_of("slurm", sbatch=("cpus-per-task=12", "constraint=h100|a100", "exclusive")))["job.sbatch"]
    assert {"#SBATCH --cpus-per-task=12", "#SBATCH --constraint=h100|a100", "#SBATCH --exclusive"} <= set(script.splitlines())
    spec = spec_of("gke-jobset", node_selector=("cloud.google.com/gke-spot=true",), cpu="96", memory="160Gi",
                   tolerations=("cloud.google.com/gke-spot=true", "dedicated"))
    pod = yaml.safe_load(render(spec)["jobset.yaml"])["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true" and "cloud.google.com/gke-tpu-topology" in pod["nodeSelector"]
    assert pod["tolerations"] == [{"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true"},
                                  {"key": "dedicated", "operator": "Exists"}]
    assert pod["containers"][0]["resources"] == {"requests": {"cpu": "96", "memory": "160Gi", "google.com/tpu": 4},
                                                 "limits": {"google.com/tpu": 4}}
    for wrong in (dict(sbatch=("requeue",)), dict(sbatch=("qos=a", "qos=b")), dict(sbatch=("wrap=x",))):
        with pytest.raises(ConfigError, match="sbatch"):
            spec_of("slurm", **wrong)
    with pytest.raises(ConfigError, match="slices"):
        spec_of("slurm", accelerator="v5e-256", slices=2)


@needs_bash
def test_a_variable_that_is_not_set_ends_the_job_as_wrong(tmp_path):
    script = render(spec_of("slurm", environment=("CONAN_DATA",)))["job.sbatch"]
    done = subprocess.run(["bash"], input=script, text=True, capture_output=True, env={"PATH": os.environ["PATH"]}, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (78, "job: CONAN_DATA is not set\n")


@needs_bash
@pytest.mark.parametrize("codes, starts, end", [([42, 0], 2, 0), ([78], 1, 78), ([1, 137, 0], 3, 0), ([9, 9, 9, 9], 3, 9), ([0], 1, 0)])
def test_the_loop_of_a_tpu_vm_restarts_all_but_done_and_refused(tmp_path, codes, starts, end):
    program = tmp_path / "python"
    program.write_text(f'#!/bin/bash\ncodes=({" ".join(map(str, codes))})\nn=$(cat "{tmp_path}/n" 2>/dev/null || echo 0)\n'
                       f'echo $((n + 1)) > "{tmp_path}/n"\nexit "${{codes[$n]}}"\n')
    program.chmod(0o755)
    script = render(spec_of("tpu-vm", python=str(program), max_restarts=2))["startup.sh"]
    script = script.replace("/var/lock/", f"{tmp_path}/lock-").replace("sleep 10", "true")
    assert subprocess.run(["bash", "-c", script], capture_output=True, timeout=30).returncode == end
    assert int((tmp_path / "n").read_text()) == starts


@needs_bash
def test_sigterm_reaches_the_program_of_a_tpu_vm_and_nothing_starts_after_it(tmp_path):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/bash\ntrap 'sleep 0.3; echo saved >> \"{tmp_path}/log\"; exit 42' TERM\n"
                       f"echo started >> \"{tmp_path}/log\"\nwhile true; do sleep 0.05; done\n")
    program.chmod(0o755)
    script = render(spec_of("tpu-vm", python=str(program)))["startup.sh"].replace("/var/lock/", f"{tmp_path}/lock-")
    (tmp_path / "script").write_text(script)
    running = subprocess.Popen(["bash", str(tmp_path / "script")])
    second, began = None, time.monotonic()
    try:
        deadline = time.monotonic() + 10
        while not (tmp_path / "log").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        second = subprocess.run(["bash", str(tmp_path / "script")], timeout=10)  # another copy ends at once
        running.terminate()
        assert running.wait(timeout=20) == 42
    finally:
        running.kill()
    assert second.returncode == 0
    assert time.monotonic() - began < 8, "it waited before an attempt that was not to come"
    assert (tmp_path / "log").read_text() == "started\nsaved\n"


@needs_bash
def test_sigterm_between_two_attempts_starts_no_other(tmp_path):
    program = tmp_path / "python"
    program.write_text(f'#!/bin/bash\necho started >> "{tmp_path}/log"\nexit 42\n')
    program.chmod(0o755)
    script = render(spec_of("tpu-vm", python=str(program)))["startup.sh"].replace("/var/lock/", f"{tmp_path}/lock-")
    running = subprocess.Popen(["bash", "-c", script.replace("sleep 10", f'touch "{tmp_path}/asleep"; sleep 1')], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 10
        while not (tmp_path / "asleep").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        running.terminate()
        assert running.wait(timeout=20) == 42
    finally:
        running.kill()
    assert (tmp_path / "log").read_text() == "started\n"
