"""A launch as a folder: the manifest that a scheduler reads, and launch.json, from which it was made."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from conan_jax.errors import ConfigError
from conan_jax.files import read_json, write_file
from conan_jax.launch import spec as specs
from conan_jax.launch.jobset import jobset
from conan_jax.launch.rehearsal import local_script
from conan_jax.launch.slurm import batch_script
from conan_jax.launch.spec import LaunchSpec
from conan_jax.launch.tpu_vm import create_command, startup_script

SPEC_FILE = "launch.json"
MANIFESTS = {"gke-jobset": "jobset.yaml", "slurm": "job.sbatch", "tpu-vm": "startup.sh", "local": "local.sh"}
_SCRIPTS = {"slurm": batch_script, "tpu-vm": startup_script, "local": local_script}


def render(spec: LaunchSpec) -> dict[str, str]:
    """File name -> content, launch.json among them."""
    if spec.target == "gke-jobset":
        manifest = yaml.safe_dump(jobset(spec), sort_keys=False, width=140, allow_unicode=True)
    else:
        manifest = _SCRIPTS[spec.target](spec)
    return {
        MANIFESTS[spec.target]: manifest,
        SPEC_FILE: json.dumps(specs.to_dict(spec), indent=2, ensure_ascii=False) + "\n",
    }


def write(spec: LaunchSpec, folder: Path) -> list[Path]:
    """Render into `folder`. Raises `ConfigError` when it holds the launch of another target, or cannot be written."""
    other = folder / SPEC_FILE
    if other.exists() and read(folder).target != spec.target:
        raise ConfigError(f"{folder} holds a launch on {read(folder).target}; render this one into a folder of its own (--out)")
    files = []
    for name, content in render(spec).items():
        try:
            write_file(folder / name, content)
        except OSError as error:
            raise ConfigError(f"{folder / name} cannot be written: {error.strerror}; give --out a folder that can") from error
        files.append(folder / name)
    return files


def read(folder: Path) -> LaunchSpec:
    """The launch of a rendered folder. Raises `ConfigError` when there is none, or its launch.json is not one."""
    data = read_json(folder / SPEC_FILE)
    if data is None:
        raise ConfigError(f"{folder} holds no {SPEC_FILE}: render a launch into it first (conan launch render CONFIG ... --out {folder})")
    return specs.from_dict(data)


def manifest_file(spec: LaunchSpec, folder: Path) -> Path:
    """The manifest of a rendered folder. Raises `ConfigError` when it is missing."""
    file = folder / MANIFESTS[spec.target]
    if not file.is_file():
        raise ConfigError(f"{file} is missing; render the launch again")
    return file


def submit_command(spec: LaunchSpec, folder: Path) -> list[str]:
    """The one command that submits the folder, as a list of arguments: no shell reads it."""
    file = str(manifest_file(spec, folder).absolute())
    if spec.target == "gke-jobset":
        return ["kubectl", "apply", "--filename", file]
    if spec.target == "slurm":
        return ["sbatch", file]
    if spec.target == "tpu-vm":
        return create_command(spec, file)
    return ["bash", file]
