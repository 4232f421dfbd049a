"""Batch, start-up and local scripts against shellcheck, and against what a run of conan needs of them."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from conan_jax.errors import EXIT_BAD_INPUT, ConfigError
from conan_jax.launch.findings import Finding
from conan_jax.launch.slurm import directives
from conan_jax.launch.spec import LaunchSpec
from conan_jax.versions import install_command

_SIZES = ("nodes", "ntasks", "ntasks-per-node", "gpus-per-node", "job-name")


def check_script(spec: LaunchSpec, text: str, file: Path) -> Iterator[Finding]:
    """What is wrong with the script."""
    yield from _check_shell(file)
    if spec.target == "slurm":
        yield from _check_directives(spec, text)
    if spec.target in ("slurm", "tpu-vm"):
        yield from _check_restarts(spec, text)
    yield from _check_signal(spec, text)


def sbatch_options(text: str) -> dict[str, str]:
    """The `#SBATCH` lines of a script. SLURM stops reading them at the first command."""
    options = {}
    for line in text.splitlines()[1:]:
        if not line.startswith("#"):
            break
        found = re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(.*))?", line)
        if found:
            options[found[1]] = found[2] or ""
    return options


def command_of(text: str) -> list[str]:
    """The arguments of the script's command, as bash reads them. Raises `ConfigError` when there is none."""
    found = re.search(r"^command=\(\n(.*?)^\)$", text, re.MULTILINE | re.DOTALL) or re.search(r"^exec (.*\n)", text, re.MULTILINE)
    if found is None:
        raise ConfigError("the script holds no command")
    return shlex.split(found[1])


def _check_shell(file: Path) -> Iterator[Finding]:
    shellcheck = shutil.which("shellcheck", path=os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)]))
    if shellcheck is None:
        yield Finding("shell", f"{file.name} was not held to shellcheck: it is not installed ({install_command(extra='launch')})",
                      serious=False)
        return
    found = subprocess.run([shellcheck, "--shell=bash", "--format=gcc", str(file)], capture_output=True, text=True, check=False)
    for line in found.stdout.splitlines():
        yield Finding("shell", line.replace(f"{file}:", f"{file.name}:"))
    if found.returncode not in (0, 1):
        yield Finding("shell", f"shellcheck failed: {found.stderr.strip()}")


def _check_directives(spec: LaunchSpec, text: str) -> Iterator[Finding]:
    options, wanted = sbatch_options(text), directives(spec)
    for name in _SIZES:
        if options.get(name) != wanted.get(name):
            yield Finding("devices", f"#SBATCH --{name} is {options.get(name) or 'missing'}, and {spec.slices} x {spec.hardware.name} "
                                     f"wants {wanted.get(name) or 'none'}")
    if not re.fullmatch(r"TERM@\d+", options.get("signal", "")):
        yield Finding("signal", f"#SBATCH --signal is {options.get('signal') or 'missing'}: it must be TERM@SECONDS, the time to save")
    seen = re.findall(r"^#SBATCH --([a-z-]+)", text, re.MULTILINE)
    for name in sorted({name for name in seen if seen.count(name) > 1}):
        yield Finding("devices", f"#SBATCH --{name} stands there more than once, and SLURM takes the last; keep one")
    if spec.hardware.chip.platform == "gpu" and not {"cpus-per-task", "exclusive"} & options.keys():
        yield Finding("devices", "no --sbatch cpus-per-task=N: most sites then give a task one core, which feeds no GPU", serious=False)
    if "requeue" not in options:
        yield Finding("restarts", "#SBATCH --requeue is missing: a preempted job would not come back")


def _check_restarts(spec: LaunchSpec, text: str) -> Iterator[Finding]:
    arm = {"slurm": rf"^\s*([\d| ]*\|\s*)?{EXIT_BAD_INPUT}(\s*\|[\d| ]*)?\)", "tpu-vm": rf'"\$code" -eq {EXIT_BAD_INPUT} \].*; then break'}
    if not re.search(arm[spec.target], text, re.MULTILINE):
        yield Finding("restarts", f"exit code {EXIT_BAD_INPUT} is not told from others: a wrong configuration would start again and again")
    if spec.target == "slurm" and "scontrol requeue" not in text:
        yield Finding("restarts", "nothing requeues the job: a run that saved and left with 42 would not come back")


def _check_signal(spec: LaunchSpec, text: str) -> Iterator[Finding]:
    """SIGTERM must reach Python: no shell between it and who sends the signal."""
    try:
        command = command_of(text)
    except ConfigError as error:
        yield Finding("signal", str(error))
        return
    if spec.target == "slurm":
        if command[:1] != ["srun"]:
            yield Finding("signal", "the tasks must be started by srun, which hands signals on")
            return
        command = command[1:]
        while command and command[0].startswith("--"):
            command = command[1:]
    verb = ["launch", "local"] if spec.target == "local" else ["train"]
    if command[1:3] != ["-m", "conan_jax"] or command[3:3 + len(verb)] != verb:
        program = PurePosixPath(command[0]).name if command else "nothing"
        yield Finding("signal", f"the script starts {program}: SIGTERM would not reach Python; "
                                f"it must start python -m conan_jax {' '.join(verb)}")
